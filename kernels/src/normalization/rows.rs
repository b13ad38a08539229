//! The norms as kernels, a cube a row.

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, backend_extension};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};

use crate::gpu::empty_like;
use crate::gpu::rows::{UNITS, cubes, sum_of_cube, sum_of_lanes, vector_size};

/// The norms as a backend computes them, without derivatives.
///
/// # Shapes
/// - x, gradient and the results: `[…, hidden]`, weight, bias: `[hidden]`
#[backend_extension(Cube, Fusion)]
pub trait NormRows: Backend {
    /// `normalized · weight + bias`; without `centred` the mean stays, and there is no bias.
    #[fusion(dtype = x, shape = x)]
    fn norm_rows(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        epsilon: f32,
        centred: bool,
    ) -> FloatTensor<Self>;

    /// `x + update`, and [`norm_rows`](Self::norm_rows) of it.
    #[fusion(meta = |x, _, _, _, _, _| (x.clone(), x.clone()))]
    fn residual_norm_rows(
        x: FloatTensor<Self>,
        update: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        epsilon: f32,
        centred: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The gradient of x, added to `addend`, its gradient from elsewhere, where there is one: where
    /// `adds`.
    #[fusion(dtype = x, shape = x)]
    fn norm_rows_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        addend: FloatTensor<Self>,
        epsilon: f32,
        centred: bool,
        adds: bool,
    ) -> FloatTensor<Self>;
}

impl NormRows for CubeBackend {
    fn norm_rows(
        x: CubeTensor,
        weight: CubeTensor,
        bias: CubeTensor,
        epsilon: f32,
        centred: bool,
    ) -> CubeTensor {
        let [x, weight, bias] = [x, weight, bias].map(into_contiguous);
        let rows = Rows::of(&x);
        let (output, dtypes) = (like(&x), rows.dtypes(&x, &weight));
        // As the reference rounds: before a weight of the same type, after one in f32.
        let rounds_first = weight.dtype == x.dtype;
        norm_kernel::launch(
            &output.client,
            cubes(rows.rows),
            CubeDim::new_1d(UNITS),
            rows.vector_size,
            x.into_linear_view(),
            weight.into_linear_view(),
            bias.into_linear_view(),
            output.clone().into_linear_view(),
            rows.rows as u32,
            rows.vectors as u32,
            epsilon,
            rows.columns as f32,
            centred,
            rounds_first,
            dtypes,
        );
        output
    }

    fn residual_norm_rows(
        x: CubeTensor,
        update: CubeTensor,
        weight: CubeTensor,
        bias: CubeTensor,
        epsilon: f32,
        centred: bool,
    ) -> (CubeTensor, CubeTensor) {
        let [x, update, weight, bias] = [x, update, weight, bias].map(into_contiguous);
        let rows = Rows::of(&x);
        let (sum, output, dtypes) = (like(&x), like(&x), rows.dtypes(&x, &weight));
        let rounds_first = weight.dtype == x.dtype;
        residual_norm_kernel::launch(
            &output.client,
            cubes(rows.rows),
            CubeDim::new_1d(UNITS),
            rows.vector_size,
            x.into_linear_view(),
            update.into_linear_view(),
            weight.into_linear_view(),
            bias.into_linear_view(),
            sum.clone().into_linear_view(),
            output.clone().into_linear_view(),
            rows.rows as u32,
            rows.vectors as u32,
            epsilon,
            rows.columns as f32,
            centred,
            rounds_first,
            dtypes,
        );
        (sum, output)
    }

    fn norm_rows_backward(
        x: CubeTensor,
        weight: CubeTensor,
        gradient: CubeTensor,
        addend: CubeTensor,
        epsilon: f32,
        centred: bool,
        adds: bool,
    ) -> CubeTensor {
        let [x, weight, gradient, addend] = [x, weight, gradient, addend].map(into_contiguous);
        let rows = Rows::of(&x);
        let (output, dtypes) = (like(&x), rows.dtypes(&x, &weight));
        norm_backward_kernel::launch(
            &output.client,
            cubes(rows.rows),
            CubeDim::new_1d(UNITS),
            rows.vector_size,
            x.into_linear_view(),
            weight.into_linear_view(),
            gradient.into_linear_view(),
            addend.into_linear_view(),
            output.clone().into_linear_view(),
            rows.rows as u32,
            rows.vectors as u32,
            epsilon,
            rows.columns as f32,
            centred,
            adds,
            dtypes,
        );
        output
    }
}

