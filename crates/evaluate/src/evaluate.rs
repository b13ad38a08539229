//! Predictions in, the metrics of their task out.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bootstrap::{BootstrapOptions, Patients, bootstrap_all, no_resamples};
use crate::error::EvaluateError;
use crate::language::{EntityMeasure, LANGUAGE_METRICS, LanguageMeasure, TOKEN_METRICS, Tagged};
use crate::measure::{
    BINARY_METRICS, BinaryMeasure, MULTICLASS_METRICS, MULTILABEL_METRICS, Measure,
    MulticlassMeasure, MultilabelMeasure, REGRESSION_METRICS, RegressionMeasure,
};
use crate::regression::Residuals;
use crate::score::{Interval, Score, Value};

/// What is predicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    Binary,
    Multiclass,
    Multilabel,
    Regression,
    /// Tags of words.
    Tokens,
    /// The next token.
    CausalLm,
}

/// Predictions of a model and what happened, a row for each sample.
#[derive(Debug, Clone, Copy)]
pub enum Predictions<'a> {
    /// Probabilities of the positive class, `[rows]`.
    Binary {
        probabilities: &'a [f64],
        targets: &'a [bool],
    },
    /// Probabilities `[rows, classes]` row by row, each row summing to 1; class numbers `[rows]`.
    Multiclass {
        classes: usize,
        probabilities: &'a [f64],
        targets: &'a [usize],
    },
    /// Probabilities and targets `[rows, labels]`, row by row.
    Multilabel {
        labels: usize,
        probabilities: &'a [f64],
        targets: &'a [bool],
    },
    /// Numbers, `[rows]`.
    Regression {
        predicted: &'a [f64],
        targets: &'a [f64],
    },
    /// Tags as numbers in `tags`, one a word; rows of different lengths.
    Tokens {
        tags: &'a [String],
        predicted: &'a [Vec<usize>],
        targets: &'a [Vec<usize>],
    },
    /// The negative log likelihood in nats, summed over the tokens of a row, and their number,
    /// `[rows]`.
    CausalLm {
        losses: &'a [f64],
        tokens: &'a [u64],
    },
}

/// How to evaluate.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaluateOptions {
    pub bootstrap: BootstrapOptions,
    /// Names of the classes or labels, for reasons and tables; empty for their numbers.
    pub class_names: Vec<String>,
}

/// The metrics of a set of predictions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    pub task: TaskKind,
    pub rows: usize,
    pub patients: usize,
    /// By name; [`metric_names`] has their order.
    pub scores: BTreeMap<String, Score>,
    /// What each name means.
    pub definitions: BTreeMap<String, String>,
    /// One entry a class or label against the rest; a single one for a binary task, none for
    /// regression.
    pub classes: Vec<ClassScores>,
    pub bootstrap: BootstrapOptions,
}

/// How one class or label is told from the rest. Without intervals.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassScores {
    pub name: String,
    /// Rows of this class.
    pub positives: usize,
    pub auroc: Score,
    pub auprc: Score,
}

impl Metrics {
    pub fn score(&self, name: &str) -> Option<&Score> {
        self.scores.get(name)
    }
}

/// All metrics of the task with their intervals. `patients` names each row's patient, `[rows]`.
///
/// # Errors
///
/// Empty input, lengths that do not match, NaN and infinite values, probabilities that are none
/// (an excess of up to 1e-6 from f32 arithmetic is cut off), class probabilities that do not sum
/// to 1 (within 1e-3), targets out of range. A metric that has no value on valid input is no
/// error: its [`Score`] says why.
pub fn evaluate(
    predictions: &Predictions<'_>,
    patients: &[i64],
    options: &EvaluateOptions,
) -> Result<Metrics, EvaluateError> {
    options.bootstrap.check()?;
    let checked = predictions.check()?;
    let rows = checked.rows;
    same_length("the list of patients", rows, patients.len())?;
    let patients = Patients::new(patients)?;
    let names = predictions.names(&options.class_names)?;
    let measure = prepare(predictions, &checked.probabilities, &names);

    let once = vec![1; rows];
    let values = measure.measure(&once);
    let mut intervals = bootstrap_all(&patients, &options.bootstrap, |weights| {
        measure.measure(weights)
    })
    .into_iter();
    let kind = predictions.task();
    let scores = metric_names(kind)
        .iter()
        .zip(values)
        .enumerate()
        .map(|(metric, (name, value))| {
            let interval = intervals.next().unwrap_or_else(no_resamples);
            let score = score_of(value, interval, measure.note(metric));
            ((*name).to_owned(), score)
        })
        .collect();
    Ok(Metrics {
        task: kind,
        rows,
        patients: patients.count(),
        scores,
        definitions: metric_names(kind)
            .iter()
            .map(|name| ((*name).to_owned(), definition(kind, name).to_owned()))
            .collect(),
        classes: class_scores(predictions, &*measure, &once, names),
        bootstrap: options.bootstrap.clone(),
    })
}

