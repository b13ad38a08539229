//! The softmax of scores that are there as a whole, for attention that adds something to them or masks
//! them as no kernel does.

#[cfg(feature = "cpu")]
mod cpu;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cube;
pub(crate) mod reference;

use burn::tensor::{Bool, Tensor};

/// What is done to scores before the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreOptions {
    /// Multiplies the scores.
    pub scale: f32,
    /// Bounds the scaled scores: `cap · tanh(score / cap)`; above 0.
    pub soft_cap: Option<f32>,
}

/// `softmax(cap(scale · scores))` over the last dimension, of what is visible; zeros where a query sees
/// nothing, as PyTorch's `scaled_dot_product_attention` has it. Computed in f32.
///
/// Keeps the result for the backward pass, and the scores where they are capped.
///
/// # Shapes
/// - scores and the result, in the type of the scores: `[batch, heads, queries, keys]`
/// - visible: `[batch, 1, queries, keys]`
pub fn masked_softmax(
    scores: Tensor<4>,
    visible: Tensor<4, Bool>,
    options: &ScoreOptions,
) -> Tensor<4> {
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&scores) {
        return cpu::dispatch(scores, visible, options);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&scores) {
        return cube::masked_softmax(scores, visible, options);
    }
    reference::masked_softmax(scores, visible, options)
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
