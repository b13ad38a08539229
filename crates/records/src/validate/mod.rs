//! Every rule of MEDS 0.4, checked over a whole cohort; all findings, not only the first.

mod items;
mod labels;
mod metadata;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::DataType;
use rayon::prelude::*;

use crate::error::RecordsError;
use crate::files::parquet_files;
use crate::metadata::value_at;
use crate::rules::{Findings, Rule, ValidationReport};
use crate::table::{Column, DATA_COLUMNS, Decode, Kind, Table, type_name};
use crate::values::{SharedStrings, float32, int64, timestamps};
use items::ItemChecks;

const BATCH_ROWS: usize = 8192;

/// Checks a folder against each rule of MEDS 0.4 (and its path columns and survival sidecars), all
/// of it: a rule broken does not keep the others from being checked. Nothing is held of the events; a subject
/// costs 24 bytes.
pub fn validate(cohort: &Path) -> ValidationReport {
    let mut findings = Findings::new(cohort);
    let files = data_files(cohort, &mut findings);

    let scans: Vec<ShardScan> = files
        .par_iter()
        .map(|file| scan_shard(cohort, file))
        .collect();
    let mut runs: Vec<Run> = Vec::new();
    let mut rows = 0;
    let mut codes: HashMap<Arc<str>, (usize, u64)> = HashMap::new();
    let mut columns: HashMap<String, bool> = HashMap::new();
    for (file, scan) in scans.into_iter().enumerate() {
        findings.append(scan.findings);
        rows += scan.rows;
        runs.extend(scan.runs.into_iter().map(|(subject_id, row)| Run {
            subject_id,
            file: file as u32,
            row,
        }));
        for (code, row) in scan.codes {
            codes.entry(code).or_insert((file, row));
        }
        for (column, is_string) in scan.columns {
            *columns.entry(column).or_insert(true) &= is_string;
        }
    }
    let subjects = check_subjects(&files, runs, &mut findings);
    metadata::check_dataset(cohort, &columns, !files.is_empty(), &mut findings);
    metadata::check_codes(cohort, &files, &codes, &mut findings);
    metadata::check_splits(cohort, &subjects, &mut findings);
    labels::check_labels(cohort, &subjects, &mut findings);
    labels::check_survival(cohort, &subjects, &mut findings);
    findings.report(files.len(), rows, subjects.len() as u64)
}

/// A stretch of rows of one subject.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Run {
    subject_id: i64,
    file: u32,
    row: u64,
}

struct ShardScan {
    findings: Findings,
    rows: u64,
    /// Subject and first row of each stretch.
    runs: Vec<(i64, u64)>,
    /// Each code and the first row that has it.
    codes: Vec<(Arc<str>, u64)>,
    /// Names of all columns, and whether they are strings.
    columns: Vec<(String, bool)>,
}

fn data_files(cohort: &Path, findings: &mut Findings) -> Vec<PathBuf> {
    let data = cohort.join("data");
    if !data.is_dir() {
        findings.add(Rule::DataFiles, None, None, "there is no folder `data`");
        return Vec::new();
    }
    match parquet_files(&data) {
        Ok(files) => {
            if files.is_empty() {
                findings.add(
                    Rule::DataFiles,
                    None,
                    None,
                    "there is no .parquet file under `data`",
                );
            }
            files
        }
        Err(error) => {
            findings.add(Rule::DataFiles, Some(&data), None, error.to_string());
            Vec::new()
        }
    }
}

fn scan_shard(cohort: &Path, file: &Path) -> ShardScan {
    let mut scan = ShardScan {
        findings: Findings::new(cohort),
        rows: 0,
        runs: Vec::new(),
        codes: Vec::new(),
        columns: Vec::new(),
    };
    let Some(table) = open(file, &mut scan.findings) else {
        return scan;
    };
    scan.columns = table
        .fields()
        .iter()
        .map(|field| {
            let is_string = matches!(field.data_type(), DataType::Utf8 | DataType::Null);
            (field.name().clone(), is_string)
        })
        .collect();
    let rules = [
        Rule::SubjectIdType,
        Rule::TimeType,
        Rule::CodeType,
        Rule::NumericValueType,
        Rule::TextValueType,
    ];
    let mut readable = Vec::new();
    for (column, rule) in DATA_COLUMNS.iter().zip(rules) {
        if check_column(&table, column, rule, &mut scan.findings) {
            let decode = match column.name {
                "code" => Decode::Dictionary,
                "text_value" => Decode::Large,
                _ => Decode::Plain,
            };
            readable.push((column.name, decode));
        }
    }
    // The other columns are decoded as well, to find damage in them.
    let names: Vec<String> = table
        .fields()
        .iter()
        .map(|field| field.name().clone())
        .filter(|name| DATA_COLUMNS.iter().all(|column| column.name != name))
        .collect();
    readable.extend(names.iter().map(|name| (name.as_str(), Decode::Plain)));
    let items = ItemChecks::of(cohort, &table, &mut scan.findings);
    if let Err(error) = scan_rows(&table, &readable, &items, &mut scan) {
        add_error(&mut scan.findings, Rule::FileReadable, file, &error);
    }
    scan
}

