//! The metrics of each task, prepared once (sorted, binned, differenced) so that a resample costs
//! one pass a metric.

use crate::calibration::Calibration;
use crate::classification::{
    ClassCounts, Confusion, binary_label, class_label, log_loss_of, weighted_mean,
};
use crate::ranking::Ranking;
use crate::regression::Residuals;
use crate::score::Value;

/// All metrics of a task at once. Rows occur `weights[row]` times.
pub(crate) trait Measure: Sync {
    /// One value a metric, in the order of the task's `metric_names`.
    fn measure(&self, weights: &[u32]) -> Vec<Value>;

    /// What a reader has to know of the metric with this index.
    fn note(&self, _metric: usize) -> Option<String> {
        None
    }

    /// AUROC and average precision of each class or label against the rest.
    fn by_class(&self, _weights: &[u32]) -> Vec<(Value, Value)> {
        Vec::new()
    }
}

pub(crate) const BINARY_METRICS: [&str; 7] = [
    "auroc", "auprc", "brier", "ece", "log_loss", "accuracy", "macro_f1",
];

pub(crate) struct BinaryMeasure {
    ranking: Ranking,
    calibration: Calibration,
    confusion: Confusion,
    squared_errors: Vec<f64>,
    log_losses: Vec<f64>,
}

impl BinaryMeasure {
    /// Probabilities of the positive class, from 0 to 1.
    pub(crate) fn new(probabilities: &[f64], targets: &[bool]) -> BinaryMeasure {
        let cases = || probabilities.iter().copied().zip(targets.iter().copied());
        let numbered = || cases().enumerate().map(|(row, (p, y))| (p, y, row));
        BinaryMeasure {
            ranking: Ranking::new(numbered()),
            calibration: Calibration::new(numbered()),
            confusion: Confusion::new(
                2,
                cases().map(|(p, y)| (usize::from(y), usize::from(binary_label(p)))),
            ),
            squared_errors: cases().map(|(p, y)| squared_error(p, y)).collect(),
            log_losses: cases().map(|(p, y)| binary_log_loss(p, y)).collect(),
        }
    }
}

impl Measure for BinaryMeasure {
    fn measure(&self, weights: &[u32]) -> Vec<Value> {
        let ranking = self.ranking.scores(weights);
        let (accuracy, macro_f1) = self.confusion.scores(weights);
        vec![
            ranking.auroc,
            ranking.auprc,
            weighted_mean(&self.squared_errors, weights),
            self.calibration.error(weights),
            weighted_mean(&self.log_losses, weights),
            accuracy,
            macro_f1,
        ]
    }

    fn by_class(&self, weights: &[u32]) -> Vec<(Value, Value)> {
        by_class(std::slice::from_ref(&self.ranking), weights)
    }
}

pub(crate) const MULTICLASS_METRICS: [&str; 5] =
    ["auroc", "log_loss", "ece", "accuracy", "macro_f1"];

pub(crate) struct MulticlassMeasure {
    rankings: Vec<Ranking>,
    calibration: Calibration,
    confusion: Confusion,
    log_losses: Vec<f64>,
    names: Vec<String>,
}

impl MulticlassMeasure {
    /// `probabilities` `[rows, classes]`, row by row; `names` one a class.
    pub(crate) fn new(
        classes: usize,
        probabilities: &[f64],
        targets: &[usize],
        names: Vec<String>,
    ) -> MulticlassMeasure {
        let rows = || {
            probabilities
                .chunks_exact(classes)
                .zip(targets.iter().copied())
        };
        let ranking_of = |class: usize| {
            let cases = rows().enumerate();
            Ranking::new(cases.map(|(row, (p, target))| (p[class], target == class, row)))
        };
        let confidence = rows().enumerate().map(|(row, (p, target))| {
            let predicted = class_label(p);
            (p[predicted], predicted == target, row)
        });
        MulticlassMeasure {
            rankings: (0..classes).map(ranking_of).collect(),
            calibration: Calibration::new(confidence),
            confusion: Confusion::new(classes, rows().map(|(p, target)| (target, class_label(p)))),
            log_losses: rows().map(|(p, target)| log_loss_of(p[target])).collect(),
            names,
        }
    }

