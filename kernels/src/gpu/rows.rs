//! Kernels in which one cube works on one row: its units read every so many vectors of the row, and
//! what they found is brought together in shared memory.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

/// Units of a cube; a power of two, which every GPU has.
pub(crate) const UNITS: u32 = 256;

/// What the device reads at once of rows of some elements.
pub(crate) fn vector_size(tensor: &CubeTensor, columns: usize) -> VectorSize {
    vector_size_within(tensor, columns, columns)
}

/// Likewise, `most` elements at most.
pub(crate) fn vector_size_within(tensor: &CubeTensor, columns: usize, most: usize) -> VectorSize {
    tensor
        .client
        .io_optimized_vector_sizes(tensor.dtype.size())
        .find(|size| *size <= most && columns.is_multiple_of(*size))
        .unwrap_or(1)
}

/// A cube a row; more than a row of cubes may have become several.
pub(crate) fn cubes(rows: usize) -> CubeCount {
    const MOST: usize = 65_535;
    let across = rows.min(MOST);
    CubeCount::Static(across as u32, rows.div_ceil(across.max(1)) as u32, 1)
}

/// The sum over the units of a cube, the same for all of them.
#[cube]
pub(crate) fn sum_of_cube(value: f32, shared: &mut Shared<[f32]>) -> f32 {
    // What came before may still be read.
    sync_cube();
    shared[UNIT_POS as usize] = value;
    sync_cube();
    #[unroll]
    for step in 1..9u32 {
        let active = comptime![UNITS >> step];
        if UNIT_POS < active {
            let other = shared[(UNIT_POS + active) as usize];
            shared[UNIT_POS as usize] += other;
        }
        sync_cube();
    }
    shared[0]
}

/// The largest over the units of a cube, the same for all of them.
#[cube]
pub(crate) fn largest_of_cube(value: f32, shared: &mut Shared<[f32]>) -> f32 {
    sync_cube();
    shared[UNIT_POS as usize] = value;
    sync_cube();
    #[unroll]
    for step in 1..9u32 {
        let active = comptime![UNITS >> step];
        if UNIT_POS < active {
            let other = shared[(UNIT_POS + active) as usize];
            let mine = shared[UNIT_POS as usize];
            shared[UNIT_POS as usize] = max(mine, other);
        }
        sync_cube();
    }
    shared[0]
}

/// The sum over the lanes of a vector.
#[cube]
pub(crate) fn sum_of_lanes<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut sum = f32::new(0.0);
    let width = vector.vector_size();
    #[unroll]
    for lane in 0..width {
        sum += vector.extract(lane);
    }
    sum
}
