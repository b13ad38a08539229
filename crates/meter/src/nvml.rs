//! NVIDIA GPUs through NVML, loaded at run time, behind a trait so that a test can stand in.

use std::ffi::OsStr;
use std::sync::Arc;

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use crate::energy::{Component, EnergySource};
use crate::{MeterError, Quantity};

/// One GPU as NVML lists it (in the order of the PCI bus).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmlDevice {
    pub index: u32,
    pub name: String,
    /// `GPU-` and a universally unique identifier.
    pub uuid: String,
}

/// The questions this crate asks NVML. `index` is NVML's own, in the order of the PCI bus.
pub trait NvmlApi: Send + Sync {
    /// All GPUs that the driver shows this process.
    fn devices(&self) -> Result<Vec<NvmlDevice>, MeterError>;

    /// Millijoules since the driver was loaded (Volta and later).
    fn total_energy_mj(&self, index: u32) -> Result<u64, MeterError>;

    /// Bytes of device memory in use, by any process.
    fn memory_used_bytes(&self, index: u32) -> Result<u64, MeterError>;

    /// Bytes of device memory.
    fn memory_total_bytes(&self, index: u32) -> Result<u64, MeterError>;
}

/// The installed driver's NVML.
pub struct SystemNvml(Nvml);

impl SystemNvml {
    /// Loads and starts the library, under its plain name or, where only the driver and not its
    /// development files are installed (containers), under its versioned one.
    pub fn load() -> Result<SystemNvml, MeterError> {
        Nvml::init()
            .or_else(|first| match first {
                NvmlError::LibloadingError(_) => Nvml::builder()
                    .lib_path(OsStr::new("libnvidia-ml.so.1"))
                    .init(),
                other => Err(other),
            })
            .map(SystemNvml)
            .map_err(|source| MeterError::NvmlLibrary {
                source: source.into(),
            })
    }

    fn ask<T>(
        &self,
        what: &'static str,
        index: u32,
        question: impl FnOnce(&nvml_wrapper::Device<'_>) -> Result<T, NvmlError>,
    ) -> Result<T, MeterError> {
        self.0
            .device_by_index(index)
            .and_then(|device| question(&device))
            .map_err(|source| MeterError::Nvml {
                what,
                index,
                source: source.into(),
            })
    }
}

impl NvmlApi for SystemNvml {
    fn devices(&self) -> Result<Vec<NvmlDevice>, MeterError> {
        let count = self
            .0
            .device_count()
            .map_err(|source| MeterError::NvmlLibrary {
                source: source.into(),
            })?;
        (0..count)
            .map(|index| {
                Ok(NvmlDevice {
                    index,
                    name: self.ask("name", index, |device| device.name())?,
                    uuid: self.ask("identifier", index, |device| device.uuid())?,
                })
            })
            .collect()
    }

    fn total_energy_mj(&self, index: u32) -> Result<u64, MeterError> {
        self.ask("total energy", index, |device| {
            device.total_energy_consumption()
        })
    }

    fn memory_used_bytes(&self, index: u32) -> Result<u64, MeterError> {
        self.ask("memory in use", index, |device| {
            device.memory_info().map(|memory| memory.used)
        })
    }

