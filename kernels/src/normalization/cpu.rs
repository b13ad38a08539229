//! The norms on the CPU: statistics of each row in registers, the input kept for the backward pass. A sum
//! is normalised where it is made, and what else it is used for adds its gradient in the same pass.

use burn::tensor::{DType, Tensor, bf16};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{Form, Norm};
use crate::cpu::elementary::{block_rows, dot, filled_beside, map_rows, map_rows2, vectorized};
use crate::cpu::operation::{JointOperation, apply_joint, dims, input, owned, tensor, values};
use crate::joint::Results;

/// Whether a sum of this type is rounded here as it is when it is stored.
pub(super) fn rounds(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16)
}

/// The results of a form: the norm last.
pub(super) fn apply<const D: usize>(
    form: Form,
    x: Tensor<D>,
    update: Option<Tensor<D>>,
    norm: Norm,
) -> Vec<Tensor<D>> {
    let operation = RowNorm {
        form,
        centred: norm.bias.is_some(),
        rounded: x.dtype() == DType::BF16,
        epsilon: norm.epsilon as f32,
    };
    let mut inputs = vec![input(x)];
    inputs.extend(update.map(input));
    inputs.push(input(norm.weight));
    inputs.extend(norm.bias.map(input));
    apply_joint(operation, inputs)
}

/// Inputs in order: x, what is added to it if something is, the weight, the bias if it is centred.
#[derive(Clone, Debug)]
struct RowNorm {
    form: Form,
    centred: bool,
    /// Whether a sum is rounded to bf16 before it is normalised.
    rounded: bool,
    epsilon: f32,
}

impl RowNorm {
    /// Mean, 0 where it stays, and the reciprocal of the standard deviation of a row.
    #[inline(always)]
    fn statistics(&self, row: &[f32]) -> (f32, f32) {
        let width = row.len() as f32;
        let (mean, squares) = match self.centred {
            true => {
                let mean = sum(row) / width;
                (mean, squares_around(row, mean))
            }
            false => (0.0, dot(row, row)),
        };
        (mean, 1.0 / (squares / width + self.epsilon).sqrt())
    }

    #[inline(always)]
    fn normalize(&self, output: &mut [f32], input: &[f32], scale: &[f32], shift: &[f32]) {
        let (mean, inverse) = self.statistics(input);
        let elements = output.iter_mut().zip(input).zip(scale);
        match self.centred {
            true => {
                for (((output, &x), &w), &b) in elements.zip(shift) {
                    *output = ((x - mean) * inverse).mul_add(w, b);
                }
            }
            false => {
                for ((output, &x), &w) in elements {
                    *output = x * inverse * w;
                }
            }
        }
    }

    /// The gradient of a row.
    #[inline(always)]
    fn pull_back(&self, output: &mut [f32], input: &[f32], gradient: &[f32], scale: &[f32]) {
        let (mean, inverse) = self.statistics(input);
        let width = input.len() as f32;
        for ((output, &g), &w) in output.iter_mut().zip(gradient).zip(scale) {
            *output = g * w;
        }
        match self.centred {
            // With n = (x − μ)·r and h = g·w: dx = r·(h − mean(h) − n·mean(h·n))
            true => {
                let total = sum(output);
                let product = dot(output, input);
                let mean_h = total / width;
                let mean_hn = (product - mean * total) * inverse / width;
                for (output, &x) in output.iter_mut().zip(input) {
                    let n = (x - mean) * inverse;
                    *output = (*output - mean_h - n * mean_hn) * inverse;
                }
            }
            // dx = r·(g·w) − x · r³ · mean(x·g·w)
            false => {
                let along = dot(output, input) / width;
                let pull = along * inverse * inverse * inverse;
                for (output, &x) in output.iter_mut().zip(input) {
                    *output = *output * inverse - x * pull;
                }
            }
        }
    }

    /// The sum of both, written where the second was if nothing else holds it, and its norm.
    fn sum_and_norm(
        &self,
        [x, update]: [FlexTensor; 2],
        scale: &[f32],
        shift: &[f32],
    ) -> [FlexTensor; 2] {
        let shape = dims(&x);
        let width = scale.len();
        let mut sum = owned(update);
        let x = values(&x);
        let block = block_rows(x.len() / width.max(1), width) * width;
        let normed = filled_beside(sum.storage_mut::<f32>(), block, |number, normed, sum| {
            let x = &x[number * block..];
            vectorized(
                #[inline(always)]
                || {
                    let rows = sum.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    for (normed, (sum, x)) in normed.chunks_exact_mut(width).zip(rows) {
                        for (sum, &x) in sum.iter_mut().zip(x) {
                            *sum += x;
                        }
                        if self.rounded {
                            for sum in sum.iter_mut() {
                                *sum = bf16::from_f32(*sum).to_f32();
                            }
                        }
                        self.normalize(normed, sum, scale, shift);
                    }
                },
            );
        });
        [sum, tensor(normed, shape)]
    }

