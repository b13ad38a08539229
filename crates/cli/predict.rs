//! `calor predict`: what a trained run says about the patients of a cohort.

use std::path::PathBuf;

use serde_json::json;

use crate::device::DeviceArgument;
use crate::evaluate;
use crate::failure::{Exit, Failure};
use crate::output;
use crate::progress::Progress;
use crate::signals::stop_on_signals;

/// Which run, for whom, and where to put it.
#[derive(clap::Args)]
#[command(
    after_help = "Patients are predicted at the prediction times of the task's label set, whatever their split; where \
                  the cohort has no such set, at their last event."
)]
pub struct Arguments {
    /// Folder of the run
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Folder of the cohort; of a run on files of text, a file with rows like those
    #[arg(long, value_name = "DIR")]
    cohort: PathBuf,
    /// Parquet file to write: subject, prediction time, probability, label where it is known
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    device: DeviceArgument,
    /// Prints the number of predictions and the file as JSON
    #[arg(long)]
    json: bool,
}

/// Scores every patient and writes the file.
pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let (options, _) =
        evaluate::options(&arguments.run, Some(&arguments.cohort), &arguments.device)?;
    let stop = stop_on_signals()?;
    let mut progress = Progress::new();
    let scored = calor_train::predict(&options, &mut progress, &stop);
    progress.finish();
    let Some(scored) = scored? else {
        return Err(Failure::failed(
            "stopped by a signal before the end; nothing was written",
        ));
    };
    scored.write_parquet(&arguments.out)?;
    if arguments.json {
        output::print_json(&json!({"predictions": scored.len(), "file": arguments.out}))?;
    } else {
        output::print(&format!(
            "{} predictions in {}\n",
            output::count(scored.len() as u64),
            arguments.out.display()
        ))?;
    }
    Ok(Exit::Done)
}
