//! Twelve updates by each algorithm beside those of its reference; see scripts/references/optimizers.py.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use calor_model::{ParameterGroup, ParameterVisitor};
use serde::Deserialize;

use super::*;

type Values = BTreeMap<String, Vec<f32>>;

const STEPS: u64 = 12;
/// The steps, from 0, after which the references are stored.
const STORED: [u64; 4] = [0, 1, 5, 11];
const LARGE: usize = 5000;

#[derive(Deserialize)]
struct Fixture {
    sgd: Vec<SgdCase>,
    muon: Vec<MuonCase>,
    schedule_free: Vec<ScheduleFreeCase>,
    ema: EmaCase,
    adamw_8bit: EightBitCase,
}

#[derive(Deserialize)]
struct SgdCase {
    lr: f64,
    momentum: f64,
    nesterov: bool,
    weight_decay: f64,
    parameters: Vec<Values>,
}

#[derive(Deserialize)]
struct MuonCase {
    scale: MuonScale,
    nesterov: bool,
    parameters: Vec<Values>,
    last_in_bf16: Values,
}

#[derive(Deserialize)]
struct ScheduleFreeCase {
    weight_decay: f64,
    factors: Vec<f64>,
    parameters: Vec<Values>,
    averages: Vec<Values>,
}

#[derive(Deserialize)]
struct EmaCase {
    decay: f64,
    averages: Vec<Values>,
}

#[derive(Deserialize)]
struct EightBitCase {
    parameters: Vec<Vec<f32>>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("../../tests/fixtures/optimizers.json")).unwrap()
}

/// Numbers from -0.5 to 0.5; with `spread`, each index a power of ten smaller, in turn.
pub(super) fn formula(seed: u64, count: usize, spread: u64) -> Vec<f32> {
    (0..count as u64)
        .map(|index| {
            let number = (index * index * 577 + index * 1103 + seed * 9973) % 2003;
            let scale = 10f64.powi(-((index % spread) as i32));
            ((number as f64 / 2003.0 - 0.5) * scale) as f32
        })
        .collect()
}

/// A low-rank pair and a head, or one large matrix with the spread of its gradients.
#[derive(Clone)]
enum Tensors {
    Small(Box<(Tensor<2>, Tensor<2>, Tensor<1>)>),
    Large(Box<Tensor<2>>, u64),
}

impl Parameters for Tensors {
    fn visit_parameters<V: ParameterVisitor>(&mut self, visitor: &mut V) {
        match self {
            Tensors::Small(tensors) => {
                let (a, b, head) = &mut **tensors;
                visitor.visit("layer.lora_A.weight", ParameterGroup::Adapter, a);
                visitor.visit("layer.lora_B.weight", ParameterGroup::Adapter, b);
                visitor.visit("head", ParameterGroup::Head, head);
            }
            Tensors::Large(matrix, _) => {
                visitor.visit(
                    "layer.lora_A.weight",
                    ParameterGroup::Adapter,
                    &mut **matrix,
                );
            }
        }
    }
}

fn device() -> Device {
    Device::flex().autodiff()
}

fn leaf<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), &device()).require_grad()
}

impl Tensors {
    fn small() -> Tensors {
        Tensors::Small(Box::new((
            leaf(formula(0, 15, 1), [3, 5]),
            leaf(formula(1, 18, 1), [6, 3]),
            leaf(formula(2, 4, 1), [4]),
        )))
    }

    fn large(spread: u64) -> Tensors {
        let matrix = leaf(formula(7, LARGE, 1), [10, LARGE / 10]);
        Tensors::Large(Box::new(matrix), spread)
    }

    fn gradients(&self, step: u64) -> AccumulatedGradients {
        let values = match self {
            Tensors::Small(..) => [
                ("layer.lora_A.weight", 15),
                ("layer.lora_B.weight", 18),
                ("head", 4),
            ]
            .iter()
            .enumerate()
            .map(|(number, (name, count))| {
                let seed = 100 + 10 * step + number as u64;
                ((*name).to_owned(), formula(seed, *count, 1))
            })
            .collect(),
            Tensors::Large(_, spread) => BTreeMap::from([(
                "layer.lora_A.weight".to_owned(),
                formula(100 + step, LARGE, *spread),
            )]),
        };
        AccumulatedGradients::from_values(&values, &device().inner())
    }

