//! `calor train RECIPE --sweep FILE`: many variants of a recipe, and the best of them.

use std::path::{Path, PathBuf};

use calor_train::{
    DeviceSpec, StopFlag, SweepFile, SweepOptions, SweepOutcome, SweepReport, SweepTrial,
};
use serde::Serialize;

use crate::cache;
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, Table, count, number};
use crate::progress::Progress;
use crate::results;
use crate::train::RecipeArguments;

/// What `calor train` was given.
pub struct SweepArguments<'a> {
    pub file: &'a Path,
    pub recipe: &'a RecipeArguments,
    pub out: Option<&'a Path>,
    pub device: DeviceSpec,
    pub resume: bool,
    pub json: bool,
}

/// Trains all, and prints the table and the best run's result.
pub fn run(arguments: &SweepArguments<'_>, stop: &StopFlag) -> Result<Exit, Failure> {
    let file = SweepFile::load(arguments.file)?;
    let mut load = |set: &[String]| arguments.recipe.load_with(set);
    let (recipe, _) = load(&[])?;
    let out = arguments.out.map_or_else(
        || PathBuf::from("runs").join(format!("{}-sweep", recipe.name)),
        Path::to_owned,
    );
    let options = SweepOptions {
        file,
        out,
        cache: cache::folder()?,
        device: arguments.device,
        resume: arguments.resume,
    };
    let mut progress = Progress::new();
    let outcome = calor_train::sweep(&options, &mut load, &mut progress, stop);
    progress.finish();
    match outcome? {
        SweepOutcome::Finished(sweep, report) => {
            if arguments.json {
                #[derive(Serialize)]
                struct Both<'a> {
                    sweep: &'a SweepReport,
                    best: &'a calor_train::artifacts::report::Report,
                }
                output::print_json(&Both {
                    sweep: &sweep,
                    best: &report,
                })?;
            } else {
                output::print(&show(&sweep))?;
                let best = sweep.best.map(|best| &sweep.trials[best - 1].folder);
                let run = options.out.join(best.expect("a finished sweep has a best"));
                output::print(&format!("\n{}", results::show_run(&run, &report)))?;
            }
            Ok(Exit::Done)
        }
        SweepOutcome::Stopped => {
            eprintln!(
                "The sweep is stopped; the same command with --resume goes on: {}",
                options.out.display()
            );
            Ok(Exit::Stopped)
        }
    }
}

/// A row a trial, the best first.
fn show(sweep: &SweepReport) -> String {
    let mut heads = vec![("trial", Align::Right)];
    let keys: Vec<&str> = sweep.trials.first().map_or(Vec::new(), |trial| {
        let split = |set: &'_ String| set.find('=').unwrap_or(set.len());
        trial.set.iter().map(|set| &set[..split(set)]).collect()
    });
    heads.extend(keys.iter().map(|key| (*key, Align::Right)));
    heads.extend([
        ("steps", Align::Right),
        (sweep.metric.title(), Align::Right),
        ("", Align::Left),
    ]);
    let mut table = Table::new(&heads);
    let mut trials: Vec<&SweepTrial> = sweep.trials.iter().collect();
    let value = |trial: &SweepTrial| trial.reached.last().and_then(|reached| reached.value);
    trials.sort_by(|one, other| {
        let steps = |trial: &SweepTrial| trial.reached.len();
        let (first, second) = match sweep.metric.higher_is_better() {
            true => (value(other), value(one)),
            false => (value(one), value(other)),
        };
        let worst = f64::INFINITY;
        steps(other)
            .cmp(&steps(one))
            .then(first.unwrap_or(worst).total_cmp(&second.unwrap_or(worst)))
    });
    for trial in trials {
        let values = trial.set.iter().map(|set| {
            set.split_once('=')
                .map_or("", |(_, value)| value)
                .to_owned()
        });
        let steps = trial.reached.last().map_or(0, |reached| reached.steps);
        let mut row = vec![trial.number.to_string()];
        row.extend(values);
        row.push(count(steps));
        row.push(value(trial).map_or("–".to_owned(), number));
        row.push(match (&trial.failure, sweep.best == Some(trial.number)) {
            (Some(_), _) => "failed".to_owned(),
            (None, true) => "best".to_owned(),
            (None, false) => String::new(),
        });
        table.row(row);
    }
    format!(
        "{}: {} trials, {} of tuning patients\n\n{}",
        sweep.name,
        count(sweep.trials.len() as u64),
        sweep.metric.title(),
        table.render()
    )
}
