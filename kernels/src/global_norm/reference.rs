//! The norm in plain tensor operations.

use burn::tensor::Tensor;

/// See [`global_norm`](crate::global_norm); of one tensor at least.
pub fn global_norm(tensors: Vec<Tensor<1>>) -> Tensor<1> {
    let squares = tensors.into_iter().map(|tensor| tensor.square().sum());
    Tensor::cat(squares.collect(), 0).sum().sqrt()
}
