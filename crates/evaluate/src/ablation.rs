//! What each source of a fused model is worth: the metric of every subset of the sources, each
//! withheld, each alone, and Shapley values, with intervals paired over the same resamples.

use serde::{Deserialize, Serialize};

use crate::bootstrap::{BootstrapOptions, Patients, bootstrap_all, no_resamples};
use crate::error::EvaluateError;
use crate::evaluate::{Predictions, TaskKind, higher_is_better, metric_names, prepare, score_of};
use crate::measure::Measure;
use crate::ranking::Ranking;
use crate::score::{Score, Value};

/// The most sources that can be told apart: 4096 subsets, each of them predicted by the model.
pub const MOST_SOURCES: usize = 12;

/// What happened to each sample: what [`Predictions`] holds beside the model's output.
#[derive(Debug, Clone, Copy)]
pub enum Targets<'a> {
    /// `[rows]`; predictions are probabilities of the positive class, `[rows]`.
    Binary(&'a [bool]),
    /// Class numbers `[rows]`; predictions are probabilities, `[rows, classes]` row by row.
    Multiclass {
        classes: usize,
        targets: &'a [usize],
    },
    /// `[rows, labels]` row by row; so are the predictions.
    Multilabel { labels: usize, targets: &'a [bool] },
    /// Numbers `[rows]`; so are the predictions.
    Regression(&'a [f64]),
}

/// The worth of each source, over one metric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ablation {
    pub task: TaskKind,
    pub metric: String,
    /// Where this is false (a loss), a source that helps has negative gains and a negative
    /// Shapley value.
    pub higher_is_better: bool,
    pub rows: usize,
    pub patients: usize,
    /// The metric with every source there.
    pub all: Score,
    /// The metric with every source withheld.
    pub none: Score,
    /// In the order in which they were given.
    pub sources: Vec<SourceScores>,
    /// Every subset: entry `s` has source `i` where bit `i` of `s` is set.
    pub subsets: Vec<SubsetScore>,
    pub bootstrap: BootstrapOptions,
}

/// What one source is worth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceScores {
    pub name: String,
    /// The metric with this source withheld and the others there.
    pub without: Score,
    /// The metric with this source there and the others withheld.
    pub alone: Score,
    /// `all − without`: what the others lack.
    pub all_minus_without: Score,
    /// `all − alone`: what the others bring.
    pub all_minus_alone: Score,
    /// The Shapley value ([`shapley_values`]). Those of all sources sum to `all − none`.
    pub shapley: Score,
}

/// The metric of one subset of the sources.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SubsetScore {
    /// Names of the sources that are there.
    pub sources: Vec<String>,
    pub score: Score,
}

