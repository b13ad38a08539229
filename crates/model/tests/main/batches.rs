//! What must not matter: which other samples share a row or a batch, how much padding there is,
//! where dropout masks come from.

use crate::common::{device, fixture, integers, largest_difference, packed, sequences, values};
use burn::tensor::{Int, Tensor};
use calor_model::{
    Checkpoint, HeadOptions, LoraOptions, Mode, Model, ModelOptions, ParameterGroup,
    ParameterVisitor, Pooling, Problem, loss, shifted_targets,
};
use proptest::prelude::*;

/// f32 sums in another order; states and logits here are around 1.
const CLOSE: f32 = 2e-5;

fn model(base: &str, pooling: Pooling, dropout: f64) -> Model {
    let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
    let options = ModelOptions {
        lora: Some(LoraOptions {
            r: 4,
            dropout,
            ..LoraOptions::default()
        }),
        head: HeadOptions::Classifier {
            labels: 3,
            pooling,
            problem: Problem::Multiclass,
        },
        ..ModelOptions::default()
    };
    let mut model = Model::load(&checkpoint, &options, &device()).unwrap();
    crate::common::fill_b(&mut model);
    model
}

const MODELS: [(&str, Pooling); 19] = [
    ("llama3", Pooling::Last),
    ("mistral", Pooling::Last),
    ("qwen2-window", Pooling::Last),
    ("bert", Pooling::Cls),
    ("bert", Pooling::Mean),
    ("roberta", Pooling::Cls),
    ("olmo2", Pooling::Last),
    ("phi3", Pooling::Last),
    // Segments on both sides of its original context of 8.
    ("phi3-long", Pooling::Last),
    ("gpt2", Pooling::Last),
    ("gpt-neox", Pooling::Last),
    ("gemma2", Pooling::Last),
    ("gemma3", Pooling::Last),
    ("electra", Pooling::Cls),
    ("electra", Pooling::Mean),
    ("modernbert", Pooling::Cls),
    ("modernbert-bias", Pooling::Cls),
    ("deberta", Pooling::Cls),
    ("deberta-own-keys", Pooling::Mean),
];

fn one_a_row(sequences: &[Vec<i32>], seq: usize) -> calor_model::ModelInput {
    let rows: Vec<Vec<Vec<i32>>> = sequences.iter().map(|s| vec![s.clone()]).collect();
    packed(&rows, seq)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn packing_and_padding_do_not_change_a_sample(
        lengths in prop::collection::vec(1usize..12, 1..6),
        offset in 0i32..50,
        padding in 0usize..9,
    ) {
        let sequences: Vec<Vec<i32>> = lengths
            .iter()
            .enumerate()
            .map(|(index, &length)| {
                (0..length as i32).map(|t| 3 + (offset + index as i32 * 31 + t * 7) % 110).collect()
            })
            .collect();
        let total: usize = lengths.iter().sum();
        let longest = *lengths.iter().max().unwrap();
        for (base, pooling) in MODELS {
            let model = model(base, pooling, 0.0).for_inference();
            let separate = one_a_row(&sequences, longest);
            let together = packed(std::slice::from_ref(&sequences), total + padding);
            let a = values(model.forward(&separate, Mode::Infer));
            let b = values(model.forward(&together, Mode::Infer));
            prop_assert!(largest_difference(&a, &b) < CLOSE, "{base}: {a:?} {b:?}");
        }
    }
}

#[test]
fn pooling_reads_what_it_says() {
    // Through the whole hidden states, where the model itself leaves tokens out early.
    let input = packed(&[sequences()], 32);
    for (base, pooling) in [("llama3", Pooling::Last), ("bert", Pooling::Cls)] {
        let model = model(base, pooling, 0.0).for_inference();
        let mut shorter = sequences();
        for sequence in &mut shorter {
            match pooling {
                // Another last token changes a decoder's logits, a later one cannot exist.
                Pooling::Last => *sequence.last_mut().unwrap() += 1,
                _ => sequence[0] += 1,
            }
        }
        let a = values(model.forward(&input, Mode::Infer));
        let b = values(model.forward(&packed(&[shorter], 32), Mode::Infer));
        assert!(
            a.iter().zip(&b).all(|(a, b)| a != b),
            "{base}: every sample's logits depend on its pooled token"
        );
    }
}

/// Gradients of everything trained, by name.
struct Gradients<'a> {
    gradients: &'a burn::tensor::Gradients,
    found: Vec<(String, Vec<f32>)>,
}

impl ParameterVisitor for Gradients<'_> {
    fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
        let gradient = tensor
            .grad(self.gradients)
            .unwrap_or_else(|| panic!("{name} has a gradient"));
        self.found.push((name.to_owned(), values(gradient)));
    }
}

