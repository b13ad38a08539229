//! A file that is truncated, corrupt, mistyped or out of order gives an error that names it, and
//! never a panic.

mod common;

use std::path::Path;
use std::sync::Arc;

use arrow_array::{
    ArrayRef, Float64Array, Int32Array, Int64Array, StringArray, TimestampNanosecondArray,
};
use calor_records::{Cohort, Patient, RecordsError, Rule, validate};
use common::*;
use parquet::basic::Compression;

/// Opens a cohort and reads all of it.
fn read(folder: &Path) -> Result<Vec<Patient>, RecordsError> {
    let cohort = Cohort::open(folder)?;
    let mut patients = Vec::new();
    for shard in 0..cohort.shards().len() {
        for patient in cohort.read_shard(shard, &|_| true)? {
            patients.push(patient?);
        }
    }
    Ok(patients)
}

/// The message of the error that reading gives, which must name the file.
fn message(folder: &Path, file: &str) -> String {
    let message = read(folder).unwrap_err().to_string();
    assert!(message.contains(file), "{message}");
    message
}

fn row(id: i64, time: Option<i64>, code: &str) -> (i64, Option<i64>, String) {
    (id, time, code.to_string())
}

fn write_rows(path: &Path, rows: &[(i64, Option<i64>, String)]) {
    let codes: Vec<Option<&str>> = rows.iter().map(|row| Some(row.2.as_str())).collect();
    write_columns(
        path,
        vec![
            (
                "subject_id",
                Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.0))),
            ),
            ("time", timestamps(rows.iter().map(|row| row.1).collect())),
            ("code", strings(Text::Plain, &codes)),
        ],
    );
}

#[test]
fn a_folder_that_is_no_cohort_says_what_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("nowhere");
    assert!(
        Cohort::open(&missing)
            .unwrap_err()
            .to_string()
            .contains("no such folder")
    );
    let open = || Cohort::open(folder.path()).unwrap_err().to_string();
    assert!(open().contains("no folder `data`"));
    std::fs::create_dir(folder.path().join("data")).unwrap();
    assert!(open().contains("no .parquet file"));
}

#[test]
fn a_truncated_file_is_named_wherever_it_breaks_off() {
    let whole = tempfile::tempdir().unwrap();
    let path = shard(whole.path(), "0.parquet");
    write_layout(&path, &patients(50, 1), &Layout::default());
    let bytes = std::fs::read(&path).unwrap();
    for length in [
        0,
        1,
        4,
        11,
        12,
        bytes.len() / 2,
        bytes.len() - 9,
        bytes.len() - 1,
    ] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let error = message(whole.path(), "0.parquet");
        assert!(error.contains("truncated"), "{length}: {error}");
        let report = validate(whole.path());
        assert!(!report.valid);
        assert_eq!(
            report.rule(Rule::FileReadable).unwrap().count,
            1,
            "{length}"
        );
    }
}

#[test]
fn damaged_bytes_give_an_error_or_other_values_and_never_a_panic() {
    // Panics inside the decoder are caught; their traces would only clutter the output.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let place = panic.location().map_or("", |location| location.file());
        if !place.contains("parquet") && !place.contains("arrow") {
            report(panic);
        }
    }));
    let mut named = 0;
    for (compression, parquet_dictionary) in [
        (Compression::UNCOMPRESSED, true),
        (Compression::UNCOMPRESSED, false),
        (Compression::SNAPPY, true),
        (Compression::ZSTD(Default::default()), true),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = shard(folder.path(), "damaged.parquet");
        let layout = Layout {
            compression,
            parquet_dictionary,
            row_group_rows: 200,
            page_rows: 50,
            ..Layout::default()
        };
        write_layout(&path, &patients(40, 2), &layout);
        let bytes = std::fs::read(&path).unwrap();
        let mut random = Random::new(3);
        for _ in 0..250 {
            let mut damaged = bytes.clone();
            for _ in 0..1 + random.below(8) {
                let at = random.below(damaged.len());
                damaged[at] ^= 1 << random.below(8);
            }
            std::fs::write(&path, &damaged).unwrap();
            if let Err(error) = read(folder.path()) {
                let error = error.to_string();
                assert!(error.contains("damaged.parquet"), "{error}");
                named += 1;
            }
            let report = validate(folder.path());
            assert_eq!(report.data_files, 1);
        }
    }
    assert!(named > 300, "{named} of 1000");
}

