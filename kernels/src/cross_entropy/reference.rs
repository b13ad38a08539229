//! Cross-entropy over whole logits, in plain tensor operations.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Int, Tensor};

use super::IGNORED_TARGET;
use crate::matmul;

/// See [`linear_cross_entropy`](crate::linear_cross_entropy).
pub fn linear_cross_entropy(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    soft_cap: Option<f32>,
) -> Tensor<1> {
    let tokens = hidden.dims()[0];
    let logits = matmul(hidden, weight.transpose()).cast(DType::F32);
    let logits = match soft_cap {
        Some(cap) => crate::reference::soft_cap(logits, cap),
        None => logits,
    };
    let ignored = targets.clone().equal_elem(IGNORED_TARGET);
    let index = targets.mask_fill(ignored.clone(), 0).reshape([tokens, 1]);
    let picked = log_softmax(logits, 1).gather(1, index).reshape([tokens]);
    picked.mask_fill(ignored, 0.0).sum().neg()
}
