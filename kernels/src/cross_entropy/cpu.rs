//! Chunked cross-entropy on the CPU: the logits of a few tokens at a time, the gradient in the same
//! pass.

use burn::tensor::{Int, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::IGNORED_TARGET;
use crate::cpu::elementary::{exp_sum, maximum, tanh, vectorized};
use crate::cpu::matrix::{Threads, View, multiply};
use crate::cpu::operation::{Operation, apply, dims, input, integers, tensor, values};

/// Logits held at once, in elements: 16 MiB of f32.
const CHUNK_ELEMENTS: usize = 1 << 22;

pub(super) fn dispatch(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    soft_cap: Option<f32>,
) -> Tensor<1> {
    let targets = integers(targets);
    assert_eq!(targets.len(), hidden.dims()[0], "one target a token");
    let operation = CrossEntropy {
        targets,
        soft_cap,
        needs: [
            hidden.is_require_grad() || hidden.device().is_autodiff(),
            // A leaf, or made of one: a table with some trained rows.
            weight.is_require_grad() || weight.is_tracked(),
        ],
    };
    apply(operation, [input(hidden), input(weight)])
}

#[derive(Clone, Debug)]
struct CrossEntropy {
    targets: Vec<i32>,
    soft_cap: Option<f32>,
    /// Which gradients the forward pass should leave for the backward one.
    needs: [bool; 2],
}

impl Operation<2> for CrossEntropy {
    const WIDE_RESULT: bool = true;

    fn forward(&self, inputs: [FlexTensor; 2], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let [hidden, weight] = inputs;
        let (vocab, width) = (dims(&weight)[0], dims(&weight)[1]);
        // Only the tokens that count are multiplied with the vocabulary.
        let counted: Vec<usize> = (0..self.targets.len())
            .filter(|&token| i64::from(self.targets[token]) != IGNORED_TARGET)
            .collect();
        let rows_a_chunk = (CHUNK_ELEMENTS / vocab).clamp(1, counted.len().max(1));
        let rows_a_chunk = rows_a_chunk.max(16.min(counted.len().max(1)));

        let for_hidden = tracked && self.needs[0];
        let for_weight = tracked && self.needs[1];
        let mut hidden_gradient = vec![
            0.0f32;
            if for_hidden {
                self.targets.len() * width
            } else {
                0
            }
        ];
        let mut weight_gradient = vec![0.0f32; if for_weight { vocab * width } else { 0 }];
        let mut logits = vec![0.0f32; rows_a_chunk * vocab];
        let mut gathered = vec![0.0f32; rows_a_chunk * width];
        let mut scattered = vec![0.0f32; if for_hidden { rows_a_chunk * width } else { 0 }];
        let source = values(&hidden);
        let weights = View::new(values(&weight), vocab, width);
        let mut total = 0.0f64;

        for chunk in counted.chunks(rows_a_chunk) {
            let rows = chunk.len();
            for (row, &token) in chunk.iter().enumerate() {
                gathered[row * width..][..width].copy_from_slice(&source[token * width..][..width]);
            }
            let tokens = View::new(&gathered[..rows * width], rows, width);
            let logits = &mut logits[..rows * vocab];
            multiply(
                logits,
                vocab,
                tokens,
                weights.transposed(),
                1.0,
                false,
                Threads::All,
            );
            let losses: Vec<f32> = logits
                .par_chunks_mut(vocab)
                .zip(chunk.par_iter())
                .map_init(Vec::new, |capped, (row, &token)| {
                    let target = self.targets[token] as usize;
                    vectorized(
                        #[inline(always)]
                        || match self.soft_cap {
                            Some(cap) => capped_softmax_row(row, target, cap, capped),
                            None => softmax_row(row, target),
                        },
                    )
                })
                .collect();
            total += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            let probabilities = View::new(logits, rows, vocab);
            if for_hidden {
                let scattered = &mut scattered[..rows * width];
                multiply(
                    scattered,
                    width,
                    probabilities,
                    weights,
                    1.0,
                    false,
                    Threads::All,
                );
                for (row, &token) in chunk.iter().enumerate() {
                    hidden_gradient[token * width..][..width]
                        .copy_from_slice(&scattered[row * width..][..width]);
                }
            }
            if for_weight {
                multiply(
                    &mut weight_gradient,
                    width,
                    probabilities.transposed(),
                    tokens,
                    1.0,
                    true,
                    Threads::All,
                );
            }
        }
        let mut saved = vec![];
        if for_hidden {
            saved.push(tensor(hidden_gradient, dims(&hidden)));
        }
        if for_weight {
            saved.push(tensor(weight_gradient, [vocab, width]));
        }
        (tensor(vec![total as f32], [1]), saved)
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradient: FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let factor = values(&gradient)[0];
        let mut saved = saved.into_iter();
        let mut scaled = |left: bool, wanted: bool| {
            let mut gradient = left.then(|| saved.next().expect("left by the forward pass"))?;
            if wanted && factor != 1.0 {
                for value in gradient.storage_mut::<f32>() {
                    *value *= factor;
                }
            }
            wanted.then_some(gradient)
        };
        [
            scaled(self.needs[0], wanted[0]),
            scaled(self.needs[1], wanted[1]),
        ]
    }
}

/// As [`softmax_row`] of capped logits; the gradient is that of the logits before the cap.
#[inline(always)]
fn capped_softmax_row(row: &mut [f32], target: usize, cap: f32, shares: &mut Vec<f32>) -> f32 {
    shares.clear();
    shares.extend(row.iter().map(|&logit| tanh(logit / cap)));
    for (logit, &share) in row.iter_mut().zip(shares.iter()) {
        *logit = cap * share;
    }
    let loss = softmax_row(row, target);
    for (slope, &share) in row.iter_mut().zip(shares.iter()) {
        *slope *= 1.0 - share * share;
    }
    loss
}

/// Turns logits into `softmax − one-hot(target)` and returns the loss of the row.
#[inline(always)]
fn softmax_row(row: &mut [f32], target: usize) -> f32 {
    let largest = maximum(row);
    let at_target = row[target] - largest;
    let total = exp_sum(row, largest);
    let inverse = 1.0 / total;
    for value in row.iter_mut() {
        *value *= inverse;
    }
    row[target] -= 1.0;
    total.ln() - at_target
}