struct Rows {
    rows: usize,
    columns: usize,
    vectors: usize,
    vector_size: VectorSize,
}

impl Rows {
    fn of(x: &CubeTensor) -> Rows {
        let columns = x.meta.shape()[x.meta.num_dims() - 1];
        let vector_size = vector_size(x, columns);
        Rows {
            rows: x.meta.num_elements() / columns,
            columns,
            vectors: columns / vector_size,
            vector_size,
        }
    }

    fn dtypes(&self, x: &CubeTensor, weight: &CubeTensor) -> [ElemType; 2] {
        [x.dtype, weight.dtype].map(dtype_to_storage_type)
    }
}

fn like(x: &CubeTensor) -> CubeTensor {
    empty_like(x, x.meta.shape().clone(), x.dtype)
}

/// A vector of what is normalised: of x, or of its sum with the update as it is stored.
#[cube]
fn read<T: Float, N: Size>(
    x: &LinearView<'_, Vector<T, N>>,
    update: &LinearView<'_, Vector<T, N>>,
    place: usize,
    #[comptime] added: bool,
) -> Vector<f32, N> {
    let mut value = Vector::<f32, N>::cast_from(x.read(place));
    if comptime![added] {
        value += Vector::<f32, N>::cast_from(update.read(place));
        value = Vector::<f32, N>::cast_from(Vector::<T, N>::cast_from(value));
    }
    value
}

/// Mean and reciprocal of the standard deviation of a row; the mean is 0 where it stays.
#[cube]
#[allow(clippy::too_many_arguments)]
fn statistics<T: Float, N: Size>(
    x: &LinearView<'_, Vector<T, N>>,
    update: &LinearView<'_, Vector<T, N>>,
    start: usize,
    vectors: u32,
    epsilon: f32,
    columns: f32,
    shared: &mut Shared<[f32]>,
    #[comptime] centred: bool,
    #[comptime] added: bool,
) -> (f32, f32) {
    let mut mean = f32::new(0.0);
    if comptime![centred] {
        let mut sum = f32::new(0.0);
        let mut index = UNIT_POS;
        while index < vectors {
            sum += sum_of_lanes(read::<T, N>(x, update, start + index as usize, added));
            index += UNITS;
        }
        mean = sum_of_cube(sum, shared) / columns;
    }
    let middle = Vector::<f32, N>::cast_from(mean);
    let mut squares = f32::new(0.0);
    let mut index = UNIT_POS;
    while index < vectors {
        let value = read::<T, N>(x, update, start + index as usize, added) - middle;
        squares += sum_of_lanes(value * value);
        index += UNITS;
    }
    let variance = sum_of_cube(squares, shared) / columns;
    (mean, f32::new(1.0) / (variance + epsilon).sqrt())
}

/// A vector of a row's norm.
#[cube]
#[allow(clippy::too_many_arguments)]
fn normalized<T: Float, W: Float, N: Size>(
    value: Vector<f32, N>,
    mean: f32,
    factor: f32,
    weight: &LinearView<'_, Vector<W, N>>,
    bias: &LinearView<'_, Vector<W, N>>,
    place: usize,
    #[comptime] centred: bool,
    #[comptime] rounds_first: bool,
) -> Vector<T, N> {
    let middle = Vector::<f32, N>::cast_from(mean);
    let mut value = (value - middle) * Vector::<f32, N>::cast_from(factor);
    if comptime![rounds_first] {
        value = Vector::<f32, N>::cast_from(Vector::<T, N>::cast_from(value));
    }
    value *= Vector::<f32, N>::cast_from(weight.read(place));
    if comptime![centred] {
        value += Vector::<f32, N>::cast_from(bias.read(place));
    }
    Vector::cast_from(value)
}

#[cube(launch)]
fn norm_kernel<T: Float, W: Float, N: Size>(
    x: LinearView<'_, Vector<T, N>>,
    weight: LinearView<'_, Vector<W, N>>,
    bias: LinearView<'_, Vector<W, N>>,
    mut output: LinearViewMut<'_, Vector<T, N>>,
    rows: u32,
    vectors: u32,
    epsilon: f32,
    columns: f32,
    #[comptime] centred: bool,
    #[comptime] rounds_first: bool,
    #[define(T, W)] _dtypes: [ElemType; 2],
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime![UNITS as usize]);
    let row = CUBE_POS as u32;
    if row < rows {
        let start = (row * vectors) as usize;
        let (mean, factor) = statistics::<T, N>(
            &x,
            &x,
            start,
            vectors,
            epsilon,
            columns,
            &mut shared,
            centred,
            false,
        );
        let mut index = UNIT_POS;
        while index < vectors {
            let place = index as usize;
            let value = read::<T, N>(&x, &x, start + place, false);
            let value = normalized::<T, W, N>(
                value,
                mean,
                factor,
                &weight,
                &bias,
                place,
                centred,
                rounds_first,
            );
            output.write(start + place, value);
            index += UNITS;
        }
    }
}

