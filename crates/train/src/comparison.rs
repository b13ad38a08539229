//! Two runs on the same patients: what one is worth over the other.

use calor_evaluate::{Score, ablate as shares};
use calor_records::Split;
use serde::Serialize;

use crate::TrainError;
use crate::ablation::{bootstrap, metric};
use crate::evaluation::Scored;
use crate::observer::{Observer, Stage, StopFlag};
use crate::usage::{UseOptions, Using};

/// A metric of two runs and its difference, with intervals paired over the same resamples of patients.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    pub metric: String,
    /// Where this is false (a loss), the better run has the lower value.
    pub higher_is_better: bool,
    pub rows: usize,
    pub patients: usize,
    pub run: Score,
    pub other: Score,
    /// `run − other`.
    pub difference: Score,
    pub resamples: usize,
    pub level: f64,
}

/// Scores the patients of a split with the models of two runs. `options.cohort` names the cohort of
/// both; without it, each run has its own, and these must hold the same patients. None when `stop` was
/// set before the end.
///
/// # Errors
/// As [`evaluate`](crate::evaluate()); runs of other tasks or on other patients.
pub fn compare(
    options: &UseOptions,
    other: &UseOptions,
    split: Option<Split>,
    observer: &mut dyn Observer,
    stop: &StopFlag,
) -> Result<Option<Comparison>, TrainError> {
    let ours = Using::open(options)?;
    let theirs = Using::open(other)?;
    ours.needs_samples()?;
    let does_not_fit = |problem: &str| {
        ours.problem(format!(
            "{} cannot be compared with it: {problem}",
            other.run.display()
        ))
    };
    if ours.task.kind != theirs.task.kind || ours.task.classes != theirs.task.classes {
        return Err(does_not_fit("its task is another, or has other classes"));
    }
    let Some((first, _)) = ours.score(split, true, observer, stop)? else {
        return Ok(None);
    };
    let Some((second, _)) = theirs.score(split, true, observer, stop)? else {
        return Ok(None);
    };
    if !same_samples(&first, &second) {
        return Err(does_not_fit(
            "it has other patients, prediction times or labels in this split",
        ));
    }
    observer.stage(Stage::Report);
    let name = "run".to_owned();
    let outputs = [&second, &first].map(Scored::complete_probabilities);
    let found = first.with_targets(|targets, patients| {
        let outputs: Vec<&[f64]> = outputs.iter().map(Vec::as_slice).collect();
        shares(
            &[name],
            &outputs,
            targets,
            patients,
            metric(&ours.recipe).name(),
            &bootstrap(&ours.recipe),
        )
    })?;
    Ok(Some(Comparison {
        difference: found.sources[0].all_minus_without.clone(),
        metric: found.metric,
        higher_is_better: found.higher_is_better,
        rows: found.rows,
        patients: found.patients,
        run: found.all,
        other: found.none,
        resamples: found.bootstrap.resamples,
        level: found.bootstrap.level,
    }))
}

fn same_samples(first: &Scored, second: &Scored) -> bool {
    // Unknown labels are NaN, which differs from itself: their text does not.
    let targets = |scored: &Scored| format!("{:?}", scored.targets);
    first.subject_ids == second.subject_ids
        && first.prediction_times_us == second.prediction_times_us
        && targets(first) == targets(second)
}