fn scan_rows(
    table: &Table,
    columns: &[(&str, Decode)],
    items: &ItemChecks<'_>,
    scan: &mut ShardScan,
) -> Result<(), RecordsError> {
    let has = |name: &str| columns.iter().any(|(column, _)| *column == name);
    let (has_subjects, has_times, has_codes) = (has("subject_id"), has("time"), has("code"));
    let file = Some(table.path());
    let mut codes = SharedStrings::default();
    let mut seen: HashSet<Arc<str>> = HashSet::new();
    // Subject and time of the row before.
    let mut subject: Option<i64> = None;
    let mut previous: Option<i64> = None;
    for batch in table.batches(columns, None, BATCH_ROWS, 0)? {
        let batch = batch?;
        let ids = int64(&batch, "subject_id").filter(|_| has_subjects);
        let times = timestamps(&batch, "time").filter(|_| has_times);
        let numbers = float32(&batch, "numeric_value");
        codes.load(&batch, "code");
        items.check(&batch, scan.rows, &mut scan.findings);
        for position in 0..batch.num_rows() {
            let row = scan.rows;
            scan.rows += 1;
            if has_subjects {
                let found = ids.as_ref().and_then(|ids| value_at(ids, position));
                match found {
                    None => scan.findings.add(
                        Rule::SubjectIdNotNull,
                        file,
                        Some(row),
                        "`subject_id` is null",
                    ),
                    Some(id) if subject != found => scan.runs.push((id, row)),
                    Some(_) => {}
                }
                if subject != found || found.is_none() {
                    previous = None;
                }
                subject = found;
            }
            if has_subjects && subject.is_some() && has_times {
                let time = times.as_ref().and_then(|times| value_at(times, position));
                match (previous, time) {
                    (Some(_), None) => scan.findings.add(
                        Rule::StaticFirst,
                        file,
                        Some(row),
                        "a row without time stands after one with a time",
                    ),
                    (Some(before), Some(now)) if now < before => scan.findings.add(
                        Rule::TimeSorted,
                        file,
                        Some(row),
                        "earlier than the row before it",
                    ),
                    _ => {}
                }
                // A static row out of place does not reset the order of the timed ones.
                previous = time.or(previous);
            }
            if has_codes {
                match codes.get(position) {
                    None => {
                        scan.findings
                            .add(Rule::CodeNotNull, file, Some(row), "`code` is null");
                    }
                    Some(code) => {
                        if seen.insert(code.clone()) {
                            scan.codes.push((code, row));
                        }
                    }
                }
            }
            if let Some(number) = numbers.as_ref().and_then(|all| value_at(all, position))
                && !number.is_finite()
            {
                scan.findings.add(
                    Rule::NumbersFinite,
                    file,
                    Some(row),
                    "`numeric_value` is infinite or not a number",
                );
            }
        }
    }
    Ok(())
}

/// Subjects of the cohort, sorted; findings for those whose rows are not together.
fn check_subjects(files: &[PathBuf], mut runs: Vec<Run>, findings: &mut Findings) -> Vec<i64> {
    runs.par_sort_unstable();
    let mut repeated: Vec<(Run, Run)> = runs
        .windows(2)
        .filter(|pair| pair[0].subject_id == pair[1].subject_id)
        .map(|pair| (pair[0], pair[1]))
        .collect();
    repeated.sort_unstable_by_key(|(_, again)| (again.file, again.row));
    for (before, again) in repeated {
        let file = Some(files[again.file as usize].as_path());
        if before.file == again.file {
            findings.add(
                Rule::SubjectContiguous,
                file,
                Some(again.row),
                format!("this subject has rows before, from row {} on", before.row),
            );
        } else {
            findings.add(
                Rule::SubjectInOneFile,
                file,
                Some(again.row),
                format!(
                    "this subject has rows in another file ({}, row {})",
                    files[before.file as usize].display(),
                    before.row
                ),
            );
        }
    }
    let mut subjects: Vec<i64> = runs.into_iter().map(|run| run.subject_id).collect();
    subjects.dedup();
    subjects
}

