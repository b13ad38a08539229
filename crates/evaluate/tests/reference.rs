//! Every metric against the value that scikit-learn or numpy gives on the same predictions, stored
//! by `scripts/references/metrics.py`.
//!
//! The tolerance of 1e-12 is that of sums of a few hundred terms in another order: each rounds to
//! 1.1e-16 of its size, so a sum of 500 terms can differ by about 500 times that in the worst case.

use std::collections::BTreeMap;

use calor_evaluate::{
    BootstrapOptions, CurveOptions, EvaluateOptions, Metrics, Predictions, class_label, curves,
    evaluate, metric_names,
};
use serde::Deserialize;

const TOLERANCE: f64 = 1e-12;

#[derive(Deserialize)]
struct Reference {
    binary: Task,
    multiclass: Task,
    multilabel: Task,
    regression: Task,
}

#[derive(Deserialize)]
struct Task {
    predictions: Vec<f64>,
    targets: Vec<f64>,
    /// How often each row occurs in the resample of `weighted`.
    weights: Vec<usize>,
    metrics: BTreeMap<String, f64>,
    weighted: BTreeMap<String, f64>,
    #[serde(default)]
    classes: usize,
    #[serde(default)]
    labels: usize,
    #[serde(default)]
    roc: Vec<(f64, f64)>,
    #[serde(default)]
    precision_recall: Vec<(f64, f64)>,
    #[serde(default)]
    calibration: Vec<(f64, f64)>,
    #[serde(default)]
    calibration_by_quantile: Vec<(f64, f64)>,
}

impl Task {
    /// The predictions and targets with each row as often as the resample has it.
    fn resampled(&self, columns: usize, target_columns: usize) -> (Vec<f64>, Vec<f64>) {
        let repeat = |table: &[f64], columns: usize| -> Vec<f64> {
            table
                .chunks_exact(columns)
                .zip(&self.weights)
                .flat_map(|(row, &times)| row.repeat(times))
                .collect()
        };
        (
            repeat(&self.predictions, columns),
            repeat(&self.targets, target_columns),
        )
    }
}

fn reference() -> Reference {
    serde_json::from_str(include_str!("fixtures/metrics.json")).expect("the stored reference")
}

fn happened(targets: &[f64]) -> Vec<bool> {
    targets.iter().map(|&target| target == 1.0).collect()
}

fn classes(targets: &[f64]) -> Vec<usize> {
    targets.iter().map(|&target| target as usize).collect()
}

fn measured(predictions: &Predictions<'_>, rows: usize) -> Metrics {
    let options = EvaluateOptions {
        bootstrap: BootstrapOptions {
            resamples: 0,
            ..BootstrapOptions::default()
        },
        class_names: Vec::new(),
    };
    let patients: Vec<i64> = (0..rows as i64).collect();
    evaluate(predictions, &patients, &options).expect("valid predictions")
}

#[track_caller]
fn assert_same(metrics: &Metrics, expected: &BTreeMap<String, f64>) {
    let names: Vec<&String> = expected.keys().collect();
    let mut known = metric_names(metrics.task).to_vec();
    known.sort_unstable();
    assert_eq!(names, known, "every metric of the task has a reference");
    for (name, expected) in expected {
        let found = metrics.score(name).and_then(|score| score.value());
        let found = found.unwrap_or_else(|| panic!("{name} has no value"));
        assert!(
            (found - expected).abs() <= TOLERANCE * expected.abs().max(1.0),
            "{name}: {found} and not {expected}"
        );
    }
}

#[track_caller]
fn assert_points(found: impl Iterator<Item = (f64, f64)>, expected: &[(f64, f64)]) {
    let found: Vec<(f64, f64)> = found.collect();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!(
            (found.0 - expected.0).abs() <= TOLERANCE && (found.1 - expected.1).abs() <= TOLERANCE,
            "{found:?} and not {expected:?}"
        );
    }
}

#[test]
fn binary() {
    let task = reference().binary;
    let of = |probabilities: &[f64], targets: &[f64]| {
        let predictions = Predictions::Binary {
            probabilities,
            targets: &happened(targets),
        };
        measured(&predictions, targets.len())
    };
    assert_same(&of(&task.predictions, &task.targets), &task.metrics);
    let (probabilities, targets) = task.resampled(1, 1);
    assert_same(&of(&probabilities, &targets), &task.weighted);
}