/// The metrics of a task, in the order of a table.
pub fn metric_names(kind: TaskKind) -> &'static [&'static str] {
    match kind {
        TaskKind::Binary => &BINARY_METRICS,
        TaskKind::Multiclass => &MULTICLASS_METRICS,
        TaskKind::Multilabel => &MULTILABEL_METRICS,
        TaskKind::Regression => &REGRESSION_METRICS,
        TaskKind::Tokens => &TOKEN_METRICS,
        TaskKind::CausalLm => &LANGUAGE_METRICS,
    }
}

/// Whether more is better, for a metric of any task; `None` for an unknown name.
pub fn higher_is_better(metric: &str) -> Option<bool> {
    match metric {
        "auroc" | "auroc_micro" | "auprc" | "auprc_micro" | "accuracy" | "macro_f1"
        | "micro_f1" | "r2" | "f1" | "precision" | "recall" => Some(true),
        "brier" | "ece" | "log_loss" | "rmse" | "loss" | "perplexity" => Some(false),
        _ => None,
    }
}

/// What a metric of a task means.
fn definition(kind: TaskKind, metric: &str) -> &'static str {
    use TaskKind::{Binary, Multiclass, Multilabel, Tokens};
    match (kind, metric) {
        (Binary, "auroc") => "area under the ROC curve; ties count a half",
        (Multiclass, "auroc") => "plain mean of each class's AUROC against the rest",
        (Multilabel, "auroc") => "plain mean of the labels' AUROC",
        (_, "auroc_micro") => "AUROC over all pairs of row and label",
        (Binary, "auprc") => {
            "average precision: sum of precision × step of recall, not interpolated"
        }
        (_, "auprc") => "plain mean of the labels' average precision",
        (_, "auprc_micro") => "average precision over all pairs of row and label",
        (Multilabel, "brier") => "mean squared error of the probability, over rows and labels",
        (_, "brier") => "mean squared error of the probability",
        (Multiclass, "ece") => {
            "expected calibration error of the most probable class, 15 bins of equal width"
        }
        (Multilabel, "ece") => {
            "expected calibration error over all pairs of row and label, 15 bins of equal width"
        }
        (_, "ece") => {
            "expected calibration error of the positive class's probability, 15 bins of equal width"
        }
        (Multilabel, "log_loss") => "mean negative log likelihood in nats, over rows and labels",
        (_, "log_loss") => "mean negative log likelihood in nats",
        (Binary, "accuracy") => "share of rows predicted right at the threshold 0.5",
        (Multilabel, "accuracy") => "share of rows with every label right at the threshold 0.5",
        (Tokens, "accuracy") => "share of words whose tag is right",
        (_, "accuracy") => "share of rows whose most probable class is right",
        (Multilabel, "macro_f1") => "plain mean of the labels' F1 at the threshold 0.5",
        (_, "macro_f1") => "plain mean of the classes' F1",
        (_, "micro_f1") => "F1 over all pairs of row and label at the threshold 0.5",
        (_, "f1") => "harmonic mean of precision and recall over all entities (seqeval, micro)",
        (_, "precision") => "share of the predicted entities that are right in type and extent",
        (_, "recall") => "share of the entities that are found, right in type and extent",
        (_, "loss") => "mean negative log likelihood of a token in nats",
        (_, "perplexity") => "exponential of the loss",
        (_, "rmse") => "root of the mean squared error, in the target's unit",
        (_, "r2") => "coefficient of determination: share of the target's variance explained",
        _ => "",
    }
}

/// What checking the predictions brought.
pub(crate) struct Checked {
    pub rows: usize,
    /// The probabilities cut to [0, 1]; empty for regression.
    pub probabilities: Vec<f64>,
}

