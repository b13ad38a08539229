//! Devices by name: `cpu`, `cuda:0`, `wgpu:0`.

use std::fmt;
use std::str::FromStr;

use burn::tensor::Device;
use calor_meter::MeteredDevice;
use calor_model::PassDevice;

use crate::TrainError;

/// A device as the command line names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceSpec {
    /// The host's processors.
    Cpu,
    /// The CUDA device with this number, after `CUDA_VISIBLE_DEVICES`.
    Cuda(usize),
    /// The graphics adapter with this number, through Vulkan, Metal or DirectX.
    Wgpu(usize),
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceSpec::Cpu => formatter.write_str("cpu"),
            DeviceSpec::Cuda(index) => write!(formatter, "cuda:{index}"),
            DeviceSpec::Wgpu(index) => write!(formatter, "wgpu:{index}"),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = TrainError;

    fn from_str(text: &str) -> Result<DeviceSpec, TrainError> {
        let wrong = |problem: String| TrainError::Device {
            device: text.to_owned(),
            problem,
        };
        let (kind, index) = match text.split_once(':') {
            None => (text, 0),
            Some((kind, index)) => {
                let index = index.parse().map_err(|_| {
                    wrong(format!(
                        "`{index}` is not the number of a device; write `{kind}:0`"
                    ))
                })?;
                (kind, index)
            }
        };
        match kind {
            "cpu" if !text.contains(':') => Ok(DeviceSpec::Cpu),
            "cpu" => Err(wrong(
                "the processors are one device; write `cpu`".to_owned(),
            )),
            "cuda" => Ok(DeviceSpec::Cuda(index)),
            "wgpu" => Ok(DeviceSpec::Wgpu(index)),
            _ => Err(wrong("is none of `cpu`, `cuda:0`, `wgpu:0`".to_owned())),
        }
    }
}

impl DeviceSpec {
    /// The first device this build can be expected to run on.
    pub fn preferred() -> DeviceSpec {
        if cfg!(feature = "cpu") {
            DeviceSpec::Cpu
        } else if cfg!(feature = "cuda") {
            DeviceSpec::Cuda(0)
        } else {
            DeviceSpec::Wgpu(0)
        }
    }

    /// Whether operations are computed while the host goes on.
    pub fn is_asynchronous(self) -> bool {
        self != DeviceSpec::Cpu
    }

    /// What decides over the memory of a pass.
    pub(crate) fn pass(self) -> PassDevice {
        match self {
            DeviceSpec::Cpu => PassDevice::host(),
            DeviceSpec::Cuda(_) => PassDevice::Device { dequantizes: true },
            DeviceSpec::Wgpu(_) => PassDevice::Device { dequantizes: false },
        }
    }

    /// Rows are padded to a multiple of this: a GPU compiles and tunes for every shape it meets.
    pub(crate) fn seq_multiple(self) -> usize {
        if self.is_asynchronous() { 64 } else { 1 }
    }

    /// Opens the device.
    ///
    /// # Errors
    /// A device that this build has no feature for, that the machine does not have, or
    /// whose driver does not answer.
    pub fn open(self) -> Result<Device, TrainError> {
        match self {
            DeviceSpec::Cpu => self.cpu(),
            DeviceSpec::Cuda(index) => self.cuda(index),
            DeviceSpec::Wgpu(index) => self.wgpu(index),
        }
    }

    /// How the meter calls the opened device.
    pub fn metered(self, device: &Device) -> MeteredDevice {
        match self {
            DeviceSpec::Cpu => MeteredDevice::Cpu,
            DeviceSpec::Cuda(ordinal) => MeteredDevice::Cuda { ordinal },
            DeviceSpec::Wgpu(_) => MeteredDevice::Adapter {
                name: describe(device),
            },
        }
    }

    #[cfg(feature = "cpu")]
    fn cpu(self) -> Result<Device, TrainError> {
        Ok(Device::flex())
    }

    #[cfg(not(feature = "cpu"))]
    fn cpu(self) -> Result<Device, TrainError> {
        Err(self.not_built("cpu"))
    }

