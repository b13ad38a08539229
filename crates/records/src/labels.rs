use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use serde::{Deserialize, Serialize};

use crate::error::RecordsError;
use crate::files::parquet_files;
use crate::metadata::{null_value, value_at};
use crate::table::{Column, Decode, Kind, Table, optional, required};
use crate::values::{SharedStrings, float32, int32, int64, timestamps};

const LABEL_BATCH_ROWS: usize = 8192;

pub(crate) const LABEL_COLUMNS: [Column; 6] = [
    required("subject_id", Kind::Int64),
    required("prediction_time", Kind::TimestampUs),
    optional("boolean_value", Kind::Boolean),
    optional("integer_value", Kind::Int64),
    optional("float_value", Kind::Float32),
    optional("categorical_value", Kind::String),
];

pub(crate) const SURVIVAL_COLUMNS: [Column; 4] = [
    required("subject_id", Kind::Int64),
    required("prediction_time", Kind::TimestampUs),
    required("duration_days", Kind::Float32),
    required("event", Kind::Int32),
];

/// Which of MEDS's four value columns a task uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelKind {
    Boolean,
    Integer,
    Float,
    Categorical,
}

impl LabelKind {
    /// The column of a label file that holds such values.
    pub fn column(self) -> &'static str {
        match self {
            LabelKind::Boolean => "boolean_value",
            LabelKind::Integer => "integer_value",
            LabelKind::Float => "float_value",
            LabelKind::Categorical => "categorical_value",
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum LabelValue {
    Boolean(bool),
    Integer(i64),
    Float(f32),
    Categorical(Arc<str>),
}

impl LabelValue {
    pub fn kind(&self) -> LabelKind {
        match self {
            LabelValue::Boolean(_) => LabelKind::Boolean,
            LabelValue::Integer(_) => LabelKind::Integer,
            LabelValue::Float(_) => LabelKind::Float,
            LabelValue::Categorical(_) => LabelKind::Categorical,
        }
    }
}

/// What is to be predicted for a subject from everything up to and including a time.
#[derive(Clone, Debug, PartialEq)]
pub struct Label {
    pub subject_id: i64,
    /// Microseconds since 1970-01-01, inclusive.
    pub prediction_time_us: i64,
    pub value: LabelValue,
}

/// The labels of one task, `<cohort>/labels/<task>/**/*.parquet`.
#[derive(Clone, Debug, PartialEq)]
pub struct Labels {
    kind: LabelKind,
    rows: Vec<Label>,
}

impl Labels {
    /// Reads every `.parquet` file under a task's folder (or one file). A file may have several of
    /// the value columns as long as one of them, the same in all files, has values.
    ///
    /// # Errors
    /// Names the file and row of a null, a mistyped column, or a row without a value.
    pub fn read(path: &Path) -> Result<Labels, RecordsError> {
        let mut kind: Option<LabelKind> = None;
        let mut rows = Vec::new();
        for file in label_files(path)? {
            read_label_file(&file, &mut kind, &mut rows)?;
        }
        let Some(kind) = kind else {
            return Err(RecordsError::Labels {
                path: path.to_path_buf(),
                reason: "its files have no rows".to_string(),
            });
        };
        rows.sort_by_key(|label| (label.subject_id, label.prediction_time_us));
        Ok(Labels { kind, rows })
    }

    pub fn kind(&self) -> LabelKind {
        self.kind
    }

    /// Sorted by subject, then prediction time.
    pub fn rows(&self) -> &[Label] {
        &self.rows
    }

    /// The labels of one subject, in order of time.
    pub fn of_subject(&self, subject_id: i64) -> &[Label] {
        of_subject(&self.rows, subject_id, |label| label.subject_id)
    }
}

/// Time to an event for a subject, from a prediction time on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SurvivalLabel {
    pub subject_id: i64,
    /// Microseconds since 1970-01-01, inclusive.
    pub prediction_time_us: i64,
    /// Days from the prediction time to the event or the end of observation.
    pub duration_days: f32,
    /// 0: censored at the end of observation; 1 and up: the cause.
    pub event: i32,
}

/// The survival sidecar of one task, `<cohort>/survival/<task>/**/*.parquet`: MEDS's label schema
/// is closed and has no place for a duration.
#[derive(Clone, Debug, PartialEq)]
pub struct SurvivalLabels {
    rows: Vec<SurvivalLabel>,
}

impl SurvivalLabels {
    /// Reads every `.parquet` file under a task's folder (or one file).
    ///
    /// # Errors
    /// Names the file and row of a null, a mistyped column, a negative or non-finite duration, or
    /// a negative event.
    pub fn read(path: &Path) -> Result<SurvivalLabels, RecordsError> {
        let mut rows = Vec::new();
        for file in label_files(path)? {
            read_survival_file(&file, &mut rows)?;
        }
        if rows.is_empty() {
            return Err(RecordsError::Labels {
                path: path.to_path_buf(),
                reason: "its files have no rows".to_string(),
            });
        }
        rows.sort_by_key(|label| (label.subject_id, label.prediction_time_us));
        Ok(SurvivalLabels { rows })
    }

