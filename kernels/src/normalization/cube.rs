//! The norms on a GPU: only the input is kept, and statistics and derivative are computed from it in
//! f32. The gradient of a weight, which is seldom trained, is in plain tensor operations.

use burn::backend::Cube;
use burn::tensor::{DType, Tensor};

use super::rows::NormRows;
use crate::gpu::operation::{Operation, Value, apply, input, tensor, value};

pub(super) fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    let norm = Norm::<D> {
        epsilon,
        centred: false,
    };
    apply(norm, [input(x), input(weight)])
}

pub(super) fn layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    epsilon: f64,
) -> Tensor<D> {
    let norm = Norm::<D> {
        epsilon,
        centred: true,
    };
    apply(norm, [input(x), input(weight), input(bias)])
}

/// Inputs in order: x, weight, and the bias where the mean is taken out.
#[derive(Debug, Clone, Copy)]
struct Norm<const D: usize> {
    epsilon: f64,
    centred: bool,
}

impl<const D: usize> Norm<D> {
    /// x of mean square 1.
    fn normalized(&self, x: Tensor<D>) -> Tensor<D> {
        let mut x = x.cast(DType::F32);
        if self.centred {
            x = x.clone() - x.mean_dim(D - 1);
        }
        let factor = (x.clone().square().mean_dim(D - 1) + self.epsilon)
            .sqrt()
            .recip();
        x * factor
    }
}

impl<const D: usize, const N: usize> Operation<N> for Norm<D> {
    fn name(&self) -> &'static str {
        match self.centred {
            true => "layer_norm",
            false => "rms_norm",
        }
    }

    fn forward(&self, inputs: [Value; N], tracked: [bool; N]) -> (Value, Vec<Value>) {
        let mut inputs = inputs.into_iter();
        let mut next = || inputs.next().expect("N inputs");
        let (x, weight) = (next(), next());
        // Without a mean to take out there is no bias, and nothing is read of it.
        let bias = match self.centred {
            true => {
                let dtype = tensor::<1>(weight.clone()).dtype();
                value(tensor::<1>(next()).cast(dtype))
            }
            false => weight.clone(),
        };
        let epsilon = self.epsilon as f32;
        let output = Cube::norm_rows(x.clone(), weight.clone(), bias, epsilon, self.centred);
        let saved = match tracked.contains(&true) {
            true => vec![x, weight],
            false => vec![],
        };
        (output, saved)
    }

    fn backward(
        &self,
        saved: Vec<Value>,
        gradient: Value,
        wanted: [bool; N],
    ) -> [Option<Value>; N] {
        let [x, weight]: [Value; 2] = saved.try_into().expect("what forward kept");
        let mut found = [const { None }; N];
        if wanted[0] {
            let (x, weight, gradient) = (x.clone(), weight.clone(), gradient.clone());
            let epsilon = self.epsilon as f32;
            let of_x = Cube::norm_rows_backward(x, weight, gradient, epsilon, self.centred);
            found[0] = Some(of_x);
        }
        if !wanted[1..].contains(&true) {
            return found;
        }
        let weight_dtype = tensor::<1>(weight).dtype();
        let gradient = tensor::<D>(gradient).cast(DType::F32);
        let normalized = self.normalized(tensor::<D>(x));
        let columns = normalized.dims()[D - 1];
        let rows = normalized.dims().iter().product::<usize>() / columns;
        let summed = |tensor: Tensor<D>| {
            let sum = tensor
                .reshape([rows, columns])
                .sum_dim(0)
                .reshape([columns]);
            value::<1>(sum.cast(weight_dtype))
        };
        if wanted[1] {
            found[1] = Some(summed(gradient.clone() * normalized.clone()));
        }
        if wanted.get(2) == Some(&true) {
            found[2] = Some(summed(gradient.clone()));
        }
        found
    }
}
