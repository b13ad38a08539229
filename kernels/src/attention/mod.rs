//! Attention over packed rows: block-diagonal by segment, causal or not, grouped-query heads,
//! optional sliding window. Memory is linear in `seq`, but for heads wider than 256 on a GPU, which
//! are in plain operations.

#[cfg(feature = "cpu")]
pub(crate) mod cpu;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cube;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod portable;
pub(crate) mod reference;

use burn::tensor::{Int, Tensor};

/// What attends to what, beside the segments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionOptions {
    /// A token sees itself and earlier tokens of its segment only.
    pub causal: bool,
    /// A token sees at most this many tokens of its segment, itself included (Mistral's sliding
    /// window): key `j` is visible from query `i` when `i - j < window`, and `j - i < window`
    /// where attention is not causal.
    pub window: Option<usize>,
    /// Multiplies the scores before the softmax, usually `head_dim^-0.5`.
    pub scale: f32,
    /// Bounds the scaled scores: `cap · tanh(score / cap)` (Gemma 2, Bello et al. 2016); above 0.
    pub soft_cap: Option<f32>,
}

/// `softmax(cap(scale · Q Kᵀ) + mask) V` (Vaswani et al. 2017), each segment for itself.
///
/// A segment is a run of equal positive numbers in a row of `segments`; 0 is padding, whose output
/// is zero and which nothing attends to. `heads` is a multiple of `kv_heads`; query head `h` reads
/// key-value head `h / (heads / kv_heads)` (Ainslie et al. 2023).
///
/// # Shapes
/// - query: `[batch, seq, heads, head_dim]`
/// - key, value: `[batch, seq, kv_heads, head_dim]`
/// - segments: `[batch, seq]`
/// - returns: `[batch, seq, heads, head_dim]`
pub fn attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    segments: Tensor<2, Int>,
    options: &AttentionOptions,
) -> Tensor<4> {
    let [batch, seq, heads, head_dim] = query.dims();
    let [_, keys, kv_heads, _] = key.dims();
    assert_eq!(key.dims(), [batch, keys, kv_heads, head_dim], "keys");
    assert_eq!(value.dims(), key.dims(), "values");
    assert_eq!(segments.dims(), [batch, seq], "segments");
    assert!(heads.is_multiple_of(kv_heads.max(1)), "heads of queries");
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&query) {
        return cpu::dispatch(query, key, value, segments, options);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if cube::serves(&query, &key, &value) {
        return cube::attention(query, key, value, segments, options);
    }
    reference::attention(query, key, value, segments, options)
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