fn gradients(model: &mut Model, loss: Tensor<1>) -> Vec<(String, Vec<f32>)> {
    let gradients = loss.backward();
    let mut visitor = Gradients {
        gradients: &gradients,
        found: Vec::new(),
    };
    model.visit_trainable(&mut visitor);
    visitor.found
}

#[test]
fn every_trained_tensor_has_a_gradient_and_it_is_that_of_separate_rows() {
    let targets = Tensor::<1, Int>::from_ints([0, 2, 1, 2], &device());
    for (base, pooling) in MODELS {
        let mut model = model(base, pooling, 0.0);
        let mode = Mode::Train { dropout_seed: 1 };
        let mut run = |input: &calor_model::ModelInput| {
            let logits = model.forward(input, mode);
            let loss = loss::multiclass(logits, targets.clone(), None);
            gradients(&mut model, loss)
        };
        let packed_row = run(&packed(&[sequences()], 30));
        let separate = run(&one_a_row(&sequences(), 11));
        assert_eq!(packed_row.len(), separate.len());
        for ((name, a), (_, b)) in packed_row.iter().zip(&separate) {
            let largest = b.iter().fold(0f32, |m, v| m.max(v.abs()));
            assert!(largest > 0.0, "{base}: {name} gets a gradient");
            let difference = largest_difference(a, b);
            assert!(
                difference <= 1e-4 * largest.max(1e-3),
                "{base} {name}: {difference}"
            );
        }
    }
}

#[test]
fn dropout_depends_on_its_seed_alone_and_is_off_in_inference() {
    let model = model("llama3", Pooling::Last, 0.5);
    let input = packed(&[sequences()], 32);
    let run = |mode| values(model.forward(&input, mode));
    let train = |dropout_seed| run(Mode::Train { dropout_seed });
    assert_eq!(train(1), train(1));
    assert_ne!(train(1), train(2));
    assert_eq!(run(Mode::Infer), run(Mode::Infer));
    assert_ne!(run(Mode::Infer), train(1));
}

#[test]
fn the_language_model_loss_is_that_of_its_logits() {
    let checkpoint = Checkpoint::open(&fixture("llama3")).unwrap();
    let options = ModelOptions {
        head: HeadOptions::CausalLm,
        ..ModelOptions::default()
    };
    let model = Model::load(&checkpoint, &options, &device()).unwrap();
    let input = packed(&[sequences()], 32);
    let ids: Vec<i32> = input
        .input_ids
        .clone()
        .into_data_as::<i32>()
        .try_to_vec()
        .unwrap();
    let segments: Vec<i32> = input
        .segments
        .clone()
        .into_data_as::<i32>()
        .try_to_vec()
        .unwrap();
    let targets = shifted_targets(&ids, &segments, 1, 32);
    // Each sequence supervises all its tokens but the first.
    let supervised = targets.iter().filter(|&&target| target != -100).count();
    assert_eq!(supervised, 7 + 3 + 11 + 5 - 4);
    let logits = values(model.logits(&input, Mode::Infer));
    let vocab = 120;
    let expected: f64 = targets
        .iter()
        .enumerate()
        .filter(|(_, target)| **target != -100)
        .map(|(place, &target)| {
            let row = &logits[place * vocab..(place + 1) * vocab];
            let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            sum.ln() - f64::from(row[target as usize])
        })
        .sum();
    let targets = integers(targets, [1, 32]).reshape([32]);
    let ours = values(model.causal_lm_loss(&input, targets, Mode::Infer))[0];
    assert!(
        (f64::from(ours) - expected).abs() < 1e-5 * expected,
        "{ours} {expected}"
    );
}

#[test]
fn heads_that_do_not_fit_are_refused() {
    let load = |base: &str, head| {
        let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
        let options = ModelOptions {
            head,
            ..ModelOptions::default()
        };
        Model::load(&checkpoint, &options, &device()).map(|_| ())
    };
    let classifier = |labels, pooling, problem| HeadOptions::Classifier {
        labels,
        pooling,
        problem,
    };
    for (base, head, word) in [
        ("bert", HeadOptions::CausalLm, "decoder"),
        (
            "llama2",
            classifier(1, Pooling::Cls, Problem::Binary),
            "last",
        ),
        (
            "bert",
            classifier(1, Pooling::Last, Problem::Binary),
            "mean",
        ),
        (
            "bert",
            classifier(2, Pooling::Cls, Problem::Binary),
            "one logit",
        ),
        (
            "bert",
            classifier(1, Pooling::Cls, Problem::Multiclass),
            "two classes",
        ),
        (
            "bert",
            classifier(0, Pooling::Cls, Problem::Regression),
            "label",
        ),
    ] {
        let error = load(base, head).unwrap_err().to_string();
        assert!(error.contains(word), "{base} {head:?}: {error}");
    }
}
