//! The quantised linear in plain tensor operations: the weight is dequantised, and autodiff keeps it.

use burn::tensor::{DType, FloatDType, Int, Tensor, TensorData};

use super::{Blocks, QuantizedWeight};
use crate::lora_linear::{Lora, reference};

/// See [`quantized_linear`](crate::quantized_linear); `mask` is 1 where an input of the low-rank part
/// is kept.
pub fn quantized_linear(
    input: Tensor<3>,
    weight: &QuantizedWeight,
    bias: Option<Tensor<1>>,
    lora: Option<&Lora>,
    mask: Option<Tensor<3>>,
) -> Tensor<3> {
    let weight = dequantize(weight, input.dtype());
    reference::lora_linear(input, weight, bias, lora, mask)
}

/// The whole weight, `[out, in]`.
pub fn dequantize(weight: &QuantizedWeight, dtype: DType) -> Tensor<2> {
    let [outputs, inputs] = weight.shape;
    let values = match &weight.blocks {
        None => {
            let codes = bytes(&weight.codes).narrow(0, 0, outputs * inputs);
            // Two's complement.
            let codes = codes.bitwise_xor_scalar(0x80).sub_scalar(0x80);
            let codes = codes.reshape([outputs, inputs]).cast(FloatDType::F32);
            codes * weight.absmax.clone().reshape([outputs, 1]) * (1.0 / 127.0f32)
        }
        Some(blocks) => {
            let codes = spread(&weight.codes, [4, 0, 12, 8, 20, 16, 28, 24], 0xF);
            let block = blocks.block;
            let count = codes.dims()[0] / block;
            let values = blocks.map.clone().select(0, codes).reshape([count, block]);
            (values * scales(weight, blocks, count).reshape([count, 1]))
                .reshape([count * block])
                .narrow(0, 0, outputs * inputs)
                .reshape([outputs, inputs])
        }
    };
    values.cast(dtype)
}

/// One scale a block of weights.
fn scales(weight: &QuantizedWeight, blocks: &Blocks, count: usize) -> Tensor<1> {
    let absmax = weight.absmax.clone();
    let Some(double) = &blocks.double else {
        return absmax;
    };
    let [groups] = absmax.dims();
    let codes = bytes(&double.codes);
    let values = double.map.clone().select(0, codes);
    let values = values.reshape([groups, double.block]) * absmax.reshape([groups, 1]);
    (values + double.offset)
        .reshape([groups * double.block])
        .narrow(0, 0, count)
}

/// The bytes of words, 0 to 255.
fn bytes(words: &Tensor<1, Int>) -> Tensor<1, Int> {
    spread(words, [0, 8, 16, 24], 0xFF)
}

/// The parts of each word that the shifts bring to its end.
fn spread<const PARTS: usize>(
    words: &Tensor<1, Int>,
    shifts: [i32; PARTS],
    mask: i32,
) -> Tensor<1, Int> {
    let [count] = words.dims();
    let shifts = TensorData::new(shifts.to_vec(), [1, PARTS]);
    let shifts = Tensor::<2, Int>::from_data(shifts, (&words.device(), DType::I32));
    words
        .clone()
        .reshape([count, 1])
        .repeat_dim(1, PARTS)
        .bitwise_right_shift(shifts.repeat_dim(0, count))
        .bitwise_and_scalar(mask)
        .reshape([count * PARTS])
}
