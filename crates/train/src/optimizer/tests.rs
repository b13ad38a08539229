use burn::tensor::TensorData;
use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Step {
    gradients: BTreeMap<String, Vec<f32>>,
    norm: Option<f64>,
    clipped: BTreeMap<String, Vec<f32>>,
    parameters: BTreeMap<String, Vec<f32>>,
    exp_avg: BTreeMap<String, Vec<f32>>,
    exp_avg_sq: BTreeMap<String, Vec<f32>>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    learning_rate: f64,
    head_learning_rate: f64,
    beta_1: f64,
    beta_2: f64,
    epsilon: f64,
    weight_decay: f64,
    max_norm: Option<f64>,
    start: BTreeMap<String, Vec<f32>>,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Defaults {
    beta_1: f64,
    beta_2: f64,
    epsilon: f64,
    weight_decay: f64,
}

#[derive(Deserialize)]
struct Fixture {
    defaults: Defaults,
    adamw: Vec<Case>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("../../tests/fixtures/optimizer.json")).unwrap()
}

/// The three tensors of the fixture.
struct Tensors {
    a: Tensor<2>,
    b: Tensor<2>,
    head: Tensor<1>,
}

impl Tensors {
    fn new(start: &BTreeMap<String, Vec<f32>>, device: &Device) -> Tensors {
        fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
            Tensor::from_data(TensorData::new(values.to_vec(), shape), device).require_grad()
        }
        Tensors {
            a: tensor(&start["adapter.a"], [2, 3], device),
            b: tensor(&start["adapter.b"], [3, 2], device),
            head: tensor(&start["head"], [4], device),
        }
    }

    fn values(&mut self) -> BTreeMap<String, Vec<f32>> {
        struct Read(BTreeMap<String, Vec<f32>>);
        impl ParameterVisitor for Read {
            fn visit<const D: usize>(
                &mut self,
                name: &str,
                _: ParameterGroup,
                tensor: &mut Tensor<D>,
            ) {
                assert!(
                    tensor.is_require_grad(),
                    "{name} is still trained after an update"
                );
                self.0
                    .insert(name.to_owned(), tensor.to_data().try_to_vec().unwrap());
            }
        }
        let mut read = Read(BTreeMap::new());
        self.visit_parameters(&mut read);
        read.0
    }
}

impl Parameters for Tensors {
    fn visit_parameters<V: ParameterVisitor>(&mut self, visitor: &mut V) {
        visitor.visit("adapter.a", ParameterGroup::Adapter, &mut self.a);
        visitor.visit("adapter.b", ParameterGroup::Adapter, &mut self.b);
        visitor.visit("head", ParameterGroup::Head, &mut self.head);
    }
}

fn assert_close(
    found: &BTreeMap<String, Vec<f32>>,
    expected: &BTreeMap<String, Vec<f32>>,
    what: &str,
) {
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>(),
        "{what}"
    );
    for (name, expected) in expected {
        for (index, (found, expected)) in found[name].iter().zip(expected).enumerate() {
            let difference = (found - expected).abs();
            assert!(
                difference <= 1e-6 * expected.abs().max(1e-2),
                "{what}, {name}[{index}]: {found} instead of {expected}"
            );
        }
    }
}

fn device() -> Device {
    Device::flex().autodiff()
}

#[test]
fn defaults_are_those_of_pytorch() {
    let defaults = fixture().defaults;
    let ours = AdamWOptions::default();
    let rule = TensorRules::uniform(1.0).of("x", ParameterGroup::Head, 2);
    assert_eq!(
        (ours.beta_1, ours.beta_2, ours.epsilon, rule.weight_decay),
        (
            defaults.beta_1,
            defaults.beta_2,
            defaults.epsilon,
            defaults.weight_decay
        )
    );
}

