//! RMSNorm and LayerNorm over the last dimension.

#[cfg(feature = "cpu")]
pub(crate) mod cpu;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cube;
pub(crate) mod reference;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod rows;

use burn::tensor::Tensor;

/// `x / √(mean(x²) + ε) · weight` (Zhang and Sennrich 2019), in the type of the input. A weight in f32
/// beside an input in half precision is multiplied before the result is rounded.
///
/// # Shapes
/// - input: `[…, hidden]`, weight: `[hidden]`, returns `[…, hidden]`
pub fn rms_norm<const D: usize>(input: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&input) {
        return cpu::rms_norm(input, weight, epsilon);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&input) {
        return cube::rms_norm(input, weight, epsilon);
    }
    reference::rms_norm(input, weight, epsilon)
}

/// `(x − mean(x)) / √(var(x) + ε) · weight + bias`, with the biased variance (Ba et al. 2016).
///
/// # Shapes
/// - input: `[…, hidden]`, weight, bias: `[hidden]`, returns `[…, hidden]`
pub fn layer_norm<const D: usize>(
    input: Tensor<D>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    epsilon: f64,
) -> Tensor<D> {
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&input) {
        return cpu::layer_norm(input, weight, bias, epsilon);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&input) {
        return cube::layer_norm(input, weight, bias, epsilon);
    }
    reference::layer_norm(input, weight, bias, epsilon)
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
