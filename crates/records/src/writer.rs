//! MEDS files written: shards, labels, metadata. Each file appears whole or not at all.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{
    BooleanBuilder, Float32Builder, Int32Builder, Int64Builder, LargeStringBuilder, ListBuilder,
    StringBuilder, TimestampMicrosecondBuilder,
};
use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{DataType, Field, Schema, SchemaRef, TimeUnit};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use crate::error::RecordsError;
use crate::files::{PendingFile, parquet_files, write_whole};
use crate::item::{ItemPath, Modality, path_columns, path_problem};
use crate::labels::{Label, LabelKind, LabelValue, SurvivalLabel};
use crate::metadata::{CODES_FILE, CodeEntry, DATASET_FILE, SPLITS_FILE};
use crate::patient::{Patient, Split};
use crate::table::Table;

/// Rows gathered before they are handed to the Parquet writer.
const BATCH_ROWS: usize = 16 * 1024;

/// How a shard is laid out.
#[derive(Clone, Copy, Debug)]
pub struct ShardOptions {
    /// Rows of a row group; the writer holds one row group in memory, encoded.
    pub row_group_rows: usize,
    /// Whether the column `site` is written.
    pub sites: bool,
    /// Modalities whose path columns are written, met or not; [`write_shard`] adds those that its
    /// patients have.
    pub items: &'static [Modality],
}

impl Default for ShardOptions {
    fn default() -> Self {
        ShardOptions {
            row_group_rows: 128 * 1024,
            sites: true,
            items: &[],
        }
    }
}

/// Writes one shard, patient by patient. Nothing stands at its path until [`ShardWriter::finish`].
pub struct ShardWriter {
    table: TableWriter,
    options: ShardOptions,
    rows: usize,
    subject_id: Int64Builder,
    time: TimestampMicrosecondBuilder,
    code: StringBuilder,
    numeric_value: Float32Builder,
    text_value: LargeStringBuilder,
    site: StringBuilder,
    paths: Vec<(Modality, StringBuilder)>,
}

impl ShardWriter {
    pub fn create(path: &Path, options: ShardOptions) -> Result<ShardWriter, RecordsError> {
        ShardWriter::with_items(path, options, options.items)
    }

    /// As `create`, with path columns for `items` and no others.
    fn with_items(
        path: &Path,
        options: ShardOptions,
        items: &[Modality],
    ) -> Result<ShardWriter, RecordsError> {
        let mut fields = vec![
            Field::new("subject_id", DataType::Int64, false),
            Field::new("time", timestamp(), true),
            Field::new("code", DataType::Utf8, false),
            Field::new("numeric_value", DataType::Float32, true),
            Field::new("text_value", DataType::LargeUtf8, true),
        ];
        if options.sites {
            fields.push(Field::new("site", DataType::Utf8, true));
        }
        let mut paths = Vec::new();
        for (modality, column) in path_columns().filter(|(modality, _)| items.contains(modality)) {
            fields.push(Field::new(column, DataType::Utf8, true));
            paths.push((modality, StringBuilder::new()));
        }
        Ok(ShardWriter {
            table: TableWriter::create(path, fields, options.row_group_rows)?,
            options,
            rows: 0,
            subject_id: Int64Builder::new(),
            time: TimestampMicrosecondBuilder::new(),
            code: StringBuilder::new(),
            numeric_value: Float32Builder::new(),
            text_value: LargeStringBuilder::new(),
            site: StringBuilder::new(),
            paths,
        })
    }

