//! What NVIDIA's own libraries do better than generated kernels, called beside CubeCL.
//!
//! A native operation runs on a stream of its own. CubeCL does not tell which stream it uses, so the
//! two are ordered by events of the whole context: the operation waits for everything that was
//! submitted before it, and everything submitted later waits for the operation; the host waits for
//! neither. The libraries are loaded at run time, and where one is not there the CubeCL kernels serve.

pub(crate) mod module;
pub(crate) mod product;
mod session;

pub(crate) use session::{Queue, Refused, Session, WORKSPACE_BYTES};

use burn::backend::DispatchDevice;
use burn::tensor::Device;

/// What computes large matrix products on a device: the library, or why it is not used.
///
/// # Errors
/// A sentence that says what is missing, for a device of CUDA's whose products CubeCL's kernels
/// compute instead.
pub fn product_library(device: &Device) -> Option<Result<String, String>> {
    let device = device.clone().without_autodiff();
    let DispatchDevice::Cube(device) = device.as_dispatch() else {
        return None;
    };
    Session::of(device).map(|found| found.as_ref().map(Session::name).map_err(Clone::clone))
}
