//! A quantised weight on a GPU: some of its rows or all become values in one kernel, or are multiplied
//! with as they are.

use std::ops::Range;

use burn::backend::Cube;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Int, Tensor};

use super::QuantizedWeight;
use super::kernel::{Form, Over, PackedWeights, Packing, RowRange};
use crate::gpu::operation::{tensor, value};

/// See [`QuantizedWeight::rows`].
pub(super) fn rows(weight: &QuantizedWeight, rows: Range<usize>, dtype: DType) -> Tensor<2> {
    let (codes, absmax, map, scale_codes, scale_map) = words(weight);
    let range = RowRange {
        first: rows.start,
        rows: rows.len(),
        dtype,
    };
    let form = form(weight);
    tensor(Cube::dequantize(
        codes,
        absmax,
        map,
        scale_codes,
        scale_map,
        form,
        range,
    ))
}

/// `x Wᵀ` or `x W`, added to `addend` if there is one; of tensors outside autodiff.
pub(crate) fn product(
    x: Tensor<2>,
    weight: &QuantizedWeight,
    over: Over,
    addend: Option<Tensor<2>>,
) -> Tensor<2> {
    let adds = addend.is_some();
    let x = value(x);
    // Where nothing is added, nothing is read of it.
    let addend = addend.map_or_else(|| x.clone(), value);
    let (codes, absmax, map, scale_codes, scale_map) = words(weight);
    let form = form(weight);
    tensor(Cube::packed_product(
        x,
        addend,
        codes,
        absmax,
        map,
        scale_codes,
        scale_map,
        form,
        over,
        adds,
    ))
}

/// Whether [`product`] is the fastest that the device has. Where NVIDIA's library multiplies, it is not:
/// at the rates of an H200, writing and reading a weight of 16 bits takes 4 % of its product with
/// 8,192 tokens, and products of kernels take several times as long as the library's.
pub(crate) fn multiplies(x: &Tensor<2>) -> bool {
    #[cfg(feature = "cuda")]
    {
        let device = x.device();
        if let burn::backend::DispatchDevice::Cube(device) = device.as_dispatch() {
            return !matches!(crate::cuda::Session::of(device), Some(Ok(_)));
        }
    }
    let _ = x;
    true
}

type Words = (
    IntTensor<Cube>,
    FloatTensor<Cube>,
    FloatTensor<Cube>,
    IntTensor<Cube>,
    FloatTensor<Cube>,
);

/// As [`PackedWeights`] takes them; what a packing has no use for is another's stand-in.
fn words(weight: &QuantizedWeight) -> Words {
    let blocks = weight.blocks.as_ref();
    let double = blocks.and_then(|blocks| blocks.double.as_ref());
    (
        integers(&weight.codes),
        value(weight.absmax.clone()),
        value(blocks.map_or(&weight.absmax, |blocks| &blocks.map).clone()),
        integers(double.map_or(&weight.codes, |double| &double.codes)),
        value(double.map_or(&weight.absmax, |double| &double.map).clone()),
    )
}

fn form(weight: &QuantizedWeight) -> Form {
    let double = |blocks: &super::Blocks| blocks.double.as_ref().map(|double| double.block as u32);
    Form {
        packing: match &weight.blocks {
            None => Packing::Int8,
            Some(blocks) => {
                let block = blocks.block as u32;
                match double(blocks) {
                    None => Packing::Nf4 { block },
                    Some(scale_block) => Packing::Nf4Double { block, scale_block },
                }
            }
        },
        shape: weight.shape,
        offset: weight
            .blocks
            .as_ref()
            .and_then(|blocks| blocks.double.as_ref())
            .map_or(0.0, |double| double.offset),
    }
}

fn integers(words: &Tensor<1, Int>) -> IntTensor<Cube> {
    let words = words.clone().try_into_primitive::<Cube>();
    words.expect("an integer tensor of this device outside autodiff")
}
