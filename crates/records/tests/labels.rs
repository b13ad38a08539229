//! Labels and survival sidecars: what is read, and what is refused.

mod common;

use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, BooleanArray, Float32Array, Float64Array, Int32Array, Int64Array};
use calor_records::{
    Label, LabelKind, LabelValue, Labels, SurvivalLabel, SurvivalLabels, write_labels,
    write_survival,
};
use common::*;

fn label(subject_id: i64, prediction_time_us: i64, value: LabelValue) -> Label {
    Label {
        subject_id,
        prediction_time_us,
        value,
    }
}

fn keys(count: usize) -> Vec<(&'static str, ArrayRef)> {
    let ids: Vec<i64> = (0..count as i64).rev().collect();
    let times: Vec<Option<i64>> = (0..count as i64).map(Some).collect();
    vec![
        ("subject_id", Arc::new(Int64Array::from(ids)) as ArrayRef),
        ("prediction_time", timestamps(times)),
    ]
}

fn refused(path: &Path) -> String {
    Labels::read(path).unwrap_err().to_string()
}

#[test]
fn each_kind_is_read_back_sorted_from_any_files() {
    type Make = fn(i64) -> LabelValue;
    let kinds: [(LabelKind, Make); 4] = [
        (LabelKind::Boolean, |n| LabelValue::Boolean(n % 2 == 0)),
        (LabelKind::Integer, LabelValue::Integer),
        (LabelKind::Float, |n| LabelValue::Float(n as f32 / 4.0)),
        (LabelKind::Categorical, |n| {
            LabelValue::Categorical(format!("class {n}").into())
        }),
    ];
    for (kind, value) in kinds {
        let folder = tempfile::tempdir().unwrap();
        let first: Vec<Label> = [(7, 3), (7, 1), (2, 9)]
            .map(|(id, time)| label(id, time, value(id + time)))
            .to_vec();
        let second = vec![label(5, 5, value(0)), label(2, 8, value(1))];
        write_labels(&folder.path().join("b.parquet"), &first).unwrap();
        write_labels(&folder.path().join("deep/a.parquet"), &second).unwrap();
        let labels = Labels::read(folder.path()).unwrap();
        assert_eq!(labels.kind(), kind);
        let order: Vec<(i64, i64)> = labels
            .rows()
            .iter()
            .map(|label| (label.subject_id, label.prediction_time_us))
            .collect();
        assert_eq!(order, [(2, 8), (2, 9), (5, 5), (7, 1), (7, 3)]);
        assert_eq!(labels.rows()[1].value, value(11));
        assert_eq!(labels.of_subject(7).len(), 2);
        assert_eq!(labels.of_subject(6), []);
        let one = Labels::read(&folder.path().join("b.parquet")).unwrap();
        assert_eq!(one.rows().len(), 3);
    }
}

#[test]
fn categories_may_be_encoded_in_any_way() {
    for text in Text::ALL {
        let folder = tempfile::tempdir().unwrap();
        let mut columns = keys(3);
        columns.push((
            "categorical_value",
            strings(text, &[Some("x"), Some("y"), Some("x")]),
        ));
        write_columns(&folder.path().join("0.parquet"), columns);
        let labels = Labels::read(folder.path()).unwrap();
        let values: Vec<&LabelValue> = labels.rows().iter().map(|label| &label.value).collect();
        let category = |name: &str| LabelValue::Categorical(name.into());
        assert_eq!(values, [&category("x"), &category("y"), &category("x")]);
    }
}

#[test]
fn empty_columns_of_other_values_are_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let mut columns = keys(2);
    columns.extend([
        (
            "boolean_value",
            Arc::new(BooleanArray::from(vec![None, None])) as ArrayRef,
        ),
        ("integer_value", Arc::new(Int64Array::from(vec![4, 5]))),
        (
            "float_value",
            Arc::new(Float32Array::from(vec![None, None])),
        ),
        ("categorical_value", strings(Text::Plain, &[None, None])),
        ("remark", strings(Text::Plain, &[Some("kept"), None])),
    ]);
    write_columns(&folder.path().join("0.parquet"), columns);
    let labels = Labels::read(folder.path()).unwrap();
    assert_eq!(labels.kind(), LabelKind::Integer);
    assert_eq!(labels.rows()[0], label(0, 1, LabelValue::Integer(5)));
}