#[cube(launch)]
fn residual_norm_kernel<T: Float, W: Float, N: Size>(
    x: LinearView<'_, Vector<T, N>>,
    update: LinearView<'_, Vector<T, N>>,
    weight: LinearView<'_, Vector<W, N>>,
    bias: LinearView<'_, Vector<W, N>>,
    mut sum: LinearViewMut<'_, Vector<T, N>>,
    mut output: LinearViewMut<'_, Vector<T, N>>,
    rows: u32,
    vectors: u32,
    epsilon: f32,
    columns: f32,
    #[comptime] centred: bool,
    #[comptime] rounds_first: bool,
    #[define(T, W)] _dtypes: [ElemType; 2],
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime![UNITS as usize]);
    let row = CUBE_POS as u32;
    if row < rows {
        let start = (row * vectors) as usize;
        let (mean, factor) = statistics::<T, N>(
            &x,
            &update,
            start,
            vectors,
            epsilon,
            columns,
            &mut shared,
            centred,
            true,
        );
        let mut index = UNIT_POS;
        while index < vectors {
            let place = index as usize;
            let value = read::<T, N>(&x, &update, start + place, true);
            sum.write(start + place, Vector::cast_from(value));
            let value = normalized::<T, W, N>(
                value,
                mean,
                factor,
                &weight,
                &bias,
                place,
                centred,
                rounds_first,
            );
            output.write(start + place, value);
            index += UNITS;
        }
    }
}

#[cube(launch)]
fn norm_backward_kernel<T: Float, W: Float, N: Size>(
    x: LinearView<'_, Vector<T, N>>,
    weight: LinearView<'_, Vector<W, N>>,
    gradient: LinearView<'_, Vector<T, N>>,
    addend: LinearView<'_, Vector<T, N>>,
    mut output: LinearViewMut<'_, Vector<T, N>>,
    rows: u32,
    vectors: u32,
    epsilon: f32,
    columns: f32,
    #[comptime] centred: bool,
    #[comptime] adds: bool,
    #[define(T, W)] _dtypes: [ElemType; 2],
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime![UNITS as usize]);
    let row = CUBE_POS as u32;
    if row < rows {
        let start = (row * vectors) as usize;
        let (mean, factor) = statistics::<T, N>(
            &x,
            &x,
            start,
            vectors,
            epsilon,
            columns,
            &mut shared,
            centred,
            false,
        );
        let middle = Vector::<f32, N>::cast_from(mean);
        let factor = Vector::<f32, N>::cast_from(factor);
        // How far the gradient lies along the row, and along what the mean takes out.
        let mut along = f32::new(0.0);
        let mut level = f32::new(0.0);
        let mut index = UNIT_POS;
        while index < vectors {
            let place = index as usize;
            let value = (Vector::<f32, N>::cast_from(x.read(start + place)) - middle) * factor;
            let inward = Vector::<f32, N>::cast_from(gradient.read(start + place))
                * Vector::<f32, N>::cast_from(weight.read(place));
            along += sum_of_lanes(inward * value);
            if comptime![centred] {
                level += sum_of_lanes(inward);
            }
            index += UNITS;
        }
        along = sum_of_cube(along, &mut shared) / columns;
        if comptime![centred] {
            level = sum_of_cube(level, &mut shared) / columns;
        }
        let along = Vector::<f32, N>::cast_from(along);
        let level = Vector::<f32, N>::cast_from(level);
        let mut index = UNIT_POS;
        while index < vectors {
            let place = index as usize;
            let value = (Vector::<f32, N>::cast_from(x.read(start + place)) - middle) * factor;
            let inward = Vector::<f32, N>::cast_from(gradient.read(start + place))
                * Vector::<f32, N>::cast_from(weight.read(place));
            let mut result = (inward - value * along - level) * factor;
            if comptime![adds] {
                result += Vector::<f32, N>::cast_from(addend.read(start + place));
            }
            output.write(start + place, Vector::cast_from(result));
            index += UNITS;
        }
    }
}
