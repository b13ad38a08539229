//! `calor devices`: what can be used here, and why something cannot.

use std::fs;
use std::path::Path;

use calor_meter::{EnergyOptions, SourceStatus, sources};
use serde::Serialize;

use crate::device;
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, Table, bytes};

/// How to show it.
#[derive(clap::Args)]
pub struct Arguments {
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// A device, usable or not.
#[derive(Serialize)]
struct DeviceStatus {
    /// As `--device` takes it.
    name: String,
    available: bool,
    /// What it is, or why it cannot be used.
    detail: String,
    memory_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Found {
    devices: Vec<DeviceStatus>,
    energy: Vec<SourceStatus>,
}

/// Lists devices and energy sources.
pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let found = Found {
        devices: [cpu()].into_iter().chain(cuda()).chain(wgpu()).collect(),
        energy: sources(&EnergyOptions::default()),
    };
    if arguments.json {
        output::print_json(&found)?;
        return Ok(Exit::Done);
    }
    let usable = |available: bool| if available { "yes" } else { "no" };
    let mut devices = Table::new(&[
        ("--device", Align::Left),
        ("usable", Align::Left),
        ("memory", Align::Right),
        ("what it is, or why it cannot be used", Align::Left),
    ]);
    for found in &found.devices {
        let memory = found.memory_bytes.map_or_else(String::new, bytes);
        devices.row([
            found.name.as_str(),
            usable(found.available),
            &memory,
            &found.detail,
        ]);
    }
    let mut energy = Table::new(&[
        ("energy source", Align::Left),
        ("usable", Align::Left),
        ("kind", Align::Left),
        ("of", Align::Left),
        ("when it is used, or why it cannot be", Align::Left),
    ]);
    for source in &found.energy {
        energy.row([
            source.name.as_str(),
            usable(source.available),
            &source.kind,
            source.component.name(),
            &source.detail,
        ]);
    }
    output::print(&format!("{}\n{}", devices.render(), energy.render()))?;
    Ok(Exit::Done)
}

fn cpu() -> DeviceStatus {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let model = cpu_model().unwrap_or_else(|| "processor".to_owned());
    let mut detail = format!("{model}, {threads} threads, {}", instruction_set());
    #[cfg(feature = "cpu")]
    {
        detail = format!("{detail}; bf16: {}", calor_kernels::half_products());
    }
    let name = "cpu".to_owned();
    if cfg!(feature = "cpu") {
        DeviceStatus {
            name,
            available: true,
            detail,
            memory_bytes: host_memory(),
        }
    } else {
        not_built(name, "cpu")
    }
}

fn cuda() -> Vec<DeviceStatus> {
    listed(
        "cuda",
        cfg!(feature = "cuda"),
        device::cuda_devices(),
        || {
            let libraries = [
                ("libcuda.so.1", "the NVIDIA driver"),
                ("libnvrtc.so", "NVRTC, of the CUDA toolkit"),
            ];
            let missing: Vec<String> = libraries
                .iter()
                .filter(|(file, _)| !device::library_is_there(file))
                .map(|(file, what)| format!("{what} ({file})"))
                .collect();
            if missing.is_empty() {
                "the driver shows no NVIDIA GPU".to_owned()
            } else {
                format!("not found: {}", missing.join(" and "))
            }
        },
    )
}

fn wgpu() -> Vec<DeviceStatus> {
    listed(
        "wgpu",
        cfg!(feature = "wgpu"),
        device::wgpu_devices(),
        || {
            "no Vulkan driver shows an adapter (Debian: apt-get install mesa-vulkan-drivers, or the GPU maker's driver)"
            .to_owned()
        },
    )
}

fn listed(
    kind: &str,
    built: bool,
    found: Vec<(String, Option<u64>)>,
    why_none: impl FnOnce() -> String,
) -> Vec<DeviceStatus> {
    if !built {
        return vec![not_built(kind.to_owned(), kind)];
    }
    if found.is_empty() {
        return vec![DeviceStatus {
            name: kind.to_owned(),
            available: false,
            detail: why_none(),
            memory_bytes: None,
        }];
    }
    found
        .into_iter()
        .enumerate()
        .map(|(index, (detail, memory_bytes))| DeviceStatus {
            name: format!("{kind}:{index}"),
            available: true,
            detail,
            memory_bytes,
        })
        .collect()
}

fn not_built(name: String, feature: &str) -> DeviceStatus {
    let detail = format!("not in this build: cargo build --release --features {feature}");
    DeviceStatus {
        name,
        available: false,
        detail,
        memory_bytes: None,
    }
}

/// The processor's name as Linux gives it.
fn cpu_model() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Physical memory, or the control group's limit where that is lower.
fn host_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    let limit = [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ]
    .iter()
    .filter_map(|path| {
        fs::read_to_string(Path::new(path))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    })
    .min();
    Some(limit.map_or(kibibytes * 1024, |limit| limit.min(kibibytes * 1024)))
}

/// The widest vector instructions that the kernels use here.
fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            "AVX-512"
        } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            "AVX2 and FMA"
        } else {
            "no AVX2: slow"
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        "NEON"
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        "no vector instructions"
    }
}
