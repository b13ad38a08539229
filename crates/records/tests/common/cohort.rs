//! A cohort that keeps every rule of MEDS.

use std::collections::BTreeSet;
use std::path::Path;

use calor_records::{
    Label, LabelValue, Patient, Rule, ShardOptions, Split, SurvivalLabel, ValidationReport,
    validate, write_codes, write_dataset, write_labels, write_shard, write_splits, write_survival,
};

use super::{patients, rows, shard};

/// A cohort that keeps every rule, in two shards.
pub fn good() -> (tempfile::TempDir, Vec<Patient>) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let written = patients(30, 1);
    write_shard(
        &shard(root, "train/0.parquet"),
        &written[..20],
        ShardOptions::default(),
    )
    .unwrap();
    write_shard(
        &shard(root, "train/1.parquet"),
        &written[20..],
        ShardOptions::default(),
    )
    .unwrap();
    let codes: BTreeSet<&str> = rows(&written)
        .iter()
        .map(|(_, event)| &*event.code)
        .collect();
    let entries: Vec<_> = codes
        .iter()
        .map(|code| {
            let entry = calor_records::CodeEntry {
                description: Some(format!("what {code} means").into()),
                parent_codes: vec!["ALL".into()],
            };
            (*code, entry)
        })
        .collect();
    write_codes(root, entries.iter().map(|(code, entry)| (*code, entry))).unwrap();
    let splits: Vec<(i64, Split)> = written
        .iter()
        .enumerate()
        .map(|(position, patient)| (patient.subject_id, Split::ALL[position % 3]))
        .collect();
    write_splits(root, &splits).unwrap();
    let dataset = serde_json::json!({
        "dataset_name": "test",
        "meds_version": "0.4.1",
        "created_at": "2024-05-06T07:08:09.123456+00:00",
        "site_id_columns": ["site"],
        "unknown": {"kept": true},
    });
    write_dataset(root, dataset.as_object().unwrap()).unwrap();
    let labels: Vec<Label> = written
        .iter()
        .map(|patient| Label {
            subject_id: patient.subject_id,
            prediction_time_us: 0,
            value: LabelValue::Boolean(patient.events.len() > 10),
        })
        .collect();
    write_labels(&root.join("labels/long/0.parquet"), &labels).unwrap();
    let survival: Vec<SurvivalLabel> = written
        .iter()
        .map(|patient| SurvivalLabel {
            subject_id: patient.subject_id,
            prediction_time_us: 0,
            duration_days: patient.events.len() as f32,
            event: 1,
        })
        .collect();
    write_survival(&root.join("survival/long/0.parquet"), &survival).unwrap();
    (folder, written)
}

/// The names of the broken rules.
pub fn broken(report: &ValidationReport) -> Vec<&'static str> {
    report.broken().map(|broken| broken.rule.name()).collect()
}

/// Asserts that a rule alone is broken, `count` times, first in this file and row.
pub fn only(root: &Path, rule: Rule, count: u64, file: &str, row: Option<u64>) -> ValidationReport {
    let report = validate(root);
    assert_eq!(broken(&report), [rule.name()]);
    let found = report.rule(rule).unwrap();
    assert_eq!(found.count, count);
    assert_eq!(
        found.findings[0].file.as_deref(),
        Some(Path::new(file)),
        "{rule:?}"
    );
    assert_eq!(found.findings[0].row, row, "{rule:?}");
    report
}