    fn macro_auroc(&self, weights: &[u32]) -> Value {
        let mut sum = 0.0;
        for (ranking, name) in self.rankings.iter().zip(&self.names) {
            sum += ranking
                .scores(weights)
                .auroc
                .map_err(|reason| format!("{name}: {reason}"))?;
        }
        Ok(sum / self.rankings.len() as f64)
    }
}

impl Measure for MulticlassMeasure {
    fn measure(&self, weights: &[u32]) -> Vec<Value> {
        let (accuracy, macro_f1) = self.confusion.scores(weights);
        vec![
            self.macro_auroc(weights),
            weighted_mean(&self.log_losses, weights),
            self.calibration.error(weights),
            accuracy,
            macro_f1,
        ]
    }

    fn by_class(&self, weights: &[u32]) -> Vec<(Value, Value)> {
        by_class(&self.rankings, weights)
    }
}

pub(crate) const MULTILABEL_METRICS: [&str; 10] = [
    "auroc",
    "auroc_micro",
    "auprc",
    "auprc_micro",
    "brier",
    "ece",
    "log_loss",
    "accuracy",
    "macro_f1",
    "micro_f1",
];

pub(crate) struct MultilabelMeasure {
    labels: usize,
    rankings: Vec<Ranking>,
    pooled: Ranking,
    calibration: Calibration,
    squared_errors: Vec<f64>,
    log_losses: Vec<f64>,
    exact: Vec<f64>,
    /// (truth, predicted) a row and label.
    decisions: Vec<(bool, bool)>,
    /// Labels that can be ranked on all rows, and those whose F1 has a value there: the macro
    /// means are over these, in every resample.
    rankable: Vec<bool>,
    decidable: Vec<bool>,
    names: Vec<String>,
}

impl MultilabelMeasure {
    /// `probabilities` and `targets` `[rows, labels]`, row by row; `names` one a label.
    pub(crate) fn new(
        labels: usize,
        probabilities: &[f64],
        targets: &[bool],
        names: Vec<String>,
    ) -> MultilabelMeasure {
        let cases = || probabilities.iter().copied().zip(targets.iter().copied());
        let by_row = || cases().enumerate().map(|(i, (p, y))| (p, y, i / labels));
        let ranking_of = |label: usize| Ranking::new(by_row().skip(label).step_by(labels));
        let decisions: Vec<(bool, bool)> = cases().map(|(p, y)| (y, binary_label(p))).collect();
        // Losses of a row are the means over its labels, so that rows weigh the same.
        let row_mean = |loss: fn(f64, bool) -> f64| -> Vec<f64> {
            probabilities
                .chunks_exact(labels)
                .zip(targets.chunks_exact(labels))
                .map(|(p, y)| {
                    let sum: f64 = p.iter().zip(y).map(|(&p, &y)| loss(p, y)).sum();
                    sum / labels as f64
                })
                .collect()
        };
        let mut measure = MultilabelMeasure {
            labels,
            rankings: (0..labels).map(ranking_of).collect(),
            pooled: Ranking::new(by_row()),
            calibration: Calibration::new(by_row()),
            squared_errors: row_mean(squared_error),
            log_losses: row_mean(binary_log_loss),
            exact: decisions
                .chunks_exact(labels)
                .map(|row| f64::from(u8::from(row.iter().all(|(y, predicted)| y == predicted))))
                .collect(),
            decisions,
            rankable: Vec::new(),
            decidable: Vec::new(),
            names,
        };
        let once = vec![1; probabilities.len() / labels];
        let ranked = by_class(&measure.rankings, &once);
        measure.rankable = ranked.iter().map(|(auroc, _)| auroc.is_ok()).collect();
        let counts = measure.counts(&once);
        measure.decidable = counts.iter().map(|counts| counts.f1().is_some()).collect();
        measure
    }