    fn values(&self) -> Values {
        struct Read(Values);
        impl ParameterVisitor for Read {
            fn visit<const D: usize>(
                &mut self,
                name: &str,
                _: ParameterGroup,
                tensor: &mut Tensor<D>,
            ) {
                assert!(tensor.is_require_grad(), "{name} is still trained");
                let values = tensor.to_data().try_to_vec().unwrap();
                self.0.insert(name.to_owned(), values);
            }
        }
        let mut read = Read(BTreeMap::new());
        self.clone().visit_parameters(&mut read);
        read.0
    }

    /// The averages that stand for the tensors.
    fn averages(&self, optimizer: &Optimizer) -> Values {
        self.values()
            .into_iter()
            .map(|(name, values)| {
                let values = leaf(values.clone(), [values.len()]).inner();
                let average = optimizer.averaged(&name, values).unwrap();
                (name, average.to_data().try_to_vec().unwrap())
            })
            .collect()
    }
}

/// The largest difference, over the largest magnitude of the expected tensor.
fn difference(found: &Values, expected: &Values) -> f32 {
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    let mut worst = 0.0f32;
    for (name, expected) in expected {
        let largest = expected
            .iter()
            .fold(0.0f32, |most, value| most.max(value.abs()));
        assert_eq!(found[name].len(), expected.len());
        for (found, expected) in found[name].iter().zip(expected) {
            worst = worst.max((found - expected).abs() / largest);
        }
    }
    worst
}

/// Runs the updates; gives the values after each stored one.
fn run(
    tensors: &mut Tensors,
    optimizer: &mut Optimizer,
    rules: &TensorRules,
    factors: &[f64],
    mut look: impl FnMut(&mut Tensors, &Optimizer),
) -> Vec<Values> {
    let mut stored = Vec::new();
    for step in 0..STEPS {
        let gradients = tensors.gradients(step);
        let factor = factors.get(step as usize).copied().unwrap_or(1.0);
        optimizer.update(tensors, gradients, rules, factor);
        look(tensors, optimizer);
        if STORED.contains(&step) {
            stored.push(tensors.values());
        }
    }
    stored
}

fn rules(rate: f64, weight_decay: f64) -> TensorRules {
    TensorRules::new(LearningRates::uniform(rate), weight_decay)
}

/// Twelve updates in f32 round apart by a few units in the last place of the largest value, 1.2e-7
/// each.
const ROUNDING: f32 = 2e-6;

fn assert_near(found: &[Values], expected: &[Values], tolerance: f32, what: &str) {
    assert_eq!((found.len(), expected.len()), (4, 4));
    for ((found, expected), step) in found.iter().zip(expected).zip(STORED) {
        let worst = difference(found, expected);
        assert!(worst <= tolerance, "{what}, step {step}: {worst} apart");
    }
}

#[test]
fn sgd_is_pytorchs() {
    let cases = fixture().sgd;
    assert_eq!(cases.len(), 3);
    for case in cases {
        let mut optimizer = Optimizer::new(OptimizerOptions::Sgd(SgdOptions {
            momentum: case.momentum,
            nesterov: case.nesterov,
        }));
        let rules = rules(case.lr, case.weight_decay);
        let found = run(
            &mut Tensors::small(),
            &mut optimizer,
            &rules,
            &[],
            |_, _| {},
        );
        assert_near(&found, &case.parameters, ROUNDING, "SGD");
    }
}

/// Ten products of matrices amplify rounding where singular values are near zero: 1e-4 of the largest
/// value against PyTorch with its iteration in f32; in bf16 (8 bits) its singular values are some
/// hundredths apart, and so are twelve updates of 0.02 each.
#[test]
fn muon_is_pytorchs() {
    let cases = fixture().muon;
    assert_eq!(cases.len(), 2);
    for case in cases {
        let mut optimizer = Optimizer::new(OptimizerOptions::Muon {
            factors: MuonOptions {
                nesterov: case.nesterov,
                scale: case.scale,
                ..MuonOptions::default()
            },
            others: AdamWOptions::default(),
        });
        let found = run(
            &mut Tensors::small(),
            &mut optimizer,
            &rules(2e-2, 0.1),
            &[],
            |_, _| {},
        );
        let what = format!("{:?}", case.scale);
        assert_near(&found, &case.parameters, 1e-4, &what);
        let worst = difference(&found[3], &case.last_in_bf16);
        assert!(worst <= 2e-2, "{what} in bf16: {worst} apart");
    }
}