    /// Sorted by subject, then prediction time.
    pub fn rows(&self) -> &[SurvivalLabel] {
        &self.rows
    }

    /// The labels of one subject, in order of time.
    pub fn of_subject(&self, subject_id: i64) -> &[SurvivalLabel] {
        of_subject(&self.rows, subject_id, |label| label.subject_id)
    }
}

fn of_subject<T>(rows: &[T], subject_id: i64, id: impl Fn(&T) -> i64) -> &[T] {
    let start = rows.partition_point(|row| id(row) < subject_id);
    let end = rows.partition_point(|row| id(row) <= subject_id);
    &rows[start..end]
}

pub(crate) fn label_files(path: &Path) -> Result<Vec<PathBuf>, RecordsError> {
    if path.is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    if !path.is_dir() {
        return Err(RecordsError::Labels {
            path: path.to_path_buf(),
            reason: "there is no such folder".to_string(),
        });
    }
    let files = parquet_files(path)?;
    if files.is_empty() {
        return Err(RecordsError::Labels {
            path: path.to_path_buf(),
            reason: "there is no .parquet file in it".to_string(),
        });
    }
    Ok(files)
}

/// Subject and prediction time of each row of a batch.
fn keys(batch: &RecordBatch, path: &Path, first_row: u64) -> Result<Vec<(i64, i64)>, RecordsError> {
    let subjects = int64(batch, "subject_id");
    let times = timestamps(batch, "prediction_time");
    (0..batch.num_rows())
        .map(|position| {
            let row = first_row + position as u64;
            let subject_id = subjects
                .as_ref()
                .and_then(|ids| value_at(ids, position))
                .ok_or_else(|| null_value(path, "subject_id", row))?;
            let time = times
                .as_ref()
                .and_then(|times| value_at(times, position))
                .ok_or_else(|| null_value(path, "prediction_time", row))?;
            Ok((subject_id, time))
        })
        .collect()
}

pub(crate) fn read_label_file(
    path: &Path,
    kind: &mut Option<LabelKind>,
    labels: &mut Vec<Label>,
) -> Result<(), RecordsError> {
    let table = Table::open(path)?;
    let mut has_values = false;
    for column in &LABEL_COLUMNS {
        has_values |= table.check(column)? && !column.required;
    }
    if !has_values {
        return Err(RecordsError::MissingColumn {
            path: path.to_path_buf(),
            column: "boolean_value".to_string(),
            expected: "or integer_value, float_value, categorical_value",
            found: table.column_names(),
        });
    }
    let columns = LABEL_COLUMNS.map(|column| {
        let decode = if column.kind == Kind::String {
            Decode::Dictionary
        } else {
            Decode::Plain
        };
        (column.name, decode)
    });
    let mut categories = SharedStrings::default();
    let mut first_row = 0;
    for batch in table.batches(&columns, None, LABEL_BATCH_ROWS, 0)? {
        let batch = batch?;
        let keys = keys(&batch, path, first_row)?;
        let booleans = batch
            .column_by_name("boolean_value")
            .and_then(|column| column.as_boolean_opt().cloned());
        let integers = int64(&batch, "integer_value");
        let floats = float32(&batch, "float_value");
        categories.load(&batch, "categorical_value");
        for (position, (subject_id, prediction_time_us)) in keys.into_iter().enumerate() {
            let row = first_row + position as u64;
            let values = [
                booleans
                    .as_ref()
                    .filter(|values| values.is_valid(position))
                    .map(|values| LabelValue::Boolean(values.value(position))),
                integers
                    .as_ref()
                    .and_then(|values| value_at(values, position))
                    .map(LabelValue::Integer),
                floats
                    .as_ref()
                    .and_then(|values| value_at(values, position))
                    .map(LabelValue::Float),
                categories.get(position).map(LabelValue::Categorical),
            ];
            let mut values = values.into_iter().flatten();
            let value = values.next().ok_or_else(|| {
                null_value(path, kind.map_or("boolean_value", LabelKind::column), row)
            })?;
            if *kind.get_or_insert(value.kind()) != value.kind() || values.next().is_some() {
                return Err(RecordsError::InvalidValue {
                    path: path.to_path_buf(),
                    column: value.kind().column().to_string(),
                    row,
                    problem: "is not the only kind of value in this task; a task has values in one \
                              of its columns alone",
                });
            }
            if matches!(value, LabelValue::Float(number) if !number.is_finite()) {
                return Err(RecordsError::InvalidValue {
                    path: path.to_path_buf(),
                    column: "float_value".to_string(),
                    row,
                    problem: "is not a finite number",
                });
            }
            labels.push(Label {
                subject_id,
                prediction_time_us,
                value,
            });
        }
        first_row += batch.num_rows() as u64;
    }
    Ok(())
}

pub(crate) fn read_survival_file(
    path: &Path,
    labels: &mut Vec<SurvivalLabel>,
) -> Result<(), RecordsError> {
    let table = Table::open(path)?;
    for column in &SURVIVAL_COLUMNS {
        table.check(column)?;
    }
    let columns = SURVIVAL_COLUMNS.map(|column| (column.name, Decode::Plain));
    let mut first_row = 0;
    for batch in table.batches(&columns, None, LABEL_BATCH_ROWS, 0)? {
        let batch = batch?;
        let keys = keys(&batch, path, first_row)?;
        let durations = float32(&batch, "duration_days");
        let events = int32(&batch, "event");
        for (position, (subject_id, prediction_time_us)) in keys.into_iter().enumerate() {
            let row = first_row + position as u64;
            let invalid = |column: &str, problem| RecordsError::InvalidValue {
                path: path.to_path_buf(),
                column: column.to_string(),
                row,
                problem,
            };
            let duration_days = durations
                .as_ref()
                .and_then(|values| value_at(values, position))
                .ok_or_else(|| null_value(path, "duration_days", row))?;
            if !duration_days.is_finite() || duration_days < 0.0 {
                return Err(invalid(
                    "duration_days",
                    "must be a finite number, 0 or more",
                ));
            }
            let event = events
                .as_ref()
                .and_then(|values| value_at(values, position))
                .ok_or_else(|| null_value(path, "event", row))?;
            if event < 0 {
                return Err(invalid(
                    "event",
                    "must be 0 (censored) or the number of a cause",
                ));
            }
            labels.push(SurvivalLabel {
                subject_id,
                prediction_time_us,
                duration_days,
                event,
            });
        }
        first_row += batch.num_rows() as u64;
    }
    Ok(())
}
