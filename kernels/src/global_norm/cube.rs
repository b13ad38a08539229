//! The norm on a GPU: cubes add up the squares of parts of several tensors, and one cube their sums.

use burn::backend::fusion::custom::TensorSpec;
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};

use crate::gpu::empty_like;
use crate::gpu::list::{apply_to_all, groups, most_at_once};
use crate::gpu::operation::{tensor, value};
use crate::gpu::rows::{UNITS, sum_of_cube, sum_of_lanes, vector_size};

/// Vectors that a unit takes of a tensor, unless more cubes than these would be needed.
const VECTORS: usize = 8;
const MOST_CUBES: usize = 256;

pub(super) fn global_norm(tensors: Vec<Tensor<1>>) -> Tensor<1> {
    let inputs = tensors.into_iter().map(value).collect();
    let output = TensorSpec::new(Shape::from(vec![1]), DType::F32);
    let mut found = apply_to_all("global_norm", inputs, vec![output], |tensors| {
        vec![norm_of_all(tensors)]
    });
    tensor(found.remove(0))
}

fn norm_of_all(tensors: Vec<CubeTensor>) -> CubeTensor {
    let tensors: Vec<CubeTensor> = tensors.into_iter().map(into_contiguous).collect();
    let elements = |tensor: &CubeTensor| tensor.meta.num_elements();
    let keys = tensors
        .iter()
        .map(|tensor| vector_size(tensor, elements(tensor)));
    // What the sums are written to takes one binding.
    let most = most_at_once(&tensors[0], 1).saturating_sub(1);
    let groups: Vec<_> = groups(keys, most)
        .into_iter()
        .map(|(vector_size, group)| {
            let longest = group.iter().map(|index| elements(&tensors[*index])).max();
            let vectors = longest.unwrap_or(0) / vector_size;
            let cubes = vectors.div_ceil(UNITS as usize * VECTORS);
            (vector_size, group, cubes.clamp(1, MOST_CUBES))
        })
        .collect();
    let count = groups.iter().map(|(_, group, cubes)| cubes * group.len());
    let count: usize = count.sum();
    let sums = empty_like(&tensors[0], Shape::from(vec![count]), DType::F32);
    let norm = empty_like(&tensors[0], Shape::from(vec![1]), DType::F32);
    let client = &norm.client;
    let mut start = 0;
    for (vector_size, group, cubes) in groups {
        let views = group.iter().map(|index| tensors[*index].clone());
        squares_kernel::launch(
            client,
            CubeCount::Static(cubes as u32, group.len() as u32, 1),
            CubeDim::new_1d(UNITS),
            vector_size,
            1,
            views.map(CubeTensor::into_linear_view).collect(),
            sums.clone().into_linear_view(),
            start as u32,
        );
        start += cubes * group.len();
    }
    norm_kernel::launch(
        client,
        CubeCount::Static(1, 1, 1),
        CubeDim::new_1d(UNITS),
        1,
        sums.into_linear_view(),
        norm.clone().into_linear_view(),
    );
    norm
}

/// The cubes of a row add up the squares of one tensor, each of its own part.
#[cube(launch)]
fn squares_kernel<N: Size, One: Size>(
    tensors: Sequence<LinearView<'static, Vector<f32, N>>>,
    mut sums: LinearViewMut<'_, Vector<f32, One>>,
    start: u32,
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime![UNITS as usize]);
    let step = (CUBE_COUNT_X * UNITS) as usize;
    let mut sum = f32::new(0.0);
    #[unroll]
    for index in 0..tensors.len() {
        if CUBE_POS_Y as usize == index {
            let length = tensors.index(index).shape();
            let mut at = (CUBE_POS_X * UNITS + UNIT_POS) as usize;
            while at < length {
                let values = tensors.index(index).read(at);
                sum += sum_of_lanes(values * values);
                at += step;
            }
        }
    }
    let total = sum_of_cube(sum, &mut shared);
    if UNIT_POS == 0 {
        let place = start + CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X;
        sums.write(place as usize, Vector::cast_from(total));
    }
}

#[cube(launch)]
fn norm_kernel<One: Size>(
    sums: LinearView<'_, Vector<f32, One>>,
    mut norm: LinearViewMut<'_, Vector<f32, One>>,
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime![UNITS as usize]);
    let length = sums.shape();
    let mut sum = f32::new(0.0);
    let mut at = UNIT_POS as usize;
    while at < length {
        sum += sum_of_lanes(sums.read(at));
        at += UNITS as usize;
    }
    let total = sum_of_cube(sum, &mut shared);
    if UNIT_POS == 0 {
        norm.write(0usize, Vector::cast_from(total.sqrt()));
    }
}
