//! A quantised weight on a GPU: some of its rows or all become values in one kernel.

use std::ops::Range;

use burn::backend::Cube;
use burn::backend::tensor::IntTensor;
use burn::tensor::{DType, Int, Tensor};

use super::QuantizedWeight;
use super::kernel::{Dequantize, RowRange, ScaleBlocks};
use crate::gpu::operation::{tensor, value};

/// See [`QuantizedWeight::rows`].
pub(super) fn rows(weight: &QuantizedWeight, rows: Range<usize>, dtype: DType) -> Tensor<2> {
    let range = RowRange {
        first: rows.start,
        rows: rows.len(),
        width: weight.shape[1],
        dtype,
    };
    let codes = integers(&weight.codes);
    let absmax = value(weight.absmax.clone());
    let Some(blocks) = &weight.blocks else {
        return tensor(Cube::dequantize_int8(codes, absmax, range));
    };
    let map = value(blocks.map.clone());
    tensor(match &blocks.double {
        None => Cube::dequantize_nf4(codes, absmax, map, blocks.block, range),
        Some(double) => Cube::dequantize_nf4_double(
            codes,
            absmax,
            map,
            integers(&double.codes),
            value(double.map.clone()),
            blocks.block,
            ScaleBlocks {
                block: double.block,
                offset: double.offset,
            },
            range,
        ),
    })
}

fn integers(words: &Tensor<1, Int>) -> IntTensor<Cube> {
    let words = words.clone().try_into_primitive::<Cube>();
    words.expect("an integer tensor of this device outside autodiff")
}
