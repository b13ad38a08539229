//! Cross-entropy behind an output layer for which there is no fused kernel, that of a language model with
//! a pair or a classifier's of many classes, some tokens at a time.

use burn::tensor::{DType, Int, Tensor};

use crate::linear::Linear;
use crate::loss;
use crate::parameter::{Parameter, Visit};
use crate::random;
use crate::recompute::{Rerun, rerun};
use crate::run::Mode;

/// Logits held at once, in elements: 64 MiB of f32.
const CHUNK_ELEMENTS: usize = 1 << 24;

/// Cross-entropy summed over the tokens whose target is not −100, `[1]`, f32. The logits of a chunk
/// of tokens exist while it is computed, forward, and once more backward.
///
/// # Shapes
/// - hidden: `[tokens, hidden]`, targets: `[tokens]`
pub(crate) fn chunked_cross_entropy(
    linear: &Linear,
    weight: &Parameter<2>,
    hidden: Tensor<2>,
    targets: Tensor<1, Int>,
    soft_cap: Option<f32>,
    mode: Mode,
) -> Tensor<1> {
    let vocab = weight.tensor.dims()[0];
    let layer = Output {
        linear,
        weight,
        soft_cap,
        class_weights: None,
    };
    in_chunks(layer, hidden, targets, mode, CHUNK_ELEMENTS / vocab.max(1))
}

/// [`loss::multiclass`] of a classifier's output layer. Logits up to 64 MiB exist as a whole, more in
/// chunks.
///
/// # Shapes
/// - states: `[1, tokens, hidden]`, targets: `[tokens]`, class_weights: `[classes]`
pub(crate) fn class_cross_entropy(
    linear: &Linear,
    states: Tensor<3>,
    targets: Tensor<1, Int>,
    class_weights: Option<Tensor<1>>,
    mode: Mode,
) -> Tensor<1> {
    let [_, tokens, width] = states.dims();
    let [classes, _] = linear.weight.dims();
    match linear.weight.dense() {
        Some(weight) if tokens * classes > CHUNK_ELEMENTS => {
            let layer = Output {
                linear,
                weight,
                soft_cap: None,
                class_weights: class_weights.as_ref(),
            };
            let states = states.reshape([tokens, width]);
            in_chunks(layer, states, targets, mode, CHUNK_ELEMENTS / classes)
        }
        _ => {
            let logits = linear.forward(states, mode).reshape([tokens, classes]);
            loss::multiclass(logits, targets, class_weights)
        }
    }
}

/// The output layer, its weight, and the bounds of its logits.
#[derive(Clone, Copy)]
struct Output<'a> {
    linear: &'a Linear,
    weight: &'a Parameter<2>,
    soft_cap: Option<f32>,
    class_weights: Option<&'a Tensor<1>>,
}

fn in_chunks(
    output: Output,
    hidden: Tensor<2>,
    targets: Tensor<1, Int>,
    mode: Mode,
    tokens_a_chunk: usize,
) -> Tensor<1> {
    let [tokens, width] = hidden.dims();
    let tokens_a_chunk = tokens_a_chunk.max(1);
    let losses: Vec<Tensor<1>> = (0..tokens)
        .step_by(tokens_a_chunk)
        .enumerate()
        .map(|(number, start)| {
            let length = tokens_a_chunk.min(tokens - start);
            let chunk = Chunk {
                linear: output.linear.clone(),
                weight: output.weight.clone(),
                soft_cap: output.soft_cap,
                class_weights: output.class_weights.cloned(),
                targets: targets.clone().narrow(0, start, length),
                // Masks go by the place in a chunk, so each chunk has a seed of its own.
                mode: match mode {
                    Mode::Train { dropout_seed } if number > 0 => Mode::Train {
                        dropout_seed: random::mix(dropout_seed, number as u64),
                    },
                    mode => mode,
                },
            };
            let hidden = hidden.clone().narrow(0, start, length);
            rerun(chunk, hidden.reshape([1, length, width]), false).reshape([1])
        })
        .collect();
    Tensor::cat(losses, 0).sum()
}

/// The output layer on some tokens, and their loss.
#[derive(Debug, Clone)]
struct Chunk {
    linear: Linear,
    /// The layer's, or the token embedding it is tied to.
    weight: Parameter<2>,
    soft_cap: Option<f32>,
    /// Of a classifier, whose targets are never -100.
    class_weights: Option<Tensor<1>>,
    targets: Tensor<1, Int>,
    mode: Mode,
}

impl Rerun for Chunk {
    /// `[1, tokens, hidden]` → `[1, 1, 1]`
    fn forward(&self, input: Tensor<3>) -> Tensor<3> {
        let [_, tokens, _] = input.dims();
        let logits = self.linear.forward_with(input, &self.weight, self.mode);
        let vocab = logits.dims()[2];
        let logits = logits.cast(DType::F32).reshape([tokens, vocab]);
        let logits = match self.soft_cap {
            Some(cap) => calor_kernels::reference::soft_cap(logits, cap),
            None => logits,
        };
        let targets = self.targets.clone();
        let loss = match &self.class_weights {
            Some(weights) => loss::multiclass(logits, targets, Some(weights.clone())),
            None => loss::token_cross_entropy(logits, targets),
        };
        loss.reshape([1, 1, 1])
    }

