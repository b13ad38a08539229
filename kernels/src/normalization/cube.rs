//! The norms on a GPU: only the input is kept, statistics and derivative are computed from it in f32,
//! in plain tensor operations that burn fuses.

use burn::tensor::{DType, Tensor};

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
    /// x of mean square 1, and what it was multiplied with.
    fn normalized(&self, x: Tensor<D>) -> (Tensor<D>, Tensor<D>) {
        let mut x = x.cast(DType::F32);
        if self.centred {
            x = x.clone() - x.mean_dim(D - 1);
        }
        let factor = (x.clone().square().mean_dim(D - 1) + self.epsilon).sqrt().recip();
        (x * factor.clone(), factor)
    }
}

fn wide<const D: usize>(weight: Value) -> Tensor<D> {
    tensor::<1>(weight).cast(DType::F32).unsqueeze::<D>()
}

impl<const D: usize, const N: usize> Operation<N> for Norm<D> {
    fn forward(&self, inputs: [Value; N], tracked: [bool; N]) -> (Value, Vec<Value>) {
        let mut inputs = inputs.into_iter();
        let mut next = || inputs.next().expect("N inputs");
        let (x, weight) = (next(), next());
        let plain = tensor::<D>(x.clone());
        let dtype = plain.dtype();
        let (normalized, _) = self.normalized(plain);
        // As the reference rounds: before a weight of the same type, after one in f32.
        let rounds_first = tensor::<1>(weight.clone()).dtype() != DType::F32;
        let normalized = match rounds_first {
            true => normalized.cast(dtype).cast(DType::F32),
            false => normalized,
        };
        let mut output = normalized * wide(weight.clone());
        if self.centred {
            output = output + wide(next());
        }
        let saved = match tracked.contains(&true) {
            true => vec![x, weight],
            false => vec![],
        };
        (value(output.cast(dtype)), saved)
    }

    fn backward(&self, saved: Vec<Value>, gradient: Value, wanted: [bool; N]) -> [Option<Value>; N] {
        let [x, weight]: [Value; 2] = saved.try_into().expect("what forward kept");
        let weight_dtype = tensor::<1>(weight.clone()).dtype();
        let gradient = tensor::<D>(gradient);
        let dtype = gradient.dtype();
        let gradient = gradient.cast(DType::F32);
        let (normalized, factor) = self.normalized(tensor::<D>(x));
        let columns = normalized.dims()[D - 1];
        let rows = normalized.dims().iter().product::<usize>() / columns;
        let summed = |tensor: Tensor<D>| {
            let sum = tensor.reshape([rows, columns]).sum_dim(0).reshape([columns]);
            value::<1>(sum.cast(weight_dtype))
        };

        let mut found = [const { None }; N];
        if wanted[1] {
            found[1] = Some(summed(gradient.clone() * normalized.clone()));
        }
        if wanted.get(2) == Some(&true) {
            found[2] = Some(summed(gradient.clone()));
        }
        if wanted[0] {
            let inward = gradient * wide(weight);
            let along = (inward.clone() * normalized.clone()).mean_dim(D - 1);
            let mut of_x = inward.clone() - normalized * along;
            if self.centred {
                of_x = of_x - inward.mean_dim(D - 1);
            }
            found[0] = Some(value((of_x * factor).cast(dtype)));
        }
        found
    }
}
