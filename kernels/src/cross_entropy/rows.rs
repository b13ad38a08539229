//! Cross-entropy and its derivative from logits, a cube a row.

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};

use super::IGNORED_TARGET;
use crate::gpu::rows::{UNITS, cubes, largest_of_cube, sum_of_cube, sum_of_lanes, vector_size};

/// Cross-entropy as a backend computes it.
#[backend_extension(Cube, Fusion)]
pub trait CrossEntropyRows: Backend {
    /// The loss of each row, f32, and its derivative by the logits in `dtype`; zeros where the target
    /// is [`IGNORED_TARGET`]. `soft_cap` of 0 is none.
    ///
    /// # Shapes
    /// - logits: `[rows, vocab]` in f32, targets: `[rows]` in i32
    /// - returns: `[rows]`, `[rows, vocab]`
    #[fusion(meta = |logits, _, _, dtype| {
        let losses = Shape::from(vec![logits.shape[0]]);
        (TensorSpec::new(losses, DType::F32), TensorSpec::new(logits.shape.clone(), *dtype))
    })]
    fn cross_entropy_rows(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        soft_cap: f32,
        dtype: DType,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

impl CrossEntropyRows for CubeBackend {
    fn cross_entropy_rows(
        logits: CubeTensor,
        targets: CubeTensor,
        soft_cap: f32,
        dtype: DType,
    ) -> (CubeTensor, CubeTensor) {
        let [logits, targets] = [logits, targets].map(into_contiguous);
        let [rows, vocab] = [logits.meta.shape()[0], logits.meta.shape()[1]];
        let empty = |shape: Vec<usize>, dtype| {
            let (client, device) = (logits.client.clone(), logits.device.clone());
            empty_device_contiguous_dtype(client, device, Shape::from(shape), dtype)
        };
        let losses = empty(vec![rows], DType::F32);
        let gradient = empty(vec![rows, vocab], dtype);
        let vector_size = vector_size(&logits, vocab);
        cross_entropy_kernel::launch(
            &losses.client,
            cubes(rows),
            CubeDim::new_1d(UNITS),
            vector_size,
            1,
            logits.into_linear_view(),
            targets.into_linear_view(),
            losses.clone().into_linear_view(),
            gradient.clone().into_linear_view(),
            rows as u32,
            (vocab / vector_size) as u32,
            IGNORED_TARGET as i32,
            soft_cap,
            soft_cap > 0.0,
            dtype_to_storage_type(dtype),
        );
        (losses, gradient)
    }
}

/// The logits that the softmax sees.
#[cube]
fn bounded<N: Size>(
    logits: Vector<f32, N>,
    soft_cap: f32,
    #[comptime] capped: bool,
) -> Vector<f32, N> {
    if comptime![capped] {
        let cap = Vector::<f32, N>::cast_from(soft_cap);
        (logits / cap).tanh() * cap
    } else {
        logits
    }
}

#[cube(launch)]
fn cross_entropy_kernel<T: Float, N: Size, One: Size>(
    logits: LinearView<'_, Vector<f32, N>>,
    targets: LinearView<'_, Vector<i32, One>>,
    mut losses: LinearViewMut<'_, Vector<f32, One>>,
    mut gradient: LinearViewMut<'_, Vector<T, N>>,
    rows: u32,
    vectors: u32,
    ignored: i32,
    soft_cap: f32,
    #[comptime] capped: bool,
    #[define(T)] _dtype: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime![UNITS as usize]);
    let row = CUBE_POS as u32;
    if row < rows {
        let start = (row * vectors) as usize;
        let target = targets.read(row as usize).extract(0usize);

        let mut largest = f32::new(-3.0e38);
        let mut index = UNIT_POS;
        while index < vectors {
            let values = bounded::<N>(logits.read(start + index as usize), soft_cap, capped);
            let width = values.vector_size();
            #[unroll]
            for lane in 0..width {
                largest = max(largest, values.extract(lane));
            }
            index += UNITS;
        }
        largest = largest_of_cube(largest, &mut shared);
        let highest = Vector::<f32, N>::cast_from(largest);

        let mut sum = f32::new(0.0);
        let mut index = UNIT_POS;
        while index < vectors {
            let values = bounded::<N>(logits.read(start + index as usize), soft_cap, capped);
            sum += sum_of_lanes((values - highest).exp());
            index += UNITS;
        }
        sum = sum_of_cube(sum, &mut shared);

        let counts = target != ignored;
        let kept = select(counts, f32::new(1.0), f32::new(0.0));
        let share = Vector::<f32, N>::cast_from(kept / sum);
        let mut picked = f32::new(0.0);
        let mut index = UNIT_POS;
        while index < vectors {
            let place = start + index as usize;
            let values = bounded::<N>(logits.read(place), soft_cap, capped);
            let mut result = (values - highest).exp() * share;
            let width = values.vector_size();
            #[unroll]
            for lane in 0..width {
                let column = i32::cast_from(index as usize * width + lane);
                if column == target {
                    picked += values.extract(lane);
                    let hit = result.extract(lane) - kept;
                    result.insert(lane, hit);
                }
            }
            if comptime![capped] {
                let tilt = values / Vector::<f32, N>::cast_from(soft_cap);
                result *= Vector::<f32, N>::cast_from(f32::new(1.0)) - tilt * tilt;
            }
            gradient.write(place, Vector::cast_from(result));
            index += UNITS;
        }
        picked = sum_of_cube(picked, &mut shared);
        if UNIT_POS == 0 {
            let loss = (sum.ln() + largest - picked) * kept;
            losses.write(row as usize, Vector::cast_from(loss));
        }
    }
}