    /// Appends a patient's events in their order. That order, and that a subject comes once, is
    /// the caller's to see to.
    ///
    /// # Errors
    /// When an item has no column in this shard, or the reader would refuse its path.
    pub fn write(&mut self, patient: &Patient) -> Result<(), RecordsError> {
        for event in &patient.events {
            self.check_items(event.items.as_deref().unwrap_or_default())?;
        }
        for event in &patient.events {
            self.subject_id.append_value(patient.subject_id);
            self.time.append_option(event.time_us);
            self.code.append_value(&event.code);
            self.numeric_value.append_option(event.numeric_value);
            self.text_value.append_option(event.text_value.as_deref());
            self.site.append_option(event.site.as_deref());
            let items = event.items.as_deref().unwrap_or_default();
            for (modality, paths) in &mut self.paths {
                let item = items.iter().find(|item| item.modality == *modality);
                paths.append_option(item.map(|item| &*item.path));
            }
        }
        self.rows += patient.events.len();
        if self.rows >= BATCH_ROWS {
            self.flush()?;
        }
        Ok(())
    }

    /// Completes the file and puts it in its place.
    pub fn finish(mut self) -> Result<(), RecordsError> {
        self.flush()?;
        self.table.finish()
    }

    /// Whether a row can hold these items and the reader would give them back.
    fn check_items(&self, items: &[ItemPath]) -> Result<(), RecordsError> {
        let refuse = |reason: String| {
            Err(RecordsError::Write {
                path: self.table.path.clone(),
                reason,
            })
        };
        for (position, item) in items.iter().enumerate() {
            let name = item.modality.name();
            if self.paths.iter().all(|(other, _)| *other != item.modality) {
                return refuse(match item.modality.column() {
                    None => format!("a `{name}` item is made of rows and has no path"),
                    Some(column) => format!(
                        "a row has a path for `{column}`, which this shard was created without; \
                         name the modality in `ShardOptions::items`"
                    ),
                });
            }
            if items[..position]
                .iter()
                .any(|other| other.modality == item.modality)
            {
                return refuse(format!(
                    "a row has two `{name}` items and room for one; give each a row of its own"
                ));
            }
            if item.path.is_empty() {
                return refuse(format!("the path of a `{name}` item is empty"));
            }
            if let Some(problem) = path_problem(&item.path) {
                return refuse(format!("the path of a `{name}` item {problem}"));
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), RecordsError> {
        self.rows = 0;
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(self.subject_id.finish()),
            Arc::new(self.time.finish()),
            Arc::new(self.code.finish()),
            Arc::new(self.numeric_value.finish()),
            Arc::new(self.text_value.finish()),
        ];
        let sites = self.site.finish();
        if self.options.sites {
            columns.push(Arc::new(sites));
        }
        for (_, paths) in &mut self.paths {
            columns.push(Arc::new(paths.finish()));
        }
        self.table.write(columns)
    }
}

/// Writes all of a shard, with the path columns of the modalities that any event has items of.
pub fn write_shard<'a>(
    path: &Path,
    patients: impl IntoIterator<Item = &'a Patient>,
    options: ShardOptions,
) -> Result<(), RecordsError> {
    let patients: Vec<&Patient> = patients.into_iter().collect();
    let mut items = options.items.to_vec();
    let found = patients
        .iter()
        .flat_map(|patient| &patient.events)
        .filter_map(|event| event.items.as_deref())
        .flatten();
    for item in found {
        if !items.contains(&item.modality) {
            items.push(item.modality);
        }
    }
    let mut writer = ShardWriter::with_items(path, options, &items)?;
    for patient in patients {
        writer.write(patient)?;
    }
    writer.finish()
}