    /// The gradient of what is normalised: through the norm, and beside it.
    fn of_input(
        &self,
        input: &FlexTensor,
        scale: &[f32],
        through: Option<FlexTensor>,
        beside: Option<FlexTensor>,
    ) -> Option<FlexTensor> {
        let (Some(through), width) = (through, scale.len()) else {
            return beside;
        };
        let (rows, gradient) = (values(input), values(&through));
        let Some(beside) = beside else {
            let output = map_rows2(
                rows,
                gradient,
                width,
                #[inline(always)]
                |output, input, gradient| self.pull_back(output, input, gradient, scale),
            );
            return Some(tensor(output, dims(input)));
        };
        let mut total = owned(beside);
        let block = block_rows(rows.len() / width.max(1), width) * width;
        total
            .storage_mut::<f32>()
            .par_chunks_mut(block)
            .zip(rows.par_chunks(block))
            .zip(gradient.par_chunks(block))
            .for_each(|((total, rows), gradient)| {
                let mut pulled = vec![0.0; width];
                vectorized(
                    #[inline(always)]
                    || {
                        let gradients = gradient.chunks_exact(width);
                        let rows = rows.chunks_exact(width).zip(gradients);
                        for (total, (row, gradient)) in total.chunks_exact_mut(width).zip(rows) {
                            self.pull_back(&mut pulled, row, gradient, scale);
                            for (total, &pulled) in total.iter_mut().zip(&pulled) {
                                *total += pulled;
                            }
                        }
                    },
                );
            });
        Some(total)
    }

    fn of_weight(&self, input: &[f32], gradient: &[f32], width: usize) -> FlexTensor {
        let mut sums = vec![0.0f64; width];
        vectorized(
            #[inline(always)]
            || {
                for (row, gradient) in input.chunks_exact(width).zip(gradient.chunks_exact(width)) {
                    let (mean, inverse) = self.statistics(row);
                    for ((sum, &x), &g) in sums.iter_mut().zip(row).zip(gradient) {
                        *sum += f64::from((x - mean) * inverse * g);
                    }
                }
            },
        );
        tensor(narrow(sums), [width])
    }
}

impl JointOperation for RowNorm {
    fn in_place(&self) -> bool {
        self.form == Form::Added
    }

    fn name(&self) -> &'static str {
        match self.centred {
            true => "layer_norm",
            false => "rms_norm",
        }
    }

    fn forward(&self, inputs: Vec<FlexTensor>, tracked: bool) -> Results<FlexTensor> {
        let mut inputs = inputs.into_iter();
        let mut next = || inputs.next().expect("all inputs");
        let x = next();
        let update = (self.form == Form::Added).then(&mut next);
        let weight = next();
        let bias = self.centred.then(&mut next);
        let (scale, shift) = (values(&weight), bias.as_ref().map_or(&[][..], values));
        let (input, results) = match update {
            Some(update) => {
                let [sum, normed] = self.sum_and_norm([x, update], scale, shift);
                (sum.clone(), vec![sum, normed])
            }
            None => {
                let normed = map_rows(
                    values(&x),
                    scale.len(),
                    #[inline(always)]
                    |output, input| self.normalize(output, input, scale, shift),
                );
                let normed = tensor(normed, dims(&x));
                match self.form {
                    Form::Alone => (x, vec![normed]),
                    _ => (x.clone(), vec![x, normed]),
                }
            }
        };
        let saved = match tracked {
            true => vec![input, weight],
            false => vec![],
        };
        (results, saved)
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        mut gradients: Vec<Option<FlexTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<FlexTensor>> {
        let [input, weight]: [FlexTensor; 2] = saved.try_into().expect("what forward kept");
        let scale = values(&weight);
        let mut results = vec![None; wanted.len()];
        let through = gradients.pop().flatten();
        let beside = gradients.pop().flatten();
        if let Some(through) = &through {
            let gradient = values(through);
            let (weight, bias) = (self.form.weight(), self.form.weight() + 1);
            if wanted[weight] {
                results[weight] = Some(self.of_weight(values(&input), gradient, scale.len()));
            }
            if self.centred && wanted[bias] {
                let sums = column_sums(gradient, scale.len());
                results[bias] = Some(tensor(sums, [scale.len()]));
            }
        }
        if wanted[..self.form.weight()].contains(&true) {
            let of_input = self.of_input(&input, scale, through, beside);
            for result in &mut results[..self.form.weight()] {
                *result = of_input.clone();
            }
        }
        results
    }
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

#[inline(always)]
fn squares_around(row: &[f32], mean: f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let (blocks, rest) = row.as_chunks::<16>();
    for block in blocks {
        for lane in 0..16 {
            let centred = block[lane] - mean;
            sums[lane] = centred.mul_add(centred, sums[lane]);
        }
    }
    let rest: f32 = rest.iter().map(|x| (x - mean) * (x - mean)).sum();
    sums.iter().sum::<f32>() + rest
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
