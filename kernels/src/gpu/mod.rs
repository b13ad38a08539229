//! What the operations on CubeCL devices, CUDA's and wgpu's, have in common.

pub(crate) mod list;
pub(crate) mod operation;
pub(crate) mod rows;

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;

/// Whether the kernels for CubeCL's devices serve this tensor: it lives on one, and no references are
/// asked for.
pub(crate) fn serves<const D: usize>(tensor: &Tensor<D>) -> bool {
    !crate::references() && holds(tensor)
}

/// A tensor to be written, with its elements one behind the other.
pub(crate) fn empty_like(tensor: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    let (client, device) = (tensor.client.clone(), tensor.device.clone());
    empty_device_contiguous_dtype(client, device, shape, dtype)
}

/// Whether the tensor lives on a device of CubeCL's.
pub(crate) fn holds<const D: usize>(tensor: &Tensor<D>) -> bool {
    let device = tensor.device().without_autodiff();
    matches!(device.as_dispatch(), DispatchDevice::Cube(_))
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
