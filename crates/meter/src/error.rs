//! What can go wrong while measuring, with what to do about it.

use std::error::Error;
use std::io;
use std::path::PathBuf;

/// Why something cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum MeterError {
    /// An option of the energy section is not usable.
    #[error("`{key}` {reason}")]
    InvalidOption { key: &'static str, reason: String },

    /// The kernel shows no power-capping interface here.
    #[error(
        "{path} does not exist: the kernel offers no RAPL counters here (in a virtual machine or a container they are usually hidden; on bare metal, load the module `intel_rapl_msr`)"
    )]
    NoPowercap { path: PathBuf },

    /// The power-capping interface is there, but holds no processor package.
    #[error(
        "{path} holds no RAPL package domain: the processor has no energy counter, or the module `intel_rapl_msr` is not loaded"
    )]
    NoPackage { path: PathBuf },

    /// A counter is there, but only root may read it.
    #[error(
        "no permission to read {path} (kernels since 5.10 allow root alone); to allow it until the next boot: sudo chmod a+r {glob}"
    )]
    PermissionDenied { path: PathBuf, glob: String },

    /// A file of `/proc` or `/sys` could not be read.
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },

    /// A file of `/proc` or `/sys` does not hold what the kernel documents.
    #[error("{path} does not hold {expected}")]
    Malformed {
        path: PathBuf,
        expected: &'static str,
    },

    /// The NVIDIA management library could not be loaded or started.
    #[error("NVML cannot be used (is the NVIDIA driver installed and visible here?)")]
    NvmlLibrary {
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },

    /// NVML refused a question about one GPU.
    #[error("NVML cannot give the {what} of GPU {index}")]
    Nvml {
        what: &'static str,
        index: u32,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },

    /// The device asked for is not among NVML's GPUs.
    #[error("{device} is not among the {count} GPUs that NVML lists{hint}")]
    NoSuchGpu {
        device: String,
        count: u32,
        hint: String,
    },

    /// The device asked for cannot be told apart among NVML's GPUs.
    #[error("{device} cannot be matched to one of NVML's {count} GPUs: {hint}")]
    AmbiguousGpu {
        device: String,
        count: u32,
        hint: String,
    },

    /// A counter that only grows has shrunk.
    #[error("the energy counter of {source_name} went backwards: the driver was reloaded")]
    WentBackwards { source_name: String },
}

/// An error with its causes on one line, for a reason in a report.
pub fn describe(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        cause = error.source();
    }
    text
}
