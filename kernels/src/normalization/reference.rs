//! The norms in plain tensor operations; statistics in f32 whatever the input's type.

use burn::tensor::{DType, Tensor};

use super::Norm;

/// See [`rms_norm`](crate::rms_norm).
pub fn rms_norm<const D: usize>(input: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    let dtype = input.dtype();
    let wide = input.cast(DType::F32);
    let mean_square = wide.clone().square().mean_dim(D - 1);
    let normalized = wide * (mean_square + epsilon).sqrt().recip();
    if weight.dtype() == DType::F32 {
        return (normalized * weight.unsqueeze::<D>()).cast(dtype);
    }
    normalized.cast(dtype) * weight.unsqueeze::<D>()
}

/// See [`layer_norm`](crate::layer_norm).
pub fn layer_norm<const D: usize>(
    input: Tensor<D>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    epsilon: f64,
) -> Tensor<D> {
    let dtype = input.dtype();
    let wide = input.cast(DType::F32);
    let centred = wide.clone() - wide.mean_dim(D - 1);
    let variance = centred.clone().square().mean_dim(D - 1);
    let normalized = centred * (variance + epsilon).sqrt().recip();
    normalized.cast(dtype) * weight.unsqueeze::<D>() + bias.unsqueeze::<D>()
}

/// See [`residual_norm`](crate::residual_norm).
pub fn residual_norm<const D: usize>(
    x: Tensor<D>,
    update: Option<Tensor<D>>,
    norm: Norm,
) -> (Tensor<D>, Tensor<D>) {
    let sum = match update {
        Some(update) => x + update,
        None => x,
    };
    let normed = match norm.bias {
        Some(bias) => layer_norm(sum.clone(), norm.weight, bias, norm.epsilon),
        None => rms_norm(sum.clone(), norm.weight, norm.epsilon),
    };
    (sum, normed)
}
