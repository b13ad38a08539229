//! Rotary position embedding, rotating halves as hub checkpoints do.

#[cfg(feature = "cpu")]
pub(crate) mod cpu;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cube;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod kernel;
pub(crate) mod reference;

use burn::tensor::Tensor;

/// `x · cos + rotate_half(x) · sin` with `rotate_half([x₁, x₂]) = [−x₂, x₁]` (Su et al. 2021, in the
/// half-split layout of Transformers). `cos` and `sin` are constants: no gradient reaches them.
/// Where they are narrower than a head, the rest of each head stays as it is.
///
/// # Shapes
/// - input: `[batch, seq, heads, head_dim]`
/// - cos, sin: `[batch, seq, rotated]` with an even `rotated ≤ head_dim`
/// - returns: `[batch, seq, heads, head_dim]`
pub fn rotary(input: Tensor<4>, cos: Tensor<3>, sin: Tensor<3>) -> Tensor<4> {
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&input) {
        return cpu::dispatch(input, cos, sin);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&input) {
        return cube::rotary(input, cos, sin);
    }
    reference::rotary(input, cos, sin)
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