#[test]
fn updates_clipping_and_moments_equal_those_of_pytorch() {
    let device = device();
    let cases = fixture().adamw;
    assert_eq!(cases.len(), 3);
    for case in cases {
        let options = AdamWOptions {
            beta_1: case.beta_1,
            beta_2: case.beta_2,
            epsilon: case.epsilon,
        };
        let rates = LearningRates {
            adapter: case.learning_rate,
            head: case.head_learning_rate,
            encoder: case.head_learning_rate,
            projector: case.head_learning_rate,
            lora_plus: None,
        };
        let mut tensors = Tensors::new(&case.start, &device);
        let rules = TensorRules::new(rates, case.weight_decay);
        let mut optimizer = Optimizer::new(OptimizerOptions::AdamW(options));
        for (index, step) in case.steps.iter().enumerate() {
            let what = format!("{}, step {index}", case.name);
            let mut gradients =
                AccumulatedGradients::from_values(&step.gradients, &device.clone().inner());
            if let (Some(max_norm), Some(expected)) = (case.max_norm, step.norm) {
                let norm = f64::from(gradients.global_norm().unwrap().into_scalar::<f32>());
                assert!(
                    (norm - expected).abs() <= 1e-6 * expected,
                    "{what}: norm {norm} instead of {expected}"
                );
                gradients.clip(norm, max_norm);
            }
            assert_close(
                &gradients.values(),
                &step.clipped,
                &format!("{what}, clipped"),
            );
            optimizer.update(&mut tensors, gradients, &rules, 1.0);
            assert_close(
                &tensors.values(),
                &step.parameters,
                &format!("{what}, parameters"),
            );
            let saved = optimizer.save();
            let part = |part: &str| {
                let floats =
                    |state: &SavedState| match state.parts().find(|(name, _)| *name == part) {
                        Some((_, SavedPart::Floats(values))) => values.clone(),
                        found => panic!("`{part}` is {found:?}"),
                    };
                saved
                    .iter()
                    .map(|(name, state)| (name.clone(), floats(state)))
                    .collect()
            };
            let (first, second) = (part("exp_avg"), part("exp_avg_sq"));
            assert_close(&first, &step.exp_avg, &format!("{what}, first moments"));
            assert_close(
                &second,
                &step.exp_avg_sq,
                &format!("{what}, second moments"),
            );
        }
    }
}

#[test]
fn gradients_of_micro_batches_add_up_to_those_of_the_batch() {
    let device = device();
    let case = fixture().adamw.remove(0);
    let mut tensors = Tensors::new(&case.start, &device);
    let input = |rows: std::ops::Range<usize>| {
        let values: Vec<f32> = rows
            .clone()
            .flat_map(|row| (0..3).map(move |column| ((row * 3 + column) as f32).sin()))
            .collect();
        Tensor::<2>::from_data(TensorData::new(values, [rows.len(), 3]), &device)
    };
    let loss = |tensors: &Tensors, rows: std::ops::Range<usize>| {
        input(rows)
            .matmul(tensors.a.clone().transpose())
            .square()
            .sum()
    };
    let mut whole = AccumulatedGradients::default();
    let mut gradients = loss(&tensors, 0..6).backward();
    whole.add(&mut tensors, &mut gradients);
    let mut parts = AccumulatedGradients::default();
    for rows in [0..2, 2..3, 3..6] {
        let mut gradients = loss(&tensors, rows).backward();
        parts.add(&mut tensors, &mut gradients);
    }
    assert_eq!(
        whole.names().collect::<Vec<_>>(),
        ["adapter.a"],
        "a tensor without a gradient has no entry"
    );
    assert_close(&parts.values(), &whole.values(), "sum over micro-batches");
}

#[test]
fn lora_plus_raises_the_rate_of_one_half_of_each_pair() {
    let rates = LearningRates {
        lora_plus: Some(LoraPlus {
            ratio: 16.0,
            embedding: 1e-6,
        }),
        ..LearningRates::uniform(2e-4)
    };
    let stem = "base_model.model.model.layers.0.self_attn.q_proj";
    for (name, expected) in [
        ("lora_A.weight", 2e-4),
        ("lora_B.weight", 32e-4),
        ("lora_magnitude_vector", 32e-4),
        ("base_layer.bias", 32e-4),
        ("lora_embedding_A", 1e-6),
        ("lora_embedding_B", 1e-6),
        ("token_adapter.trainable_tokens_delta", 2e-4),
    ] {
        let rate = rates.of(&format!("{stem}.{name}"), ParameterGroup::Adapter);
        assert_eq!(rate, expected, "{name}");
    }
    let head = rates.of("base_model.model.classifier.bias", ParameterGroup::Head);
    assert_eq!(head, 2e-4);
    let plain = LearningRates::uniform(2e-4);
    let rate = plain.of("a.lora_B.weight", ParameterGroup::Adapter);
    assert_eq!(rate, 2e-4);
}
