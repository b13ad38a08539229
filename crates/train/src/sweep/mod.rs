//! Many variants of one recipe, one after the other, and the best of them.
//!
//! A trial is an ordinary run in a folder of its own, `trial-N/` of the sweep's folder; prepared
//! sequences are shared through the cache. With ASHA a trial is trained up to a rung, set aside with a
//! checkpoint, and resumed when it is among the best. `tuning` patients decide; held-out patients are
//! scored once, with the best trial.
//!
//! `sweep.json` says after every rung what is done, so a sweep that was stopped or killed goes on.

mod file;

use std::cmp::Ordering;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::artifacts::metrics::{self, MetricsLine};
use crate::artifacts::report::Report;
use crate::device::DeviceSpec;
use crate::files::{read_json, write_json};
use crate::observer::{Observer, StopFlag};
use crate::recipe::{Metric, Recipe};
use crate::run_folder::hash_text;
use crate::session::RunOptions;
use crate::trainer::{TrainOutcome, train};

pub use file::{Asha, Method, SweepFile};

/// The file of a sweep's folder that says what is done.
pub const SWEEP_FILE: &str = "sweep.json";
const SCHEMA: u32 = 1;

/// How a sweep is started.
#[derive(Clone, Debug)]
pub struct SweepOptions {
    /// What is tried.
    pub file: SweepFile,
    /// The sweep's folder.
    pub out: PathBuf,
    /// Where prepared sequences are kept between runs.
    pub cache: PathBuf,
    /// Where the trials compute.
    pub device: DeviceSpec,
    /// Whether to go on with what the folder holds.
    pub resume: bool,
}

/// What a sweep has found so far: `sweep.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SweepReport {
    /// Version of the file's format.
    pub schema: u32,
    /// The recipe's name.
    pub name: String,
    /// SHA-256 of the recipe and the sweep's file, as they were read.
    pub sha256: String,
    /// What decides, on `tuning` patients.
    pub metric: Metric,
    /// Optimizer steps at which trials are compared; empty where all run to their end.
    pub rungs: Vec<u64>,
    /// Trials in the order in which they were started.
    pub trials: Vec<SweepTrial>,
    /// The number of the best, once all is done: its run holds the held-out evaluation.
    pub best: Option<usize>,
}

/// One variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SweepTrial {
    /// From 1, in the order in which they were started.
    pub number: usize,
    /// Its run's folder, within the sweep's.
    pub folder: String,
    /// What it sets of the recipe.
    pub set: Vec<String>,
    /// What it reached at each rung.
    pub reached: Vec<Reached>,
    /// Why it ended before its time: its loss is no number any more.
    pub failure: Option<String>,
}

/// A trial at a rung.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reached {
    /// Optimizer steps done.
    pub steps: u64,
    /// The metric's best value until then; none where it was never defined.
    pub value: Option<f64>,
}

/// How a sweep ended.
#[derive(Debug)]
pub enum SweepOutcome {
    /// All trials are done; with the report of the best.
    Finished(Box<SweepReport>, Box<Report>),
    /// It was asked to stop; `--resume` goes on.
    Stopped,
}

/// A recipe and the folder of its checkpoint.
pub type Loaded<E> = Result<(Recipe, PathBuf), E>;

