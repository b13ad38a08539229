//! What the CPU kernels share: entering and leaving burn's tensors, registering a backward pass,
//! matrix products, vectorised elementary functions.

pub(crate) mod allocator;
pub(crate) mod cast;
pub(crate) mod elementary;
#[cfg(test)]
mod half_tests;
pub(crate) mod halves;
pub(crate) mod matrix;
pub(crate) mod operation;
pub(crate) mod stored;
#[cfg(test)]
pub(crate) mod testing;

use burn::backend::DispatchDevice;
use burn::tensor::Device;

/// Whether the device computes with burn-flex, under autodiff or not.
pub(crate) fn is_flex(device: &Device) -> bool {
    let plain;
    let dispatch = if device.is_autodiff() {
        plain = device.clone().without_autodiff();
        plain.as_dispatch()
    } else {
        device.as_dispatch()
    };
    matches!(dispatch, DispatchDevice::Flex(_))
}
