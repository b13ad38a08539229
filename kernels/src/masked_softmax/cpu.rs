//! The masked softmax on the CPU: a row at a time, one pass forward and one backward.

use std::sync::Arc;

use burn::tensor::{Bool, Tensor};
use burn_flex::FlexTensor;

use super::ScoreOptions;
use crate::cpu::elementary::{change_rows, dot, exp_sum, map_rows_numbered, maximum, tanh};
use crate::cpu::operation::{Operation, apply, dims, input, tensor, values};

pub(super) fn dispatch(
    scores: Tensor<4>,
    visible: Tensor<4, Bool>,
    options: &ScoreOptions,
) -> Tensor<4> {
    let [batch, _, queries, keys] = scores.dims();
    assert_eq!(visible.dims(), [batch, 1, queries, keys], "what is visible");
    let softmax = Softmax {
        visible: visible.into_data().iter::<bool>().collect(),
        options: *options,
    };
    apply(softmax, [input(scores)])
}

#[derive(Clone, Debug)]
struct Softmax {
    /// `[batch, queries, keys]`
    visible: Arc<[bool]>,
    options: ScoreOptions,
}

impl Softmax {
    /// What the query of row `number` sees, of rows `[batch, heads, queries]`.
    fn visible(&self, shape: &[usize], number: usize) -> &[bool] {
        let (heads, queries, keys) = (shape[1], shape[2], shape[3]);
        let row = number / (heads * queries) * queries + number % queries;
        &self.visible[row * keys..][..keys]
    }
}

impl Operation<1> for Softmax {
    fn forward(&self, [scores]: [FlexTensor; 1], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let shape = dims(&scores);
        let ScoreOptions { scale, soft_cap } = self.options;
        let output = map_rows_numbered(
            values(&scores),
            shape[3],
            #[inline(always)]
            |number, output, scores| {
                let visible = self.visible(&shape, number);
                for ((output, &score), &visible) in output.iter_mut().zip(scores).zip(visible) {
                    let score = scale * score;
                    let score = match soft_cap {
                        Some(cap) => cap * tanh(score / cap),
                        None => score,
                    };
                    *output = if visible { score } else { f32::NEG_INFINITY };
                }
                let largest = maximum(output);
                if largest == f32::NEG_INFINITY {
                    output.fill(0.0);
                    return;
                }
                let inverse = 1.0 / exp_sum(output, largest);
                for output in output {
                    *output *= inverse;
                }
            },
        );
        let output = tensor(output, shape);
        let saved = match (tracked, soft_cap) {
            (false, _) => vec![],
            (true, None) => vec![output.clone()],
            (true, Some(_)) => vec![output.clone(), scores],
        };
        (output, saved)
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        mut gradient: FlexTensor,
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let width = dims(&gradient)[3];
        let ScoreOptions { scale, soft_cap } = self.options;
        change_rows(
            gradient.storage_mut::<f32>(),
            values(&saved[0]),
            width,
            #[inline(always)]
            |gradient, weights| {
                let mean = dot(weights, gradient);
                for (gradient, &weight) in gradient.iter_mut().zip(weights) {
                    *gradient = scale * weight * (*gradient - mean);
                }
            },
        );
        if let Some(cap) = soft_cap {
            change_rows(
                gradient.storage_mut::<f32>(),
                values(&saved[1]),
                width,
                #[inline(always)]
                |gradient, scores| {
                    for (gradient, &score) in gradient.iter_mut().zip(scores) {
                        let share = tanh(scale * score / cap);
                        *gradient *= 1.0 - share * share;
                    }
                },
            );
        }
        [Some(gradient)]
    }
}
