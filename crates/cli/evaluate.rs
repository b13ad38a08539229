//! `calor evaluate`: a trained run on a split of its cohort, or of another.

use std::path::{Path, PathBuf};

use calor_meter::MeterReport;
use calor_records::Split;
use calor_train::artifacts::report::SplitEvaluation;
use calor_train::{Sources, UseOptions, run_recipe};
use clap::ValueEnum;
use serde::Serialize;

use crate::cache;
use crate::device::DeviceArgument;
use crate::failure::{Exit, Failure};
use crate::hub::{Hub, Purpose};
use crate::output;
use crate::progress::Progress;
use crate::results;
use crate::signals::stop_on_signals;

/// Which run, on which patients.
#[derive(clap::Args)]
pub struct Arguments {
    /// Folder of the run
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Which patients
    #[arg(long, value_enum, default_value_t = Which::HeldOut)]
    split: Which,
    /// Another cohort than the run's own, with labels of the same name; of a run on files of text,
    /// another file
    #[arg(long, value_name = "DIR")]
    cohort: Option<PathBuf>,
    /// At most so many patients of the split: a sample, the same for every run on the cohort
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    patients: Option<u64>,
    /// Shows what each modality or site is worth: withheld, alone, and its Shapley value
    #[arg(long, value_enum, value_name = "WHAT")]
    ablate: Option<Ablate>,
    /// Compares with another run on the same patients: both values and their difference, paired
    #[arg(long, value_name = "RUN", conflicts_with = "ablate")]
    against: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgument,
    /// Prints metrics, curves and cost as JSON
    #[arg(long)]
    json: bool,
}

/// What is withheld in turn.
#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Ablate {
    /// The text and each modality that becomes soft tokens
    Modality,
    /// The sites that rows come from
    Site,
}

/// The patients of a split, or all.
#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Which {
    /// Patients that the model was trained on
    Train,
    /// Patients that decided on the best model
    Tuning,
    /// Patients that nothing was decided on
    HeldOut,
    /// All patients with a label
    All,
}

impl Which {
    fn split(self) -> Option<Split> {
        match self {
            Which::Train => Some(Split::Train),
            Which::Tuning => Some(Split::Tuning),
            Which::HeldOut => Some(Split::HeldOut),
            Which::All => None,
        }
    }
}

#[derive(Serialize)]
struct Found<'a> {
    run: &'a Path,
    cohort: &'a Path,
    split: &'a str,
    evaluation: &'a SplitEvaluation,
    meter: &'a MeterReport,
}

/// Scores the patients, and prints the metrics.
pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let (mut options, own_cohort) = options(
        &arguments.run,
        arguments.cohort.as_deref(),
        &arguments.device,
    )?;
    options.patients = arguments.patients.map(|patients| patients as usize);
    let stop = stop_on_signals()?;
    let mut progress = Progress::new();
    if let Some(ablate) = arguments.ablate {
        let sources = match ablate {
            Ablate::Modality => Sources::Modality,
            Ablate::Site => Sources::Site,
        };
        let split = arguments.split.split();
        let found = calor_train::ablate(&options, split, sources, &mut progress, &stop);
        progress.finish();
        let found = found?.ok_or_else(stopped)?;
        if arguments.json {
            output::print_json(&found)?;
        } else {
            output::print(&results::show_ablation(&found))?;
        }
        return Ok(Exit::Done);
    }
    if let Some(against) = &arguments.against {
        let cohort = arguments.cohort.as_deref();
        let (mut other, _) = self::options(against, cohort, &arguments.device)?;
        other.patients = options.patients;
        let split = arguments.split.split();
        let found = calor_train::compare(&options, &other, split, &mut progress, &stop);
        progress.finish();
        let found = found?.ok_or_else(stopped)?;
        if arguments.json {
            output::print_json(&found)?;
        } else {
            output::print(&results::show_comparison(&arguments.run, against, &found))?;
        }
        return Ok(Exit::Done);
    }
    let evaluated = calor_train::evaluate(&options, arguments.split.split(), &mut progress, &stop);
    progress.finish();
    let Some(evaluated) = evaluated? else {
        return Err(stopped());
    };
    let split = evaluated.split.map_or("all", Split::name);
    if arguments.json {
        let cohort = options.cohort.as_deref().unwrap_or(&own_cohort);
        let found = Found {
            run: &arguments.run,
            cohort,
            split,
            evaluation: &evaluated.evaluation,
            meter: &evaluated.meter,
        };
        output::print_json(&found)?;
    } else {
        let table = results::show_split(split, &evaluated.evaluation);
        let cost = results::cost_of_evaluation(&evaluated.meter);
        output::print(&format!("{}\n{cost}", table.trim_start()))?;
    }
    Ok(Exit::Done)
}

fn stopped() -> Failure {
    Failure::failed("stopped by a signal before the end; nothing was written")
}

/// Opens a run for use: its checkpoint is found as training found it.
pub fn options(
    run: &Path,
    cohort: Option<&Path>,
    device: &DeviceArgument,
) -> Result<(UseOptions, PathBuf), Failure> {
    let device = device.spec()?;
    let recipe = run_recipe(run)?;
    let revision = recipe.model.revision.as_deref();
    let checkpoint = Hub::from_env().resolve(&recipe.model.id, revision, Purpose::LanguageModel)?;
    let options = UseOptions {
        run: run.to_owned(),
        checkpoint,
        cache: cache::folder()?,
        device,
        cohort: cohort.map(Path::to_owned),
        patients: None,
    };
    Ok((options, recipe.cohort.path))
}
