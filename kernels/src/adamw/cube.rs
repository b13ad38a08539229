//! AdamW on a GPU: one pass over values, gradient and moments, several tensors a kernel.
//!
//! Left to burn's fusion, the updates of all tensors together become kernels that take many seconds to
//! compile, and other ones when a gradient is clipped for the first time.

use burn::backend::fusion::custom::TensorSpec;
use burn::tensor::{DType, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};

use super::{AdamWTensor, AdamWUpdate};
use crate::gpu::list::{apply_to_all, groups, most_at_once, owned};
use crate::gpu::operation::{tensor, value};
use crate::gpu::rows::{UNITS, vector_size};

/// Buffers of one tensor: values, gradient and moments.
const BINDINGS: usize = 4;
/// Tensors a kernel: what it is handed stays well within CUDA's 4 KiB.
const MOST_TENSORS: usize = 16;
/// Cubes that work on one tensor at most; each goes on until the tensor is done.
const MOST_CUBES: usize = 4096;

pub(super) fn adamw(tensors: Vec<AdamWTensor>, scale: f32) -> Vec<[Tensor<1>; 3]> {
    let mut inputs = Vec::with_capacity(4 * tensors.len());
    let mut outputs = Vec::with_capacity(3 * tensors.len());
    let mut updates = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let spec = TensorSpec::new(tensor.values.shape(), DType::F32);
        outputs.extend([spec.clone(), spec.clone(), spec]);
        inputs.extend([tensor.values, tensor.gradient, tensor.first, tensor.second].map(value));
        updates.push(tensor.update);
    }
    let run = move |inputs: Vec<CubeTensor>| update_all(inputs, &updates, scale);
    let mut found = apply_to_all("adamw", inputs, outputs, run).into_iter();
    let mut triples = vec![];
    while let (Some(values), Some(first), Some(second)) = (found.next(), found.next(), found.next())
    {
        triples.push([values, first, second].map(tensor));
    }
    triples
}

/// `inputs` and the result are those of [`adamw`], four and three a tensor. The moments stay where they
/// are, and the new values lie where the gradient was.
fn update_all(inputs: Vec<CubeTensor>, updates: &[AdamWUpdate], scale: f32) -> Vec<CubeTensor> {
    let owned = |(index, tensor)| match index % 4 {
        0 => into_contiguous(tensor),
        _ => owned(tensor),
    };
    let tensors: Vec<CubeTensor> = inputs.into_iter().enumerate().map(owned).collect();
    let keys = tensors.chunks_exact(4).zip(updates).map(|(parts, update)| {
        let elements = parts[0].meta.num_elements();
        (*update, vector_size(&parts[0], elements))
    });
    let most = most_at_once(&tensors[0], BINDINGS).min(MOST_TENSORS);
    for ((update, vector_size), group) in groups(keys, most) {
        launch(&update, vector_size, &group, &tensors, scale);
    }
    let mut tensors = tensors.into_iter();
    let mut outputs = vec![];
    while let Some(_values) = tensors.next() {
        outputs.extend(tensors.by_ref().take(3));
    }
    outputs
}

fn launch(
    update: &AdamWUpdate,
    vector_size: VectorSize,
    group: &[usize],
    tensors: &[CubeTensor],
    scale: f32,
) {
    let longest = group
        .iter()
        .map(|index| tensors[4 * index].meta.num_elements());
    let vectors = longest.max().unwrap_or(0) / vector_size;
    let cubes = vectors.div_ceil(UNITS as usize).clamp(1, MOST_CUBES);
    let part = |part: usize| {
        let parts = group.iter().map(move |index| &tensors[4 * index + part]);
        parts.cloned().map(CubeTensor::into_linear_view)
    };
    let factors = update.factors();
    update_kernel::launch(
        &tensors[0].client,
        CubeCount::Static(cubes as u32, group.len() as u32, 1),
        CubeDim::new_1d(UNITS),
        vector_size,
        part(0).collect(),
        part(1).collect(),
        part(2).collect(),
        part(3).collect(),
        factors.beta_1,
        factors.rest_1,
        factors.beta_2,
        factors.rest_2,
        factors.correction,
        factors.epsilon,
        factors.rate,
        factors.decay,
        scale,
    );
}

type Reads<N> = Sequence<LinearView<'static, Vector<f32, N>>>;
type Writes<N> = Sequence<LinearViewMut<'static, Vector<f32, N>>>;

/// The cubes of a row work on one tensor. `moving` is the gradient before and the values after.
#[cube(launch)]
fn update_kernel<N: Size>(
    values: Reads<N>,
    mut moving: Writes<N>,
    mut first: Writes<N>,
    mut second: Writes<N>,
    beta_1: f32,
    rest_1: f32,
    beta_2: f32,
    rest_2: f32,
    correction: f32,
    epsilon: f32,
    rate: f32,
    decay: f32,
    scale: f32,
) {
    let beta_1 = Vector::<f32, N>::cast_from(beta_1);
    let rest_1 = Vector::<f32, N>::cast_from(rest_1);
    let beta_2 = Vector::<f32, N>::cast_from(beta_2);
    let rest_2 = Vector::<f32, N>::cast_from(rest_2);
    let correction = Vector::<f32, N>::cast_from(correction);
    let epsilon = Vector::<f32, N>::cast_from(epsilon);
    let rate = Vector::<f32, N>::cast_from(rate);
    let decay = Vector::<f32, N>::cast_from(decay);
    let scale = Vector::<f32, N>::cast_from(scale);
    let step = (CUBE_COUNT_X * UNITS) as usize;
    #[unroll]
    for index in 0..values.len() {
        if CUBE_POS_Y as usize == index {
            let length = values.index(index).shape();
            let mut at = (CUBE_POS_X * UNITS + UNIT_POS) as usize;
            while at < length {
                let g = moving.index(index).read(at) * scale;
                let m = first.index(index).read(at) * beta_1 + g * rest_1;
                let v = second.index(index).read(at) * beta_2 + g * g * rest_2;
                let denominator = v.sqrt() / correction + epsilon;
                let change = m / denominator * rate;
                let moved = values.index(index).read(at) * decay - change;
                moving.index_mut(index).write(at, moved);
                first.index_mut(index).write(at, m);
                second.index_mut(index).write(at, v);
                at += step;
            }
        }
    }
}