    fn counts(&self, weights: &[u32]) -> Vec<ClassCounts> {
        let mut counts = vec![ClassCounts::default(); self.labels];
        for (row, &weight) in self.decisions.chunks_exact(self.labels).zip(weights) {
            for (counts, &(truth, predicted)) in counts.iter_mut().zip(row) {
                counts.add(truth, predicted, u64::from(weight));
            }
        }
        counts
    }

    /// The mean over the labels that take part; undefined where one of them has no value.
    fn macro_mean(&self, values: &[Value], takes_part: &[bool]) -> Value {
        let mut sum = 0.0;
        let mut count = 0;
        for ((value, takes_part), name) in values.iter().zip(takes_part).zip(&self.names) {
            if *takes_part {
                sum += value
                    .as_ref()
                    .map_err(|reason| format!("{name}: {reason}"))?;
                count += 1;
            }
        }
        if count == 0 {
            return Err("no label has both a positive and a negative case".into());
        }
        Ok(sum / f64::from(count))
    }
}

impl Measure for MultilabelMeasure {
    fn measure(&self, weights: &[u32]) -> Vec<Value> {
        let (auroc, auprc): (Vec<Value>, Vec<Value>) =
            by_class(&self.rankings, weights).into_iter().unzip();
        let pooled = self.pooled.scores(weights);
        let counts = self.counts(weights);
        let f1: Vec<Value> = counts
            .iter()
            .map(|counts| counts.f1().ok_or("neither occurs nor is predicted".into()))
            .collect();
        let mut all = ClassCounts::default();
        for counts in &counts {
            all.true_positives += counts.true_positives;
            all.false_positives += counts.false_positives;
            all.false_negatives += counts.false_negatives;
        }
        vec![
            self.macro_mean(&auroc, &self.rankable),
            pooled.auroc,
            self.macro_mean(&auprc, &self.rankable),
            pooled.auprc,
            weighted_mean(&self.squared_errors, weights),
            self.calibration.error(weights),
            weighted_mean(&self.log_losses, weights),
            weighted_mean(&self.exact, weights),
            self.macro_mean(&f1, &self.decidable),
            all.f1()
                .ok_or("no label occurs and none is predicted".into()),
        ]
    }

    fn note(&self, metric: usize) -> Option<String> {
        let (takes_part, reason) = match MULTILABEL_METRICS[metric] {
            "auroc" | "auprc" => (&self.rankable, "only one class occurs"),
            "macro_f1" => (&self.decidable, "neither occurs nor is predicted"),
            _ => return None,
        };
        let left_out: Vec<&str> = self
            .names
            .iter()
            .zip(takes_part)
            .filter(|(_, takes_part)| !**takes_part)
            .map(|(name, _)| name.as_str())
            .collect();
        (!left_out.is_empty())
            .then(|| format!("the mean leaves out {} ({reason})", left_out.join(", ")))
    }

    fn by_class(&self, weights: &[u32]) -> Vec<(Value, Value)> {
        by_class(&self.rankings, weights)
    }
}

pub(crate) const REGRESSION_METRICS: [&str; 2] = ["rmse", "r2"];

pub(crate) struct RegressionMeasure(pub(crate) Residuals);

impl Measure for RegressionMeasure {
    fn measure(&self, weights: &[u32]) -> Vec<Value> {
        let (rmse, r2) = self.0.scores(weights);
        vec![rmse, r2]
    }
}

fn by_class(rankings: &[Ranking], weights: &[u32]) -> Vec<(Value, Value)> {
    rankings
        .iter()
        .map(|ranking| {
            let scores = ranking.scores(weights);
            (scores.auroc, scores.auprc)
        })
        .collect()
}

fn squared_error(probability: f64, happened: bool) -> f64 {
    (probability - f64::from(u8::from(happened))).powi(2)
}

fn binary_log_loss(probability: f64, happened: bool) -> f64 {
    log_loss_of(if happened {
        probability
    } else {
        1.0 - probability
    })
}

#[cfg(test)]
mod tests;
