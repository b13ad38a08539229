//! Attention in plain tensor operations: the scores of every pair of a row, masked.

use burn::tensor::activation::softmax;
use burn::tensor::{Bool, DType, Int, Tensor};

use super::AttentionOptions;
use crate::matmul;

/// See [`attention`](crate::attention). Holds `[batch, heads, seq, seq]` scores.
pub fn attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    segments: Tensor<2, Int>,
    options: &AttentionOptions,
) -> Tensor<4> {
    let [batch, seq, heads, head_dim] = query.dims();
    let device = query.device();

    let query = query.swap_dims(1, 2);
    let key = spread_heads(key, heads);
    let value = spread_heads(value, heads);

    let rows = segments.clone().reshape([batch, 1, seq, 1]);
    let columns = segments.clone().reshape([batch, 1, 1, seq]);
    let mut hidden: Tensor<4, Bool> = rows
        .repeat_dim(3, seq)
        .not_equal(columns.repeat_dim(2, seq));
    if options.causal || options.window.is_some() {
        let index = Tensor::<1, Int>::arange(0..seq as i64, &device);
        let difference = index
            .clone()
            .reshape([1, 1, seq, 1])
            .repeat_dim(3, seq)
            .sub(index.reshape([1, 1, 1, seq]).repeat_dim(2, seq));
        if options.causal {
            hidden = hidden.bool_or(difference.clone().lower_elem(0).repeat_dim(0, batch));
        }
        if let Some(window) = options.window {
            hidden = hidden.bool_or(
                difference
                    .abs()
                    .greater_equal_elem(window as i64)
                    .repeat_dim(0, batch),
            );
        }
    }
    // Scaled before the product, where f16 could overflow; statistics in f32.
    let dtype = query.dtype();
    let scores = matmul(query * options.scale, key.swap_dims(2, 3));
    let scores = scores.cast(DType::F32);
    let scores = match options.soft_cap {
        Some(cap) => soft_cap(scores, cap),
        None => scores,
    };
    let scores = scores.mask_fill(hidden.repeat_dim(1, heads), -1e30);
    let weights = softmax(scores, 3).cast(dtype);
    let output = matmul(weights, value).swap_dims(1, 2);
    let padding = segments.equal_elem(0).reshape([batch, seq, 1, 1]);
    output.mask_fill(padding.repeat_dim(2, heads).repeat_dim(3, head_dim), 0.0)
}

/// `cap · tanh(x / cap)`: nearly `x` where that is small against `cap`, and never beyond it.
pub fn soft_cap<const D: usize>(tensor: Tensor<D>, cap: f32) -> Tensor<D> {
    (tensor / cap).tanh() * cap
}

/// Repeats each key-value head for the query heads that read it.
///
/// # Shapes
/// - tensor: `[batch, seq, kv_heads, head_dim]`
/// - returns: `[batch, heads, seq, head_dim]`
pub fn spread_heads(tensor: Tensor<4>, heads: usize) -> Tensor<4> {
    let [batch, seq, kv_heads, head_dim] = tensor.dims();
    let tensor = tensor.swap_dims(1, 2);
    if heads == kv_heads {
        return tensor;
    }
    tensor
        .reshape([batch, kv_heads, 1, seq, head_dim])
        .repeat_dim(2, heads / kv_heads)
        .reshape([batch, heads, seq, head_dim])
}
