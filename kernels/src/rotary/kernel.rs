//! The rotation as a kernel, a unit an element.

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, backend_extension};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};

/// The rotation as a backend computes it, without derivatives.
#[backend_extension(Cube, Fusion)]
pub trait Rotate: Backend {
    /// See [`rotary`](crate::rotary); `back` rotates the other way.
    #[fusion(dtype = x, shape = x)]
    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        back: bool,
    ) -> FloatTensor<Self>;
}

impl Rotate for CubeBackend {
    fn rotate(x: CubeTensor, cos: CubeTensor, sin: CubeTensor, back: bool) -> CubeTensor {
        let [x, cos, sin] = [x, cos, sin].map(into_contiguous);
        let (client, device) = (x.client.clone(), x.device.clone());
        let output = empty_device_contiguous_dtype(client, device, x.meta.shape().clone(), x.dtype);
        let units = x.meta.num_elements();
        let (heads, head_dim) = (x.meta.shape()[2], x.meta.shape()[3]);
        let rotated = cos.meta.shape()[2];
        let dtypes = [x.dtype, cos.dtype].map(dtype_to_storage_type);
        let dimension = CubeDim::new(&output.client, units);
        let count = calculate_cube_count_elemwise(&output.client, units, dimension);
        rotate_kernel::launch(
            &output.client,
            count,
            dimension,
            1,
            x.into_linear_view(),
            cos.into_linear_view(),
            sin.into_linear_view(),
            output.clone().into_linear_view(),
            head_dim as u32,
            (heads * head_dim) as u32,
            rotated as u32,
            if back { -1.0 } else { 1.0 },
            dtypes,
        );
        output
    }
}

#[cube(launch)]
fn rotate_kernel<T: Float, C: Float, N: Size>(
    x: LinearView<'_, Vector<T, N>>,
    cos: LinearView<'_, Vector<C, N>>,
    sin: LinearView<'_, Vector<C, N>>,
    mut output: LinearViewMut<'_, Vector<T, N>>,
    head_dim: u32,
    width: u32,
    rotated: u32,
    direction: f32,
    #[define(T, C)] _dtypes: [ElemType; 2],
) {
    if !output.is_in_bounds(ABSOLUTE_POS) {
        terminate!();
    }
    let at = ABSOLUTE_POS as u32;
    let value = x.read(ABSOLUTE_POS);
    let place = at % head_dim;
    if place < rotated {
        let half = rotated / 2;
        let first = place < half;
        let partner = select(first, at + half, at - half);
        let sign = select(first, -direction, direction);
        let angle = (at / width * rotated + place) as usize;
        let other = Vector::<f32, N>::cast_from(x.read(partner as usize));
        let result = Vector::<f32, N>::cast_from(value)
            * Vector::<f32, N>::cast_from(cos.read(angle))
            + other
                * Vector::<f32, N>::cast_from(sign)
                * Vector::<f32, N>::cast_from(sin.read(angle));
        output.write(ABSOLUTE_POS, Vector::cast_from(result));
    } else {
        output.write(ABSOLUTE_POS, value);
    }
}
