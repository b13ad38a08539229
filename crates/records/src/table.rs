//! A Parquet file with its columns checked by name and type, read in batches.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::{DataType, Field, Fields, Schema, TimeUnit};
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader,
    ParquetRecordBatchReaderBuilder, RowSelection,
};
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};

use crate::error::RecordsError;

/// Columns of a row that are decoded together: each holds a decompressor of its own meanwhile.
const COLUMNS_AT_ONCE: usize = 512;

/// The column types a cohort is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Int64,
    Int32,
    Float32,
    Boolean,
    TimestampUs,
    String,
    StringList,
}

impl Kind {
    pub(crate) fn expected(self) -> &'static str {
        match self {
            Kind::Int64 => "int64",
            Kind::Int32 => "int32",
            Kind::Float32 => "float32",
            Kind::Boolean => "boolean",
            Kind::TimestampUs => "timestamp[us]",
            Kind::String => "string",
            Kind::StringList => "list of string",
        }
    }

    /// Whether a column of this Parquet type holds the kind. A time zone of UTC does not change
    /// what a timestamp's number means, so it is let through here (validation reports it); an
    /// all-null column without a type passes where the column may be null.
    fn holds(self, found: &DataType, nullable: bool) -> bool {
        match (self, found) {
            (_, DataType::Null) => nullable,
            (Kind::Int64, DataType::Int64)
            | (Kind::Int32, DataType::Int32)
            | (Kind::Float32, DataType::Float32)
            | (Kind::Boolean, DataType::Boolean)
            | (Kind::String, DataType::Utf8) => true,
            (Kind::TimestampUs, DataType::Timestamp(TimeUnit::Microsecond, zone)) => {
                zone.as_deref().is_none_or(|zone| zone == "UTC")
            }
            (Kind::StringList, DataType::List(item)) => {
                matches!(item.data_type(), DataType::Utf8 | DataType::Null)
            }
            _ => false,
        }
    }
}

/// A column of the MEDS schema.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    pub name: &'static str,
    pub kind: Kind,
    pub required: bool,
    pub nullable: bool,
}

pub(crate) const fn required(name: &'static str, kind: Kind) -> Column {
    Column {
        name,
        kind,
        required: true,
        nullable: false,
    }
}

pub(crate) const fn optional(name: &'static str, kind: Kind) -> Column {
    Column {
        name,
        kind,
        required: false,
        nullable: true,
    }
}

/// The columns of a data shard. `time` must be there and may be null.
pub(crate) const DATA_COLUMNS: [Column; 5] = [
    required("subject_id", Kind::Int64),
    Column {
        nullable: true,
        ..required("time", Kind::TimestampUs)
    },
    required("code", Kind::String),
    optional("numeric_value", Kind::Float32),
    optional("text_value", Kind::String),
];

/// How a string column is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decode {
    /// As the file has it.
    Plain,
    /// Strings of few distinct values: 32-bit keys into a dictionary, whatever the file's own keys.
    Dictionary,
    /// Long strings: 64-bit offsets, so that a batch may hold more than 2 GiB of text.
    Large,
}

/// An open Parquet file whose footer has been read.
///
/// The Arrow schema that writers embed is ignored: in it a string column may be a string, a large
/// string, a view or a dictionary with keys too narrow to be merged over row groups, while in
/// Parquet itself they are all the same.
pub(crate) struct Table {
    path: PathBuf,
    source: Source,
    metadata: ArrowReaderMetadata,
}

impl Table {
    pub(crate) fn open(path: &Path) -> Result<Table, RecordsError> {
        let file = File::open(path).map_err(|source| RecordsError::io(path, source))?;
        Table::of(path, Source::File(Arc::new(file)))
    }

    /// As `open`, with the whole file in memory: reading a few bytes each of very many columns
    /// from the file itself takes several system calls a column.
    pub(crate) fn open_in_memory(path: &Path) -> Result<Table, RecordsError> {
        let bytes = std::fs::read(path).map_err(|source| RecordsError::io(path, source))?;
        Table::of(path, Source::Memory(bytes.into()))
    }