    #[cfg(feature = "cuda")]
    fn cuda(self, index: usize) -> Result<Device, TrainError> {
        let devices = self.enumerate(burn::tensor::DeviceType::Cuda)?;
        self.pick(
            devices,
            index,
            "no NVIDIA driver or GPU was found; see `calor devices`",
        )
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(self, _: usize) -> Result<Device, TrainError> {
        Err(self.not_built("cuda"))
    }

    #[cfg(feature = "wgpu")]
    fn wgpu(self, index: usize) -> Result<Device, TrainError> {
        let devices = self.enumerate(burn::tensor::DeviceType::Wgpu)?;
        self.pick(
            devices,
            index,
            "no graphics adapter was found; see `calor devices`",
        )
    }

    #[cfg(not(feature = "wgpu"))]
    fn wgpu(self, _: usize) -> Result<Device, TrainError> {
        Err(self.not_built("wgpu"))
    }

    /// Lists devices of a kind. A driver that is missing makes the runtime panic, which
    /// is no reason for this program to do so.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    fn enumerate(self, kind: burn::tensor::DeviceType) -> Result<Vec<Device>, TrainError> {
        std::panic::catch_unwind(|| Device::enumerate(kind).into_vec()).map_err(|panic| {
            let reason = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("its driver does not answer");
            TrainError::Device {
                device: self.to_string(),
                problem: reason.to_owned(),
            }
        })
    }

    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    fn pick(
        self,
        mut devices: Vec<Device>,
        index: usize,
        none: &str,
    ) -> Result<Device, TrainError> {
        let count = devices.len();
        if index < count {
            return Ok(devices.swap_remove(index));
        }
        let problem = if count == 0 {
            none.to_owned()
        } else {
            format!("this machine has {count} of that kind, numbered from 0")
        };
        Err(TrainError::Device {
            device: self.to_string(),
            problem,
        })
    }

    #[cfg(not(all(feature = "cpu", feature = "cuda", feature = "wgpu")))]
    fn not_built(self, feature: &str) -> TrainError {
        TrainError::Device {
            device: self.to_string(),
            problem: format!(
                "this build has no feature `{feature}`; build with `cargo build --release --features {feature}`"
            ),
        }
    }
}

/// What a device is: the name its driver gives, or the processor's.
pub fn describe(device: &Device) -> String {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if let Some(identity) = device.identity() {
        return identity.name;
    }
    let _ = device;
    processor()
}

/// The same, and on CUDA what computes its matrix products, with the reason where that is not
/// NVIDIA's library.
pub fn describe_with_products(device: &Device) -> String {
    let name = describe(device);
    #[cfg(feature = "cuda")]
    match calor_kernels::product_library(device) {
        Some(Ok(library)) => return format!("{name}, products by {library}"),
        Some(Err(reason)) => return format!("{name}, products by CubeCL's kernels ({reason})"),
        None => (),
    }
    name
}

/// The processor's name and the number of threads that work on it.
fn processor() -> String {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let name = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            text.lines().find_map(|line| {
                line.strip_prefix("model name")?
                    .split_once(':')
                    .map(|(_, name)| name.trim().to_owned())
            })
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    format!("{name}, {threads} threads")
}

/// Waits until the device has done everything it was given.
pub(crate) fn synchronise(device: &Device, doing: &'static str) -> Result<(), TrainError> {
    device.sync().map_err(|error| TrainError::Execution {
        doing,
        problem: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_wrong_ones_explained() {
        for (text, spec) in [
            ("cpu", DeviceSpec::Cpu),
            ("cuda:1", DeviceSpec::Cuda(1)),
            ("cuda", DeviceSpec::Cuda(0)),
            ("wgpu:0", DeviceSpec::Wgpu(0)),
        ] {
            assert_eq!(text.parse::<DeviceSpec>().unwrap(), spec);
        }
        for (text, hint) in [
            ("gpu", "`cuda:0`"),
            ("cuda:x", "`cuda:0`"),
            ("cpu:0", "write `cpu`"),
            ("", "none of"),
        ] {
            let error = text.parse::<DeviceSpec>().unwrap_err();
            assert!(error.to_string().contains(hint), "{error}");
            assert!(error.is_usage());
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_device_without_its_feature_names_the_feature() {
        let error = DeviceSpec::Cuda(0).open().unwrap_err().to_string();
        assert!(error.contains("--features cuda"), "{error}");
    }
}