#[test]
fn a_mistyped_column_is_named_with_both_types() {
    let good = patients(5, 4);
    let all = rows(&good);
    let count = all.len();
    let cases: Vec<(&str, ArrayRef, &str, Rule)> = vec![
        (
            "subject_id",
            Arc::new(Int32Array::from(vec![1; count])),
            "is int32 and must be int64",
            Rule::SubjectIdType,
        ),
        (
            "subject_id",
            Arc::new(StringArray::from(vec!["1"; count])),
            "is string and must be int64",
            Rule::SubjectIdType,
        ),
        (
            "time",
            Arc::new(TimestampNanosecondArray::from(vec![1; count])),
            "is timestamp[ns] and must be timestamp[us]",
            Rule::TimeType,
        ),
        (
            "time",
            Arc::new(StringArray::from(vec!["2000-01-01"; count])),
            "is string and must be timestamp[us]",
            Rule::TimeType,
        ),
        (
            "code",
            Arc::new(Int64Array::from(vec![1; count])),
            "is int64 and must be string",
            Rule::CodeType,
        ),
        (
            "numeric_value",
            Arc::new(Float64Array::from(vec![1.0; count])),
            "is float64 and must be float32",
            Rule::NumericValueType,
        ),
        (
            "text_value",
            Arc::new(Int64Array::from(vec![1; count])),
            "is int64 and must be string",
            Rule::TextValueType,
        ),
    ];
    for (name, column, expected, rule) in cases {
        let folder = tempfile::tempdir().unwrap();
        let columns: Vec<(&str, ArrayRef)> = columns(&all, Text::Plain)
            .into_iter()
            .map(|(other, kept)| (other, if other == name { column.clone() } else { kept }))
            .collect();
        write_columns(&shard(folder.path(), "typed.parquet"), columns);
        let error = message(folder.path(), "typed.parquet");
        assert!(error.contains(name) && error.contains(expected), "{error}");
        let report = validate(folder.path());
        let broken = report.rule(rule).unwrap();
        assert_eq!(broken.count, 1);
        assert!(broken.findings[0].message.contains(expected));
    }
}

#[test]
fn a_missing_column_is_named_beside_those_that_are_there() {
    let good = patients(5, 5);
    for name in ["subject_id", "time", "code"] {
        let folder = tempfile::tempdir().unwrap();
        let mut columns = columns(&rows(&good), Text::Plain);
        columns.retain(|(other, _)| *other != name);
        write_columns(&shard(folder.path(), "0.parquet"), columns);
        let error = message(folder.path(), "0.parquet");
        assert!(error.contains(&format!("no column `{name}`")), "{error}");
        assert!(error.contains("`numeric_value`"), "{error}");
    }
}

#[test]
fn nulls_are_named_by_row() {
    for (name, column) in [
        (
            "subject_id",
            Arc::new(Int64Array::from(vec![Some(1), Some(1), None])) as ArrayRef,
        ),
        ("code", strings(Text::Plain, &[Some("a"), Some("b"), None])),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("subject_id", Arc::new(Int64Array::from(vec![1, 1, 1]))),
            ("time", timestamps(vec![None, Some(1), Some(2)])),
            (
                "code",
                strings(Text::Plain, &[Some("a"), Some("b"), Some("c")]),
            ),
        ];
        let columns = columns
            .into_iter()
            .map(|(other, kept)| (other, if other == name { column.clone() } else { kept }))
            .collect();
        write_columns(&shard(folder.path(), "0.parquet"), columns);
        let error = message(folder.path(), "0.parquet");
        assert!(error.contains("row 2") && error.contains(name), "{error}");
    }
}

#[test]
fn rows_out_of_time_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = shard(folder.path(), "0.parquet");
    write_rows(
        &path,
        &[
            row(1, Some(9), "a"),
            row(2, Some(5), "a"),
            row(2, Some(4), "b"),
        ],
    );
    assert!(message(folder.path(), "0.parquet").contains("row 2: earlier than the row before"));

    write_rows(
        &path,
        &[
            row(1, None, "a"),
            row(1, Some(5), "a"),
            row(1, None, "b"),
            row(1, Some(6), "c"),
        ],
    );
    assert!(message(folder.path(), "0.parquet").contains("row 2: a row without time"));
}