    fn of(path: &Path, source: Source) -> Result<Table, RecordsError> {
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let metadata = guard(|| ArrowReaderMetadata::load(&source, options))
            .ok_or_else(|| RecordsError::Undecodable {
                path: path.to_path_buf(),
                row: 0,
            })?
            .map_err(|source| RecordsError::Parquet {
                path: path.to_path_buf(),
                source,
            })?;
        if let Some(group) = metadata
            .metadata()
            .row_groups()
            .iter()
            .find(|group| group.num_rows() < 0)
        {
            return Err(RecordsError::Parquet {
                path: path.to_path_buf(),
                source: ParquetError::General(format!("a row group of {} rows", group.num_rows())),
            });
        }
        Ok(Table {
            path: path.to_path_buf(),
            source,
            metadata,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn rows(&self) -> u64 {
        self.row_group_rows().iter().sum()
    }

    /// Rows of each row group, in file order.
    pub(crate) fn row_group_rows(&self) -> Vec<u64> {
        self.metadata
            .metadata()
            .row_groups()
            .iter()
            .map(|group| group.num_rows() as u64)
            .collect()
    }

    pub(crate) fn fields(&self) -> &Fields {
        &self.metadata.schema().fields
    }

    pub(crate) fn field(&self, name: &str) -> Option<&Field> {
        self.fields()
            .iter()
            .find(|field| field.name() == name)
            .map(Arc::as_ref)
    }

    /// Checks one column; `Ok(false)` when an optional one is missing.
    pub(crate) fn check(&self, column: &Column) -> Result<bool, RecordsError> {
        match self.field(column.name) {
            None if column.required => Err(RecordsError::MissingColumn {
                path: self.path.clone(),
                column: column.name.to_string(),
                expected: column.kind.expected(),
                found: self.column_names(),
            }),
            None => Ok(false),
            Some(field) if column.kind.holds(field.data_type(), column.nullable) => Ok(true),
            Some(field) => Err(RecordsError::ColumnType {
                path: self.path.clone(),
                column: column.name.to_string(),
                expected: column.kind.expected(),
                found: type_name(field.data_type()),
            }),
        }
    }

    pub(crate) fn column_names(&self) -> String {
        let names: Vec<String> = self
            .fields()
            .iter()
            .map(|field| format!("`{}`", field.name()))
            .collect();
        if names.is_empty() {
            "none".to_string()
        } else {
            names.join(", ")
        }
    }

    /// Checks that the columns named are compressed in a way that is built in.
    fn check_compression(&self, is_read: impl Fn(&str) -> bool) -> Result<(), RecordsError> {
        let unread = self
            .metadata
            .metadata()
            .row_groups()
            .iter()
            .flat_map(|group| group.columns())
            .filter(|chunk| {
                let root = chunk.column_path().parts().first();
                root.is_some_and(|root| is_read(root))
            })
            .map(|chunk| chunk.compression())
            .find(|codec| matches!(codec, Compression::BROTLI(_) | Compression::LZO));
        match unread {
            None => Ok(()),
            Some(codec) => Err(RecordsError::Compression {
                path: self.path.clone(),
                codec: if codec == Compression::LZO {
                    "LZO".to_string()
                } else {
                    "Brotli".to_string()
                },
            }),
        }
    }

    /// Reads the columns named (those the file has) in batches of at most `batch_rows` rows.
    /// `row_groups` and `selection` (relative to those groups) restrict the rows; `first_row` is
    /// the row of the file that the first batch starts at, for messages.
    pub(crate) fn batches(
        &self,
        columns: &[(&str, Decode)],
        rows: Option<(Vec<usize>, RowSelection)>,
        batch_rows: usize,
        first_row: u64,
    ) -> Result<Batches, RecordsError> {
        let decode = |name: &str| columns.iter().find(|(column, _)| *column == name);
        self.check_compression(|name| decode(name).is_some())?;
        let mut roots = Vec::new();
        let fields: Vec<Field> = self
            .fields()
            .iter()
            .enumerate()
            .map(|(position, field)| {
                let wanted = decode(field.name());
                if wanted.is_some() {
                    roots.push(position);
                }
                let data_type = match (wanted, field.data_type()) {
                    (Some((_, Decode::Dictionary)), DataType::Utf8) => {
                        DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8))
                    }
                    (Some((_, Decode::Large)), DataType::Utf8) => DataType::LargeUtf8,
                    (_, found) => found.clone(),
                };
                field.as_ref().clone().with_data_type(data_type)
            })
            .collect();
        let options = ArrowReaderOptions::new()
            .with_skip_arrow_metadata(true)
            .with_schema(Arc::new(Schema::new(fields)));
        let metadata = || ArrowReaderMetadata::try_new(self.metadata.metadata().clone(), options);
        self.start(metadata, roots, rows, batch_rows, first_row)
    }

    /// Reads the columns at these positions (ascending) of a table of one row.
    pub(crate) fn row(&self, positions: &[usize]) -> Result<Vec<ArrayRef>, RecordsError> {
        let fields = self.fields();
        let names: HashSet<&str> = positions
            .iter()
            .map(|&position| fields[position].name().as_str())
            .collect();
        self.check_compression(|name| names.contains(name))?;
        let mut columns = Vec::with_capacity(positions.len());
        for some in positions.chunks(COLUMNS_AT_ONCE) {
            let metadata = || Ok(self.metadata.clone());
            for batch in self.start(metadata, some.to_vec(), None, 1, 0)? {
                columns.extend_from_slice(batch?.columns());
            }
        }
        // What the footer says of the rows need not be so in a damaged file.
        if columns.len() == positions.len() && columns.iter().all(|column| column.len() == 1) {
            Ok(columns)
        } else {
            Err(RecordsError::Undecodable {
                path: self.path.clone(),
                row: 0,
            })
        }
    }

    /// Starts the decoder on the columns at positions `roots`.
    fn start(
        &self,
        metadata: impl FnOnce() -> Result<ArrowReaderMetadata, ParquetError>,
        roots: Vec<usize>,
        rows: Option<(Vec<usize>, RowSelection)>,
        batch_rows: usize,
        first_row: u64,
    ) -> Result<Batches, RecordsError> {
        let reader = guard(|| {
            let metadata = metadata()?;
            let mask = ProjectionMask::roots(metadata.parquet_schema(), roots);
            let source = self.source.clone();
            let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(source, metadata)
                .with_projection(mask)
                .with_batch_size(batch_rows.max(1));
            if let Some((groups, selection)) = rows {
                builder = builder
                    .with_row_groups(groups)
                    .with_row_selection(selection);
            }
            builder.build()
        })
        .ok_or_else(|| RecordsError::Undecodable {
            path: self.path.clone(),
            row: first_row,
        })?
        .map_err(|source| RecordsError::Parquet {
            path: self.path.clone(),
            source,
        })?;
        Ok(Batches {
            path: self.path.clone(),
            reader: Some(reader),
            next_row: first_row,
        })
    }
}

/// Where the bytes of a table are.
#[derive(Clone)]
enum Source {
    File(Arc<File>),
    Memory(Bytes),
}

impl Length for Source {
    fn len(&self) -> u64 {
        match self {
            Source::File(file) => Length::len(&**file),
            Source::Memory(bytes) => Length::len(bytes),
        }
    }
}

impl ChunkReader for Source {
    type T = Box<dyn Read + Send>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(match self {
            Source::File(file) => Box::new(file.get_read(start)?),
            Source::Memory(bytes) => Box::new(bytes.get_read(start)?),
        })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        match self {
            Source::File(file) => file.get_bytes(start, length),
            Source::Memory(bytes) => bytes.get_bytes(start, length),
        }
    }
}