/// Writes the labels of one task into one file. All values must be of one kind.
pub fn write_labels(path: &Path, labels: &[Label]) -> Result<(), RecordsError> {
    let kind = labels
        .first()
        .map_or(LabelKind::Boolean, |label| label.value.kind());
    let data_type = match kind {
        LabelKind::Boolean => DataType::Boolean,
        LabelKind::Integer => DataType::Int64,
        LabelKind::Float => DataType::Float32,
        LabelKind::Categorical => DataType::Utf8,
    };
    let mut booleans = BooleanBuilder::new();
    let mut integers = Int64Builder::new();
    let mut floats = Float32Builder::new();
    let mut strings = StringBuilder::new();
    for (row, label) in labels.iter().enumerate() {
        if label.value.kind() != kind {
            return Err(RecordsError::Write {
                path: path.to_path_buf(),
                reason: format!("label {row} is of another kind than label 0"),
            });
        }
        match &label.value {
            LabelValue::Boolean(value) => booleans.append_value(*value),
            LabelValue::Integer(value) => integers.append_value(*value),
            LabelValue::Float(value) => floats.append_value(*value),
            LabelValue::Categorical(value) => strings.append_value(value),
        }
    }
    let values: ArrayRef = match kind {
        LabelKind::Boolean => Arc::new(booleans.finish()),
        LabelKind::Integer => Arc::new(integers.finish()),
        LabelKind::Float => Arc::new(floats.finish()),
        LabelKind::Categorical => Arc::new(strings.finish()),
    };
    let fields = vec![
        Field::new("subject_id", DataType::Int64, false),
        Field::new("prediction_time", timestamp(), false),
        Field::new(kind.column(), data_type, false),
    ];
    let (subjects, times) = key_columns(
        labels
            .iter()
            .map(|label| (label.subject_id, label.prediction_time_us)),
    );
    write_table(path, fields, vec![subjects, times, values])
}

/// Writes the survival sidecar of one task into one file.
pub fn write_survival(path: &Path, labels: &[SurvivalLabel]) -> Result<(), RecordsError> {
    let mut durations = Float32Builder::new();
    let mut events = Int32Builder::new();
    for label in labels {
        durations.append_value(label.duration_days);
        events.append_value(label.event);
    }
    let fields = vec![
        Field::new("subject_id", DataType::Int64, false),
        Field::new("prediction_time", timestamp(), false),
        Field::new("duration_days", DataType::Float32, false),
        Field::new("event", DataType::Int32, false),
    ];
    let (subjects, times) = key_columns(
        labels
            .iter()
            .map(|label| (label.subject_id, label.prediction_time_us)),
    );
    write_table(
        path,
        fields,
        vec![
            subjects,
            times,
            Arc::new(durations.finish()),
            Arc::new(events.finish()),
        ],
    )
}

/// Writes `metadata/subject_splits.parquet` of a cohort.
pub fn write_splits(cohort: &Path, splits: &[(i64, Split)]) -> Result<(), RecordsError> {
    let mut subjects = Int64Builder::new();
    let mut names = StringBuilder::new();
    for (subject_id, split) in splits {
        subjects.append_value(*subject_id);
        names.append_value(split.name());
    }
    let fields = vec![
        Field::new("subject_id", DataType::Int64, false),
        Field::new("split", DataType::Utf8, false),
    ];
    write_table(
        &cohort.join(SPLITS_FILE),
        fields,
        vec![Arc::new(subjects.finish()), Arc::new(names.finish())],
    )
}

/// Writes `metadata/codes.parquet` of a cohort.
pub fn write_codes<'a>(
    cohort: &Path,
    codes: impl IntoIterator<Item = (&'a str, &'a CodeEntry)>,
) -> Result<(), RecordsError> {
    let mut names = StringBuilder::new();
    let mut descriptions = StringBuilder::new();
    let mut parents = ListBuilder::new(StringBuilder::new());
    for (code, entry) in codes {
        names.append_value(code);
        descriptions.append_option(entry.description.as_deref());
        for parent in &entry.parent_codes {
            parents.values().append_value(parent);
        }
        parents.append(!entry.parent_codes.is_empty());
    }
    let parents = parents.finish();
    use arrow_array::Array;
    let fields = vec![
        Field::new("code", DataType::Utf8, false),
        Field::new("description", DataType::Utf8, true),
        Field::new("parent_codes", parents.data_type().clone(), true),
    ];
    write_table(
        &cohort.join(CODES_FILE),
        fields,
        vec![
            Arc::new(names.finish()),
            Arc::new(descriptions.finish()),
            Arc::new(parents),
        ],
    )
}

