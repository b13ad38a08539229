//! The norm of many tensors together, which gradients are clipped by.

#[cfg(feature = "cpu")]
mod cpu;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cube;
pub(crate) mod reference;

use burn::tensor::Tensor;

/// The 2-norm of all elements of all tensors, `[1]`; none of no tensors. The same tensors give the same
/// norm to the bit. On a GPU a kernel takes several tensors.
///
/// # Shapes
/// - tensors: `[elements]` each, f32, outside autodiff
pub fn global_norm(tensors: Vec<Tensor<1>>) -> Option<Tensor<1>> {
    let first = tensors.first()?;
    #[cfg(feature = "cpu")]
    if crate::on_cpu(first) {
        return Some(cpu::global_norm(tensors));
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(first) {
        return Some(cube::global_norm(tensors));
    }
    let _ = first;
    Some(reference::global_norm(tensors))
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use super::*;
    use crate::cpu::testing::random;

    #[test]
    fn the_kernel_matches_the_reference() {
        let of = |length, seed| random([length], seed).inner();
        // The last takes several blocks.
        let tensors = vec![of(1, 1), of(33, 2), of(200_001, 3)];
        let number = |tensor: Tensor<1>| tensor.into_scalar::<f32>();
        let found = number(global_norm(tensors.clone()).unwrap());
        let expected = number(reference::global_norm(tensors));
        assert!((found - expected).abs() < 1e-5 * expected);
        assert!(global_norm(vec![]).is_none());
        let infinite = of(7, 1) / 0.0;
        assert!(!number(global_norm(vec![of(7, 2), infinite]).unwrap()).is_finite());
    }
}