    fn memory_total_bytes(&self, index: u32) -> Result<u64, MeterError> {
        self.ask("memory", index, |device| {
            device.memory_info().map(|memory| memory.total)
        })
    }
}

/// The total-energy counter of one GPU: the whole board, whichever process uses it.
pub struct NvmlSource {
    nvml: Arc<dyn NvmlApi>,
    index: u32,
    name: String,
    first_mj: u64,
    last_mj: u64,
}

impl NvmlSource {
    /// Reads the counter of the GPU with NVML's `index` once. Fails where the GPU has none
    /// (before Volta) or shows none (a MIG instance).
    pub fn open(nvml: Arc<dyn NvmlApi>, index: u32) -> Result<NvmlSource, MeterError> {
        let devices = nvml.devices()?;
        let device = devices
            .iter()
            .find(|device| device.index == index)
            .ok_or_else(|| MeterError::NoSuchGpu {
                device: format!("GPU {index}"),
                count: devices.len() as u32,
                hint: String::new(),
            })?;
        let name = format!("NVML total energy, GPU {index} ({})", device.name);
        let first_mj = nvml.total_energy_mj(index)?;
        Ok(NvmlSource {
            nvml,
            index,
            name,
            first_mj,
            last_mj: first_mj,
        })
    }
}

impl EnergySource for NvmlSource {
    fn component(&self) -> Component {
        Component::Device
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn energy_j(&mut self) -> Result<f64, MeterError> {
        let now_mj = self.nvml.total_energy_mj(self.index)?;
        if now_mj < self.last_mj {
            return Err(MeterError::WentBackwards {
                source_name: self.name.clone(),
            });
        }
        self.last_mj = now_mj;
        Ok((now_mj - self.first_mj) as f64 * 1e-3)
    }

    fn label(&self, energy_j: f64) -> Quantity {
        Quantity::measured(energy_j, format!("{} (whole board)", self.name))
    }

    fn counts_idle(&self) -> bool {
        true
    }
}

/// NVML's index of the CUDA device `ordinal`.
///
/// `visible` is the value of `CUDA_VISIBLE_DEVICES` and `order` that of `CUDA_DEVICE_ORDER`. CUDA
/// by default numbers the fastest GPU first, NVML numbers by PCI bus: with GPUs of several kinds
/// and no set order, an ordinal cannot be matched, and that is an error rather than a guess.
pub fn nvml_index_of_cuda(
    nvml: &dyn NvmlApi,
    ordinal: usize,
    visible: Option<&str>,
    order: Option<&str>,
) -> Result<u32, MeterError> {
    let devices = nvml.devices()?;
    let count = devices.len() as u32;
    let no_such = |hint: &str| MeterError::NoSuchGpu {
        device: format!("cuda:{ordinal}"),
        count,
        hint: hint.to_owned(),
    };
    let selector = match visible {
        None => ordinal.to_string(),
        Some(list) => list
            .split(',')
            .map(str::trim)
            .take_while(|entry| !entry.is_empty() && *entry != "-1")
            .nth(ordinal)
            .ok_or_else(|| no_such(" (see CUDA_VISIBLE_DEVICES)"))?
            .to_owned(),
    };
    if selector.starts_with("MIG-") {
        return Err(no_such(
            ": it is a part of a GPU (MIG), and the energy counter is the whole GPU's",
        ));
    }
    if selector.starts_with("GPU-") {
        let mut matches = devices
            .iter()
            .filter(|device| device.uuid.starts_with(&selector));
        return match (matches.next(), matches.next()) {
            (Some(device), None) => Ok(device.index),
            _ => Err(no_such(" (see CUDA_VISIBLE_DEVICES)")),
        };
    }
    let index: u32 = selector
        .parse()
        .map_err(|_| no_such(" (CUDA_VISIBLE_DEVICES does not name a GPU there)"))?;
    if index >= count {
        return Err(no_such(""));
    }
    let mixed = devices.iter().any(|device| device.name != devices[0].name);
    if mixed && order != Some("PCI_BUS_ID") {
        return Err(MeterError::AmbiguousGpu {
            device: format!("cuda:{ordinal}"),
            count,
            hint: "they are of several kinds; set CUDA_DEVICE_ORDER=PCI_BUS_ID".to_owned(),
        });
    }
    Ok(index)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use super::*;

    /// NVML with GPUs, counters and refusals of the test's choice.
    #[derive(Default)]
    pub(crate) struct FakeNvml {
        pub(crate) gpus: Vec<NvmlDevice>,
        pub(crate) energy_mj: Mutex<Vec<Option<u64>>>,
        pub(crate) memory_used: Mutex<u64>,
    }

    impl FakeNvml {
        pub(crate) fn new(names: &[&str]) -> FakeNvml {
            let gpus = names.iter().zip(0..).map(|(name, index)| NvmlDevice {
                index,
                name: (*name).to_owned(),
                uuid: format!("GPU-{index}f3a-{index}"),
            });
            FakeNvml {
                gpus: gpus.collect(),
                energy_mj: Mutex::new(vec![Some(5_000_000); names.len()]),
                memory_used: Mutex::new(0),
            }
        }

        pub(crate) fn set_energy(&self, index: usize, energy_mj: Option<u64>) {
            self.energy_mj.lock().unwrap()[index] = energy_mj;
        }
    }

    impl NvmlApi for FakeNvml {
        fn devices(&self) -> Result<Vec<NvmlDevice>, MeterError> {
            Ok(self.gpus.clone())
        }

        fn total_energy_mj(&self, index: u32) -> Result<u64, MeterError> {
            self.energy_mj.lock().unwrap()[index as usize].ok_or(MeterError::Nvml {
                what: "total energy",
                index,
                source: NvmlError::NotSupported.into(),
            })
        }

        fn memory_used_bytes(&self, _index: u32) -> Result<u64, MeterError> {
            Ok(*self.memory_used.lock().unwrap())
        }

        fn memory_total_bytes(&self, _index: u32) -> Result<u64, MeterError> {
            Ok(80 << 30)
        }
    }

    #[test]
    fn energy_counts_from_the_opening() {
        let nvml = Arc::new(FakeNvml::new(&["NVIDIA H100 80GB HBM3"]));
        let mut source = NvmlSource::open(nvml.clone(), 0).unwrap();
        assert_eq!(source.energy_j().unwrap(), 0.0);
        nvml.set_energy(0, Some(5_002_500));
        assert_eq!(source.energy_j().unwrap(), 2.5);
        assert_eq!(source.label(2.5).status(), "measured");
        assert!(source.name().contains("NVIDIA H100 80GB HBM3"));
    }

    #[test]
    fn a_counter_that_goes_back_is_an_error_not_a_negative_energy() {
        let nvml = Arc::new(FakeNvml::new(&["NVIDIA H100 80GB HBM3"]));
        let mut source = NvmlSource::open(nvml.clone(), 0).unwrap();
        nvml.set_energy(0, Some(17));
        assert!(matches!(
            source.energy_j(),
            Err(MeterError::WentBackwards { .. })
        ));
    }

    #[test]
    fn a_gpu_without_a_counter_says_so() {
        let nvml = Arc::new(FakeNvml::new(&["Tesla P100"]));
        nvml.set_energy(0, None);
        let error = NvmlSource::open(nvml, 0).err().unwrap();
        let text = crate::describe(&error);
        assert!(text.contains("total energy of GPU 0"), "{text}");
        assert!(
            text.contains("not available on the target device"),
            "{text}"
        );
    }

    #[test]
    fn a_gpu_that_is_not_there_is_an_error() {
        let nvml = Arc::new(FakeNvml::new(&["NVIDIA H100 80GB HBM3"]));
        let error = NvmlSource::open(nvml, 3).err().unwrap();
        assert!(matches!(error, MeterError::NoSuchGpu { count: 1, .. }));
    }

    #[test]
    fn ordinals_follow_cuda_visible_devices() {
        let nvml = FakeNvml::new(&["A", "A", "A"]);
        let index = |ordinal, visible| nvml_index_of_cuda(&nvml, ordinal, visible, None);
        assert_eq!(index(2, None).unwrap(), 2);
        assert_eq!(index(0, Some("2,0")).unwrap(), 2);
        assert_eq!(index(1, Some("2, 0")).unwrap(), 0);
        assert_eq!(index(0, Some("GPU-1f3a")).unwrap(), 1);
        assert!(index(3, None).is_err());
        assert!(index(0, Some("")).is_err());
        assert!(index(1, Some("2,-1,0")).is_err());
        assert!(index(0, Some("7")).is_err());
        assert!(
            index(0, Some("GPU-")).is_err(),
            "a prefix of several is of none"
        );
        let mig = index(0, Some("MIG-5f0c")).unwrap_err().to_string();
        assert!(mig.contains("MIG"), "{mig}");
    }

    #[test]
    fn mixed_gpus_need_a_set_order() {
        let nvml = FakeNvml::new(&["A", "B"]);
        let error = nvml_index_of_cuda(&nvml, 0, None, None).unwrap_err();
        assert!(error.to_string().contains("CUDA_DEVICE_ORDER"), "{error}");
        assert_eq!(
            nvml_index_of_cuda(&nvml, 1, None, Some("PCI_BUS_ID")).unwrap(),
            1
        );
        let by_identifier = nvml_index_of_cuda(&nvml, 0, Some("GPU-1f3a-1"), None);
        assert_eq!(by_identifier.unwrap(), 1);
    }
}