/// Evaluates a model on every subset of its sources.
///
/// `outputs[s]` is what the model gives where source `i` is there exactly if bit `i` of `s` is
/// set; so `outputs[0]` has everything withheld. There are 2ⁿ of them for n `sources`, all over
/// the same samples in the same order, in the shape that [`Targets`] says. `patients` names each
/// row's patient, `[rows]`. `metric` is one of the task's [`metric_names`].
///
/// Intervals are percentiles over resamples of the patients, and every number of a resample comes
/// from the same patients: an interval of a difference is that of the paired difference.
///
/// # Errors
///
/// No sources, more than [`MOST_SOURCES`], a name given twice, outputs that are not 2ⁿ, an unknown
/// metric, and what [`evaluate`](fn@crate::evaluate) refuses. A metric without a value on valid
/// input is no error: its [`Score`] says why, and so does each difference that needs it.
pub fn ablate(
    sources: &[String],
    outputs: &[&[f64]],
    targets: Targets<'_>,
    patients: &[i64],
    metric: &str,
    options: &BootstrapOptions,
) -> Result<Ablation, EvaluateError> {
    options.check()?;
    check_sources(sources)?;
    let count = sources.len();
    if outputs.len() != 1 << count {
        return Err(EvaluateError::LengthMismatch {
            what: "the list of outputs, one a subset of the sources,",
            expected: 1 << count,
            found: outputs.len(),
        });
    }
    let task = targets.predictions(outputs[0]).task();
    let index = metric_names(task)
        .iter()
        .position(|name| *name == metric)
        .ok_or(EvaluateError::InvalidOption {
            key: "metric",
            reason: "must be a metric of the task, such as \"auroc\" of a binary one",
        })?;
    let scorers = outputs
        .iter()
        .map(|output| Scorer::new(&targets.predictions(output), index))
        .collect::<Result<Vec<_>, _>>()?;
    let rows = targets.rows();
    if patients.len() != rows {
        return Err(EvaluateError::LengthMismatch {
            what: "the list of patients",
            expected: rows,
            found: patients.len(),
        });
    }
    let patients = Patients::new(patients)?;

    let game = |weights: &[u32]| -> Vec<Value> {
        let subsets: Vec<Value> = scorers.iter().map(|scorer| scorer.score(weights)).collect();
        let derived = derive(&subsets, count);
        subsets.into_iter().chain(derived).collect()
    };
    let values = game(&vec![1; rows]);
    let mut intervals = bootstrap_all(&patients, options, game).into_iter();
    let scores: Vec<Score> = values
        .into_iter()
        .enumerate()
        .map(|(entry, value)| {
            let interval = intervals.next().unwrap_or_else(no_resamples);
            let note = scorers.get(entry).and_then(Scorer::note);
            score_of(value, interval, note)
        })
        .collect();

    let everything = outputs.len() - 1;
    let (subsets, derived) = scores.split_at(outputs.len());
    Ok(Ablation {
        task,
        metric: metric.to_owned(),
        higher_is_better: higher_is_better(metric).unwrap_or(true),
        rows,
        patients: patients.count(),
        all: subsets[everything].clone(),
        none: subsets[0].clone(),
        sources: sources
            .iter()
            .zip(derived.chunks_exact(DERIVED))
            .enumerate()
            .map(|(source, (name, derived))| SourceScores {
                name: name.clone(),
                without: subsets[everything ^ (1 << source)].clone(),
                alone: subsets[1 << source].clone(),
                all_minus_without: derived[0].clone(),
                all_minus_alone: derived[1].clone(),
                shapley: derived[2].clone(),
            })
            .collect(),
        subsets: subsets
            .iter()
            .enumerate()
            .map(|(subset, score)| SubsetScore {
                sources: members(subset, sources),
                score: score.clone(),
            })
            .collect(),
        bootstrap: options.clone(),
    })
}

/// The Shapley value of each of n players in a game whose subset `s` is worth `worth[s]`, where
/// player `i` is in `s` if bit `i` of `s` is set; `worth` `[2ⁿ]`, the result `[n]`.
///
/// `φᵢ = Σ_S |S|!·(n − |S| − 1)!/n! · (v(S ∪ {i}) − v(S))` over the subsets `S` without `i`: the
/// mean gain from `i` over all orders in which the players may come (Shapley, "A value for
/// n-person games", 1953). Exact, in n·2ⁿ⁻¹ steps; `v(∅)` need not be 0, and the values sum to
/// `v(all) − v(∅)`.
///
/// # Errors
///
/// A length that is no power of two, or above 2 to the [`MOST_SOURCES`].
pub fn shapley_values(worth: &[f64]) -> Result<Vec<f64>, EvaluateError> {
    if !worth.len().is_power_of_two() {
        return Err(EvaluateError::LengthMismatch {
            what: "the list of subsets, one entry each,",
            expected: worth.len().next_power_of_two(),
            found: worth.len(),
        });
    }
    let players = worth.len().trailing_zeros() as usize;
    if players > MOST_SOURCES {
        return Err(TOO_MANY_SOURCES);
    }
    Ok(shapley(worth, players))
}

const TOO_MANY_SOURCES: EvaluateError = EvaluateError::InvalidOption {
    key: "sources",
    reason: "must be at most 12: the model predicts once for every subset of them",
};

/// Entries a source in the list that [`derive`] makes.
const DERIVED: usize = 3;

/// Of each source: all − without, all − alone, the Shapley value; `subsets` `[2ⁿ]`.
fn derive(subsets: &[Value], count: usize) -> Vec<Value> {
    let everything = subsets.len() - 1;
    let difference = |a: usize, b: usize| -> Value {
        match (&subsets[a], &subsets[b]) {
            (Ok(a), Ok(b)) => Ok(a - b),
            (Err(reason), _) | (_, Err(reason)) => Err(reason.clone()),
        }
    };
    let shapley = subsets
        .iter()
        .cloned()
        .collect::<Result<Vec<f64>, _>>()
        .map(|worth| shapley(&worth, count));
    (0..count)
        .flat_map(|source| {
            [
                difference(everything, everything ^ (1 << source)),
                difference(everything, 1 << source),
                match &shapley {
                    Ok(values) => Ok(values[source]),
                    Err(reason) => Err(reason.clone()),
                },
            ]
        })
        .collect()
}

