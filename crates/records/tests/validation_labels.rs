//! Labels and survival sidecars that break a rule are told so by its name, file and row.

mod common;

use std::sync::Arc;

use arrow_array::{ArrayRef, BooleanArray, Float32Array, Int32Array, Int64Array};
use calor_records::{Rule, validate};
use common::cohort::{broken, good, only};
use common::*;

#[test]
fn labels_are_checked_file_by_file() {
    let (folder, written) = good();
    let root = folder.path();
    let path = root.join("labels/other/0.parquet");
    let file = "labels/other/0.parquet";
    let ids: Vec<i64> = written[..3]
        .iter()
        .map(|patient| patient.subject_id)
        .collect();
    let keys = |ids: &[i64]| -> Vec<(&'static str, ArrayRef)> {
        vec![
            ("subject_id", Arc::new(Int64Array::from(ids.to_vec()))),
            ("prediction_time", timestamps(vec![Some(4); ids.len()])),
        ]
    };
    let with = |ids: &[i64], columns: Vec<(&'static str, ArrayRef)>| {
        let mut all = keys(ids);
        all.extend(columns);
        write_columns(&path, all);
    };
    let booleans = |values: Vec<Option<bool>>| -> ArrayRef { Arc::new(BooleanArray::from(values)) };

    with(&ids, vec![]);
    only(root, Rule::LabelsSchema, 1, file, None);
    with(
        &ids,
        vec![("integer_value", Arc::new(Int32Array::from(vec![1, 2, 3])))],
    );
    only(root, Rule::LabelsSchema, 1, file, None);
    with(
        &ids,
        vec![
            ("boolean_value", booleans(vec![Some(true); 3])),
            ("remark", booleans(vec![None; 3])),
        ],
    );
    only(root, Rule::LabelsSchema, 1, file, None);
    with(
        &ids,
        vec![("boolean_value", booleans(vec![Some(true), None, None]))],
    );
    only(root, Rule::LabelsNotNull, 2, file, Some(1));
    with(
        &ids,
        vec![
            ("boolean_value", booleans(vec![Some(true); 3])),
            ("integer_value", Arc::new(Int64Array::from(vec![1, 2, 3]))),
        ],
    );
    only(root, Rule::LabelsOneKind, 1, file, Some(0));
    with(
        &[ids[0], 1_000_000, ids[2]],
        vec![("boolean_value", booleans(vec![Some(true); 3]))],
    );
    assert!(only(root, Rule::LabelsKnown, 1, file, Some(1)).valid);

    // Another file of the same task with values of another kind.
    with(&ids, vec![("boolean_value", booleans(vec![Some(true); 3]))]);
    let mut floats = keys(&ids);
    floats.push(("float_value", Arc::new(Float32Array::from(vec![0.5; 3]))));
    write_columns(&root.join("labels/other/1.parquet"), floats.clone());
    only(
        root,
        Rule::LabelsOneKind,
        1,
        "labels/other/1.parquet",
        Some(0),
    );
    // Another task may have them.
    std::fs::remove_file(root.join("labels/other/1.parquet")).unwrap();
    write_columns(&root.join("labels/third/1.parquet"), floats);
    assert_eq!(broken(&validate(root)), [] as [&str; 0]);

    std::fs::write(&path, "PAR1PAR1PAR1").unwrap();
    only(root, Rule::FileReadable, 1, file, None);
}

#[test]
fn survival_sidecars_are_checked() {
    let (folder, written) = good();
    let root = folder.path();
    let path = root.join("survival/long/0.parquet");
    let file = "survival/long/0.parquet";
    let with = |id: i64, duration: f32, event: ArrayRef| {
        write_columns(
            &path,
            vec![
                (
                    "subject_id",
                    Arc::new(Int64Array::from(vec![id])) as ArrayRef,
                ),
                ("prediction_time", timestamps(vec![Some(4)])),
                (
                    "duration_days",
                    Arc::new(Float32Array::from(vec![duration])),
                ),
                ("event", event),
            ],
        );
    };
    let one = || -> ArrayRef { Arc::new(Int32Array::from(vec![1])) };
    let id = written[0].subject_id;
    with(id, 3.0, Arc::new(Int64Array::from(vec![1])));
    only(root, Rule::SurvivalSchema, 1, file, None);
    with(id, -3.0, one());
    only(root, Rule::SurvivalValues, 1, file, Some(0));
    with(id, 3.0, Arc::new(Int32Array::from(vec![-1])));
    only(root, Rule::SurvivalValues, 1, file, Some(0));
    with(1_000_000, 3.0, one());
    only(root, Rule::LabelsKnown, 1, file, Some(0));
}