#[test]
fn schedule_free_adamw_is_its_authors_and_an_evaluation_changes_nothing() {
    let cases = fixture().schedule_free;
    assert_eq!(cases.len(), 2);
    for case in cases {
        let mut optimizer = Optimizer::new(OptimizerOptions::ScheduleFreeAdamW(AdamWOptions {
            beta_2: 0.98,
            ..AdamWOptions::default()
        }));
        let mut averages = Vec::new();
        let found = run(
            &mut Tensors::small(),
            &mut optimizer,
            &rules(2e-2, case.weight_decay),
            &case.factors,
            |tensors, optimizer| {
                let before = tensors.values();
                averages.push(tensors.averages(optimizer));
                assert_eq!(before, tensors.values());
            },
        );
        assert_near(&found, &case.parameters, ROUNDING, "in training");
        let averages: Vec<Values> = STORED
            .iter()
            .map(|step| averages[*step as usize].clone())
            .collect();
        assert_near(&averages, &case.averages, ROUNDING, "averages");
        assert!(difference(&found[3], &averages[3]) > 1e-3, "they differ");
    }
}

#[test]
fn an_ema_is_pytorchs() {
    let case = fixture().ema;
    let mut ema = Ema::new(case.decay);
    let mut optimizer = Optimizer::new(OptimizerOptions::Sgd(SgdOptions {
        momentum: 0.0,
        nesterov: false,
    }));
    let mut averages = Vec::new();
    run(
        &mut Tensors::small(),
        &mut optimizer,
        &rules(0.1, 0.0),
        &[],
        |tensors, _| {
            ema.update(tensors);
            let values = tensors.values().into_keys().map(|name| {
                let average = ema.average(&name).unwrap();
                (name, average.to_data().try_to_vec().unwrap())
            });
            averages.push(values.collect::<Values>());
        },
    );
    let averages: Vec<Values> = STORED
        .iter()
        .map(|step| averages[*step as usize].clone())
        .collect();
    assert_near(&averages, &case.averages, ROUNDING, "EMA");
}

/// Every 41st of 5,000 values, whose gradients span five powers of ten. A moment half-way between two
/// codes could go either way by rounding; none of these does.
#[test]
fn adamw_in_eight_bits_is_bitsandbytes_and_near_f32() {
    let expected = fixture().adamw_8bit.parameters;
    let options = AdamWOptions::default();
    let rules = rules(1e-2, 0.1);
    let mut optimizer = Optimizer::new(OptimizerOptions::AdamW8Bit(options));
    let mut tensors = Tensors::large(5);
    let found = run(&mut tensors, &mut optimizer, &rules, &[], |_, _| {});
    assert_eq!(expected.len(), 4);
    for (found, expected) in found.iter().zip(&expected) {
        let found = found["layer.lora_A.weight"].iter().step_by(41);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.zip(expected) {
            assert!(
                (found - expected).abs() <= 2e-6,
                "{found} instead of {expected}"
            );
        }
    }
    // A byte an element, and four of scale a block of 256, of which there are 20; twice.
    assert_eq!(optimizer.bytes(), 2 * (20 * 256 + 20 * 4));

    // Beside f32, with gradients of one magnitude, as those of a matrix mostly are: an element whose
    // gradients are thousands of times smaller than the largest of its block has its second moment
    // rounded to zero, in bitsandbytes as here.
    let last = |options| {
        let mut optimizer = Optimizer::new(options);
        let mut found = run(
            &mut Tensors::large(1),
            &mut optimizer,
            &rules,
            &[],
            |_, _| {},
        );
        let values = found.pop().unwrap();
        (values["layer.lora_A.weight"].clone(), optimizer.bytes())
    };
    let (in_8_bits, _) = last(OptimizerOptions::AdamW8Bit(options));
    let (in_f32, bytes) = last(OptimizerOptions::AdamW(options));
    assert_eq!(bytes, 2 * 4 * LARGE as u64);
    let distance = |one: &[f32], other: &[f32]| {
        let squares = one.iter().zip(other);
        let sum: f64 = squares.map(|(a, b)| f64::from(a - b).powi(2)).sum();
        sum.sqrt()
    };
    let moved = distance(&in_f32, &formula(7, LARGE, 1));
    let share = distance(&in_8_bits, &in_f32) / moved;
    assert!(share < 0.05, "eight bits change {share} of what is moved");
    assert!(share > 1e-6, "eight bits change something");

    // A small tensor keeps f32 moments: the same to the bit.
    let small = |options| {
        let mut optimizer = Optimizer::new(options);
        run(
            &mut Tensors::small(),
            &mut optimizer,
            &rules,
            &[],
            |_, _| {},
        )
    };
    assert_eq!(
        small(OptimizerOptions::AdamW8Bit(options)),
        small(OptimizerOptions::AdamW(options))
    );
}