/// [`shapley_values`] of checked input.
fn shapley(worth: &[f64], players: usize) -> Vec<f64> {
    // weight[s] = s!·(n − s − 1)!/n! = 1/(n·C(n − 1, s)).
    let mut binomial = 1.0;
    let weights: Vec<f64> = (0..players)
        .map(|size| {
            let weight = 1.0 / (players as f64 * binomial);
            binomial *= (players - 1 - size) as f64 / (size + 1) as f64;
            weight
        })
        .collect();
    (0..players)
        .map(|player| {
            let bit = 1 << player;
            (0..worth.len())
                .filter(|subset| subset & bit == 0)
                .map(|subset| {
                    let size = subset.count_ones() as usize;
                    weights[size] * (worth[subset | bit] - worth[subset])
                })
                .sum()
        })
        .collect()
}

fn check_sources(sources: &[String]) -> Result<(), EvaluateError> {
    if sources.is_empty() {
        return Err(EvaluateError::TooFew {
            what: "the number of sources",
            least: 1,
            found: 0,
        });
    }
    if sources.len() > MOST_SOURCES {
        return Err(TOO_MANY_SOURCES);
    }
    let repeated = |i: usize| sources[..i].contains(&sources[i]);
    if (0..sources.len()).any(repeated) {
        return Err(EvaluateError::InvalidOption {
            key: "sources",
            reason: "has a name twice",
        });
    }
    Ok(())
}

fn members(subset: usize, sources: &[String]) -> Vec<String> {
    sources
        .iter()
        .enumerate()
        .filter(|(source, _)| subset & (1 << source) != 0)
        .map(|(_, name)| name.clone())
        .collect()
}

impl<'a> Targets<'a> {
    fn predictions(&self, output: &'a [f64]) -> Predictions<'a> {
        match *self {
            Targets::Binary(targets) => Predictions::Binary {
                probabilities: output,
                targets,
            },
            Targets::Multiclass { classes, targets } => Predictions::Multiclass {
                classes,
                probabilities: output,
                targets,
            },
            Targets::Multilabel { labels, targets } => Predictions::Multilabel {
                labels,
                probabilities: output,
                targets,
            },
            Targets::Regression(targets) => Predictions::Regression {
                predicted: output,
                targets,
            },
        }
    }

    fn rows(&self) -> usize {
        match *self {
            Targets::Binary(targets) => targets.len(),
            Targets::Multiclass { targets, .. } => targets.len(),
            Targets::Multilabel { labels, targets } => targets.len() / labels.max(1),
            Targets::Regression(targets) => targets.len(),
        }
    }
}

/// One metric of one subset, prepared for resamples.
enum Scorer {
    Auroc(Ranking),
    Auprc(Ranking),
    /// One of the metrics that the task's measure gives.
    Of(Box<dyn Measure>, usize),
}

impl Scorer {
    fn new(predictions: &Predictions<'_>, metric: usize) -> Result<Scorer, EvaluateError> {
        let checked = predictions.check()?;
        // The metrics of order are those asked for most, and a resample of the whole measure
        // costs several times as much as a sweep.
        if let Predictions::Binary { targets, .. } = predictions {
            let cases = checked.probabilities.iter().zip(*targets).enumerate();
            let ranking = || Ranking::new(cases.map(|(row, (&p, &y))| (p, y, row)));
            match metric_names(TaskKind::Binary)[metric] {
                "auroc" => return Ok(Scorer::Auroc(ranking())),
                "auprc" => return Ok(Scorer::Auprc(ranking())),
                _ => {}
            }
        }
        let names = predictions.names(&[])?;
        let measure = prepare(predictions, &checked.probabilities, &names);
        Ok(Scorer::Of(measure, metric))
    }

    fn score(&self, weights: &[u32]) -> Value {
        match self {
            Scorer::Auroc(ranking) => ranking.scores(weights).auroc,
            Scorer::Auprc(ranking) => ranking.scores(weights).auprc,
            Scorer::Of(measure, metric) => measure.measure(weights).swap_remove(*metric),
        }
    }

    fn note(&self) -> Option<String> {
        match self {
            Scorer::Of(measure, metric) => measure.note(*metric),
            Scorer::Auroc(_) | Scorer::Auprc(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;
