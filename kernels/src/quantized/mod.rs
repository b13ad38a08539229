//! The linear layer with a frozen weight in 8 or 4 bits, which is dequantised where it is used
//! (QLoRA, Dettmers et al. 2023).

#[cfg(feature = "cpu")]
pub(crate) mod cpu;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub(crate) mod cube;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
#[allow(
    dead_code,
    reason = "some is called only in what the attribute for kernels writes"
)]
mod fused;
mod host;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub(crate) mod kernel;
mod recomputed;
pub(crate) mod reference;

use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

pub use host::{BlockScales, HostWeight, NF4, Quantization};

use crate::lora_linear::{self, FrozenWeight, Lora};

/// A quantised matrix on a device, outside autodiff. Cloning shares it.
#[derive(Debug, Clone)]
pub struct QuantizedWeight {
    /// `[out, in]`
    shape: [usize; 2],
    /// bitsandbytes' bytes, four a word, the first in the lowest bits; padded to whole blocks.
    codes: Tensor<1, Int>,
    /// Of 8 bits `[out]`, of 4 one a block, or with `double` those of blocks of scales.
    absmax: Tensor<1>,
    /// Of 4 bits alone.
    blocks: Option<Blocks>,
    bytes: usize,
}

#[derive(Debug, Clone)]
struct Blocks {
    /// Weights a block.
    block: usize,
    double: Option<Double>,
    /// `[16]`: the values of the codes.
    map: Tensor<1>,
}

/// What quantised scales are dequantised with.
#[derive(Debug, Clone)]
struct Double {
    /// Bytes, four a word, padded to whole blocks of `block`.
    codes: Tensor<1, Int>,
    /// Scales a block of scales.
    block: usize,
    /// `[256]`: the values of the codes.
    map: Tensor<1>,
    offset: f32,
}

impl QuantizedWeight {
    /// Moves a weight `[out, in]` to a device.
    ///
    /// # Panics
    /// When there are more or fewer codes or scales than `shape` needs.
    pub fn new(host: HostWeight, shape: [usize; 2], device: &Device) -> QuantizedWeight {
        let device = device.clone().inner();
        let elements = shape[0] * shape[1];
        let floats = |values: Vec<f32>| {
            let length = values.len();
            Tensor::<1>::from_data(TensorData::new(values, [length]), (&device, DType::F32))
        };
        let integers = |values: Vec<i32>| {
            let length = values.len();
            Tensor::<1, Int>::from_data(TensorData::new(values, [length]), (&device, DType::I32))
        };
        let (codes, absmax, blocks, bytes) = match host {
            HostWeight::Int8 { codes, absmax } => {
                assert_eq!(codes.len(), elements, "8-bit codes");
                assert_eq!(absmax.len(), shape[0], "scales of rows");
                let bytes = codes.len() + 4 * absmax.len();
                let codes = words(codes.iter().map(|&code| code as u8), elements);
                (integers(codes), floats(absmax), None, bytes)
            }
            HostWeight::Nf4 {
                codes,
                block,
                absmax,
            } => {
                assert_eq!(codes.len(), elements.div_ceil(2), "4-bit codes");
                assert!(block.is_power_of_two() && block >= 8, "blocks of {block}");
                let blocks = elements.div_ceil(block);
                let mut bytes = codes.len();
                let (absmax, double) = match absmax {
                    BlockScales::Plain(absmax) => {
                        assert_eq!(absmax.len(), blocks, "scales of blocks");
                        (absmax, None)
                    }
                    BlockScales::Double {
                        codes,
                        block,
                        map,
                        absmax,
                        offset,
                    } => {
                        assert_eq!(codes.len(), blocks, "codes of scales");
                        assert_eq!(map.len(), 256, "values of the codes of scales");
                        assert_eq!(absmax.len(), blocks.div_ceil(block), "scales of scales");
                        bytes += codes.len() + 4 * map.len();
                        let double = Double {
                            codes: integers(words(codes.into_iter(), absmax.len() * block)),
                            block,
                            map: floats(map),
                            offset,
                        };
                        (absmax, Some(double))
                    }
                };
                bytes += 4 * absmax.len();
                let scales = Blocks {
                    block,
                    double,
                    map: floats(NF4.to_vec()),
                };
                let codes = words(codes.into_iter(), blocks * block / 2);
                (integers(codes), floats(absmax), Some(scales), bytes)
            }
        };
        QuantizedWeight {
            shape,
            codes,
            absmax,
            blocks,
            bytes,
        }
    }

    /// `[out, in]`
    pub fn dims(&self) -> [usize; 2] {
        self.shape
    }

    /// Bytes of its codes and scales.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How it was quantised.
    pub fn quantization(&self) -> Quantization {
        match &self.blocks {
            None => Quantization::Int8,
            Some(blocks) => Quantization::Nf4 {
                double: blocks.double.is_some(),
            },
        }
    }

    /// The whole weight, `[out, in]`: the values that the layer computes with.
    pub fn dequantize(&self, dtype: DType) -> Tensor<2> {
        self.rows(0..self.shape[0], dtype)
    }

    /// Some rows of it, `[rows, in]`.
    pub fn rows(&self, rows: Range<usize>, dtype: DType) -> Tensor<2> {
        #[cfg(feature = "cpu")]
        if crate::cpu::is_flex(&self.codes.device()) {
            return cpu::dequantized_rows(self, rows.start, rows.len(), dtype);
        }
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if crate::gpu::serves(&self.absmax) {
            return cube::rows(self, rows, dtype);
        }
        let whole = rows == (0..self.shape[0]);
        let weight = reference::dequantize(self, dtype);
        if whole {
            weight
        } else {
            weight.narrow(0, rows.start, rows.len())
        }
    }
}

/// Bytes as words of four, `length` of them and then zeros.
fn words(bytes: impl Iterator<Item = u8>, length: usize) -> Vec<i32> {
    let mut words = vec![0u32; length.div_ceil(4)];
    for (index, byte) in bytes.enumerate() {
        words[index / 4] |= u32::from(byte) << (8 * (index % 4));
    }
    words.into_iter().map(|word| word as i32).collect()
}

/// `y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ` with a quantised `W`, computed in the type of `x`.
///
/// The dequantised weight never lives from the forward to the backward pass: that one dequantises it
/// again. There is no gradient of the weight.
///
/// # Shapes
/// - input: `[batch, seq, in]`
/// - weight: `[out, in]`, bias: `[out]`
/// - returns: `[batch, seq, out]`
pub fn quantized_linear(
    input: Tensor<3>,
    weight: &QuantizedWeight,
    bias: Option<Tensor<1>>,
    lora: Option<&Lora>,
) -> Tensor<3> {
    if crate::references() {
        let mask = lora.and_then(|lora| lora_linear::mask(&input, lora));
        return reference::quantized_linear(input, weight, bias, lora, mask);
    }
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&input) {
        return lora_linear::one(input, FrozenWeight::Quantized(weight), bias, lora);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if lora.is_some() && crate::gpu::serves(&input) {
        return lora_linear::one(input, FrozenWeight::Quantized(weight), bias, lora);
    }
    // Every device that this build can open has a kernel for that.
    assert!(lora.is_none(), "a LoRA on a device without a kernel for it");
    let [batch, seq, inputs] = input.dims();
    let product = recomputed::product(input.reshape([batch * seq, inputs]), weight);
    let output = match bias {
        Some(bias) => product + bias.unsqueeze::<2>(),
        None => product,
    };
    output.reshape([batch, seq, weight.shape[0]])
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
