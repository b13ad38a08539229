//! Recipe, upload, optimizer, the one training loop and what it leaves behind.
//!
//! [`train`] runs a [`Recipe`](recipe::Recipe) from cohort and checkpoint to report;
//! [`check`] finds what would make it fail without running it; [`evaluate`] and [`predict`]
//! use what it left. Nothing in this crate prints: an [`Observer`] hears what happens, and
//! errors say what is wrong, where and what to do.

#![forbid(unsafe_code)]

mod ablation;
pub mod artifacts;
mod bench;
mod bench_kernels;
mod calibration;
mod check;
pub mod checkpoint;
mod comparison;
mod data;
pub mod device;
mod error;
pub mod evaluation;
mod files;
mod finish;
mod generate;
pub mod loss_scale;
mod memory;
pub mod objective;
mod observer;
mod opening;
pub mod optimizer;
mod plan;
mod preflight;
pub mod recipe;
mod run_folder;
pub mod schedule;
pub mod seed;
mod session;
mod soft;
pub mod step;
mod sweep;
mod trainer;
mod upload;
mod usage;

pub use ablation::{Sources, ablate};
pub use bench::{
    BenchTask, OperationProfile, OtherTimes, PhaseTimes, Spread, StepBenchOptions, StepBenchReport,
    StepProfile, WindowReport, step_bench,
};
pub use bench_kernels::{
    BlockShape, KernelBenchOptions, KernelBenchReport, OperationTime, TensorError, kernel_bench,
};
pub use check::{CheckReport, Trial, check};
pub use comparison::{Comparison, compare};
pub use data::{TASK_FILE, TaskFile, label_folder};
pub use device::DeviceSpec;
pub use error::TrainError;
pub use finish::rewrite_report;
pub use generate::{Generated, Generator, GeneratorSource, Sampling};
pub use memory::{Component, MemoryPrediction, Proposal};
pub use observer::{Observer, Stage, StepProgress, StopFlag};
pub use session::{RunOptions, frozen_weights, lora_options};
pub use sweep::{
    Asha, Loaded, Method, Reached, SWEEP_FILE, SweepFile, SweepOptions, SweepOutcome, SweepReport,
    SweepTrial, sweep,
};
pub use trainer::{TrainOutcome, train};
pub use usage::{Evaluated, UseOptions, evaluate, predict, run_recipe};
