//! Products with a quantised weight on the CPU: a few rows of the weight at a time are dequantised
//! into a buffer and multiplied while they are in the cache.

use burn::backend::Flex;
use burn::tensor::{DType, Int, Tensor};
use burn_flex::FlexTensor;

use super::QuantizedWeight;
use super::host::{ScaleView, int8_rows, nf4_range};
use crate::cpu::matrix::{Threads, View, multiply};
use crate::cpu::operation::{tensor, values};

/// Weights that are dequantised at once, 1 MiB of f32: a large enough product, a small buffer.
const TILE: usize = 1 << 18;

/// A quantised weight as the Flex backend holds it.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    /// `[out, in]`
    shape: [usize; 2],
    codes: FlexTensor,
    absmax: FlexTensor,
    blocks: Option<FlexBlocks>,
}

#[derive(Clone, Debug)]
struct FlexBlocks {
    block: usize,
    double: Option<FlexDouble>,
}

#[derive(Clone, Debug)]
struct FlexDouble {
    codes: FlexTensor,
    block: usize,
    map: FlexTensor,
    offset: f32,
}

impl Weight {
    pub(crate) fn new(weight: &QuantizedWeight) -> Weight {
        let floats = |values: &Tensor<1>| {
            let values = values.clone().try_into_primitive::<Flex>();
            values.expect("a Flex float tensor outside autodiff")
        };
        let integers = |values: &Tensor<1, Int>| {
            let values = values.clone().try_into_primitive::<Flex>();
            values.expect("a Flex integer tensor")
        };
        Weight {
            shape: weight.shape,
            codes: integers(&weight.codes),
            absmax: floats(&weight.absmax),
            blocks: weight.blocks.as_ref().map(|blocks| FlexBlocks {
                block: blocks.block,
                double: blocks.double.as_ref().map(|double| FlexDouble {
                    codes: integers(&double.codes),
                    block: double.block,
                    map: floats(&double.map),
                    offset: double.offset,
                }),
            }),
        }
    }

    pub(crate) fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Dequantises the rows from `first` on, as many as `output` has place for.
    pub(crate) fn rows(&self, first: usize, output: &mut [f32]) {
        let width = self.shape[1];
        let start = first * width;
        let absmax = values(&self.absmax);
        match &self.blocks {
            None => {
                let codes = signed(&self.codes.bytes()[start..start + output.len()]);
                int8_rows(codes, &absmax[first..], width, output);
            }
            Some(blocks) => {
                let scales = match &blocks.double {
                    None => ScaleView::Plain(absmax),
                    Some(double) => ScaleView::Double {
                        codes: double.codes.bytes(),
                        block: double.block,
                        map: values(&double.map),
                        absmax,
                        offset: double.offset,
                    },
                };
                nf4_range(self.codes.bytes(), blocks.block, &scales, start, output);
            }
        }
    }

    /// `output = x Wᵀ`, added to `output` when `accumulate`.
    ///
    /// x `[tokens, in]`, output `[tokens, out]`
    pub(crate) fn multiply_transposed(&self, output: &mut [f32], x: View<'_>, accumulate: bool) {
        let [outputs, width] = self.shape;
        self.tiles(|first, rows, tile| {
            multiply(
                &mut output[first..],
                outputs,
                x,
                View::new(tile, rows, width).transposed(),
                1.0,
                accumulate,
                Threads::All,
            );
        });
    }

    /// `output = g W`, added to `output` when `accumulate`.
    ///
    /// g `[tokens, out]`, output `[tokens, in]`
    pub(crate) fn multiply_plain(&self, output: &mut [f32], gradient: View<'_>, accumulate: bool) {
        let [_, width] = self.shape;
        self.tiles(|first, rows, tile| {
            multiply(
                output,
                width,
                gradient.columns(first, rows),
                View::new(tile, rows, width),
                1.0,
                accumulate || first > 0,
                Threads::All,
            );
        });
    }

    /// Calls `use_tile(first row, rows, their values)` for the whole weight.
    fn tiles(&self, mut use_tile: impl FnMut(usize, usize, &[f32])) {
        let [outputs, width] = self.shape;
        let tile_rows = (TILE / width.max(1)).clamp(1, outputs.max(1));
        let mut buffer = vec![0.0f32; tile_rows * width];
        for first in (0..outputs).step_by(tile_rows) {
            let rows = tile_rows.min(outputs - first);
            let tile = &mut buffer[..rows * width];
            self.rows(first, tile);
            use_tile(first, rows, tile);
        }
    }
}

/// Rows as a tensor.
pub(super) fn dequantized_rows(
    weight: &QuantizedWeight,
    first: usize,
    rows: usize,
    dtype: DType,
) -> Tensor<2> {
    let width = weight.shape[1];
    let mut output = vec![0.0f32; rows * width];
    Weight::new(weight).rows(first, &mut output);
    let output = tensor(output, [rows, width]);
    Tensor::<2>::from_primitive::<Flex>(output).cast(dtype)
}

/// The same bytes as signed numbers.
fn signed(bytes: &[u8]) -> &[i8] {
    // SAFETY: i8 has the size, alignment and valid values of u8.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) }
}