/// Runs a sweep. `load` gives the recipe with assignments, and its checkpoint.
///
/// # Errors
/// What makes any trial impossible, before the first is trained; what makes a run fail, but a loss
/// that is not finite, which ends its trial alone.
pub fn sweep<E: From<TrainError>>(
    options: &SweepOptions,
    load: &mut dyn FnMut(&[String]) -> Loaded<E>,
    observer: &mut dyn Observer,
    stop: &StopFlag,
) -> Result<SweepOutcome, E> {
    let file = &options.file;
    let (recipe, _) = load(&common(file))?;
    // A value that no recipe can have is told before hours are spent on the others.
    for trial in 0..file.trials() {
        load(&all(file, &file.assignments(trial)))?;
    }
    let mut report = begin(options, &recipe)?;
    let reduction = file.asha.map_or(u64::MAX, |asha| asha.reduction_factor);
    while let Some((index, rung)) = next_job(&report, file.trials(), reduction) {
        if report.trials.len() == index {
            report.trials.push(SweepTrial {
                number: index + 1,
                folder: format!("trial-{}", index + 1),
                set: file.assignments(index),
                reached: Vec::new(),
                failure: None,
            });
        }
        let until = report.rungs.get(rung).copied().unwrap_or(u64::MAX);
        let trial = &report.trials[index];
        let steps = report.rungs.get(rung).copied();
        observer.trial(trial.number, file.trials(), &trial.set, steps);
        let run = run_options(options, trial, load(&all(file, &trial.set))?);
        let outcome = train(&run, observer, &stop.pausing_after(until));
        let trial = &mut report.trials[index];
        match outcome {
            Ok(TrainOutcome::Stopped { .. }) if stop.is_set() => return Ok(SweepOutcome::Stopped),
            Ok(TrainOutcome::Stopped { step, .. }) => {
                let value = best_value(&run.out, report.metric, step)?;
                trial.reached.push(Reached { steps: step, value });
            }
            Ok(TrainOutcome::Finished(_)) => unreachable!("a trial pauses before its end"),
            Err(error @ TrainError::NonFinite { .. }) => trial.failure = Some(error.to_string()),
            Err(error) => return Err(error.into()),
        }
        write_json(&options.out.join(SWEEP_FILE), &report)?;
    }

    let Some(best) = best_trial(&report) else {
        return Err(TrainError::RunFolder {
            path: options.out.clone(),
            problem: "every trial of the sweep failed; see the file sweep.json there".to_owned(),
        }
        .into());
    };
    let trial = &report.trials[best];
    observer.trial(trial.number, file.trials(), &trial.set, None);
    let run = run_options(options, trial, load(&all(file, &trial.set))?);
    match train(&run, observer, stop)? {
        TrainOutcome::Stopped { .. } => Ok(SweepOutcome::Stopped),
        TrainOutcome::Finished(found) => {
            report.best = Some(best + 1);
            write_json(&options.out.join(SWEEP_FILE), &report)?;
            Ok(SweepOutcome::Finished(Box::new(report), found))
        }
    }
}

/// What every trial sets, whatever it tries.
fn common(file: &SweepFile) -> Vec<String> {
    let metric = file
        .metric
        .map(|metric| format!("evaluate.metric={}", metric.name()));
    let steps = file
        .asha
        .map(|asha| format!("train.max_steps={}", asha.max_steps));
    metric.into_iter().chain(steps).collect()
}

fn all(file: &SweepFile, own: &[String]) -> Vec<String> {
    [&common(file), own].concat()
}

fn run_options(
    options: &SweepOptions,
    trial: &SweepTrial,
    (recipe, checkpoint): (Recipe, PathBuf),
) -> RunOptions {
    RunOptions {
        recipe,
        checkpoint,
        out: options.out.join(&trial.folder),
        cache: options.cache.clone(),
        device: options.device,
        resume: true,
    }
}

/// What is done already, or nothing yet.
fn begin(options: &SweepOptions, recipe: &Recipe) -> Result<SweepReport, TrainError> {
    let file = &options.file;
    let definition = serde_json::to_string(file).expect("a sweep's file is plain data");
    let sha256 = hash_text(&(recipe.to_toml("") + &definition));
    let path = options.out.join(SWEEP_FILE);
    let wrong = |problem: &str| TrainError::RunFolder {
        path: options.out.clone(),
        problem: problem.to_owned(),
    };
    if path.exists() {
        if !options.resume {
            return Err(wrong(
                "holds a sweep already; go on with it by --resume, or give another --out",
            ));
        }
        let report: SweepReport = read_json(&path)?;
        if report.sha256 != sha256 || report.schema != SCHEMA {
            return Err(wrong(
                "holds the sweep of another recipe or another sweep file; give another --out",
            ));
        }
        return Ok(report);
    }
    let report = SweepReport {
        schema: SCHEMA,
        name: recipe.name.clone(),
        sha256,
        metric: recipe
            .evaluate
            .metric
            .unwrap_or(Metric::default_of(recipe.task.kind)),
        rungs: file.asha.map_or(Vec::new(), |asha| asha.rungs()),
        trials: Vec::new(),
        best: None,
    };
    std::fs::create_dir_all(&options.out).map_err(TrainError::io("create", &options.out))?;
    write_json(&path, &report)?;
    Ok(report)
}

/// The index of the trial to train next and the rung to train it to: the best that may go on, from the highest rung
/// down, else a new one, else nothing.
fn next_job(report: &SweepReport, trials: usize, reduction: u64) -> Option<(usize, usize)> {
    let rungs = report.rungs.len().max(1);
    // What was under way when the sweep was stopped or killed.
    let started = report
        .trials
        .iter()
        .find(|trial| trial.reached.is_empty() && trial.failure.is_none());
    if let Some(trial) = started {
        return Some((trial.number - 1, 0));
    }
    for rung in (0..rungs - 1).rev() {
        let ranked = ranked(report, rung);
        let promoted = ranked.len() / reduction as usize;
        let next = ranked
            .into_iter()
            .take(promoted)
            .find(|trial| trial.reached.len() == rung + 1 && trial.failure.is_none());
        if let Some(trial) = next {
            return Some((trial.number - 1, rung + 1));
        }
    }
    (report.trials.len() < trials).then_some((report.trials.len(), 0))
}