    fn visit<V: Visit>(&mut self, visitor: &mut V) {
        visitor.visit(&mut self.weight);
        self.linear.visit_rest(visitor);
    }
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::linear::LowRank;
    use crate::parameter::ParameterKind;

    fn numbers<const D: usize>(shape: [usize; D], name: &str) -> Tensor<D> {
        let values = random::Stream::new(1, name).normal(shape.iter().product(), 0.5);
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    fn parameter<const D: usize>(name: &str, shape: [usize; D]) -> Parameter<D> {
        Parameter::new(name.into(), numbers(shape, name), ParameterKind::Adapter)
    }

    #[test]
    fn loss_and_gradients_do_not_depend_on_the_chunks() {
        let linear = Linear {
            weight: parameter("weight", [13, 6]).into(),
            bias: None,
            lora: Some(LowRank {
                a: parameter("a", [2, 6]),
                b: parameter("b", [13, 2]),
                scaling: 2.0,
                dropout: 0.0,
                index: 0,
                dora: None,
                start: None,
            }),
        };
        let hidden = numbers([7, 6], "hidden").autodiff().require_grad();
        let targets = Tensor::<1, Int>::from_ints([1, 12, -100, 4, 0, -100, 7], &Device::flex());
        let run = |tokens_a_chunk| {
            let mode = Mode::Train { dropout_seed: 1 };
            let weight = linear.weight.dense().expect("given above");
            let (h, t) = (hidden.clone(), targets.clone());
            let output = Output {
                linear: &linear,
                weight,
                soft_cap: Some(2.0),
                class_weights: None,
            };
            let loss = in_chunks(output, h, t, mode, tokens_a_chunk);
            let found = loss.backward();
            let pair = linear.lora.as_ref().expect("given above");
            let values = |tensor: Option<Tensor<2>>| -> Vec<f32> {
                tensor
                    .expect("a gradient")
                    .into_data()
                    .try_to_vec()
                    .unwrap()
            };
            vec![
                loss.into_data().try_to_vec().unwrap(),
                values(hidden.grad(&found)),
                values(weight.tensor.grad(&found)),
                values(pair.a.tensor.grad(&found)),
                values(pair.b.tensor.grad(&found)),
            ]
        };
        let whole = run(7);
        assert_chunks_give(&whole, run);
    }

    #[test]
    fn a_classifier_of_many_classes_is_chunked_with_its_weights_and_bias() {
        let classes = 13;
        let linear = Linear {
            weight: parameter("weight", [classes, 6]).into(),
            bias: Some(parameter("bias", [classes])),
            lora: None,
        };
        let states = numbers([7, 6], "states").autodiff().require_grad();
        let targets = Tensor::<1, Int>::from_ints([1, 12, 3, 4, 0, 9, 7], &Device::flex());
        let class_weights = numbers([classes], "class weights").abs();
        let weight = linear.weight.dense().expect("given above");
        let bias = linear.bias.as_ref().expect("given above");
        let values = |loss: Tensor<1>| {
            let found = loss.backward();
            let flat = |tensor: Option<Tensor<2>>| -> Vec<f32> {
                let tensor = tensor.expect("a gradient");
                tensor.into_data().try_to_vec().unwrap()
            };
            vec![
                loss.into_data().try_to_vec().unwrap(),
                flat(states.grad(&found)),
                flat(weight.tensor.grad(&found)),
                flat(bias.tensor.grad(&found).map(Tensor::unsqueeze)),
            ]
        };
        let mode = Mode::Train { dropout_seed: 1 };
        let whole = values(class_cross_entropy(
            &linear,
            states.clone().reshape([1, 7, 6]),
            targets.clone(),
            Some(class_weights.clone()),
            mode,
        ));
        assert_chunks_give(&whole, |tokens_a_chunk| {
            let output = Output {
                linear: &linear,
                weight,
                soft_cap: None,
                class_weights: Some(&class_weights),
            };
            let (states, targets) = (states.clone(), targets.clone());
            values(in_chunks(output, states, targets, mode, tokens_a_chunk))
        });
    }

    fn assert_chunks_give(whole: &[Vec<f32>], run: impl Fn(usize) -> Vec<Vec<f32>>) {
        for tokens_a_chunk in [0, 1, 3] {
            for (whole, chunked) in whole.iter().zip(run(tokens_a_chunk)) {
                let largest = whole.iter().fold(0f32, |m, v| m.max(v.abs()));
                for (a, b) in whole.iter().zip(&chunked) {
                    // Sums over tokens in another order.
                    assert!((a - b).abs() < 2e-6 * largest, "{a} {b}");
                }
            }
        }
    }
}
