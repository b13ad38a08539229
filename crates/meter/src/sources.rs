//! Which energy sources this machine has, and which of them a run uses.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::cpu::CpuTimeModel;
use crate::energy::{Channel, Component, EnergySource};
use crate::nvml::{NvmlApi, NvmlSource, SystemNvml, nvml_index_of_cuda};
use crate::options::{EnergyOptions, MeteredDevice};
use crate::rapl::RaplSource;
use crate::{MeterError, describe};

/// One energy source, for `calor devices`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStatus {
    pub component: Component,
    pub name: String,
    /// `measured` or `modelled`.
    pub kind: String,
    /// Whether it can be read here and now.
    pub available: bool,
    /// Why it cannot, and what to do; or when it is used.
    pub detail: String,
}

/// All energy sources of this machine, usable or not.
pub fn sources(options: &EnergyOptions) -> Vec<SourceStatus> {
    let nvml = SystemNvml::load().map(|nvml| Arc::new(nvml) as Arc<dyn NvmlApi>);
    sources_at(options, nvml)
}

/// [`sources`], with NVML given (a test's, or the reason why there is none).
pub fn sources_at(
    options: &EnergyOptions,
    nvml: Result<Arc<dyn NvmlApi>, MeterError>,
) -> Vec<SourceStatus> {
    let mut found = Vec::new();
    let mut add = |component, name: &str, kind: &str, state: Result<String, MeterError>| {
        let available = state.is_ok();
        found.push(SourceStatus {
            component,
            name: name.to_owned(),
            kind: kind.to_owned(),
            available,
            detail: state.unwrap_or_else(|error| describe(&error)),
        });
    };
    match nvml.and_then(|nvml| nvml.devices().map(|devices| (nvml, devices))) {
        Err(error) => add(
            Component::Device,
            "NVML total energy",
            "measured",
            Err(error),
        ),
        Ok((_, devices)) if devices.is_empty() => {
            let none = MeterError::NoSuchGpu {
                device: "any GPU".to_owned(),
                count: 0,
                hint: String::new(),
            };
            add(
                Component::Device,
                "NVML total energy",
                "measured",
                Err(none),
            );
        }
        Ok((nvml, devices)) => {
            for device in devices {
                let name = format!("NVML total energy, GPU {} ({})", device.index, device.name);
                let state = NvmlSource::open(nvml.clone(), device.index)
                    .map(|_| "used when the run is on this GPU".to_owned());
                add(Component::Device, &name, "measured", state);
            }
        }
    }
    let rapl = RaplSource::open(&options.powercap_root);
    let has_rapl = rapl.is_ok();
    let name = rapl
        .as_ref()
        .map_or("RAPL", |source| source.name())
        .to_owned();
    let state = rapl.map(|_| "used for the host".to_owned());
    add(Component::Host, &name, "measured", state);

    let model = CpuTimeModel::open(&options.proc_root, options.watts_per_busy_core);
    let name = model
        .as_ref()
        .map_or("model of processor time", |model| model.name())
        .to_owned();
    let use_of_model = if has_rapl {
        "not used: RAPL can be read"
    } else {
        "used for the host, since RAPL cannot be read"
    };
    add(
        Component::Host,
        &name,
        "modelled",
        model.map(|_| use_of_model.to_owned()),
    );
    found
}

/// The host's source: RAPL, else the model of processor time with a note of why.
pub(crate) fn host_channel(options: &EnergyOptions, notes: &mut Vec<String>) -> Channel {
    let rapl = match RaplSource::open(&options.powercap_root) {
        Ok(source) => return Channel::Source(Box::new(source)),
        Err(error) => describe(&error),
    };
    match CpuTimeModel::open(&options.proc_root, options.watts_per_busy_core) {
        Ok(model) => {
            notes.push(format!(
                "host energy is modelled because RAPL cannot be read: {rapl}"
            ));
            Channel::Source(Box::new(model))
        }
        Err(error) => Channel::Missing {
            component: Component::Host,
            reason: format!("{rapl}; {}", describe(&error)),
        },
    }
}

/// The GPU of a device, as NVML and its index there; `Err(None)` when the device is the host.
pub(crate) fn gpu_of(
    device: &MeteredDevice,
    load: impl FnOnce() -> Result<Arc<dyn NvmlApi>, MeterError>,
) -> Result<(Arc<dyn NvmlApi>, u32), Option<MeterError>> {
    match device {
        MeteredDevice::Cpu => Err(None),
        MeteredDevice::Cuda { ordinal } => {
            let nvml = load()?;
            let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
            let order = std::env::var("CUDA_DEVICE_ORDER").ok();
            let index = nvml_index_of_cuda(&*nvml, *ordinal, visible.as_deref(), order.as_deref())?;
            Ok((nvml, index))
        }
        MeteredDevice::Adapter { name } if is_software(name) => Err(None),
        MeteredDevice::Adapter { name } => {
            let nvml = load()?;
            let devices = nvml.devices().map_err(Some)?;
            let count = devices.len() as u32;
            let mut matches = devices.iter().filter(|device| device.name == *name);
            match (matches.next(), matches.next()) {
                (Some(device), None) => {
                    let index = device.index;
                    Ok((nvml, index))
                }
                (None, _) => Err(Some(MeterError::NoSuchGpu {
                    device: name.clone(),
                    count,
                    hint: ", and no other energy counter is known for it".to_owned(),
                })),
                (Some(_), Some(_)) => Err(Some(MeterError::AmbiguousGpu {
                    device: name.clone(),
                    count,
                    hint: "several have this name; run on CUDA to choose one".to_owned(),
                })),
            }
        }
    }
}

