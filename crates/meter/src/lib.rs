//! Throughput, energy, memory and model FLOPs utilisation of a run, and the part of `report.json`
//! that holds them.
//!
//! This crate measures and never steers: it prints nothing, decides nothing, and knows neither
//! tensors nor patients. The three rules it is built on:
//!
//! * **Every number carries its source.** A [`Quantity`] is measured (by which counter), modelled
//!   (with which inputs) or unavailable (for which reason). There is no silent zero.
//! * **A window begins and ends with a synchronised device.** The caller waits for the device
//!   before [`Meter::begin`] and [`Meter::end`]; [`Meter::within`] does it for them.
//! * **Nothing is counted twice.** One window is open at a time, RAPL packages are summed without
//!   the sub-domains they contain, and warm-up, training and evaluation are kept apart.
//!
//! ```no_run
//! use calor_meter::{Counts, EnergyOptions, Meter, MeteredDevice, Phase, Purpose};
//!
//! let mut meter = Meter::open(&EnergyOptions::default(), &MeteredDevice::Cpu)?;
//! meter.measure_idle();
//! meter.begin(Purpose::Training); // the device has been synchronised
//! let loss = meter.time(Phase::Forward, || 0.7);
//! let counts = Counts { sequences: 8, padded_tokens: 1024, tokens: 900, supervised: 8 };
//! meter.count(Purpose::Training, counts, &[112; 8]);
//! let step = meter.finish_step();
//! meter.end(); // and here again
//! println!("{loss} {:?} {}", step.tokens_per_s, serde_json::to_string(&meter.report())?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod clock;
mod cpu;
mod energy;
mod error;
mod flops;
mod host;
mod memory;
mod meter;
mod nvml;
mod options;
mod quantity;
mod rapl;
mod report;
mod sources;
mod throughput;

pub use clock::{Clock, SystemClock};
pub use cpu::{CpuTime, CpuTimeModel};
pub use energy::{Channel, Component, EnergyMeter, EnergySource, Purpose};
pub use error::{MeterError, describe};
pub use flops::{FlopModel, PeakFlops, Precision};
pub use host::{host_memory_limit, resident_host_memory};
pub use memory::{MemoryReport, peak_host_memory};
pub use meter::{Live, Meter, StepReading};
pub use nvml::{NvmlApi, NvmlDevice, NvmlSource, SystemNvml, nvml_index_of_cuda};
pub use options::{EnergyOptions, MeteredDevice};
pub use quantity::Quantity;
pub use rapl::RaplSource;
pub use report::{
    ActivityEnergy, ComponentEnergy, EnergyReport, IdleBaseline, MeterReport, UtilisationReport,
};
pub use sources::{SourceStatus, sources, sources_at};
pub use throughput::{ActivityThroughput, Counts, Phase, PhaseReport, StepTimes, ThroughputReport};
