//! Widening bf16 and f16 to f32 and rounding back, on every core: each half tensor that a kernel reads
//! or writes passes here.

use burn::tensor::{DType, Element, bf16, f16};
use burn_flex::{FlexTensor, Layout};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::elementary::{block_length, vectorized};
use super::operation::{contiguous, dims};

/// The nearest numbers in another of the three float types; the same tensor where it has that type.
///
/// # Panics
/// A type that is none of f32, bf16 and f16.
pub(crate) fn cast(tensor: FlexTensor, dtype: DType) -> FlexTensor {
    if tensor.dtype() == dtype {
        return tensor;
    }
    let tensor = contiguous(tensor);
    match (tensor.dtype(), dtype) {
        (DType::BF16, DType::F32) => convert(&tensor, bf16::widen),
        (DType::F16, DType::F32) => convert(&tensor, f16::widen),
        (DType::F32, DType::BF16) => convert(&tensor, bf16::round),
        (DType::F32, DType::F16) => convert(&tensor, f16::round),
        (DType::BF16 | DType::F16, _) => cast(cast(tensor, DType::F32), dtype),
        (from, to) => panic!("a cast from {from:?} to {to:?}"),
    }
}

/// The nearest numbers in bf16.
pub(crate) fn rounded(values: &[f32]) -> Vec<bf16> {
    in_blocks(values, bf16::round)
}

fn convert<From, To>(
    tensor: &FlexTensor,
    run: impl Fn(&[From], &mut [To]) + Send + Sync,
) -> FlexTensor
where
    From: Element + bytemuck::Pod,
    To: Element + bytemuck::Pod,
{
    let input = tensor.as_slice::<From>();
    let output = in_blocks(input.expect("contiguous, of this type"), run);
    let layout = Layout::contiguous(dims(tensor).into());
    FlexTensor::new(burn::tensor::Bytes::from_elems(output), layout, To::dtype())
}

fn in_blocks<From: Sync, To: bytemuck::Pod + Send>(
    input: &[From],
    run: impl Fn(&[From], &mut [To]) + Send + Sync,
) -> Vec<To> {
    let mut output = vec![To::zeroed(); input.len()];
    let block = block_length(input.len());
    output
        .par_chunks_mut(block)
        .zip(input.par_chunks(block))
        .for_each(|(output, input)| {
            vectorized(
                #[inline(always)]
                || run(input, output),
            );
        });
    output
}

/// bf16 and f16, a few numbers at a time: loops that [`vectorized`] code runs.
pub(super) trait Half: Element + bytemuck::Pod {
    fn widen(input: &[Self], output: &mut [f32]);

    /// To the nearest, ties to even; a NaN stays one.
    fn round(input: &[f32], output: &mut [Self]);
}

/// The upper half of an f32.
impl Half for bf16 {
    #[inline(always)]
    fn widen(input: &[Self], output: &mut [f32]) {
        for (output, input) in output.iter_mut().zip(input) {
            *output = f32::from_bits(u32::from(input.to_bits()) << 16);
        }
    }

    #[inline(always)]
    fn round(input: &[f32], output: &mut [Self]) {
        for (output, input) in output.iter_mut().zip(input) {
            let bits = input.to_bits();
            let nearest = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1));
            let quiet = bits | 0x0040_0000;
            let rounded = if input.is_nan() { quiet } else { nearest };
            *output = bf16::from_bits((rounded >> 16) as u16);
        }
    }
}

impl Half for f16 {
    #[inline(always)]
    fn widen(input: &[Self], output: &mut [f32]) {
        input.convert_to_f32_slice(output);
    }

    #[inline(always)]
    fn round(input: &[f32], output: &mut [Self]) {
        output.convert_from_f32_slice(input);
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::TensorData;

    use super::*;

    /// Every f32 whose lower half is one of those that rounding depends on, NaN and infinity among
    /// them, as the `half` crate rounds it.
    #[test]
    fn every_number_is_rounded_as_by_the_half_crate() {
        let numbers: Vec<f32> = (0..=u16::MAX)
            .flat_map(|upper| {
                [0u32, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
                    .map(|lower| f32::from_bits(u32::from(upper) << 16 | lower))
            })
            .collect();
        let wide = FlexTensor::from_data(TensorData::new(numbers.clone(), [numbers.len()]));
        let found = cast(wide.clone(), DType::BF16);
        let found = found.as_slice::<bf16>().unwrap();
        for (number, found) in numbers.iter().zip(found) {
            assert_eq!(
                found.to_bits(),
                bf16::from_f32(*number).to_bits(),
                "{number}"
            );
        }
        let found = cast(wide, DType::F16);
        for (number, found) in numbers.iter().zip(found.as_slice::<f16>().unwrap()) {
            let expected = f16::from_f32(*number);
            assert!(
                *found == expected || found.is_nan() && expected.is_nan(),
                "{number}"
            );
        }
    }

    #[test]
    fn every_half_is_widened_exactly() {
        for dtype in [DType::BF16, DType::F16] {
            let all: Vec<u16> = (0..=u16::MAX).collect();
            let bytes = burn::tensor::Bytes::from_elems(all);
            let layout = Layout::contiguous([1 << 8, 1 << 8].into());
            let halves = FlexTensor::new(bytes, layout, dtype);
            let expected = Flex::float_cast(halves.clone(), DType::F32.into());
            let found = cast(halves.clone(), DType::F32);
            let bits = |tensor: &FlexTensor| -> Vec<u32> {
                let values = tensor.as_slice::<f32>().unwrap();
                let bits = values.iter().map(|value| value.to_bits());
                // Which of the NaNs it is says nothing.
                bits.map(|bits| {
                    if f32::from_bits(bits).is_nan() {
                        u32::MAX
                    } else {
                        bits
                    }
                })
                .collect()
            };
            assert_eq!(bits(&found), bits(&expected));
            let back = cast(found, dtype);
            for (back, half) in back.bytes().chunks(2).zip(halves.bytes().chunks(2)) {
                let [back, half] = [back, half].map(|b| u16::from_le_bytes([b[0], b[1]]));
                let is_nan = |bits| match dtype {
                    DType::BF16 => bf16::from_bits(bits).is_nan(),
                    _ => f16::from_bits(bits).is_nan(),
                };
                assert!(back == half || is_nan(half) && is_nan(back), "{half:#x}");
            }
        }
    }
}