/// Record batches of a file, errors named. Ends after the first error.
pub(crate) struct Batches {
    path: PathBuf,
    reader: Option<ParquetRecordBatchReader>,
    next_row: u64,
}

impl Iterator for Batches {
    type Item = Result<RecordBatch, RecordsError>;

    fn next(&mut self) -> Option<Self::Item> {
        let reader = self.reader.as_mut()?;
        let row = self.next_row;
        match guard(|| reader.next()) {
            Some(Some(Ok(batch))) => {
                self.next_row += batch.num_rows() as u64;
                Some(Ok(batch))
            }
            Some(Some(Err(source))) => {
                self.reader = None;
                Some(Err(RecordsError::CorruptRows {
                    path: self.path.clone(),
                    row,
                    source,
                }))
            }
            Some(None) => {
                self.reader = None;
                None
            }
            None => {
                self.reader = None;
                Some(Err(RecordsError::Undecodable {
                    path: self.path.clone(),
                    row,
                }))
            }
        }
    }
}

/// Runs a step of the Parquet decoder. On damaged bytes it mostly returns an error, but some
/// damage trips its assertions; `None` then, so that a bad file never takes the process down.
fn guard<T>(step: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(step)).ok()
}

/// A type as MEDS and pyarrow spell it.
pub(crate) fn type_name(data_type: &DataType) -> String {
    match data_type {
        DataType::Int8 => "int8".into(),
        DataType::Int16 => "int16".into(),
        DataType::Int32 => "int32".into(),
        DataType::Int64 => "int64".into(),
        DataType::UInt8 => "uint8".into(),
        DataType::UInt16 => "uint16".into(),
        DataType::UInt32 => "uint32".into(),
        DataType::UInt64 => "uint64".into(),
        DataType::Float16 => "float16".into(),
        DataType::Float32 => "float32".into(),
        DataType::Float64 => "float64".into(),
        DataType::Boolean => "boolean".into(),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "string".into(),
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => "binary".into(),
        DataType::Null => "null".into(),
        DataType::Date32 => "date".into(),
        DataType::Timestamp(unit, zone) => {
            let unit = match unit {
                TimeUnit::Second => "s",
                TimeUnit::Millisecond => "ms",
                TimeUnit::Microsecond => "us",
                TimeUnit::Nanosecond => "ns",
            };
            match zone {
                Some(zone) => format!("timestamp[{unit}, {zone}]"),
                None => format!("timestamp[{unit}]"),
            }
        }
        DataType::List(item) | DataType::LargeList(item) => {
            format!("list of {}", type_name(item.data_type()))
        }
        DataType::Struct(_) => "struct".into(),
        other => other.to_string(),
    }
}
