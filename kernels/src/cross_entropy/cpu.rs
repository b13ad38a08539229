//! Chunked cross-entropy on the CPU: the logits of a few tokens at a time, the gradient in the same
//! pass.

use burn::tensor::{DType, Int, Tensor, bf16};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::IGNORED_TARGET;
use crate::cpu::cast::rounded;
use crate::cpu::elementary::{exp_sum, maximum, tanh, vectorized};
use crate::cpu::halves::{self, Engine, Halves, Sink};
use crate::cpu::matrix::{Threads, View, multiply};
use crate::cpu::operation::{
    Operation, apply, dims, half_values, input, integers, tensor, values, wide,
};

/// Logits held at once, in elements: 16 MiB of f32.
const CHUNK_ELEMENTS: usize = 1 << 22;

pub(super) fn dispatch(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    soft_cap: Option<f32>,
) -> Tensor<1> {
    let stored = hidden.dtype() == DType::BF16 && weight.dtype() == DType::BF16;
    let engine = match stored && !is_trained(&weight) {
        true => halves::engine(),
        false => None,
    };
    dispatch_to(engine, hidden, weight, targets, soft_cap)
}

/// With what multiplies bf16 as it is stored, or with everything in f32.
pub(super) fn dispatch_to(
    engine: Option<Engine>,
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
        engine,
        needs: [
            hidden.is_require_grad() || hidden.device().is_autodiff(),
            is_trained(&weight),
        ],
    };
    apply(operation, [input(hidden), input(weight)])
}

/// A leaf, or made of one: a table with some trained rows.
fn is_trained(weight: &Tensor<2>) -> bool {
    weight.is_require_grad() || weight.is_tracked()
}

#[derive(Clone, Debug)]
struct CrossEntropy {
    targets: Vec<i32>,
    soft_cap: Option<f32>,
    /// What multiplies bf16 as it is stored.
    engine: Option<Engine>,
    /// Which gradients the forward pass should leave for the backward one.
    needs: [bool; 2],
}

impl Operation<2> for CrossEntropy {
    const AS_STORED: bool = true;

    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn forward(&self, inputs: [FlexTensor; 2], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let [hidden, weight] = inputs;
        let (vocab, width) = (dims(&weight)[0], dims(&weight)[1]);
        // Only the tokens that count are multiplied with the vocabulary.
        let counted: Vec<usize> = (0..self.targets.len())
            .filter(|&token| i64::from(self.targets[token]) != IGNORED_TARGET)
            .collect();
        let at_once = match self.engine {
            // Rounded and packed slopes are held beside them.
            Some(_) => CHUNK_ELEMENTS / 2,
            None => CHUNK_ELEMENTS,
        };
        let rows_a_chunk = (at_once / vocab).clamp(1, counted.len().max(1));
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
        let mut scattered = vec![0.0f32; if for_hidden { rows_a_chunk * width } else { 0 }];
        let mut factors = Factors::new(self.engine, hidden, weight);
        let mut total = 0.0f64;

        for chunk in counted.chunks(rows_a_chunk) {
            let rows = chunk.len();
            let logits = &mut logits[..rows * vocab];
            factors.logits(chunk, logits);
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
            if for_hidden {
                let scattered = &mut scattered[..rows * width];
                factors.times_weight(logits, scattered);
                for (row, &token) in chunk.iter().enumerate() {
                    hidden_gradient[token * width..][..width]
                        .copy_from_slice(&scattered[row * width..][..width]);
                }
            }
            if for_weight {
                factors.add_weight_gradient(logits, &mut weight_gradient);
            }
        }
        let mut saved = vec![];
        if for_hidden {
            saved.push(tensor(hidden_gradient, [self.targets.len(), width]));
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

/// States and weight as they are multiplied, and the states of one chunk.
enum Factors {
    Wide {
        hidden: FlexTensor,
        weight: FlexTensor,
        gathered: Vec<f32>,
    },
    Half {
        engine: Engine,
        hidden: FlexTensor,
        weight: FlexTensor,
        gathered: Vec<bf16>,
    },
}

impl Factors {
    fn new(engine: Option<Engine>, hidden: FlexTensor, weight: FlexTensor) -> Factors {
        match engine {
            Some(engine) => Factors::Half {
                engine,
                hidden,
                weight,
                gathered: vec![],
            },
            None => Factors::Wide {
                hidden: wide(hidden),
                weight: wide(weight),
                gathered: vec![],
            },
        }
    }

    /// `[chunk, vocab]` of the tokens of a chunk, whose states are kept until the next.
    fn logits(&mut self, chunk: &[usize], output: &mut [f32]) {
        match self {
            Factors::Wide {
                hidden,
                weight,
                gathered,
            } => {
                let (vocab, width) = (dims(weight)[0], dims(weight)[1]);
                gather(values(hidden), width, chunk, gathered);
                multiply(
                    output,
                    vocab,
                    View::new(gathered, chunk.len(), width),
                    View::new(values(weight), vocab, width).transposed(),
                    1.0,
                    false,
                    Threads::All,
                );
            }
            Factors::Half {
                engine,
                hidden,
                weight,
                gathered,
            } => {
                let (vocab, width) = (dims(weight)[0], dims(weight)[1]);
                gather(half_values(hidden), width, chunk, gathered);
                let states = Halves::new(gathered, chunk.len(), width);
                let weight = Halves::new(half_values(weight), vocab, width);
                let terms = [(states, weight.transposed())];
                halves::multiply(*engine, &terms, Sink::Wide(output));
            }
        }
    }

    /// `[chunk, hidden]` of slopes `[chunk, vocab]`, which halves round first, as their result is.
    fn times_weight(&self, slopes: &[f32], output: &mut [f32]) {
        match self {
            Factors::Wide { weight, .. } => {
                let (vocab, width) = (dims(weight)[0], dims(weight)[1]);
                multiply(
                    output,
                    width,
                    View::new(slopes, slopes.len() / vocab, vocab),
                    View::new(values(weight), vocab, width),
                    1.0,
                    false,
                    Threads::All,
                );
            }
            Factors::Half { engine, weight, .. } => {
                let (vocab, width) = (dims(weight)[0], dims(weight)[1]);
                let slopes = rounded(slopes);
                let slopes = Halves::new(&slopes, slopes.len() / vocab, vocab);
                let weight = Halves::new(half_values(weight), vocab, width);
                halves::multiply(*engine, &[(slopes, weight)], Sink::Wide(output));
            }
        }
    }

    /// Adds `slopesᵀ · states` of the chunk at hand.
    fn add_weight_gradient(&self, slopes: &[f32], output: &mut [f32]) {
        let Factors::Wide {
            weight, gathered, ..
        } = self
        else {
            unreachable!("a tracked weight is multiplied in f32")
        };
        let (vocab, width) = (dims(weight)[0], dims(weight)[1]);
        let rows = slopes.len() / vocab;
        multiply(
            output,
            width,
            View::new(slopes, rows, vocab).transposed(),
            View::new(gathered, rows, width),
            1.0,
            true,
            Threads::All,
        );
    }
}

/// The rows of some tokens, one after the other.
fn gather<T: Copy>(source: &[T], width: usize, tokens: &[usize], gathered: &mut Vec<T>) {
    gathered.clear();
    for &token in tokens {
        gathered.extend_from_slice(&source[token * width..][..width]);
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