/// The trials that reached a rung with a value, best first; of equals the earlier.
fn ranked(report: &SweepReport, rung: usize) -> Vec<&SweepTrial> {
    let value = |trial: &SweepTrial| trial.reached.get(rung).and_then(|reached| reached.value);
    let mut there: Vec<&SweepTrial> = report
        .trials
        .iter()
        .filter(|trial| trial.reached.len() > rung)
        .collect();
    there.sort_by(|one, other| match (value(one), value(other)) {
        (Some(one), Some(other)) if report.metric.higher_is_better() => other.total_cmp(&one),
        (Some(one), Some(other)) => one.total_cmp(&other),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => Ordering::Equal,
    });
    there
}

/// The index of the best of those that came furthest.
fn best_trial(report: &SweepReport) -> Option<usize> {
    let rungs = report.rungs.len().max(1);
    (0..rungs).rev().find_map(|rung| {
        ranked(report, rung)
            .into_iter()
            .find(|trial| trial.failure.is_none())
            .map(|trial| trial.number - 1)
    })
}

/// The best value of a metric in a run's evaluations up to a step.
fn best_value(run: &Path, metric: Metric, until: u64) -> Result<Option<f64>, TrainError> {
    let lines = metrics::read(&run.join("metrics.jsonl"))?;
    let values = lines.into_iter().filter_map(|line| match line {
        MetricsLine::Evaluation(line) if line.step <= until => {
            line.metrics.get(metric.name()).copied().flatten()
        }
        _ => None,
    });
    Ok(
        values.reduce(|best, value| match metric.higher_is_better() {
            true => best.max(value),
            false => best.min(value),
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays a sweep in which trial `n` has `values[n]` at every rung; gives the jobs.
    fn play(
        values: &[Option<f64>],
        rungs: &[u64],
        metric: Metric,
    ) -> (Vec<(usize, usize)>, SweepReport) {
        let mut report = SweepReport {
            schema: SCHEMA,
            name: String::new(),
            sha256: String::new(),
            metric,
            rungs: rungs.to_vec(),
            trials: Vec::new(),
            best: None,
        };
        let mut jobs = Vec::new();
        while let Some((number, rung)) = next_job(&report, values.len(), 3) {
            jobs.push((number, rung));
            if number == report.trials.len() {
                report.trials.push(SweepTrial {
                    number: number + 1,
                    folder: String::new(),
                    set: Vec::new(),
                    reached: Vec::new(),
                    failure: None,
                });
            }
            let trial = &mut report.trials[number];
            assert_eq!(trial.reached.len(), rung, "rungs are climbed one by one");
            let steps = rungs.get(rung).copied().unwrap_or(7);
            trial.reached.push(Reached {
                steps,
                value: values[number],
            });
        }
        (jobs, report)
    }

    #[test]
    fn the_best_of_three_go_on_and_the_others_stay() {
        let values = [0.5, 0.9, 0.1, 0.2, 0.3, 0.4, 0.95, 0.6, 0.7].map(Some);
        let (jobs, report) = play(&values, &[5, 15, 45], Metric::Auroc);
        let expected = [
            (0, 0),
            (1, 0),
            (2, 0),
            // The best of three goes on,
            (1, 1),
            (3, 0),
            (4, 0),
            (5, 0),
            // of six the second as well;
            (0, 1),
            (6, 0),
            // this one is among the best two of seven, and then the best of three.
            (6, 1),
            (6, 2),
            (7, 0),
            (8, 0),
            (8, 1),
        ];
        assert_eq!(jobs, expected);
        assert_eq!(best_trial(&report), Some(6));
        // Where less is better, the others go on.
        let (jobs, report) = play(&values, &[5, 15, 45], Metric::Rmse);
        assert_eq!(best_trial(&report), Some(2));
        assert!(jobs.contains(&(2, 2)) && !jobs.contains(&(6, 1)));
    }

    #[test]
    fn without_rungs_every_trial_runs_once() {
        let (jobs, report) = play(&[Some(0.5), None, Some(0.7), Some(0.7)], &[], Metric::Auroc);
        assert_eq!(jobs, [(0, 0), (1, 0), (2, 0), (3, 0)]);
        assert_eq!(best_trial(&report), Some(2), "of equals the earlier");
    }

    #[test]
    fn too_few_for_a_promotion_still_have_a_best() {
        let (jobs, report) = play(&[Some(0.1), Some(0.2)], &[5, 15], Metric::Auroc);
        assert_eq!(jobs, [(0, 0), (1, 0)]);
        assert_eq!(best_trial(&report), Some(1));
    }
}