impl Predictions<'_> {
    pub fn task(&self) -> TaskKind {
        match self {
            Predictions::Binary { .. } => TaskKind::Binary,
            Predictions::Multiclass { .. } => TaskKind::Multiclass,
            Predictions::Multilabel { .. } => TaskKind::Multilabel,
            Predictions::Regression { .. } => TaskKind::Regression,
            Predictions::Tokens { .. } => TaskKind::Tokens,
            Predictions::CausalLm { .. } => TaskKind::CausalLm,
        }
    }

    pub(crate) fn check(&self) -> Result<Checked, EvaluateError> {
        match *self {
            Predictions::Binary {
                probabilities,
                targets,
            } => {
                let rows = row_count(targets.len())?;
                same_length("the list of probabilities", rows, probabilities.len())?;
                let probabilities = check_probabilities(probabilities, None)?;
                Ok(Checked {
                    rows,
                    probabilities,
                })
            }
            Predictions::Multiclass {
                classes,
                probabilities,
                targets,
            } => {
                at_least("the number of classes", 2, classes)?;
                let rows = row_count(targets.len())?;
                same_length(
                    "the table of probabilities",
                    rows * classes,
                    probabilities.len(),
                )?;
                let probabilities = check_probabilities(probabilities, Some(classes))?;
                for (row, (p, &target)) in
                    probabilities.chunks_exact(classes).zip(targets).enumerate()
                {
                    if (p.iter().sum::<f64>() - 1.0).abs() > 1e-3 {
                        return Err(EvaluateError::RowSum { row });
                    }
                    if target >= classes {
                        return Err(EvaluateError::ClassOutOfRange { row, classes });
                    }
                }
                Ok(Checked {
                    rows,
                    probabilities,
                })
            }
            Predictions::Multilabel {
                labels,
                probabilities,
                targets,
            } => {
                at_least("the number of labels", 1, labels)?;
                let rows = row_count(targets.len() / labels)?;
                same_length("the table of targets", rows * labels, targets.len())?;
                same_length(
                    "the table of probabilities",
                    rows * labels,
                    probabilities.len(),
                )?;
                let probabilities = check_probabilities(probabilities, Some(labels))?;
                Ok(Checked {
                    rows,
                    probabilities,
                })
            }
            Predictions::Regression { predicted, targets } => {
                let rows = row_count(targets.len())?;
                same_length("the list of predictions", rows, predicted.len())?;
                for (what, numbers) in [("the prediction", predicted), ("the target", targets)] {
                    if let Some(row) = numbers.iter().position(|number| !number.is_finite()) {
                        return Err(EvaluateError::NotFinite {
                            what,
                            row,
                            column: None,
                        });
                    }
                }
                Ok(Checked {
                    rows,
                    probabilities: Vec::new(),
                })
            }
            Predictions::Tokens {
                tags,
                predicted,
                targets,
            } => {
                let rows = row_count(targets.len())?;
                same_length("the list of predictions", rows, predicted.len())?;
                let classes = tags.len();
                for (row, (predicted, targets)) in predicted.iter().zip(targets).enumerate() {
                    same_length("a row of predicted tags", targets.len(), predicted.len())?;
                    if predicted.iter().chain(targets).any(|&tag| tag >= classes) {
                        return Err(EvaluateError::ClassOutOfRange { row, classes });
                    }
                }
                Ok(Checked {
                    rows,
                    probabilities: Vec::new(),
                })
            }
            Predictions::CausalLm { losses, tokens } => {
                let rows = row_count(losses.len())?;
                same_length("the list of token numbers", rows, tokens.len())?;
                if let Some(row) = losses.iter().position(|loss| !loss.is_finite()) {
                    return Err(EvaluateError::NotFinite {
                        what: "the loss",
                        row,
                        column: None,
                    });
                }
                Ok(Checked {
                    rows,
                    probabilities: Vec::new(),
                })
            }
        }
    }

    /// One name a class or label: those given, or numbers.
    pub(crate) fn names(&self, given: &[String]) -> Result<Vec<String>, EvaluateError> {
        let (count, noun) = match self {
            Predictions::Binary { .. } => return Ok(vec!["positive".to_owned()]),
            Predictions::Regression { .. }
            | Predictions::Tokens { .. }
            | Predictions::CausalLm { .. } => return Ok(Vec::new()),
            Predictions::Multiclass { classes, .. } => (*classes, "class"),
            Predictions::Multilabel { labels, .. } => (*labels, "label"),
        };
        if given.is_empty() {
            return Ok((0..count)
                .map(|number| format!("{noun} {number}"))
                .collect());
        }
        same_length("the list of class names", count, given.len())?;
        Ok(given.to_vec())
    }
}

