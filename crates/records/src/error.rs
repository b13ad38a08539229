use std::path::PathBuf;

/// Everything that can be wrong with a cohort, its labels or its metadata.
///
/// A message names the file, the column and the row (counted from 0 in that file), never a
/// patient's identifier or value.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    #[error("{path} cannot be read or written", path = path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },

    #[error("{path} is not a MEDS cohort: {reason}", path = path.display())]
    NotACohort { path: PathBuf, reason: String },

    #[error(
        "{path} cannot be read as Parquet: the file is truncated, corrupt or of another format; \
         write it again",
        path = path.display()
    )]
    Parquet {
        path: PathBuf,
        source: parquet::errors::ParquetError,
    },

    #[error(
        "{path} breaks off or is corrupt near row {row}: write it again",
        path = path.display()
    )]
    CorruptRows {
        path: PathBuf,
        row: u64,
        source: arrow_schema::ArrowError,
    },

    #[error(
        "{path} is corrupt near row {row}: the Parquet decoder gave up on it; write it again",
        path = path.display()
    )]
    Undecodable { path: PathBuf, row: u64 },

    #[error(
        "{path} is compressed with {codec}, which is not read here: write it again with zstd or snappy",
        path = path.display()
    )]
    Compression { path: PathBuf, codec: String },

    #[error(
        "{path} has no column `{column}` ({expected}); its columns are {found}",
        path = path.display()
    )]
    MissingColumn {
        path: PathBuf,
        column: String,
        expected: &'static str,
        found: String,
    },

    #[error(
        "{path}: column `{column}` is {found} and must be {expected}; cast it and write the file again",
        path = path.display()
    )]
    ColumnType {
        path: PathBuf,
        column: String,
        expected: &'static str,
        found: String,
    },

    #[error("{path}, row {row}: `{column}` is null and may not be", path = path.display())]
    NullValue {
        path: PathBuf,
        column: String,
        row: u64,
    },

    #[error("{path}: {problem}; {hint}", path = path.display())]
    Item {
        path: PathBuf,
        problem: String,
        hint: &'static str,
    },

    #[error("{path}, row {row}: `{column}` {problem}", path = path.display())]
    InvalidValue {
        path: PathBuf,
        column: String,
        row: u64,
        problem: &'static str,
    },

    #[error(
        "{path}, row {row}: earlier than the row before it; sort each subject's rows by time",
        path = path.display()
    )]
    Unsorted { path: PathBuf, row: u64 },

    #[error(
        "{path}, row {row}: a row without time stands after a row with one; put each subject's \
         static rows first",
        path = path.display()
    )]
    StaticAfterTimed { path: PathBuf, row: u64 },

    #[error(
        "{path}, row {row}: this subject already has rows elsewhere ({first_path}, row {first_row}); \
         keep each subject's rows together in one file",
        path = path.display(),
        first_path = first_path.display()
    )]
    SubjectScattered {
        path: PathBuf,
        row: u64,
        first_path: PathBuf,
        first_row: u64,
    },

    #[error(
        "{path}, row {row}: this subject is already in the split `{first}` (row {first_row}) and \
         may not be in another one",
        path = path.display()
    )]
    SplitConflict {
        path: PathBuf,
        row: u64,
        first: String,
        first_row: u64,
    },

    #[error(
        "{path} is not valid JSON (line {line}, column {column})",
        path = path.display(),
        line = source.line(),
        column = source.column()
    )]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },

    #[error("{path}: `{key}` must be {expected}", path = path.display())]
    JsonShape {
        path: PathBuf,
        key: String,
        expected: &'static str,
    },

    #[error("{path} holds no usable labels: {reason}", path = path.display())]
    Labels { path: PathBuf, reason: String },

    #[error(
        "{path} has changed since the cohort was opened (near row {row}): open the cohort again",
        path = path.display()
    )]
    ChangedSinceOpen { path: PathBuf, row: u64 },

    #[error("synthetic cohort: `{option}` {problem}")]
    SynthOption {
        option: &'static str,
        problem: String,
    },

    #[error(
        "{path} holds something that is no synthetic cohort: name another folder, or leave out the \
         options of one", path = path.display()
    )]
    NotSynthetic { path: PathBuf },

    #[error(
        "the synthetic cohort in {path} was made with {difference}: remove it, or name another folder",
        path = path.display()
    )]
    OtherSynthetic { path: PathBuf, difference: String },

    #[error("{path} cannot be written: {reason}", path = path.display())]
    Write { path: PathBuf, reason: String },
}

impl RecordsError {
    pub(crate) fn io(path: &std::path::Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_path_buf(),
            source,
        }
    }
}
