//! AdamW on a GPU: one pass over values, gradient and moments.
//!
//! Left to burn's fusion, the updates of all tensors together become kernels that take many seconds to
//! compile, and other ones when a gradient is clipped for the first time.

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Cube, backend_extension};
use burn::tensor::Tensor;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};

use super::AdamWUpdate;
use crate::gpu::operation::{tensor, value};
use crate::gpu::rows::vector_size;

pub(super) fn adamw(
    values: Tensor<1>,
    gradient: Tensor<1>,
    first: Tensor<1>,
    second: Tensor<1>,
    update: &AdamWUpdate,
) -> [Tensor<1>; 3] {
    let (values, gradient) = (value(values), value(gradient));
    let (first, second) = (value(first), value(second));
    let (values, first, second) = Cube::adamw_update(values, gradient, first, second, *update);
    [values, first, second].map(tensor)
}

/// AdamW as a backend computes it.
#[backend_extension(Cube, Fusion)]
pub trait AdamW: Backend {
    /// See [`adamw`](crate::adamw).
    #[fusion(meta = |values, _, first, second, _| (values.clone(), first.clone(), second.clone()))]
    fn adamw_update(
        values: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        update: AdamWUpdate,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

impl AdamW for CubeBackend {
    fn adamw_update(
        values: CubeTensor,
        gradient: CubeTensor,
        first: CubeTensor,
        second: CubeTensor,
        update: AdamWUpdate,
    ) -> (CubeTensor, CubeTensor, CubeTensor) {
        let [values, gradient, first, second] =
            [values, gradient, first, second].map(into_contiguous);
        let client = values.client.clone();
        let outputs = [(); 3].map(|()| {
            let (device, shape) = (values.device.clone(), values.meta.shape().clone());
            empty_device_contiguous_dtype(client.clone(), device, shape, values.dtype)
        });
        let elements = values.meta.num_elements();
        let vector_size = vector_size(&values, elements);
        let units = elements / vector_size;
        let dimension = CubeDim::new(&client, units);
        let count = calculate_cube_count_elemwise(&client, units, dimension);
        let [correction_1, correction_2] = update.corrections();
        let dtype = dtype_to_storage_type(values.dtype);
        let [new_values, new_first, new_second] = outputs;
        adamw_kernel::launch(
            &client,
            count,
            dimension,
            vector_size,
            values.into_linear_view(),
            gradient.into_linear_view(),
            first.into_linear_view(),
            second.into_linear_view(),
            new_values.clone().into_linear_view(),
            new_first.clone().into_linear_view(),
            new_second.clone().into_linear_view(),
            update.beta_1 as f32,
            (1.0 - update.beta_1) as f32,
            update.beta_2 as f32,
            (1.0 - update.beta_2) as f32,
            correction_2.sqrt() as f32,
            update.epsilon as f32,
            (update.learning_rate / correction_1) as f32,
            (1.0 - update.learning_rate * update.weight_decay) as f32,
            dtype,
        );
        (new_values, new_first, new_second)
    }
}

#[cube(launch)]
fn adamw_kernel<T: Float, N: Size>(
    values: LinearView<'_, Vector<T, N>>,
    gradient: LinearView<'_, Vector<T, N>>,
    first: LinearView<'_, Vector<T, N>>,
    second: LinearView<'_, Vector<T, N>>,
    mut new_values: LinearViewMut<'_, Vector<T, N>>,
    mut new_first: LinearViewMut<'_, Vector<T, N>>,
    mut new_second: LinearViewMut<'_, Vector<T, N>>,
    beta_1: f32,
    rest_1: f32,
    beta_2: f32,
    rest_2: f32,
    correction: f32,
    epsilon: f32,
    rate: f32,
    decay: f32,
    #[define(T)] _dtype: ElemType,
) {
    if !new_values.is_in_bounds(ABSOLUTE_POS) {
        terminate!();
    }
    let beta_1 = Vector::<T, N>::cast_from(beta_1);
    let rest_1 = Vector::<T, N>::cast_from(rest_1);
    let beta_2 = Vector::<T, N>::cast_from(beta_2);
    let rest_2 = Vector::<T, N>::cast_from(rest_2);
    let correction = Vector::<T, N>::cast_from(correction);
    let epsilon = Vector::<T, N>::cast_from(epsilon);
    let rate = Vector::<T, N>::cast_from(rate);
    let decay = Vector::<T, N>::cast_from(decay);
    let g = gradient.read(ABSOLUTE_POS);
    let m = first.read(ABSOLUTE_POS) * beta_1 + g * rest_1;
    let v = second.read(ABSOLUTE_POS) * beta_2 + g * g * rest_2;
    let denominator = v.sqrt() / correction + epsilon;
    let change = m / denominator * rate;
    new_values.write(ABSOLUTE_POS, values.read(ABSOLUTE_POS) * decay - change);
    new_first.write(ABSOLUTE_POS, m);
    new_second.write(ABSOLUTE_POS, v);
}
