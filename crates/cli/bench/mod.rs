//! `calor bench`: throughput, energy and memory.

mod kernels;
mod profile;
mod step;

use calor_train::recipe::Dtype;
use clap::ValueEnum;

use crate::failure::{Exit, Failure};

/// What to measure.
#[derive(clap::Subcommand)]
pub enum Verb {
    /// Repeats one optimizer step, the code of the training loop, of a recipe or of a LoRA on a
    /// checkpoint: tokens/s, J/token, MFU, memory, and where the time goes
    #[command(after_help = step::MORE)]
    Step(Box<step::Step>),
    /// Times each operation of a step by itself, and shows how far it is from what the device could do
    #[command(after_help = kernels::MORE)]
    Kernels(kernels::Kernels),
}

/// Measures, and prints what was found.
pub fn run(verb: &Verb) -> Result<Exit, Failure> {
    match verb {
        Verb::Step(step) => step::run(step),
        Verb::Kernels(kernels) => kernels::run(kernels),
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Precision {
    F32,
    Bf16,
    F16,
}

impl From<Precision> for Dtype {
    fn from(precision: Precision) -> Dtype {
        match precision {
            Precision::F32 => Dtype::F32,
            Precision::Bf16 => Dtype::Bf16,
            Precision::F16 => Dtype::F16,
        }
    }
}
