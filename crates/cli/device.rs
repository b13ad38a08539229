//! The devices that this build and this machine have.

use std::path::Path;

use calor_train::DeviceSpec;

use crate::failure::Failure;

/// `--device`, for every verb that computes.
#[derive(clap::Args)]
pub struct DeviceArgument {
    /// Where to compute: `cpu`, `cuda:0`, `wgpu:0`, … as `calor devices` lists them [default: cpu
    /// where the build has it]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
}

impl DeviceArgument {
    /// The device that was named, or the one this build prefers.
    pub fn spec(&self) -> Result<DeviceSpec, Failure> {
        match &self.device {
            Some(name) => Ok(name.parse()?),
            None => Ok(DeviceSpec::preferred()),
        }
    }
}

/// CUDA devices by name, with their memory where NVML gives it; empty without a driver.
#[cfg(feature = "cuda")]
pub fn cuda_devices() -> Vec<(String, Option<u64>)> {
    use calor_meter::{NvmlApi, SystemNvml, nvml_index_of_cuda};

    let nvml = SystemNvml::load().ok();
    let memory = |ordinal: usize| {
        let nvml = nvml.as_ref()?;
        let variable = |name: &str| std::env::var(name).ok();
        let (visible, order) = (
            variable("CUDA_VISIBLE_DEVICES"),
            variable("CUDA_DEVICE_ORDER"),
        );
        let index = nvml_index_of_cuda(nvml, ordinal, visible.as_deref(), order.as_deref()).ok()?;
        nvml.memory_total_bytes(index).ok()
    };
    let names = names(burn::tensor::DeviceType::Cuda);
    names
        .into_iter()
        .enumerate()
        .map(|(ordinal, name)| (name, memory(ordinal)))
        .collect()
}

#[cfg(not(feature = "cuda"))]
pub fn cuda_devices() -> Vec<(String, Option<u64>)> {
    Vec::new()
}

/// Adapters that wgpu lists, by name.
#[cfg(feature = "wgpu")]
pub fn wgpu_devices() -> Vec<(String, Option<u64>)> {
    names(burn::tensor::DeviceType::Wgpu)
        .into_iter()
        .map(|name| (name, None))
        .collect()
}

#[cfg(not(feature = "wgpu"))]
pub fn wgpu_devices() -> Vec<(String, Option<u64>)> {
    Vec::new()
}

/// Opens every device of a kind and asks for its name. A runtime whose driver is half there
/// panics; such a device has no name and counts as missing.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn names(kind: burn::tensor::DeviceType) -> Vec<String> {
    use burn::tensor::Device;
    use std::panic::{catch_unwind, set_hook, take_hook};

    let hook = take_hook();
    set_hook(Box::new(|_| {}));
    let names = catch_unwind(|| Device::enumerate(kind).into_vec())
        .unwrap_or_default()
        .into_iter()
        .filter_map(|device| {
            catch_unwind(|| calor_train::device::describe_with_products(&device)).ok()
        })
        .collect();
    set_hook(hook);
    names
}

/// Whether the dynamic linker would find a library whose file name starts with `name`.
pub fn library_is_there(name: &str) -> bool {
    let listed = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let usual = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/lib/x86_64-linux-gnu",
        "/usr/lib/wsl/lib",
        "/usr/local/cuda/lib64",
        "/usr/local/nvidia/lib64",
        "/opt/cuda/lib64",
    ];
    std::env::split_paths(&listed)
        .chain(usual.iter().map(|folder| Path::new(folder).to_owned()))
        .any(|folder| {
            std::fs::read_dir(folder).is_ok_and(|entries| {
                entries
                    .flatten()
                    .any(|entry| entry.file_name().to_string_lossy().starts_with(name))
            })
        })
}