pub(crate) fn prepare(
    predictions: &Predictions<'_>,
    probabilities: &[f64],
    names: &[String],
) -> Box<dyn Measure> {
    let names = names.to_vec();
    match *predictions {
        Predictions::Binary { targets, .. } => Box::new(BinaryMeasure::new(probabilities, targets)),
        Predictions::Multiclass {
            classes, targets, ..
        } => Box::new(MulticlassMeasure::new(
            classes,
            probabilities,
            targets,
            names,
        )),
        Predictions::Multilabel {
            labels, targets, ..
        } => Box::new(MultilabelMeasure::new(
            labels,
            probabilities,
            targets,
            names,
        )),
        Predictions::Regression { predicted, targets } => {
            Box::new(RegressionMeasure(Residuals::new(predicted, targets)))
        }
        Predictions::Tokens {
            tags,
            predicted,
            targets,
        } => Box::new(EntityMeasure::new(Tagged {
            tags,
            predicted,
            targets,
        })),
        Predictions::CausalLm { losses, tokens } => Box::new(LanguageMeasure {
            losses: losses.to_vec(),
            tokens: tokens.to_vec(),
        }),
    }
}

fn class_scores(
    predictions: &Predictions<'_>,
    measure: &dyn Measure,
    once: &[u32],
    names: Vec<String>,
) -> Vec<ClassScores> {
    let positives = |class: usize| match *predictions {
        Predictions::Binary { targets, .. } => targets.iter().filter(|&&target| target).count(),
        Predictions::Multiclass { targets, .. } => {
            targets.iter().filter(|&&target| target == class).count()
        }
        Predictions::Multilabel {
            labels, targets, ..
        } => targets
            .iter()
            .skip(class)
            .step_by(labels)
            .filter(|&&target| target)
            .count(),
        Predictions::Regression { .. }
        | Predictions::Tokens { .. }
        | Predictions::CausalLm { .. } => 0,
    };
    let without_interval = |value: Value| {
        let reason = "intervals are given for the whole task".to_owned();
        score_of(value, Interval::Unavailable { reason }, None)
    };
    names
        .into_iter()
        .zip(measure.by_class(once))
        .enumerate()
        .map(|(class, (name, (auroc, auprc)))| ClassScores {
            name,
            positives: positives(class),
            auroc: without_interval(auroc),
            auprc: without_interval(auprc),
        })
        .collect()
}

pub(crate) fn score_of(value: Value, interval: Interval, note: Option<String>) -> Score {
    match value {
        Ok(value) => Score::Defined {
            value,
            interval,
            note,
        },
        Err(reason) => Score::Undefined {
            reason: reason.into_owned(),
        },
    }
}

/// Excess over [0, 1] that f32 arithmetic can bring.
const ROUNDING: f64 = 1e-6;

fn check_probabilities(
    probabilities: &[f64],
    columns: Option<usize>,
) -> Result<Vec<f64>, EvaluateError> {
    let place = |index: usize| match columns {
        None => (index, None),
        Some(columns) => (index / columns, Some(index % columns)),
    };
    probabilities
        .iter()
        .enumerate()
        .map(|(index, &probability)| {
            let (row, column) = place(index);
            if !probability.is_finite() {
                let what = "the prediction";
                Err(EvaluateError::NotFinite { what, row, column })
            } else if !(-ROUNDING..=1.0 + ROUNDING).contains(&probability) {
                Err(EvaluateError::NotAProbability { row, column })
            } else {
                Ok(probability.clamp(0.0, 1.0))
            }
        })
        .collect()
}

fn row_count(rows: usize) -> Result<usize, EvaluateError> {
    if rows == 0 {
        return Err(EvaluateError::Empty);
    }
    if u32::try_from(rows).is_err() {
        return Err(EvaluateError::TooManyRows { rows });
    }
    Ok(rows)
}

fn same_length(what: &'static str, expected: usize, found: usize) -> Result<(), EvaluateError> {
    if expected == found {
        return Ok(());
    }
    Err(EvaluateError::LengthMismatch {
        what,
        expected,
        found,
    })
}

fn at_least(what: &'static str, least: usize, found: usize) -> Result<(), EvaluateError> {
    if found >= least {
        return Ok(());
    }
    Err(EvaluateError::TooFew { what, least, found })
}

#[cfg(test)]
mod tests;
