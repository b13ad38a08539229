//! Output projection and cross-entropy in one, without the logits of all tokens at once.

#[cfg(feature = "cpu")]
pub(crate) mod cpu;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cube;
pub(crate) mod reference;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod rows;

use burn::tensor::{Int, Tensor};

/// Target of a token that takes no part in the loss, as in PyTorch.
pub const IGNORED_TARGET: i64 = -100;

/// `Σ −log softmax(cap(h Wᵀ))[target]` over the tokens whose target is not [`IGNORED_TARGET`].
///
/// `soft_cap` bounds the logits by `cap · tanh(logit / cap)`, as Gemma 2 does; above 0.
///
/// The caller divides by the step's number of supervised tokens. The kernels go through the
/// tokens in chunks and computes the gradient in the same pass (as Liger Kernel does, Hsu et al.
/// 2024), so that no `[tokens, vocab]` tensor ever exists.
///
/// # Shapes
/// - hidden: `[tokens, hidden]`, weight: `[vocab, hidden]`, targets: `[tokens]`
/// - returns: `[1]`
pub fn linear_cross_entropy(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    soft_cap: Option<f32>,
) -> Tensor<1> {
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&hidden) {
        return cpu::dispatch(hidden, weight, targets, soft_cap);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&hidden) {
        return cube::linear_cross_entropy(hidden, weight, targets, soft_cap);
    }
    reference::linear_cross_entropy(hidden, weight, targets, soft_cap)
}

/// Whether there is a kernel for these states, so that the logits of all tokens never exist at once.
/// Where references are asked for the answer is yes too: the reference stands for the kernel.
pub fn fuses_cross_entropy(hidden: &Tensor<2>) -> bool {
    if crate::references() {
        return true;
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(hidden) {
        return true;
    }
    crate::on_cpu(hidden)
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
