//! The command line of Calor: one file a verb.
//!
//! Only this crate prints. What a program may want to read goes to stdout, what a person wants
//! to know while it happens goes to stderr.

#![forbid(unsafe_code)]

mod bench;
mod cache;
mod check;
mod cohort;
mod device;
mod devices;
mod evaluate;
mod failure;
mod fetch;
mod generate;
mod hub;
mod init;
mod merge;
mod output;
mod parity;
mod predict;
mod progress;
mod report;
mod results;
mod schema;
mod signals;
mod sweep;
mod synth;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::{Exit, Failure};

/// Fine-tunes pretrained transformers on patients, and counts every token and every joule.
#[derive(Parser)]
#[command(
    name = "calor",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = "Exit status: 0 done, 1 failed, 2 wrong usage or recipe, 3 stopped by a signal with a checkpoint written."
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Shows what can be used here: devices, memory, energy sources, and why something cannot
    Devices(devices::Arguments),
    /// Brings a checkpoint from the Hugging Face hub into the cache
    Fetch(fetch::Arguments),
    /// Makes a synthetic cohort, shows what is in one, or whether it follows the MEDS format
    #[command(subcommand)]
    Cohort(cohort::Verb),
    /// Copies a recipe of the project to start from, and checks it
    Init(init::Arguments),
    /// Prints the JSON Schema of recipes, so that editors complete keys
    Schema(schema::Arguments),
    /// Checks everything that can fail before anything runs: keys, data, shapes, memory
    Check(check::Arguments),
    /// Trains as a recipe says
    Train(train::Arguments),
    /// Evaluates a trained run on a split of its cohort or of another
    Evaluate(evaluate::Arguments),
    /// Writes a trained run's predictions for a cohort
    Predict(predict::Arguments),
    /// Folds an adapter into its checkpoint, or combines several adapters
    Merge(merge::Arguments),
    /// Continues prompts with a language model, a run's or a checkpoint's
    Generate(generate::Arguments),
    /// Compares a checkpoint's outputs and gradients with a reference
    Parity(parity::Arguments),
    /// Measures throughput, energy and memory
    #[command(subcommand)]
    Bench(bench::Verb),
    /// Writes a run's HTML report anew, and prints its summary
    Report(report::Arguments),
}

fn main() -> ExitCode {
    #[cfg(feature = "cpu")]
    calor_kernels::keep_freed_memory();
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if let Ok(folder) = cache::folder() {
        calor_kernels::keep_compiled_in(folder.join("kernels"));
    }
    let exit = match run(Arguments::parse().verb) {
        Ok(exit) => exit,
        Err(failure) => {
            eprintln!("{failure}");
            failure.exit
        }
    };
    ExitCode::from(exit as u8)
}

fn run(verb: Verb) -> Result<Exit, Failure> {
    match verb {
        Verb::Devices(arguments) => devices::run(&arguments),
        Verb::Fetch(arguments) => fetch::run(&arguments),
        Verb::Cohort(verb) => cohort::run(&verb),
        Verb::Init(arguments) => init::run(&arguments),
        Verb::Schema(arguments) => schema::run(&arguments),
        Verb::Check(arguments) => check::run(&arguments),
        Verb::Train(arguments) => train::run(&arguments),
        Verb::Evaluate(arguments) => evaluate::run(&arguments),
        Verb::Predict(arguments) => predict::run(&arguments),
        Verb::Merge(arguments) => merge::run(&arguments),
        Verb::Generate(arguments) => generate::run(&arguments),
        Verb::Parity(arguments) => parity::run(&arguments),
        Verb::Bench(verb) => bench::run(&verb),
        Verb::Report(arguments) => report::run(&arguments),
    }
}
