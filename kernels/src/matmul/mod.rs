//! The matrix product, f32 computed in f32.
//!
//! On a GPU burn times a dozen kernels for every shape that it meets and takes the fastest. For f32
//! those that round their operands to TF32 (10 bits of fraction) win, so that a result depends on
//! what was fastest that day, and a program compiles for a minute before its first step. Here the
//! kernel follows from the type.

#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub(crate) mod cube;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub(crate) mod planned;

use burn::tensor::Tensor;

/// `lhs · rhs`, each matrix of the leading dimensions for itself; a leading dimension of 1 is
/// repeated.
///
/// # Shapes
/// - lhs: `[…, rows, inner]`, rhs: `[…, inner, columns]`
/// - returns: `[…, rows, columns]`
pub fn matmul<const D: usize>(lhs: Tensor<D>, rhs: Tensor<D>) -> Tensor<D> {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::holds(&lhs) {
        return cube::matmul(lhs, rhs);
    }
    lhs.matmul(rhs)
}
