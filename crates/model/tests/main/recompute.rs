//! Blocks that are run again in the backward pass: losses and gradients are those of the plain pass,
//! to the bit.

use crate::common::{device, fixture, integers, packed, sequences};
use burn::tensor::{Int, Tensor};
use calor_model::{
    Checkpoint, HeadOptions, LoraOptions, Mode, Model, ModelInput, ModelOptions, ParameterGroup,
    ParameterVisitor, Pooling, Problem, Recompute, RecomputedBlocks, loss, shifted_targets,
};

const WAYS: [RecomputedBlocks; 4] = [
    RecomputedBlocks::All,
    RecomputedBlocks::Every(2),
    RecomputedBlocks::First(1),
    RecomputedBlocks::First(9),
];

fn model(base: &str, head: HeadOptions, modules_to_save: &[&str]) -> Model {
    let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
    let options = ModelOptions {
        lora: Some(LoraOptions {
            r: 4,
            dropout: 0.2,
            modules_to_save: modules_to_save.iter().map(|&name| name.into()).collect(),
            ..LoraOptions::default()
        }),
        head,
        ..ModelOptions::default()
    };
    let mut model = Model::load(&checkpoint, &options, &device()).unwrap();
    crate::common::fill_b(&mut model);
    model
}

fn classifier(pooling: Pooling) -> HeadOptions {
    HeadOptions::Classifier {
        labels: 3,
        pooling,
        problem: Problem::Multiclass,
    }
}

/// The bits of the loss, and of the gradient of everything trained, by name.
fn step(model: &mut Model, input: &ModelInput) -> Vec<(String, Option<Vec<u32>>)> {
    struct Gradients(burn::tensor::Gradients, Vec<(String, Option<Vec<u32>>)>);
    impl ParameterVisitor for Gradients {
        fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
            let gradient = tensor.grad_remove(&mut self.0);
            self.1.push((name.to_owned(), gradient.map(bits)));
        }
    }
    let mode = Mode::Train { dropout_seed: 7 };
    let loss = match model.options().head {
        HeadOptions::CausalLm => {
            let values = |tensor: &Tensor<2, Int>| -> Vec<i32> {
                let data = tensor.clone().into_data_as::<i32>();
                data.try_to_vec().unwrap()
            };
            let [rows, seq] = input.input_ids.dims();
            let ids = values(&input.input_ids);
            let targets = shifted_targets(&ids, &values(&input.segments), rows, seq);
            let targets = integers(targets, [rows, seq]).reshape([rows * seq]);
            model.causal_lm_loss(input, targets, mode)
        }
        _ => {
            let targets = Tensor::<1, Int>::from_ints([0, 2, 1, 2], &device());
            loss::multiclass(model.forward(input, mode), targets, None)
        }
    };
    let mut found = Gradients(loss.backward(), vec![("loss".into(), Some(bits(loss)))]);
    model.visit_trainable(&mut found);
    found.1
}

fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    let values = crate::common::values(tensor);
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn losses_and_gradients_are_the_same_to_the_bit() {
    let one_a_row: Vec<_> = sequences().into_iter().map(|s| vec![s]).collect();
    let inputs = [packed(&[sequences()], 30), packed(&one_a_row, 11)];
    let causal = HeadOptions::CausalLm;
    let cases: [(&str, HeadOptions, &[&str]); 10] = [
        ("llama3", classifier(Pooling::Last), &[]),
        ("mistral", classifier(Pooling::Last), &[]),
        ("qwen2-window", classifier(Pooling::Last), &[]),
        ("qwen3", causal, &[]),
        ("llama2", causal, &["embed_tokens"]),
        // Tied: the output layer's gradient and the embedding's meet in one tensor.
        ("llama3", causal, &["embed_tokens", "input_layernorm"]),
        ("bert", classifier(Pooling::Cls), &[]),
        ("bert", classifier(Pooling::Mean), &["word_embeddings"]),
        ("roberta", classifier(Pooling::Cls), &["LayerNorm"]),
        ("bert-tanh", classifier(Pooling::Mean), &[]),
    ];
    for (base, head, saved) in cases {
        let mut model = model(base, head, saved);
        for input in &inputs {
            let plain = step(&mut model, input);
            assert!(plain.iter().filter(|(_, found)| found.is_some()).count() > 8);
            for blocks in WAYS {
                for offload in [false, true] {
                    model.set_recompute(Recompute { blocks, offload });
                    let again = step(&mut model, input);
                    for (plain, again) in plain.iter().zip(&again) {
                        assert_eq!(plain, again, "{base} {blocks:?}");
                    }
                }
            }
            model.set_recompute(Recompute::default());
        }
    }
}

#[test]
fn the_share_that_is_run_again_is_that_of_the_blocks() {
    let mut model = model("llama3", classifier(Pooling::Last), &[]);
    assert_eq!(model.recomputed_share(), 0.0);
    let recompute = |blocks| Recompute {
        blocks,
        offload: false,
    };
    model.set_recompute(recompute(RecomputedBlocks::All));
    let all = model.recomputed_share();
    // All but the head of three labels.
    assert!(all > 0.98 && all < 1.0, "{all}");
    model.set_recompute(recompute(RecomputedBlocks::First(1)));
    assert!((model.recomputed_share() - all / 2.0).abs() < 1e-12);
}