/// Opens a file; a finding if it cannot be read.
fn open(path: &Path, findings: &mut Findings) -> Option<Table> {
    match Table::open(path) {
        Ok(table) => Some(table),
        Err(error) => {
            add_error(findings, Rule::FileReadable, path, &error);
            None
        }
    }
}

/// Checks that a column is there and has exactly its type; whether it can be read.
fn check_column(table: &Table, column: &Column, rule: Rule, findings: &mut Findings) -> bool {
    let file = Some(table.path());
    match (table.check(column), table.field(column.name)) {
        (Err(error), _) => {
            add_error(findings, rule, table.path(), &error);
            false
        }
        (Ok(_), None) => false,
        (Ok(_), Some(field)) => {
            // Types that say the same to the reader, but are not what MEDS asks for.
            let strict = match (column.kind, field.data_type()) {
                (_, DataType::Null) => false,
                (Kind::TimestampUs, DataType::Timestamp(_, zone)) => zone.is_none(),
                _ => true,
            };
            if !strict {
                findings.add(
                    rule,
                    file,
                    None,
                    format!(
                        "column `{}` is {} and must be {}",
                        column.name,
                        type_name(field.data_type()),
                        column.kind.expected()
                    ),
                );
            }
            true
        }
    }
}

/// Checks all columns of a schema; whether the file can be read by it.
fn check_columns(table: &Table, columns: &[Column], rule: Rule, findings: &mut Findings) -> bool {
    let mut readable = true;
    for column in columns {
        let there = table.field(column.name).is_some();
        readable &= check_column(table, column, rule, findings) || !(there || column.required);
    }
    readable
}

/// Checks that a file has no columns but those of its schema.
fn check_closed(table: &Table, columns: &[Column], rule: Rule, findings: &mut Findings) {
    for field in table.fields() {
        if columns.iter().all(|column| column.name != field.name()) {
            findings.add(
                rule,
                Some(table.path()),
                None,
                format!("column `{}` has no place in such a file", field.name()),
            );
        }
    }
}

/// Visits a file's batches with the row each starts at.
fn each_batch(
    table: &Table,
    columns: &[(&str, Decode)],
    mut visit: impl FnMut(u64, &RecordBatch),
) -> Result<(), RecordsError> {
    let mut first_row = 0;
    for batch in table.batches(columns, None, BATCH_ROWS, 0)? {
        let batch = batch?;
        visit(first_row, &batch);
        first_row += batch.num_rows() as u64;
    }
    Ok(())
}

/// Turns an error of the reader into a finding with its row.
fn add_error(findings: &mut Findings, rule: Rule, path: &Path, error: &RecordsError) {
    let (row, message) = match error {
        RecordsError::CorruptRows { row, source, .. } => (
            Some(*row),
            format!("it breaks off or is corrupt near this row ({source})"),
        ),
        RecordsError::Undecodable { row, .. } => (
            Some(*row),
            "it is corrupt near this row: the Parquet decoder gave up on it".to_string(),
        ),
        RecordsError::NullValue { row, column, .. } => (Some(*row), format!("`{column}` is null")),
        RecordsError::InvalidValue {
            row,
            column,
            problem,
            ..
        } => (Some(*row), format!("`{column}` {problem}")),
        RecordsError::Parquet { source, .. } => (
            None,
            format!("it is truncated, corrupt or not Parquet ({source})"),
        ),
        RecordsError::Io { source, .. } => (None, source.to_string()),
        RecordsError::Compression { codec, .. } => (
            None,
            format!("it is compressed with {codec}, which is not read here"),
        ),
        RecordsError::MissingColumn {
            column, expected, ..
        } => (None, format!("there is no column `{column}` ({expected})")),
        RecordsError::ColumnType {
            column,
            expected,
            found,
            ..
        } => (
            None,
            format!("column `{column}` is {found} and must be {expected}"),
        ),
        other => (None, other.to_string()),
    };
    findings.add(rule, Some(path), row, message);
}