fn all() -> Vec<OptimizerOptions> {
    let adamw = AdamWOptions::default();
    vec![
        OptimizerOptions::AdamW(adamw),
        OptimizerOptions::AdamW8Bit(adamw),
        OptimizerOptions::ScheduleFreeAdamW(adamw),
        OptimizerOptions::Muon {
            factors: MuonOptions::default(),
            others: adamw,
        },
        OptimizerOptions::Sgd(SgdOptions::default()),
    ]
}

#[test]
fn each_restored_optimizer_goes_on_bit_for_bit() {
    for options in all() {
        for start in [Tensors::small(), Tensors::large(1)] {
            let run = |cut: Option<u64>| {
                let mut tensors = start.clone();
                let mut optimizer = Optimizer::new(options);
                for step in 0..6 {
                    if cut == Some(step) {
                        let saved = optimizer.save();
                        optimizer = Optimizer::new(options);
                        optimizer.restore(saved.clone(), &device()).unwrap();
                        assert_eq!(optimizer.save(), saved);
                    }
                    let gradients = tensors.gradients(step);
                    optimizer.update(&mut tensors, gradients, &rules(1e-2, 0.1), 1.0);
                }
                tensors.values()
            };
            let unbroken = run(None);
            assert_eq!(unbroken, run(Some(1)), "{options:?}");
            assert_eq!(unbroken, run(Some(4)), "{options:?}");
        }
    }
}

#[test]
fn the_state_of_another_optimizer_is_refused() {
    let mut saved = Vec::new();
    for options in all() {
        let mut optimizer = Optimizer::new(options);
        let mut tensors = Tensors::large(1);
        let gradients = tensors.gradients(0);
        optimizer.update(&mut tensors, gradients, &rules(1e-2, 0.0), 1.0);
        saved.push(optimizer.save());
    }
    for (reader, options) in all().into_iter().enumerate() {
        for (writer, saved) in saved.iter().enumerate() {
            let found = Optimizer::new(options).restore(saved.clone(), &device());
            // The 8-bit optimizer reads f32 moments: those of its small tensors.
            let reads = reader == writer || (reader, writer) == (1, 0);
            // Muon has AdamW's moments of what is no factor.
            let reads = reads || (reader, writer) == (3, 0);
            assert_eq!(found.is_ok(), reads, "{options:?} and {writer}: {found:?}");
            if let Err(problem) = found {
                assert!(problem.contains("layer.lora_A.weight"), "{problem}");
            }
        }
    }
}

#[test]
fn groups_decide_in_their_order_and_each_has_to_decide() {
    let train = |groups: &str| {
        let text = format!(
            "learning_rate = 1e-3\nhead_learning_rate = 1e-2\nweight_decay = 0.1\n{groups}"
        );
        toml::from_str::<TrainSection>(&text).unwrap()
    };
    let both = "[[groups]]\npattern = 'lora_B'\nlearning_rate = 5e-3\n[[groups]]\npattern = '^layer'\nweight_decay = 0.0\n";
    let rules = TensorRules::from_recipe(&train(both)).unwrap();
    rules.check(&mut Tensors::small()).unwrap();
    let rule = |name, group, dimensions| {
        let rule: TensorRule = rules.of(name, group, dimensions);
        (rule.learning_rate, rule.weight_decay)
    };
    let adapter = ParameterGroup::Adapter;
    assert_eq!(rule("layer.lora_B.weight", adapter, 2), (5e-3, 0.1));
    assert_eq!(rule("layer.lora_A.weight", adapter, 2), (1e-3, 0.0));
    assert_eq!(rule("head", ParameterGroup::Head, 1), (1e-2, 0.1));

    let without = TensorRules::from_recipe(&train("decay_vectors = false\n")).unwrap();
    let decay = |dimensions| {
        without
            .of("head", ParameterGroup::Head, dimensions)
            .weight_decay
    };
    assert_eq!((decay(1), decay(2)), (0.0, 0.1));

    for (groups, says) in [
        (
            "[[groups]]\npattern = 'lora_E'\nweight_decay = 0.0\n",
            "matches no trained tensor",
        ),
        (
            "[[groups]]\npattern = 'lora'\nweight_decay = 0.0\n[[groups]]\npattern = 'lora_A'\nweight_decay = 0.1\n",
            "decides about no tensor",
        ),
    ] {
        let rules = TensorRules::from_recipe(&train(groups)).unwrap();
        let error = rules.check(&mut Tensors::small()).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("lora_"), "{error}");
    }
}
