//! Dequantising as kernels: from packed words to values of the asked type in one pass, a unit a vector
//! of neighbours. The values are those of the reference to the bit, rounded once.

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};

use crate::gpu::rows::vector_size_within;

/// Rows of a quantised weight, and what they become.
#[derive(Debug, Clone, Copy)]
pub struct RowRange {
    pub first: usize,
    pub rows: usize,
    /// Weights a row.
    pub width: usize,
    pub dtype: DType,
}

/// How blocks share scales that are quantised themselves.
#[derive(Debug, Clone, Copy)]
pub struct ScaleBlocks {
    /// Scales a block of scales.
    pub block: usize,
    /// The mean of the scales.
    pub offset: f32,
}

/// Dequantising as a backend computes it.
///
/// # Shapes
/// - codes, scale_codes: words of four bytes as
///   [`QuantizedWeight`](crate::QuantizedWeight) packs them, map: `[16]`, scale_map: `[256]`
/// - absmax: one a row (8 bits), a block of weights, or a block of scales
/// - returns: `[range.rows, range.width]` in `range.dtype`
#[backend_extension(Cube, Fusion)]
pub trait Dequantize: Backend {
    #[fusion(meta = |_, _, range| range.spec())]
    fn dequantize_int8(
        codes: IntTensor<Self>,
        absmax: FloatTensor<Self>,
        range: RowRange,
    ) -> FloatTensor<Self>;

    /// `block`: weights that share a scale.
    #[fusion(meta = |_, _, _, _, range| range.spec())]
    fn dequantize_nf4(
        codes: IntTensor<Self>,
        absmax: FloatTensor<Self>,
        map: FloatTensor<Self>,
        block: usize,
        range: RowRange,
    ) -> FloatTensor<Self>;

    #[allow(clippy::too_many_arguments)]
    #[fusion(meta = |_, _, _, _, _, _, _, range| range.spec())]
    fn dequantize_nf4_double(
        codes: IntTensor<Self>,
        absmax: FloatTensor<Self>,
        map: FloatTensor<Self>,
        scale_codes: IntTensor<Self>,
        scale_map: FloatTensor<Self>,
        block: usize,
        scales: ScaleBlocks,
        range: RowRange,
    ) -> FloatTensor<Self>;
}

impl RowRange {
    fn spec(&self) -> TensorSpec {
        TensorSpec::new(Shape::from(vec![self.rows, self.width]), self.dtype)
    }

    /// The number of the first weight.
    fn start(&self) -> u32 {
        (self.first * self.width) as u32
    }
}

impl Dequantize for CubeBackend {
    fn dequantize_int8(codes: CubeTensor, absmax: CubeTensor, range: RowRange) -> CubeTensor {
        let [codes, absmax] = [codes, absmax].map(into_contiguous);
        let launch = Launch::of(&absmax, range, 4);
        int8_kernel::launch(
            &launch.output.client,
            launch.count,
            launch.dimension,
            launch.vector_size,
            1,
            codes.into_linear_view(),
            absmax.into_linear_view(),
            launch.output.clone().into_linear_view(),
            range.start(),
            range.width as u32,
            1.0 / 127.0,
            dtype_to_storage_type(range.dtype),
        );
        launch.output
    }

    fn dequantize_nf4(
        codes: CubeTensor,
        absmax: CubeTensor,
        map: CubeTensor,
        block: usize,
        range: RowRange,
    ) -> CubeTensor {
        let [codes, absmax, map] = [codes, absmax, map].map(into_contiguous);
        let launch = Launch::of(&absmax, range, 8);
        nf4_kernel::launch(
            &launch.output.client,
            launch.count,
            launch.dimension,
            launch.vector_size,
            1,
            codes.into_linear_view(),
            absmax.into_linear_view(),
            map.into_linear_view(),
            launch.output.clone().into_linear_view(),
            range.start(),
            block as u32,
            dtype_to_storage_type(range.dtype),
        );
        launch.output
    }

    fn dequantize_nf4_double(
        codes: CubeTensor,
        absmax: CubeTensor,
        map: CubeTensor,
        scale_codes: CubeTensor,
        scale_map: CubeTensor,
        block: usize,
        scales: ScaleBlocks,
        range: RowRange,
    ) -> CubeTensor {
        let [codes, absmax, map] = [codes, absmax, map].map(into_contiguous);
        let [scale_codes, scale_map] = [scale_codes, scale_map].map(into_contiguous);
        let launch = Launch::of(&absmax, range, 8);
        nf4_double_kernel::launch(
            &launch.output.client,
            launch.count,
            launch.dimension,
            launch.vector_size,
            1,
            codes.into_linear_view(),
            absmax.into_linear_view(),
            map.into_linear_view(),
            scale_codes.into_linear_view(),
            scale_map.into_linear_view(),
            launch.output.clone().into_linear_view(),
            range.start(),
            scales.offset,
            block as u32,
            scales.block as u32,
            dtype_to_storage_type(range.dtype),
        );
        launch.output
    }
}

struct Launch {
    output: CubeTensor,
    vector_size: VectorSize,
    count: CubeCount,
    dimension: CubeDim,
}

