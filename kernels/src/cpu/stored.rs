//! Elementwise functions of halves as they are stored: widened, computed and rounded a few at a time, so
//! that nothing but the halves goes through memory.

use burn::tensor::{Bytes, DType, bf16, f16};
use burn_flex::{FlexTensor, Layout};
use rayon::prelude::*;

use super::cast::Half;
use super::elementary::{block_length, vectorized};
use super::operation::dims;

/// Elements that are f32 at once.
const BLOCK: usize = 256;

/// `function` of each element of the inputs, contiguous tensors of one half type and one shape: tensors of
/// the same.
///
/// # Panics
/// Inputs that are neither bf16 nor f16.
#[inline(always)]
pub(crate) fn map_halves<const N: usize, const M: usize>(
    inputs: [&FlexTensor; N],
    function: impl Fn([f32; N]) -> [f32; M] + Copy + Send + Sync,
) -> [FlexTensor; M] {
    match inputs[0].dtype() {
        DType::BF16 => map_typed::<bf16, N, M>(inputs, function),
        DType::F16 => map_typed::<f16, N, M>(inputs, function),
        other => panic!("{other:?} is no half precision"),
    }
}

#[inline(always)]
fn map_typed<H: Half, const N: usize, const M: usize>(
    tensors: [&FlexTensor; N],
    function: impl Fn([f32; N]) -> [f32; M] + Copy + Send + Sync,
) -> [FlexTensor; M] {
    let inputs = tensors.map(|tensor| tensor.as_slice::<H>().expect("contiguous, of this type"));
    let length = inputs[0].len();
    assert!(
        inputs.iter().all(|input| input.len() == length),
        "inputs of one shape"
    );
    let mut outputs: [Vec<H>; M] = std::array::from_fn(|_| vec![H::zeroed(); length]);
    let block = block_length(length);
    let mut parts = outputs.each_mut().map(|output| output.chunks_mut(block));
    let tasks: Vec<(usize, [&mut [H]; M])> = (0..length.div_ceil(block))
        .map(|number| {
            let next = parts
                .each_mut()
                .map(|part| part.next().expect("as many blocks"));
            (number * block, next)
        })
        .collect();
    tasks.into_par_iter().for_each(|(start, outputs)| {
        vectorized(
            #[inline(always)]
            || map_block(inputs, start, outputs, function),
        );
    });
    let shape = dims(tensors[0]);
    outputs.map(|output| {
        let layout = Layout::contiguous(shape.clone().into());
        FlexTensor::new(Bytes::from_elems(output), layout, H::dtype())
    })
}

/// The elements from `start` on, as many as the outputs hold.
#[inline(always)]
fn map_block<H: Half, const N: usize, const M: usize>(
    inputs: [&[H]; N],
    start: usize,
    mut outputs: [&mut [H]; M],
    function: impl Fn([f32; N]) -> [f32; M],
) {
    let mut wide = [[0.0f32; BLOCK]; N];
    let mut results = [[0.0f32; BLOCK]; M];
    let length = outputs[0].len();
    for first in (0..length).step_by(BLOCK) {
        let count = BLOCK.min(length - first);
        for (wide, input) in wide.iter_mut().zip(inputs) {
            H::widen(&input[start + first..][..count], &mut wide[..count]);
        }
        // All of the block, whatever stands behind the count: loops of a known length vectorise.
        for index in 0..BLOCK {
            let values = std::array::from_fn(|input| wide[input][index]);
            for (results, value) in results.iter_mut().zip(function(values)) {
                results[index] = value;
            }
        }
        for (output, results) in outputs.iter_mut().zip(&results) {
            H::round(&results[..count], &mut output[first..][..count]);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::cpu::cast::cast;

    #[test]
    fn halves_of_any_number_are_mapped() {
        for (dtype, length) in [(DType::BF16, 1), (DType::F16, 257), (DType::BF16, 40_000)] {
            let numbers: Vec<f32> = (0..length).map(|i| (i % 97) as f32 / 8.0 - 3.0).collect();
            let half = cast(
                FlexTensor::from_data(TensorData::new(numbers, [length])),
                dtype,
            );
            let [sum, product] = map_halves([&half, &half], |[a, b]| [a + b, a * b]);
            let wide = cast(half, DType::F32);
            let values: &[f32] = wide.as_slice().unwrap();
            for (found, expected) in [
                (sum, values.iter().map(|x| x + x).collect::<Vec<_>>()),
                (product, values.iter().map(|x| x * x).collect()),
            ] {
                assert_eq!(found.dtype(), dtype);
                let expected = cast(
                    FlexTensor::from_data(TensorData::new(expected, [length])),
                    dtype,
                );
                assert_eq!(found.bytes(), expected.bytes());
            }
        }
    }
}
