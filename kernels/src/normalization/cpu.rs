//! The norms on the CPU: statistics of each row in registers, the input kept for the backward pass.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::cpu::elementary::{dot, map_rows, map_rows2, vectorized};
use crate::cpu::operation::{Operation, apply, dims, input, tensor, values};

pub(super) fn rms_norm<const D: usize>(
    tensor: Tensor<D>,
    weight: Tensor<1>,
    epsilon: f64,
) -> Tensor<D> {
    apply(
        RmsNorm {
            epsilon: epsilon as f32,
        },
        [input(tensor), input(weight)],
    )
}

pub(super) fn layer_norm<const D: usize>(
    tensor: Tensor<D>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    epsilon: f64,
) -> Tensor<D> {
    apply(
        LayerNorm {
            epsilon: epsilon as f32,
        },
        [input(tensor), input(weight), input(bias)],
    )
}

#[inline(always)]
fn sum(row: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (blocks, rest) = row.as_chunks::<16>();
    for block in blocks {
        for lane in 0..16 {
            sums[lane] += block[lane];
        }
    }
    sums.iter().chain(rest).sum()
}

#[derive(Clone, Debug)]
struct RmsNorm {
    epsilon: f32,
}

impl RmsNorm {
    #[inline(always)]
    fn inverse(&self, row: &[f32]) -> f32 {
        1.0 / (dot(row, row) / row.len() as f32 + self.epsilon).sqrt()
    }
}

impl Operation<2> for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn forward(&self, inputs: [FlexTensor; 2], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let [input, weight] = inputs;
        let shape = dims(&input);
        let width = *shape.last().expect("a hidden dimension");
        let scale = values(&weight);
        let output = map_rows(
            values(&input),
            width,
            #[inline(always)]
            |output, input| {
                let inverse = self.inverse(input);
                for ((output, &x), &w) in output.iter_mut().zip(input).zip(scale) {
                    *output = x * inverse * w;
                }
            },
        );
        let saved = if tracked { vec![input, weight] } else { vec![] };
        (tensor(output, shape), saved)
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradient: FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let (input, weight) = (values(&saved[0]), values(&saved[1]));
        let gradient = values(&gradient);
        let width = weight.len();
        let for_input = wanted[0].then(|| {
            let output = map_rows2(
                input,
                gradient,
                width,
                #[inline(always)]
                |output, input, gradient| {
                    let inverse = self.inverse(input);
                    // dx = r·(g·w) − x · r³ · mean(x·g·w)
                    for ((output, &g), &w) in output.iter_mut().zip(gradient).zip(weight) {
                        *output = g * w;
                    }
                    let along = dot(output, input) / width as f32;
                    let pull = along * inverse * inverse * inverse;
                    for (output, &x) in output.iter_mut().zip(input) {
                        *output = *output * inverse - x * pull;
                    }
                },
            );
            tensor(output, dims(&saved[0]))
        });
        let for_weight = wanted[1].then(|| {
            let mut sums = vec![0.0f64; width];
            for (input, gradient) in input.chunks_exact(width).zip(gradient.chunks_exact(width)) {
                let inverse = self.inverse(input);
                for ((sum, &x), &g) in sums.iter_mut().zip(input).zip(gradient) {
                    *sum += f64::from(x * inverse * g);
                }
            }
            tensor(narrow(sums), [width])
        });
        [for_input, for_weight]
    }
}

#[derive(Clone, Debug)]
struct LayerNorm {
    epsilon: f32,
}

impl LayerNorm {
    /// Mean and 1/standard deviation of a row.
    #[inline(always)]
    fn statistics(&self, row: &[f32]) -> (f32, f32) {
        let mean = sum(row) / row.len() as f32;
        let mut sums = [0.0f32; 16];
        let (blocks, rest) = row.as_chunks::<16>();
        for block in blocks {
            for lane in 0..16 {
                let centred = block[lane] - mean;
                sums[lane] = centred.mul_add(centred, sums[lane]);
            }
        }
        let rest: f32 = rest.iter().map(|x| (x - mean) * (x - mean)).sum();
        let variance = (sums.iter().sum::<f32>() + rest) / row.len() as f32;
        (mean, 1.0 / (variance + self.epsilon).sqrt())
    }
}

impl Operation<3> for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn forward(&self, inputs: [FlexTensor; 3], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let [input, weight, bias] = inputs;
        let shape = dims(&input);
        let width = *shape.last().expect("a hidden dimension");
        let (scale, shift) = (values(&weight), values(&bias));
        let output = map_rows(
            values(&input),
            width,
            #[inline(always)]
            |output, input| {
                let (mean, inverse) = self.statistics(input);
                for (((output, &x), &w), &b) in output.iter_mut().zip(input).zip(scale).zip(shift) {
                    *output = ((x - mean) * inverse).mul_add(w, b);
                }
            },
        );
        let saved = if tracked { vec![input, weight] } else { vec![] };
        (tensor(output, shape), saved)
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradient: FlexTensor,
        wanted: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let (input, weight) = (values(&saved[0]), values(&saved[1]));
        let gradient = values(&gradient);
        let width = weight.len();
        let for_input = wanted[0].then(|| {
            let output = map_rows2(
                input,
                gradient,
                width,
                #[inline(always)]
                |output, input, gradient| {
                    let (mean, inverse) = self.statistics(input);
                    // With n = (x − μ)·r and h = g·w: dx = r·(h − mean(h) − n·mean(h·n))
                    for ((output, &g), &w) in output.iter_mut().zip(gradient).zip(weight) {
                        *output = g * w;
                    }
                    let total = sum(output);
                    let product = dot(output, input);
                    let mean_h = total / width as f32;
                    let mean_hn = (product - mean * total) * inverse / width as f32;
                    for (output, &x) in output.iter_mut().zip(input) {
                        let n = (x - mean) * inverse;
                        *output = (*output - mean_h - n * mean_hn) * inverse;
                    }
                },
            );
            tensor(output, dims(&saved[0]))
        });
        let for_weight = wanted[1].then(|| {
            let mut sums = vec![0.0f64; width];
            for (input, gradient) in input.chunks_exact(width).zip(gradient.chunks_exact(width)) {
                let (mean, inverse) = self.statistics(input);
                for ((sum, &x), &g) in sums.iter_mut().zip(input).zip(gradient) {
                    *sum += f64::from((x - mean) * inverse * g);
                }
            }
            tensor(narrow(sums), [width])
        });
        let for_bias = wanted[2].then(|| tensor(column_sums(gradient, width), [width]));
        [for_input, for_weight, for_bias]
    }
}

/// Sum over the rows of a matrix of `width` columns, in f64: the terms of a gradient may cancel.
pub(crate) fn column_sums(matrix: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0f64; width];
    vectorized(
        #[inline(always)]
        || {
            for row in matrix.chunks_exact(width) {
                for (sum, &x) in sums.iter_mut().zip(row) {
                    *sum += f64::from(x);
                }
            }
        },
    );
    narrow(sums)
}

fn narrow(sums: Vec<f64>) -> Vec<f32> {
    sums.into_iter().map(|sum| sum as f32).collect()
}