#[test]
fn labels_that_cannot_be_used_are_refused_by_file_and_row() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("0.parquet");
    assert!(refused(&folder.path().join("nowhere")).contains("no such folder"));
    assert!(refused(folder.path()).contains("no .parquet file"));

    write_columns(&path, keys(2));
    assert!(refused(folder.path()).contains("boolean_value"));

    let with = |column: (&'static str, ArrayRef)| {
        let mut columns = keys(2);
        columns.push(column);
        write_columns(&path, columns);
    };
    with((
        "boolean_value",
        Arc::new(BooleanArray::from(vec![Some(true), None])),
    ));
    assert!(refused(folder.path()).contains("0.parquet, row 1"));
    with(("float_value", Arc::new(Float64Array::from(vec![1.0, 2.0]))));
    assert!(refused(folder.path()).contains("is float64 and must be float32"));
    with((
        "float_value",
        Arc::new(Float32Array::from(vec![1.0, f32::NAN])),
    ));
    assert!(refused(folder.path()).contains("row 1: `float_value` is not a finite number"));
    with(("integer_value", Arc::new(Int32Array::from(vec![1, 2]))));
    assert!(refused(folder.path()).contains("is int32 and must be int64"));

    let mut both = keys(2);
    both.push((
        "boolean_value",
        Arc::new(BooleanArray::from(vec![Some(true), None])),
    ));
    both.push((
        "integer_value",
        Arc::new(Int64Array::from(vec![None, Some(1)])),
    ));
    write_columns(&path, both);
    assert!(refused(folder.path()).contains("row 1"));

    with((
        "boolean_value",
        Arc::new(BooleanArray::from(vec![true, false])),
    ));
    write_labels(
        &folder.path().join("1.parquet"),
        &[label(1, 1, LabelValue::Integer(3))],
    )
    .unwrap();
    assert!(refused(folder.path()).contains("1.parquet, row 0"));
    std::fs::remove_file(folder.path().join("1.parquet")).unwrap();
    write_labels(&path, &[]).unwrap();
    assert!(refused(folder.path()).contains("no rows"));

    let mixed = [
        label(1, 1, LabelValue::Integer(3)),
        label(1, 1, LabelValue::Float(0.0)),
    ];
    assert!(write_labels(&path, &mixed).is_err());
}

#[test]
fn a_survival_sidecar_is_read_back_sorted() {
    let folder = tempfile::tempdir().unwrap();
    let survival = |subject_id, duration_days, event| SurvivalLabel {
        subject_id,
        prediction_time_us: 4,
        duration_days,
        event,
    };
    let written = [survival(9, 0.0, 2), survival(3, 12.5, 0)];
    write_survival(&folder.path().join("0.parquet"), &written).unwrap();
    let labels = SurvivalLabels::read(folder.path()).unwrap();
    assert_eq!(labels.rows(), [written[1], written[0]]);
    assert_eq!(labels.of_subject(9), [written[0]]);
}

#[test]
fn a_survival_sidecar_that_makes_no_sense_is_refused_by_row() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |durations: ArrayRef, events: ArrayRef| {
        let mut columns = keys(2);
        columns.extend([("duration_days", durations), ("event", events)]);
        write_columns(&folder.path().join("0.parquet"), columns);
        SurvivalLabels::read(folder.path()).unwrap_err().to_string()
    };
    let floats =
        |values: [Option<f32>; 2]| -> ArrayRef { Arc::new(Float32Array::from(values.to_vec())) };
    let ints =
        |values: [Option<i32>; 2]| -> ArrayRef { Arc::new(Int32Array::from(values.to_vec())) };
    let good = || (floats([Some(1.0), Some(2.0)]), ints([Some(0), Some(1)]));
    for durations in [
        [Some(1.0), Some(-1.0)],
        [Some(1.0), Some(f32::INFINITY)],
        [Some(1.0), None],
    ] {
        let error = refused(floats(durations), good().1);
        assert!(
            error.contains("0.parquet, row 1") && error.contains("duration_days"),
            "{error}"
        );
    }
    for events in [[Some(0), Some(-1)], [Some(0), None]] {
        let error = refused(good().0, ints(events));
        assert!(
            error.contains("0.parquet, row 1") && error.contains("event"),
            "{error}"
        );
    }
    let error = refused(Arc::new(Float64Array::from(vec![1.0, 2.0])), good().1);
    assert!(error.contains("is float64 and must be float32"), "{error}");
}