/// Writes `metadata/dataset.json` of a cohort. Path columns of the shards that are written by then
/// are added to its `additional_value_modality_columns`.
pub fn write_dataset(
    cohort: &Path,
    dataset: &serde_json::Map<String, serde_json::Value>,
) -> Result<(), RecordsError> {
    const KEY: &str = "additional_value_modality_columns";
    let path = cohort.join(DATASET_FILE);
    let mut dataset = dataset.clone();
    let columns = written_path_columns(cohort)?;
    if !columns.is_empty() {
        let named = dataset
            .entry(KEY)
            .or_insert_with(|| serde_json::Value::Array(Vec::new()));
        let Some(named) = named.as_array_mut() else {
            return Err(RecordsError::JsonShape {
                path,
                key: KEY.to_string(),
                expected: "a list of strings",
            });
        };
        for column in columns {
            if !named.iter().any(|name| name == column) {
                named.push(column.into());
            }
        }
    }
    let mut bytes = serde_json::to_vec_pretty(&dataset).map_err(|source| RecordsError::Json {
        path: path.clone(),
        source,
    })?;
    bytes.push(b'\n');
    write_whole(&path, &bytes)
}

/// The path columns that any shard of a cohort has.
fn written_path_columns(cohort: &Path) -> Result<Vec<&'static str>, RecordsError> {
    let data = cohort.join("data");
    if !data.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for file in parquet_files(&data)? {
        let table = Table::open(&file)?;
        for (_, column) in path_columns() {
            if table.field(column).is_some() && !found.contains(&column) {
                found.push(column);
            }
        }
    }
    Ok(found)
}

fn timestamp() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, None)
}

fn key_columns(keys: impl Iterator<Item = (i64, i64)>) -> (ArrayRef, ArrayRef) {
    let mut subjects = Int64Builder::new();
    let mut times = TimestampMicrosecondBuilder::new();
    for (subject_id, time_us) in keys {
        subjects.append_value(subject_id);
        times.append_value(time_us);
    }
    (Arc::new(subjects.finish()), Arc::new(times.finish()))
}

fn write_table(
    path: &Path,
    fields: Vec<Field>,
    columns: Vec<ArrayRef>,
) -> Result<(), RecordsError> {
    let mut table = TableWriter::create(path, fields, ShardOptions::default().row_group_rows)?;
    table.write(columns)?;
    table.finish()
}

pub(crate) struct TableWriter {
    path: PathBuf,
    schema: SchemaRef,
    writer: ArrowWriter<File>,
    pending: PendingFile,
}

impl TableWriter {
    pub(crate) fn create(
        path: &Path,
        fields: Vec<Field>,
        row_group_rows: usize,
    ) -> Result<TableWriter, RecordsError> {
        let pending = PendingFile::create(path)?;
        let schema = Arc::new(Schema::new(fields));
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_max_row_group_row_count(Some(row_group_rows.max(1)))
            .build();
        let writer = ArrowWriter::try_new(pending.handle()?, schema.clone(), Some(properties))
            .map_err(|error| failed(path, &error))?;
        Ok(TableWriter {
            path: path.to_path_buf(),
            schema,
            writer,
            pending,
        })
    }

    pub(crate) fn write(&mut self, columns: Vec<ArrayRef>) -> Result<(), RecordsError> {
        let batch = RecordBatch::try_new(self.schema.clone(), columns)
            .map_err(|error| failed(&self.path, &error))?;
        self.writer
            .write(&batch)
            .map_err(|error| failed(&self.path, &error))
    }

    pub(crate) fn finish(self) -> Result<(), RecordsError> {
        self.writer
            .close()
            .map_err(|error| failed(&self.path, &error))?;
        self.pending.commit()
    }
}

fn failed(path: &Path, error: &dyn std::error::Error) -> RecordsError {
    RecordsError::Write {
        path: path.to_path_buf(),
        reason: error.to_string(),
    }
}