#[test]
fn a_subject_in_two_places_is_named_by_both() {
    let folder = tempfile::tempdir().unwrap();
    let path = shard(folder.path(), "0.parquet");
    write_rows(
        &path,
        &[
            row(77001, None, "a"),
            row(2, None, "a"),
            row(77001, None, "b"),
        ],
    );
    let error = message(folder.path(), "0.parquet");
    assert!(
        error.contains("row 2") && error.contains("row 0"),
        "{error}"
    );
    assert!(!error.contains("77001"), "{error}");

    write_rows(&path, &[row(77001, None, "a"), row(2, None, "a")]);
    write_rows(
        &shard(folder.path(), "1.parquet"),
        &[row(3, None, "a"), row(4, None, "a"), row(2, None, "a")],
    );
    let error = message(folder.path(), "1.parquet");
    assert!(error.contains("row 2"), "{error}");
    assert!(error.contains("0.parquet, row 1"), "{error}");
}

#[test]
fn a_file_that_changes_after_the_cohort_was_opened_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = shard(folder.path(), "0.parquet");
    write_rows(&path, &[row(1, None, "a"), row(2, None, "a")]);
    let cohort = Cohort::open(folder.path()).unwrap();
    write_rows(&path, &[row(1, None, "a"), row(3, None, "a")]);
    let mut reader = cohort.read_shard(0, &|_| true).unwrap();
    assert_eq!(reader.next().unwrap().unwrap().subject_id, 1);
    let error = reader.next().unwrap().unwrap_err();
    assert!(
        matches!(error, RecordsError::ChangedSinceOpen { row: 1, .. }),
        "{error}"
    );
    assert!(reader.next().is_none());

    write_rows(&path, &[row(1, None, "a")]);
    assert!(matches!(
        cohort.read_subject(2),
        Err(RecordsError::ChangedSinceOpen { .. })
    ));
}

#[test]
fn metadata_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().unwrap();
    write_layout(
        &shard(folder.path(), "0.parquet"),
        &patients(3, 6),
        &Layout::default(),
    );
    let metadata = folder.path().join("metadata");
    std::fs::create_dir(&metadata).unwrap();
    for (content, expected) in [
        ("{", "not valid JSON"),
        ("[]", "must be an object"),
        (
            r#"{"site_id_columns": "site"}"#,
            "`site_id_columns` must be a list of strings",
        ),
        (r#"{"dataset_name": 3}"#, "`dataset_name` must be a string"),
    ] {
        std::fs::write(metadata.join("dataset.json"), content).unwrap();
        let error = message(folder.path(), "dataset.json");
        assert!(error.contains(expected), "{error}");
        assert!(!validate(folder.path()).valid);
    }
    std::fs::write(metadata.join("dataset.json"), "{}").unwrap();

    let splits = metadata.join("subject_splits.parquet");
    write_columns(
        &splits,
        vec![
            ("subject_id", Arc::new(Int64Array::from(vec![5, 6, 5]))),
            (
                "split",
                strings(
                    Text::Plain,
                    &[Some("train"), Some("train"), Some("held_out")],
                ),
            ),
        ],
    );
    let error = message(folder.path(), "subject_splits.parquet");
    assert!(
        error.contains("row 2") && error.contains("`train` (row 0)"),
        "{error}"
    );
    write_columns(
        &splits,
        vec![("subject_id", Arc::new(Int64Array::from(vec![5])))],
    );
    assert!(message(folder.path(), "subject_splits.parquet").contains("`split`"));
    std::fs::write(&splits, "PAR1").unwrap();
    assert!(message(folder.path(), "subject_splits.parquet").contains("truncated"));
    std::fs::remove_file(&splits).unwrap();

    write_columns(
        &metadata.join("codes.parquet"),
        vec![("code", strings(Text::Plain, &[Some("a"), None]))],
    );
    assert!(message(folder.path(), "codes.parquet").contains("row 1"));
}

#[test]
fn a_codec_that_is_not_built_in_is_named() {
    // A Brotli file from pyarrow 26: pq.write_table(pa.table({"subject_id": pa.array([1], pa.int64()),
    // "time": pa.array([None], pa.timestamp("us")), "code": ["a"]}), path, compression="brotli",
    // store_schema=False).
    let folder = tempfile::tempdir().unwrap();
    let path = shard(folder.path(), "brotli.parquet");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, include_bytes!("fixtures/brotli.parquet")).unwrap();
    let error = message(folder.path(), "brotli.parquet");
    assert!(error.contains("Brotli"), "{error}");
    assert_eq!(
        validate(folder.path())
            .rule(Rule::FileReadable)
            .unwrap()
            .count,
        1
    );
}