/// The device's source; `None` when the device is the host.
pub(crate) fn device_channel(
    gpu: &Result<(Arc<dyn NvmlApi>, u32), Option<MeterError>>,
) -> Option<Channel> {
    let missing = |error: &MeterError| Channel::Missing {
        component: Component::Device,
        reason: describe(error),
    };
    match gpu {
        Err(None) => None,
        Err(Some(error)) => Some(missing(error)),
        Ok((nvml, index)) => Some(match NvmlSource::open(nvml.clone(), *index) {
            Ok(source) => Channel::Source(Box::new(source)),
            Err(error) => missing(&error),
        }),
    }
}

/// Renderers that run on the host's processors, by the names their drivers give.
fn is_software(adapter: &str) -> bool {
    let adapter = adapter.to_ascii_lowercase();
    ["llvmpipe", "lavapipe", "swiftshader", "basic render"]
        .iter()
        .any(|name| adapter.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvml::tests::FakeNvml;
    use crate::rapl::tests::FakePowercap;

    fn no_nvml() -> Result<Arc<dyn NvmlApi>, MeterError> {
        Err(MeterError::NvmlLibrary {
            source: "libnvidia-ml.so: not found".into(),
        })
    }

    #[test]
    fn every_source_is_listed_with_its_state() {
        let fake = FakePowercap::new(&[("intel-rapl:0", "package-0")]);
        let options = EnergyOptions {
            powercap_root: fake.root(),
            ..EnergyOptions::default()
        };
        let nvml = FakeNvml::new(&["NVIDIA H100 80GB HBM3", "Tesla P100"]);
        nvml.set_energy(1, None);
        let found = sources_at(&options, Ok(Arc::new(nvml)));
        let states: Vec<(Component, bool)> = found
            .iter()
            .map(|source| (source.component, source.available))
            .collect();
        use Component::{Device, Host};
        assert_eq!(
            states,
            [(Device, true), (Device, false), (Host, true), (Host, true)]
        );
        assert!(
            found[1].detail.contains("total energy of GPU 1"),
            "{:?}",
            found[1]
        );
        assert_eq!(found[2].name, "RAPL package-0");
        assert_eq!(found[3].detail, "not used: RAPL can be read");
        assert_eq!(found[3].kind, "modelled");
    }

    #[test]
    fn what_is_missing_says_why() {
        let options = EnergyOptions {
            powercap_root: "/nonexistent/powercap".into(),
            proc_root: "/nonexistent/proc".into(),
            ..EnergyOptions::default()
        };
        let found = sources_at(&options, no_nvml());
        assert!(found.iter().all(|source| !source.available));
        assert!(
            found[0].detail.contains("libnvidia-ml.so"),
            "{:?}",
            found[0]
        );
        assert!(found[1].detail.contains("/nonexistent/powercap"));
        assert!(found[2].detail.contains("/nonexistent/proc"));
        let none = sources_at(&options, Ok(Arc::new(FakeNvml::new(&[]))));
        assert!(!none[0].available && none[0].detail.contains("0 GPUs"));
    }

    #[test]
    fn the_host_falls_back_to_the_model_and_notes_why() {
        let options = EnergyOptions {
            powercap_root: "/nonexistent/powercap".into(),
            ..EnergyOptions::default()
        };
        let mut notes = Vec::new();
        let channel = host_channel(&options, &mut notes);
        if cfg!(target_os = "linux") {
            assert!(matches!(channel, Channel::Source(_)));
            assert!(notes[0].contains("/nonexistent/powercap"), "{notes:?}");
        }
        let fake = FakePowercap::new(&[("intel-rapl:0", "package-0")]);
        let options = EnergyOptions {
            powercap_root: fake.root(),
            ..options
        };
        let mut notes = Vec::new();
        let Channel::Source(source) = host_channel(&options, &mut notes) else {
            panic!("RAPL can be read");
        };
        assert_eq!(source.name(), "RAPL package-0");
        assert!(notes.is_empty());
    }

    #[test]
    fn an_adapter_is_matched_by_name_or_not_at_all() {
        let load = || Ok(Arc::new(FakeNvml::new(&["A", "B", "B"])) as Arc<dyn NvmlApi>);
        let adapter = |name: &str| MeteredDevice::Adapter {
            name: name.to_owned(),
        };
        assert_eq!(gpu_of(&adapter("A"), load).ok().unwrap().1, 0);
        let unknown = gpu_of(&adapter("AMD Radeon"), load).err().unwrap().unwrap();
        assert!(unknown.to_string().contains("no other energy counter"));
        let twice = gpu_of(&adapter("B"), load).err().unwrap().unwrap();
        assert!(matches!(twice, MeterError::AmbiguousGpu { .. }));
        let software = gpu_of(&adapter("llvmpipe (LLVM 15.0.6, 256 bits)"), load);
        assert!(matches!(software, Err(None)));
        assert!(device_channel(&software).is_none());
        let failed = gpu_of(&adapter("A"), no_nvml);
        assert!(matches!(
            device_channel(&failed),
            Some(Channel::Missing { .. })
        ));
    }
}
