//! A resample by weights gives what scikit-learn gives on the repeated rows.

use serde_json::Value as Json;

use super::*;

fn reference() -> Json {
    serde_json::from_str(include_str!("../../tests/fixtures/metrics.json")).unwrap()
}

fn numbers(task: &Json, key: &str) -> Vec<f64> {
    let numbers = task[key].as_array().unwrap().iter();
    numbers.map(|number| number.as_f64().unwrap()).collect()
}

fn size(task: &Json, key: &str) -> usize {
    task[key].as_u64().unwrap() as usize
}

fn numbered(count: usize) -> Vec<String> {
    (0..count).map(|number| number.to_string()).collect()
}

fn happened(task: &Json) -> Vec<bool> {
    numbers(task, "targets").iter().map(|&y| y == 1.0).collect()
}

/// Measures with the stored weights and compares with the stored values. 1e-12: sums of a few
/// hundred terms in another order.
#[track_caller]
fn assert_weighted(measure: &dyn Measure, names: &[&str], task: &Json) {
    let weights: Vec<u32> = numbers(task, "weights").iter().map(|&w| w as u32).collect();
    assert!(weights.contains(&0) && weights.iter().any(|&weight| weight > 1));
    for (name, value) in names.iter().zip(measure.measure(&weights)) {
        let expected = task["weighted"][name].as_f64().unwrap();
        let found = value.unwrap();
        assert!(
            (found - expected).abs() <= 1e-12 * expected.abs().max(1.0),
            "{name}: {found} and not {expected}"
        );
    }
}

#[test]
fn binary() {
    let task = &reference()["binary"];
    let measure = BinaryMeasure::new(&numbers(task, "predictions"), &happened(task));
    assert_weighted(&measure, &BINARY_METRICS, task);
}

#[test]
fn multiclass() {
    let task = &reference()["multiclass"];
    let classes = size(task, "classes");
    let targets: Vec<usize> = numbers(task, "targets")
        .iter()
        .map(|&y| y as usize)
        .collect();
    let predictions = numbers(task, "predictions");
    let measure = MulticlassMeasure::new(classes, &predictions, &targets, numbered(classes));
    assert_weighted(&measure, &MULTICLASS_METRICS, task);
}

#[test]
fn multilabel() {
    let task = &reference()["multilabel"];
    let labels = size(task, "labels");
    let predictions = numbers(task, "predictions");
    let measure = MultilabelMeasure::new(labels, &predictions, &happened(task), numbered(labels));
    assert_weighted(&measure, &MULTILABEL_METRICS, task);
}

#[test]
fn regression() {
    let task = &reference()["regression"];
    let residuals = Residuals::new(&numbers(task, "predictions"), &numbers(task, "targets"));
    assert_weighted(&RegressionMeasure(residuals), &REGRESSION_METRICS, task);
}

#[test]
fn the_percentile_is_numpys() {
    let stored = &reference()["percentile"];
    let values = numbers(stored, "values");
    let expected = numbers(stored, "percentiles");
    for (share, expected) in numbers(stored, "shares").into_iter().zip(expected) {
        let found = crate::bootstrap::percentile(&values, share);
        assert!(
            (found - expected).abs() < 1e-15,
            "{share}: {found} and not {expected}"
        );
    }
}
