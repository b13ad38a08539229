//! Cross-entropy behind an output layer for which there is no fused kernel, some tokens at a time.

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
    };
    in_chunks(layer, hidden, targets, mode, CHUNK_ELEMENTS / vocab.max(1))
}

/// The output layer, its weight, and the bounds of its logits.
#[derive(Clone, Copy)]
struct Output<'a> {
    linear: &'a Linear,
    weight: &'a Parameter<2>,
    soft_cap: Option<f32>,
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
        loss::token_cross_entropy(logits, self.targets.clone()).reshape([1, 1, 1])
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
