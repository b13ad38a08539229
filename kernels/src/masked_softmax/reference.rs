//! The masked softmax in plain tensor operations.

use burn::tensor::activation::softmax;
use burn::tensor::{Bool, DType, Tensor};

use super::ScoreOptions;
use crate::attention::reference::soft_cap;

/// See [`masked_softmax`](crate::masked_softmax).
pub fn masked_softmax(
    scores: Tensor<4>,
    visible: Tensor<4, Bool>,
    options: &ScoreOptions,
) -> Tensor<4> {
    let (dtype, [_, heads, _, keys]) = (scores.dtype(), scores.dims());
    let nothing = visible.clone().any_dim(3).bool_not();
    let mut scores = scores.cast(DType::F32).mul_scalar(options.scale);
    if let Some(cap) = options.soft_cap {
        scores = soft_cap(scores, cap);
    }
    let scores = scores.mask_fill(visible.bool_not().repeat_dim(1, heads), -1e30);
    softmax(scores, 3)
        .mask_fill(nothing.repeat_dim(1, heads).repeat_dim(3, keys), 0.0)
        .cast(dtype)
}
