//! Attention in tiles for every device of CubeCL's, forward and backward (Dao 2023, FlashAttention-2):
//! scores are never stored, the backward pass computes them again from the logarithm of each row's sum.
//!
//! Nothing is assumed of a device but cubes of 256 units and 16 KiB of shared memory. dK and dV are
//! summed by one cube each, dQ by a kernel of its own: no atomic additions, so the same inputs give the
//! same bits.

mod backward;
mod forward;
mod tiles;

use burn::backend::cubecl::dtype_to_storage_type;
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};

use self::backward::{key_value_gradient_kernel, query_gradient_kernel};
use self::forward::forward_kernel;
use self::tiles::{DOWN, Plan, ROWS, SizesLaunch};
use super::AttentionOptions;
use super::cube::sums_shape;
use crate::gpu::empty_like;
use crate::gpu::rows::{UNITS, cubes};

/// The output and the logarithm of each row's sum.
pub(super) fn forward(
    query: CubeTensor,
    key: CubeTensor,
    value: CubeTensor,
    segments: CubeTensor,
    options: &AttentionOptions,
) -> (CubeTensor, CubeTensor) {
    let [query, key, value] = [query, key, value].map(into_contiguous);
    let launch = Launch::new(&query, &key, options);
    let runs = launch.runs(segments);
    let output = empty_like(&query, query.meta.shape().clone(), query.dtype);
    let sums = empty_like(&query, sums_shape(query.meta.shape()), DType::F32);
    // SAFETY: every index is below the sizes that the launch was made from.
    unsafe {
        forward_kernel::launch_unchecked(
            &output.client,
            launch.cubes(launch.heads),
            launch.units(),
            launch.vector_size,
            launch.plan.columns(),
            query.into_linear_view(),
            key.into_linear_view(),
            value.into_linear_view(),
            runs.into_linear_view(),
            output.clone().into_linear_view(),
            sums.clone().into_linear_view(),
            launch.sizes(),
            launch.plan,
            launch.dtype,
        );
    }
    (output, sums)
}

/// The gradients of query, key and value.
pub(super) fn backward(
    [query, key, value]: [CubeTensor; 3],
    segments: CubeTensor,
    [output, sums, gradient]: [CubeTensor; 3],
    options: &AttentionOptions,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [query, key, value] = [query, key, value].map(into_contiguous);
    let [output, sums, gradient] = [output, sums, gradient].map(into_contiguous);
    let launch = Launch::new(&query, &key, options);
    let runs = launch.runs(segments);
    let [dq, dk, dv] = [&query, &key, &value]
        .map(|tensor| empty_like(tensor, tensor.meta.shape().clone(), tensor.dtype));
    let deltas = empty_like(&sums, sums.meta.shape().clone(), DType::F32);
    // SAFETY: as above.
    unsafe {
        query_gradient_kernel::launch_unchecked(
            &dq.client,
            launch.cubes(launch.heads),
            launch.units(),
            launch.vector_size,
            launch.plan.columns(),
            query.clone().into_linear_view(),
            key.clone().into_linear_view(),
            value.clone().into_linear_view(),
            runs.clone().into_linear_view(),
            output.into_linear_view(),
            sums.clone().into_linear_view(),
            gradient.clone().into_linear_view(),
            deltas.clone().into_linear_view(),
            dq.clone().into_linear_view(),
            launch.sizes(),
            launch.plan,
            launch.dtype,
        );
        key_value_gradient_kernel::launch_unchecked(
            &dk.client,
            launch.cubes(launch.kv_heads),
            launch.units(),
            launch.vector_size,
            launch.plan.columns(),
            query.into_linear_view(),
            key.into_linear_view(),
            value.into_linear_view(),
            runs.into_linear_view(),
            sums.into_linear_view(),
            gradient.into_linear_view(),
            deltas.into_linear_view(),
            dk.clone().into_linear_view(),
            dv.clone().into_linear_view(),
            launch.sizes(),
            launch.plan,
            launch.dtype,
        );
    }
    (dq, dk, dv)
}

/// One attention on its way to the device.
struct Launch {
    batch: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    options: AttentionOptions,
    plan: Plan,
    dtype: ElemType,
    vector_size: VectorSize,
}

