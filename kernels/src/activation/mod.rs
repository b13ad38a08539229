//! The activations of feed-forward blocks.

#[cfg(feature = "cpu")]
pub(crate) mod cpu;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cube;
pub(crate) mod reference;

use burn::tensor::Tensor;

/// `silu(gate) · up` with `silu(x) = x · sigmoid(x)` (Shazeer 2020). Keeps only its inputs for the
/// backward pass.
///
/// # Shapes
/// - gate, up and the result: the same
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&gate) {
        return cpu::swiglu(gate, up);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&gate) {
        return cube::gated(cube::Function::Silu, gate, up);
    }
    reference::swiglu(gate, up)
}

/// `gelu(gate) · up` (Shazeer 2020); see [`gelu`]. Keeps only its inputs for the backward pass.
///
/// # Shapes
/// - gate, up and the result: the same
pub fn geglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&gate) {
        return cpu::geglu(gate, up);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&gate) {
        return cube::gated(cube::Function::Gelu, gate, up);
    }
    reference::geglu(gate, up)
}

/// [`geglu`] with [`gelu_tanh`].
pub fn geglu_tanh<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&gate) {
        return cpu::geglu_tanh(gate, up);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&gate) {
        return cube::gated(cube::Function::GeluTanh, gate, up);
    }
    reference::geglu_tanh(gate, up)
}

/// `x · Φ(x)` with the exact normal distribution function (Hendrycks and Gimpel 2016).
pub fn gelu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&input) {
        return cpu::gelu(input);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&input) {
        return cube::alone(cube::Function::Gelu, input);
    }
    reference::gelu(input)
}

/// The tanh approximation of [`gelu`]: `0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
pub fn gelu_tanh<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&input) {
        return cpu::gelu_tanh(input);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&input) {
        return cube::alone(cube::Function::GeluTanh, input);
    }
    reference::gelu_tanh(input)
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
