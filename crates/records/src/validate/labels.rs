use std::path::{Path, PathBuf};

use arrow_array::Array;

use super::{add_error, check_closed, check_columns, each_batch, open};
use crate::error::RecordsError;
use crate::files::parquet_files;
use crate::labels::{
    LABEL_COLUMNS, LabelKind, SURVIVAL_COLUMNS, read_label_file, read_survival_file,
};
use crate::rules::{Findings, Rule};
use crate::table::{Decode, Table};

/// The tasks of `labels/` or `survival/`: each folder in it, with its files; files that stand in
/// it directly are a task each.
fn tasks(folder: &Path, findings: &mut Findings) -> Vec<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Vec::new();
    }
    let files = match parquet_files(folder) {
        Ok(files) => files,
        Err(error) => {
            findings.add(Rule::FileReadable, Some(folder), None, error.to_string());
            return Vec::new();
        }
    };
    let mut tasks: Vec<Vec<PathBuf>> = Vec::new();
    let mut current = None;
    for file in files {
        let task = file
            .strip_prefix(folder)
            .ok()
            .and_then(|relative| relative.iter().next())
            .map(ToOwned::to_owned);
        match tasks.last_mut() {
            Some(last) if task == current => last.push(file),
            _ => {
                tasks.push(vec![file]);
                current = task;
            }
        }
    }
    tasks
}

pub(super) fn check_labels(cohort: &Path, subjects: &[i64], findings: &mut Findings) {
    for files in tasks(&cohort.join("labels"), findings) {
        let mut kind: Option<LabelKind> = None;
        for path in files {
            let Some(table) = open(&path, findings) else {
                continue;
            };
            check_closed(&table, &LABEL_COLUMNS, Rule::LabelsSchema, findings);
            if !check_columns(&table, &LABEL_COLUMNS, Rule::LabelsSchema, findings) {
                continue;
            }
            let file = Some(path.as_path());
            let names: Vec<&str> = LABEL_COLUMNS
                .iter()
                .map(|column| column.name)
                .filter(|name| table.field(name).is_some())
                .collect();
            if names.len() == 2 {
                findings.add(
                    Rule::LabelsSchema,
                    file,
                    None,
                    "it has none of the four columns of values",
                );
                continue;
            }
            let nulls = findings.count(Rule::LabelsNotNull);
            if let Err(error) = check_nulls(&table, &names, findings) {
                add_error(findings, Rule::FileReadable, &path, &error);
                continue;
            }
            let mut labels = Vec::new();
            match read_label_file(&path, &mut kind, &mut labels) {
                Ok(()) => {}
                // Already among the findings.
                Err(RecordsError::NullValue { .. })
                    if findings.count(Rule::LabelsNotNull) > nulls => {}
                Err(error) => add_error(findings, Rule::LabelsOneKind, &path, &error),
            }
            for (row, label) in labels.iter().enumerate() {
                check_known(subjects, label.subject_id, &path, row as u64, findings);
            }
        }
    }
}

pub(super) fn check_survival(cohort: &Path, subjects: &[i64], findings: &mut Findings) {
    for path in tasks(&cohort.join("survival"), findings)
        .into_iter()
        .flatten()
    {
        let Some(table) = open(&path, findings) else {
            continue;
        };
        if !check_columns(&table, &SURVIVAL_COLUMNS, Rule::SurvivalSchema, findings) {
            continue;
        }
        let mut labels = Vec::new();
        if let Err(error) = read_survival_file(&path, &mut labels) {
            let rule = match error {
                RecordsError::InvalidValue { .. } | RecordsError::NullValue { .. } => {
                    Rule::SurvivalValues
                }
                _ => Rule::FileReadable,
            };
            add_error(findings, rule, &path, &error);
        }
        for (row, label) in labels.iter().enumerate() {
            check_known(subjects, label.subject_id, &path, row as u64, findings);
        }
    }
}

fn check_known(subjects: &[i64], subject: i64, path: &Path, row: u64, findings: &mut Findings) {
    if subjects.binary_search(&subject).is_err() {
        findings.add(
            Rule::LabelsKnown,
            Some(path),
            Some(row),
            "this subject has no rows in the data",
        );
    }
}

fn check_nulls(table: &Table, names: &[&str], findings: &mut Findings) -> Result<(), RecordsError> {
    let columns: Vec<(&str, Decode)> = names.iter().map(|name| (*name, Decode::Plain)).collect();
    each_batch(table, &columns, |first_row, batch| {
        for (name, column) in names.iter().filter_map(|name| {
            let column = batch.column_by_name(name)?;
            Some((name, column))
        }) {
            let Some(nulls) = column.logical_nulls() else {
                continue;
            };
            for position in (0..batch.num_rows()).filter(|&row| nulls.is_null(row)) {
                findings.add(
                    Rule::LabelsNotNull,
                    Some(table.path()),
                    Some(first_row + position as u64),
                    format!("`{name}` is null"),
                );
            }
        }
    })
}
