//! The LoRA linear: a frozen product and its low-rank correction, on activations.

#[cfg(feature = "cpu")]
pub(crate) mod cpu;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub(crate) mod cube;
#[cfg(feature = "cpu")]
mod halves;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod products;
pub(crate) mod reference;

use burn::tensor::Tensor;

use crate::quantized::{QuantizedWeight, quantized_linear};

/// The low-rank part of one linear layer (Hu et al. 2021).
#[derive(Debug, Clone)]
pub struct Lora {
    /// `[rank, in]`, f32 or the type of the input
    pub a: Tensor<2>,
    /// `[out, rank]`, likewise
    pub b: Tensor<2>,
    /// `alpha / rank`, or `alpha / √rank` for rsLoRA.
    pub scaling: f32,
    /// Probability with which an input of `a` is dropped; 0 outside training.
    pub dropout: f32,
    /// Fixes which inputs are dropped: the same seed gives the same mask, forward and backward.
    pub dropout_seed: u64,
}

/// `y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ`, without ever forming `W + scaling · B A`.
///
/// With `weight` untracked no weight gradient is computed: 4N instead of 6N operations a token.
///
/// # Shapes
/// - input: `[batch, seq, in]`
/// - weight: `[out, in]`, bias: `[out]`
/// - returns: `[batch, seq, out]`
pub fn lora_linear(
    input: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    lora: Option<&Lora>,
) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&input) {
        return one(input, FrozenWeight::Dense(&weight), bias, lora);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if lora.is_some() && crate::gpu::serves(&input) {
        return one(input, FrozenWeight::Dense(&weight), bias, lora);
    }
    let mask = lora.and_then(|lora| mask(&input, lora));
    reference::lora_linear(input, weight, bias, lora, mask)
}

/// One of several linears that read the same input.
#[derive(Debug, Clone)]
pub struct LinearPart<'a> {
    /// `[out, in]`
    pub weight: FrozenWeight<'a>,
    /// `[out]`
    pub bias: Option<Tensor<1>>,
    pub lora: Option<Lora>,
}

/// What a linear multiplies with.
#[derive(Debug, Clone, Copy)]
pub enum FrozenWeight<'a> {
    Dense(&'a Tensor<2>),
    Quantized(&'a QuantizedWeight),
}

/// [`lora_linear`], or [`quantized_linear`](crate::quantized_linear), of each part: queries, keys and
/// values, or both branches of a gated block. Together they read the input once, and the input gets one
/// gradient; where nothing is dropped, their `a` are one product.
///
/// # Shapes
/// - input: `[batch, seq, in]`
/// - returns: `[batch, seq, out]` of each part
pub fn lora_linears(input: Tensor<3>, parts: Vec<LinearPart<'_>>) -> Vec<Tensor<3>> {
    if parts.len() <= MOST_PARTS && serves(&input, &parts) {
        return dispatch(input, parts);
    }
    let one = |part: LinearPart<'_>| {
        let (input, lora) = (input.clone(), part.lora.as_ref());
        match part.weight {
            FrozenWeight::Dense(weight) => lora_linear(input, weight.clone(), part.bias, lora),
            FrozenWeight::Quantized(weight) => quantized_linear(input, weight, part.bias, lora),
        }
    };
    parts.into_iter().map(one).collect()
}

/// What one operation takes.
const MOST_PARTS: usize = 3;

/// Whether there is a kernel for such parts: on a GPU, plain linears are plain products.
fn serves(input: &Tensor<3>, parts: &[LinearPart<'_>]) -> bool {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(input) {
        return parts.iter().any(|part| part.lora.is_some());
    }
    let _ = parts;
    crate::on_cpu(input)
}

/// Of parts that [`serves`] takes.
fn dispatch(input: Tensor<3>, parts: Vec<LinearPart<'_>>) -> Vec<Tensor<3>> {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&input) {
        return cube::linears(input, parts);
    }
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&input) {
        return cpu::dispatch(input, parts);
    }
    unreachable!("{} parts on {:?}", parts.len(), input.device())
}

/// Likewise, of one part.
#[cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu"))]
pub(crate) fn one(
    input: Tensor<3>,
    weight: FrozenWeight<'_>,
    bias: Option<Tensor<1>>,
    lora: Option<&Lora>,
) -> Tensor<3> {
    let lora = lora.cloned();
    let part = LinearPart { weight, bias, lora };
    let mut found = dispatch(input, vec![part]);
    found.pop().expect("a result a part")
}

/// The input with elements dropped and the others divided by the share that is kept: the very
/// elements that [`lora_linear`] drops under the same seed.
///
/// # Shapes
/// - input and output: `[batch, seq, in]`
pub fn dropout(input: Tensor<3>, probability: f32, seed: u64) -> Tensor<3> {
    if probability <= 0.0 {
        return input;
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&input) {
        return cube::dropped(input, probability, seed);
    }
    let mask = dropout_mask(&input, probability, seed);
    (input * mask).div_scalar(1.0 - probability)
}

/// See [`dropout_mask`]; none where nothing is dropped.
pub(crate) fn mask(input: &Tensor<3>, lora: &Lora) -> Option<Tensor<3>> {
    (lora.dropout > 0.0).then(|| dropout_mask(input, lora.dropout, lora.dropout_seed))
}

/// 1 where an element is kept, 0 where it is dropped.
fn dropout_mask(input: &Tensor<3>, probability: f32, seed: u64) -> Tensor<3> {
    let device = input.device().inner();
    let shape = input.dims();
    let kept: Vec<f32> = (0..shape.iter().product())
        .map(|index| f32::from(u8::from(dropout_keeps(seed, index, probability))))
        .collect();
    let mask = burn::tensor::TensorData::new(kept, shape);
    Tensor::<3>::from_data(mask, &device).cast(input.dtype())
}

/// Whether element `index` of a dropout mask survives: a counter-based hash, so that the mask needs
/// no memory and no generator state, and is the same however many threads compute it.
///
/// The integer mixing is Wellons' `lowbias32`.
#[inline(always)]
pub fn dropout_keeps(seed: u64, index: usize, probability: f32) -> bool {
    let mut x = (index as u32).wrapping_mul(0x9E37_79B1) ^ (seed as u32);
    x = x.wrapping_add((seed >> 32) as u32);
    x ^= x >> 16;
    x = x.wrapping_mul(0x7FEB_352D);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846C_A68B);
    x ^= x >> 16;
    // 24 bits: every value is exact in f32.
    (x >> 8) as f32 * (1.0 / 16_777_216.0) >= probability
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