impl Launch {
    /// A vector lies within a row and within a word of `word` codes, and so within a block.
    fn of(like: &CubeTensor, range: RowRange, word: usize) -> Launch {
        let (client, device) = (like.client.clone(), like.device.clone());
        let shape = Shape::from(vec![range.rows, range.width]);
        let output = empty_device_contiguous_dtype(client, device, shape, range.dtype);
        let vector_size = vector_size_within(&output, range.width, word);
        let units = range.rows * range.width / vector_size;
        let dimension = CubeDim::new(&output.client, units);
        Launch {
            vector_size,
            count: calculate_cube_count_elemwise(&output.client, units, dimension),
            dimension,
            output,
        }
    }
}

#[cube(launch)]
fn int8_kernel<T: Float, N: Size, One: Size>(
    codes: LinearView<'_, Vector<i32, One>>,
    absmax: LinearView<'_, Vector<f32, One>>,
    mut output: LinearViewMut<'_, Vector<T, N>>,
    start: u32,
    width: u32,
    // A constant would be brought together with the scale by some drivers: one rounding less.
    unit: f32,
    #[define(T)] _dtype: ElemType,
) {
    if !output.is_in_bounds(ABSOLUTE_POS) {
        terminate!();
    }
    let mut values = Vector::<f32, N>::cast_from(f32::new(0.0));
    let lanes = values.vector_size();
    let first = start + (ABSOLUTE_POS * lanes) as u32;
    let word = codes.read((first / 4) as usize).extract(0usize);
    let scale = absmax.read((first / width) as usize).extract(0usize);
    #[unroll]
    for lane in 0..lanes {
        let shift = (first % 4 + lane as u32) * 8;
        let code = (word >> shift as i32) & 0xFF;
        // Two's complement.
        let code = (code ^ 0x80) - 0x80;
        values.insert(lane, f32::cast_from(code) * scale * unit);
    }
    output.write(ABSOLUTE_POS, Vector::cast_from(values));
}

#[cube(launch)]
fn nf4_kernel<T: Float, N: Size, One: Size>(
    codes: LinearView<'_, Vector<i32, One>>,
    absmax: LinearView<'_, Vector<f32, One>>,
    map: LinearView<'_, Vector<f32, One>>,
    mut output: LinearViewMut<'_, Vector<T, N>>,
    start: u32,
    #[comptime] block: u32,
    #[define(T)] _dtype: ElemType,
) {
    if !output.is_in_bounds(ABSOLUTE_POS) {
        terminate!();
    }
    let mut values = Vector::<f32, N>::cast_from(f32::new(0.0));
    let first = start + (ABSOLUTE_POS * values.vector_size()) as u32;
    let scale = absmax.read((first / block) as usize).extract(0usize);
    let word = codes.read((first / 8) as usize).extract(0usize);
    values = nf4_values::<N, One>(word, first % 8, &map);
    values *= Vector::<f32, N>::cast_from(scale);
    output.write(ABSOLUTE_POS, Vector::cast_from(values));
}

#[cube(launch)]
fn nf4_double_kernel<T: Float, N: Size, One: Size>(
    codes: LinearView<'_, Vector<i32, One>>,
    absmax: LinearView<'_, Vector<f32, One>>,
    map: LinearView<'_, Vector<f32, One>>,
    scale_codes: LinearView<'_, Vector<i32, One>>,
    scale_map: LinearView<'_, Vector<f32, One>>,
    mut output: LinearViewMut<'_, Vector<T, N>>,
    start: u32,
    offset: f32,
    #[comptime] block: u32,
    #[comptime] scale_block: u32,
    #[define(T)] _dtype: ElemType,
) {
    if !output.is_in_bounds(ABSOLUTE_POS) {
        terminate!();
    }
    let mut values = Vector::<f32, N>::cast_from(f32::new(0.0));
    let first = start + (ABSOLUTE_POS * values.vector_size()) as u32;
    let place = first / block;
    let word = scale_codes.read((place / 4) as usize).extract(0usize);
    let code = (word >> ((place % 4) * 8) as i32) & 0xFF;
    let product = scale_map.read(code as usize).extract(0usize)
        * absmax.read((place / scale_block) as usize).extract(0usize);
    // The bound changes nothing, but keeps compilers from making product and sum one operation that
    // rounds once: the reference rounds twice.
    let scale = max(product, f32::new(-3.0e38)) + offset;
    let word = codes.read((first / 8) as usize).extract(0usize);
    values = nf4_values::<N, One>(word, first % 8, &map);
    values *= Vector::<f32, N>::cast_from(scale);
    output.write(ABSOLUTE_POS, Vector::cast_from(values));
}

/// The values, before scaling, of the codes of a word from its `place`-th on: of each byte the high
/// half comes first.
#[cube]
fn nf4_values<N: Size, One: Size>(
    word: i32,
    place: u32,
    map: &LinearView<'_, Vector<f32, One>>,
) -> Vector<f32, N> {
    let mut values = Vector::<f32, N>::cast_from(f32::new(0.0));
    let lanes = values.vector_size();
    #[unroll]
    for lane in 0..lanes {
        let shift = ((place + lane as u32) ^ 1) * 4;
        let code = (word >> shift as i32) & 0xF;
        values.insert(lane, map.read(code as usize).extract(0usize));
    }
    values
}
