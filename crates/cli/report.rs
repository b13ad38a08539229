//! `calor report`: a run's HTML report, and its summary.

use std::path::PathBuf;

use calor_train::rewrite_report;

use crate::failure::{Exit, Failure};
use crate::output;
use crate::results;

/// Which run.
#[derive(clap::Args)]
pub struct Arguments {
    /// Folder of a finished run
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Prints report.json
    #[arg(long)]
    json: bool,
}

/// Writes `report.html` from what the run left, and prints the summary.
pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    if !arguments.run.is_dir() {
        return Err(Failure::usage(format!(
            "{}: there is no such folder",
            arguments.run.display()
        )));
    }
    let report = rewrite_report(&arguments.run)?;
    if arguments.json {
        // As it was written: reading numbers and writing them again need not give the same text.
        output::print(&std::fs::read_to_string(arguments.run.join("report.json"))?)?;
    } else {
        output::print(&results::show_run(&arguments.run, &report))?;
    }
    Ok(Exit::Done)
}