#[test]
fn multiclass() {
    let task = reference().multiclass;
    let of = |probabilities: &[f64], targets: &[f64]| {
        let predictions = Predictions::Multiclass {
            classes: task.classes,
            probabilities,
            targets: &classes(targets),
        };
        measured(&predictions, targets.len())
    };
    assert_same(&of(&task.predictions, &task.targets), &task.metrics);
    let (probabilities, targets) = task.resampled(task.classes, 1);
    assert_same(&of(&probabilities, &targets), &task.weighted);
}

#[test]
fn multilabel() {
    let task = reference().multilabel;
    let of = |probabilities: &[f64], targets: &[f64]| {
        let predictions = Predictions::Multilabel {
            labels: task.labels,
            probabilities,
            targets: &happened(targets),
        };
        measured(&predictions, targets.len() / task.labels)
    };
    assert_same(&of(&task.predictions, &task.targets), &task.metrics);
    let (probabilities, targets) = task.resampled(task.labels, task.labels);
    assert_same(&of(&probabilities, &targets), &task.weighted);
}

#[test]
fn regression() {
    let task = reference().regression;
    let of = |predicted: &[f64], targets: &[f64]| {
        measured(
            &Predictions::Regression { predicted, targets },
            targets.len(),
        )
    };
    assert_same(&of(&task.predictions, &task.targets), &task.metrics);
    let (predicted, targets) = task.resampled(1, 1);
    assert_same(&of(&predicted, &targets), &task.weighted);
}

#[test]
fn single_metrics() {
    let Reference {
        binary,
        multiclass,
        regression,
        ..
    } = reference();
    let same = |name: &str, found: Result<f64, _>, expected: &BTreeMap<String, f64>| {
        let found = found.expect(name);
        assert!(
            (found - expected[name]).abs() <= TOLERANCE * expected[name].abs().max(1.0),
            "{name}"
        );
    };
    let (p, y) = (&binary.predictions, &happened(&binary.targets));
    same("auroc", calor_evaluate::auroc(p, y), &binary.metrics);
    same("auprc", calor_evaluate::auprc(p, y), &binary.metrics);
    same("brier", calor_evaluate::brier(p, y), &binary.metrics);
    same("ece", calor_evaluate::ece(p, y), &binary.metrics);

    let (p, y) = (&multiclass.predictions, &classes(&multiclass.targets));
    let count = multiclass.classes;
    let predicted: Vec<usize> = p.chunks_exact(count).map(class_label).collect();
    same(
        "log_loss",
        calor_evaluate::log_loss(count, p, y),
        &multiclass.metrics,
    );
    same(
        "accuracy",
        calor_evaluate::accuracy(count, &predicted, y),
        &multiclass.metrics,
    );
    same(
        "macro_f1",
        calor_evaluate::macro_f1(count, &predicted, y),
        &multiclass.metrics,
    );

    let (p, y) = (&regression.predictions, &regression.targets);
    same("rmse", calor_evaluate::rmse(p, y), &regression.metrics);
    same("r2", calor_evaluate::r2(p, y), &regression.metrics);
}

#[test]
fn curve_points() {
    let task = reference().binary;
    let predictions = Predictions::Binary {
        probabilities: &task.predictions,
        targets: &happened(&task.targets),
    };
    let options = CurveOptions {
        most_points: usize::MAX,
        ..CurveOptions::default()
    };
    let curve = curves(&predictions, &options)
        .expect("valid predictions")
        .remove(0);
    let roc = curve.roc.iter();
    assert_points(
        roc.map(|point| (point.false_positive_rate, point.true_positive_rate)),
        &task.roc,
    );
    let precision_recall = curve.precision_recall.iter();
    let expected = &task.precision_recall;
    assert_points(
        precision_recall.map(|point| (point.recall, point.precision)),
        expected,
    );
    let pair =
        |point: &calor_evaluate::CalibrationPoint| (point.mean_predicted, point.observed_rate);
    assert_points(curve.calibration.iter().map(pair), &task.calibration);
    let by_quantile = curve.calibration_by_quantile.iter().map(pair);
    assert_points(by_quantile, &task.calibration_by_quantile);
}