impl Launch {
    fn new(query: &CubeTensor, key: &CubeTensor, options: &AttentionOptions) -> Launch {
        let shape = query.meta.shape();
        let head_dim = shape[3];
        Launch {
            batch: shape[0],
            seq: shape[1],
            heads: shape[2],
            kv_heads: key.meta.shape()[2],
            options: *options,
            head_dim,
            plan: Plan::new(head_dim, options.soft_cap.is_some()),
            dtype: dtype_to_storage_type(query.dtype),
            vector_size: if head_dim.is_multiple_of(4) { 4 } else { 1 },
        }
    }

    /// A cube for each 32 rows of each of `heads`.
    fn cubes(&self, heads: usize) -> CubeCount {
        let blocks = self.seq.div_ceil(ROWS as usize);
        CubeCount::Static(blocks as u32, heads as u32, self.batch as u32)
    }

    fn units(&self) -> CubeDim {
        CubeDim::new_2d(self.plan.across, DOWN)
    }

    fn sizes(&self) -> SizesLaunch {
        let window = self.options.window.unwrap_or(self.seq).min(self.seq);
        SizesLaunch::new(
            self.seq as u32,
            self.heads as u32,
            self.kv_heads as u32,
            self.head_dim as u32,
            window as u32,
            u32::from(self.options.causal),
            self.options.scale,
            self.options.soft_cap.unwrap_or(0.0),
            ROWS,
            self.plan.across,
        )
    }

    /// Where the segment of each token begins and where it ends: `[2, batch, seq]`.
    fn runs(&self, segments: CubeTensor) -> CubeTensor {
        let segments = into_contiguous(segments);
        let shape = Shape::from(vec![2, self.batch, self.seq]);
        let runs = empty_like(&segments, shape, segments.dtype);
        runs_kernel::launch(
            &runs.client,
            cubes(self.batch),
            CubeDim::new_1d(UNITS),
            segments.into_linear_view(),
            runs.clone().into_linear_view(),
            self.batch as u32,
            self.seq as u32,
        );
        runs
    }
}

/// One cube a row of the batch: each unit goes through its share of the tokens.
#[cube(launch)]
fn runs_kernel(
    segments: LinearView<'_, i32>,
    mut runs: LinearViewMut<'_, i32>,
    batch: u32,
    seq: u32,
) {
    let mut last = Shared::<[i32]>::new_slice(comptime![UNITS as usize]);
    let mut next = Shared::<[i32]>::new_slice(comptime![UNITS as usize]);
    let row = CUBE_POS as u32;
    if row < batch {
        let base = row * seq;
        let share = seq.div_ceil(UNITS);
        let begin = min(UNIT_POS * share, seq);
        let end = min(begin + share, seq);

        // The last and the first place in a unit's share where a run begins.
        let mut newest = i32::new(-1);
        let mut oldest = i32::cast_from(seq);
        for at in begin..end {
            if begins(&segments, base, at) {
                newest = i32::cast_from(at);
                oldest = min(oldest, newest);
            }
        }
        last[UNIT_POS as usize] = newest;
        next[UNIT_POS as usize] = oldest;
        sync_cube();
        #[unroll]
        for step in 0..8u32 {
            let distance = comptime![1u32 << step];
            let mut before = newest;
            if UNIT_POS >= distance {
                before = last[(UNIT_POS - distance) as usize];
            }
            let mut after = oldest;
            if UNIT_POS + distance < UNITS {
                after = next[(UNIT_POS + distance) as usize];
            }
            sync_cube();
            newest = max(newest, before);
            oldest = min(oldest, after);
            last[UNIT_POS as usize] = newest;
            next[UNIT_POS as usize] = oldest;
            sync_cube();
        }

        let mut start = i32::new(0);
        if UNIT_POS > 0 {
            start = last[(UNIT_POS - 1) as usize];
        }
        let mut stop = i32::cast_from(seq);
        if UNIT_POS + 1 < UNITS {
            stop = next[(UNIT_POS + 1) as usize];
        }
        for step in 0..end - begin {
            let at = begin + step;
            if begins(&segments, base, at) {
                start = i32::cast_from(at);
            }
            let there = segments.read((base + at) as usize) > 0;
            runs.write((base + at) as usize, select(there, start, 0));
            let at = end - 1 - step;
            let there = segments.read((base + at) as usize) > 0;
            runs.write((batch * seq + base + at) as usize, select(there, stop, 0));
            if begins(&segments, base, at) {
                stop = i32::cast_from(at);
            }
        }
    }
}

#[cube]
fn begins(segments: &LinearView<'_, i32>, base: u32, at: u32) -> bool {
    let mut begins = true;
    if at > 0 {
        let here = segments.read((base + at) as usize);
        begins = here != segments.read((base + at - 1) as usize);
    }
    begins
}
