//! Peak memory of the process and of the device.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::nvml::NvmlApi;
use crate::{MeterError, Quantity, describe};

/// Peak memory of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// The most resident memory the process had (`VmHWM`).
    pub host_peak_bytes: Quantity,
    /// The most device memory the run held, as the caller's backend counts it.
    pub device_peak_bytes: Quantity,
    /// The most device memory in use on the GPU by any process, as NVML was seen to count it.
    pub device_in_use_peak_bytes: Quantity,
    /// The device's memory.
    pub device_total_bytes: Quantity,
}

/// The most resident memory this process has had, in bytes: `VmHWM` of `/proc/self/status`
/// (proc(5)), kept by the kernel, so no peak is missed between readings. `proc_root` is `/proc`.
pub fn peak_host_memory(proc_root: &Path) -> Quantity {
    let path = proc_root.join("self/status");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(source) => {
            let error = MeterError::Read { path, source };
            return Quantity::unavailable(describe(&error));
        }
    };
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let Some(line) = line else {
        return Quantity::unavailable(format!(
            "{} has no VmHWM: this kernel does not keep the peak",
            path.display()
        ));
    };
    let kibibytes = line
        .trim()
        .strip_suffix("kB")
        .and_then(|number| number.trim().parse::<u64>().ok());
    match kibibytes {
        Some(kibibytes) => Quantity::measured((kibibytes * 1024) as f64, "VmHWM, kernel"),
        None => Quantity::unavailable(format!("VmHWM in {} is not a number of kB", path.display())),
    }
}

/// Why a run on the processors has no device memory of its own.
pub(crate) const DEVICE_IS_HOST: &str = "the device is the host";

/// Device memory: what the caller's backend says, and what NVML shows.
pub(crate) struct DeviceMemory {
    nvml: Result<(Arc<dyn NvmlApi>, u32), String>,
    in_use_peak_bytes: Result<u64, String>,
    stated: Option<(u64, String)>,
    sampled_s: f64,
}

impl DeviceMemory {
    pub(crate) fn new(nvml: Result<(Arc<dyn NvmlApi>, u32), String>) -> DeviceMemory {
        DeviceMemory {
            nvml,
            in_use_peak_bytes: Err("not sampled yet".to_owned()),
            stated: None,
            sampled_s: f64::NEG_INFINITY,
        }
    }

    /// Keeps the larger of the peaks that the caller states.
    pub(crate) fn state(&mut self, bytes: u64, source: &str) {
        if self
            .stated
            .as_ref()
            .is_none_or(|(known, _)| bytes >= *known)
        {
            self.stated = Some((bytes, source.to_owned()));
        }
    }

    /// Asks NVML, at most four times a second.
    pub(crate) fn sample(&mut self, now_s: f64) {
        let Ok((nvml, index)) = &self.nvml else {
            return;
        };
        if now_s - self.sampled_s < 0.25 {
            return;
        }
        self.sampled_s = now_s;
        match nvml.memory_used_bytes(*index) {
            Ok(bytes) => {
                let known = self.in_use_peak_bytes.as_ref().copied().unwrap_or(0);
                self.in_use_peak_bytes = Ok(bytes.max(known));
            }
            Err(error) if self.in_use_peak_bytes.is_err() => {
                self.in_use_peak_bytes = Err(describe(&error));
            }
            Err(_) => {}
        }
    }

    pub(crate) fn report(&self, proc_root: &Path) -> MemoryReport {
        let device_peak_bytes = match &self.stated {
            Some((bytes, source)) => Quantity::measured(*bytes as f64, source),
            None => match &self.nvml {
                Err(reason) if reason == DEVICE_IS_HOST => Quantity::unavailable(reason),
                _ => Quantity::unavailable("the backend does not tell its peak"),
            },
        };
        let (device_in_use_peak_bytes, device_total_bytes) = match &self.nvml {
            Err(reason) => (Quantity::unavailable(reason), Quantity::unavailable(reason)),
            Ok((nvml, index)) => (
                match &self.in_use_peak_bytes {
                    Ok(bytes) => Quantity::measured(
                        *bytes as f64,
                        "NVML memory in use, all processes, largest of the samples after each step",
                    ),
                    Err(reason) => Quantity::unavailable(reason),
                },
                match nvml.memory_total_bytes(*index) {
                    Ok(bytes) => Quantity::measured(bytes as f64, "NVML"),
                    Err(error) => Quantity::unavailable(describe(&error)),
                },
            ),
        };
        MemoryReport {
            host_peak_bytes: peak_host_memory(proc_root),
            device_peak_bytes,
            device_in_use_peak_bytes,
            device_total_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvml::tests::FakeNvml;

    fn fake_status(text: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("self")).unwrap();
        fs::write(root.path().join("self/status"), text).unwrap();
        root
    }

    #[test]
    fn the_peak_is_read_in_bytes() {
        let root = fake_status("Name:\tx\nVmPeak:\t 9999 kB\nVmHWM:\t    1708 kB\nVmRSS:\t 5 kB\n");
        assert_eq!(peak_host_memory(root.path()).value(), Some(1708.0 * 1024.0));
    }

    #[test]
    fn a_kernel_without_the_peak_gives_a_reason() {
        let root = fake_status("Name:\tx\nVmRSS:\t 5 kB\n");
        let peak = peak_host_memory(root.path());
        assert!(peak.source().contains("no VmHWM"), "{peak:?}");
        let root = fake_status("VmHWM:\tmany\n");
        assert!(
            peak_host_memory(root.path())
                .source()
                .contains("not a number")
        );
        let nowhere = peak_host_memory(Path::new("/nonexistent"));
        assert!(nowhere.source().contains("/nonexistent/self/status"));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_has_a_peak_that_covers_what_it_holds() {
        let before = peak_host_memory(Path::new("/proc")).value().unwrap();
        let block = std::hint::black_box(vec![1_u8; 64 << 20]);
        let after = peak_host_memory(Path::new("/proc")).value().unwrap();
        assert!(after >= (64 << 20) as f64 && after >= before);
        drop(block);
    }

    #[test]
    fn nvml_gives_the_largest_sample_and_the_caller_its_own() {
        let nvml = Arc::new(FakeNvml::new(&["GPU"]));
        let mut memory = DeviceMemory::new(Ok((nvml.clone(), 0)));
        for (now_s, used) in [(0.0, 5), (1.0, 900), (1.1, 5000), (2.0, 7)] {
            *nvml.memory_used.lock().unwrap() = used;
            memory.sample(now_s); // the third comes too soon after the second
        }
        memory.state(300, "allocator");
        memory.state(200, "allocator");
        let report = memory.report(Path::new("/proc"));
        assert_eq!(report.device_in_use_peak_bytes.value(), Some(900.0));
        assert_eq!(
            report.device_peak_bytes,
            Quantity::measured(300.0, "allocator")
        );
        assert_eq!(
            report.device_total_bytes.value(),
            Some((80_u64 << 30) as f64)
        );
    }

    #[test]
    fn without_a_gpu_there_is_a_reason() {
        let memory = DeviceMemory::new(Err(DEVICE_IS_HOST.to_owned()));
        let report = memory.report(Path::new("/proc"));
        assert_eq!(
            report.device_total_bytes,
            Quantity::unavailable("the device is the host")
        );
        assert_eq!(report.device_peak_bytes, report.device_total_bytes);
    }
}
