//! What stands beside the data: `dataset.json`, `codes.parquet`, `subject_splits.parquet`.
//! Each file may be missing.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::RecordsError;
use crate::patient::Split;
use crate::table::{Column, Decode, Kind, Table, optional, required};
use crate::values::{Interner, Strings, int64, string_list};

pub(crate) const DATASET_FILE: &str = "metadata/dataset.json";
pub(crate) const CODES_FILE: &str = "metadata/codes.parquet";
pub(crate) const SPLITS_FILE: &str = "metadata/subject_splits.parquet";

pub(crate) const CODE_COLUMNS: [Column; 3] = [
    required("code", Kind::String),
    optional("description", Kind::String),
    optional("parent_codes", Kind::StringList),
];

pub(crate) const SPLIT_COLUMNS: [Column; 2] = [
    required("subject_id", Kind::Int64),
    required("split", Kind::String),
];

const METADATA_BATCH_ROWS: usize = 8192;

/// `metadata/dataset.json`: every key is optional, `{}` is a valid file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DatasetMetadata {
    pub dataset_name: Option<String>,
    pub dataset_version: Option<String>,
    pub etl_name: Option<String>,
    pub etl_version: Option<String>,
    pub meds_version: Option<String>,
    /// ISO 8601, as the file has it.
    pub created_at: Option<String>,
    pub license: Option<String>,
    pub location_uri: Option<String>,
    pub description_uri: Option<String>,
    /// Columns that hold keys into the source data.
    pub raw_source_id_columns: Vec<String>,
    /// Columns that refine the code (a unit, a priority).
    pub code_modifier_columns: Vec<String>,
    /// Columns with values that are neither a number nor a text (paths of images, recordings…).
    pub additional_value_modality_columns: Vec<String>,
    /// Columns that say where a row comes from.
    pub site_id_columns: Vec<String>,
    pub other_extension_columns: Vec<String>,
    /// The whole object, unknown keys included.
    pub raw: Map<String, Value>,
}

impl DatasetMetadata {
    /// Reads `metadata/dataset.json` under `cohort`; a missing file is the empty object.
    pub fn read(cohort: &Path) -> Result<DatasetMetadata, RecordsError> {
        let path = cohort.join(DATASET_FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(DatasetMetadata::default());
            }
            Err(source) => return Err(RecordsError::io(&path, source)),
        };
        let value: Value = serde_json::from_slice(&bytes).map_err(|source| RecordsError::Json {
            path: path.clone(),
            source,
        })?;
        let Value::Object(raw) = value else {
            return Err(RecordsError::JsonShape {
                path,
                key: "the whole file".to_string(),
                expected: "an object",
            });
        };
        let text = |key: &str| match raw.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(RecordsError::JsonShape {
                path: path.clone(),
                key: key.to_string(),
                expected: "a string",
            }),
        };
        let list = |key: &str| {
            let wrong = || RecordsError::JsonShape {
                path: path.clone(),
                key: key.to_string(),
                expected: "a list of strings",
            };
            match raw.get(key) {
                None | Some(Value::Null) => Ok(Vec::new()),
                Some(Value::Array(items)) => items
                    .iter()
                    .map(|item| item.as_str().map(str::to_string).ok_or_else(wrong))
                    .collect(),
                Some(_) => Err(wrong()),
            }
        };
        Ok(DatasetMetadata {
            dataset_name: text("dataset_name")?,
            dataset_version: text("dataset_version")?,
            etl_name: text("etl_name")?,
            etl_version: text("etl_version")?,
            meds_version: text("meds_version")?,
            created_at: text("created_at")?,
            license: text("license")?,
            location_uri: text("location_uri")?,
            description_uri: text("description_uri")?,
            raw_source_id_columns: list("raw_source_id_columns")?,
            code_modifier_columns: list("code_modifier_columns")?,
            additional_value_modality_columns: list("additional_value_modality_columns")?,
            site_id_columns: list("site_id_columns")?,
            other_extension_columns: list("other_extension_columns")?,
            raw,
        })
    }
}

/// What `metadata/codes.parquet` says of one code.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CodeEntry {
    pub description: Option<Arc<str>>,
    pub parent_codes: Vec<Arc<str>>,
}

/// `metadata/codes.parquet`; empty when the file is missing.
#[derive(Clone, Debug, Default)]
pub struct CodeTable {
    present: bool,
    entries: HashMap<Arc<str>, CodeEntry>,
}

impl CodeTable {
    /// Reads the table under `cohort`. Where a code is listed several times (as with code
    /// modifiers), its first description and all of its parents count.
    pub fn read(cohort: &Path) -> Result<CodeTable, RecordsError> {
        let path = cohort.join(CODES_FILE);
        if !path.is_file() {
            return Ok(CodeTable::default());
        }
        let table = Table::open(&path)?;
        for column in &CODE_COLUMNS {
            table.check(column)?;
        }
        let mut interner = Interner::default();
        let mut entries: HashMap<Arc<str>, CodeEntry> = HashMap::new();
        let mut row = 0;
        let columns = CODE_COLUMNS.map(|column| (column.name, Decode::Plain));
        for batch in table.batches(&columns, None, METADATA_BATCH_ROWS, 0)? {
            let batch = batch?;
            let codes = Strings::of(&batch, "code");
            let descriptions = Strings::of(&batch, "description");
            let parents = batch.column_by_name("parent_codes");
            for position in 0..batch.num_rows() {
                let code = codes
                    .get(position)
                    .ok_or_else(|| null_value(&path, "code", row))?;
                let entry = entries.entry(interner.intern(code)).or_default();
                if entry.description.is_none() {
                    entry.description = descriptions
                        .get(position)
                        .filter(|description| !description.trim().is_empty())
                        .map(|description| interner.intern(description));
                }
                for parent in parents.iter().flat_map(|list| string_list(list, position)) {
                    let parent = interner.intern(&parent);
                    if !entry.parent_codes.contains(&parent) {
                        entry.parent_codes.push(parent);
                    }
                }
                row += 1;
            }
        }
        Ok(CodeTable {
            present: true,
            entries,
        })
    }

    /// Whether the cohort has a `codes.parquet`.
    pub fn is_present(&self) -> bool {
        self.present
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn get(&self, code: &str) -> Option<&CodeEntry> {
        self.entries.get(code)
    }

    /// The description of a code; `None` for an unlisted code and an empty description.
    pub fn description(&self, code: &str) -> Option<&str> {
        self.entries.get(code)?.description.as_deref()
    }

    /// All codes listed, in no order.
    pub fn codes(&self) -> impl Iterator<Item = (&str, &CodeEntry)> {
        self.entries.iter().map(|(code, entry)| (&**code, entry))
    }
}

/// `metadata/subject_splits.parquet`; empty when the file is missing.
#[derive(Clone, Debug, Default)]
pub struct Splits {
    present: bool,
    /// Sorted by subject.
    members: Vec<(i64, Split)>,
    other: BTreeMap<String, usize>,
}

impl Splits {
    /// Reads the splits under `cohort`. A subject in two different splits is an error, also when
    /// one of them has a name of its own; MEDS allows such names and their subjects are counted
    /// in [`Splits::other`].
    pub fn read(cohort: &Path) -> Result<Splits, RecordsError> {
        let path = cohort.join(SPLITS_FILE);
        if !path.is_file() {
            return Ok(Splits::default());
        }
        let mut names: Vec<String> = Split::ALL.map(|split| split.name().to_string()).to_vec();
        // (subject, position in `names`, row)
        let mut rows: Vec<(i64, u32, u64)> = Vec::new();
        for row in read_split_rows(&path)? {
            let (subject_id, name, row) = row?;
            let position = names
                .iter()
                .position(|known| *known == name)
                .unwrap_or_else(|| {
                    names.push(name);
                    names.len() - 1
                });
            rows.push((subject_id, position as u32, row));
        }
        rows.sort_unstable();
        if let Some(pair) = rows
            .windows(2)
            .find(|pair| pair[0].0 == pair[1].0 && pair[0].1 != pair[1].1)
        {
            let (first, second) = if pair[0].2 < pair[1].2 {
                (pair[0], pair[1])
            } else {
                (pair[1], pair[0])
            };
            return Err(RecordsError::SplitConflict {
                path,
                row: second.2,
                first: names[first.1 as usize].clone(),
                first_row: first.2,
            });
        }
        rows.dedup_by_key(|row| row.0);
        let mut members = Vec::with_capacity(rows.len());
        let mut other = BTreeMap::new();
        for (subject_id, position, _) in rows {
            match Split::ALL.get(position as usize) {
                Some(split) => members.push((subject_id, *split)),
                None => *other.entry(names[position as usize].clone()).or_insert(0) += 1,
            }
        }
        Ok(Splits {
            present: true,
            members,
            other,
        })
    }

    /// Whether the cohort has a `subject_splits.parquet`.
    pub fn is_present(&self) -> bool {
        self.present
    }

    /// Subjects in one of the three splits.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub fn split_of(&self, subject_id: i64) -> Option<Split> {
        let position = self
            .members
            .binary_search_by_key(&subject_id, |member| member.0)
            .ok()?;
        Some(self.members[position].1)
    }

    /// Subjects of one split.
    pub fn count(&self, split: Split) -> usize {
        self.members
            .iter()
            .filter(|member| member.1 == split)
            .count()
    }

    /// Subject and split, sorted by subject.
    pub fn iter(&self) -> impl Iterator<Item = (i64, Split)> {
        self.members.iter().copied()
    }

    /// Splits of other names than MEDS's three, with their number of subjects. Calor uses none of
    /// them.
    pub fn other(&self) -> &BTreeMap<String, usize> {
        &self.other
    }
}

/// Subject, split name and row of each row of a splits file.
pub(crate) fn read_split_rows(
    path: &Path,
) -> Result<impl Iterator<Item = Result<(i64, String, u64), RecordsError>>, RecordsError> {
    let path: PathBuf = path.to_path_buf();
    let table = Table::open(&path)?;
    for column in &SPLIT_COLUMNS {
        table.check(column)?;
    }
    let columns = [("subject_id", Decode::Plain), ("split", Decode::Dictionary)];
    let batches = table.batches(&columns, None, METADATA_BATCH_ROWS, 0)?;
    let mut first_row = 0;
    Ok(batches.flat_map(move |batch| {
        let rows: Vec<Result<(i64, String, u64), RecordsError>> = match batch {
            Err(error) => vec![Err(error)],
            Ok(batch) => {
                let start = first_row;
                first_row += batch.num_rows() as u64;
                let subjects = int64(&batch, "subject_id");
                let splits = Strings::of(&batch, "split");
                (0..batch.num_rows())
                    .map(|position| {
                        let row = start + position as u64;
                        let subject_id = subjects
                            .as_ref()
                            .and_then(|ids| value_at(ids, position))
                            .ok_or_else(|| null_value(&path, "subject_id", row))?;
                        let split = splits
                            .get(position)
                            .ok_or_else(|| null_value(&path, "split", row))?;
                        Ok((subject_id, split.to_string(), row))
                    })
                    .collect()
            }
        };
        rows
    }))
}

pub(crate) fn value_at<T: arrow_array::types::ArrowPrimitiveType>(
    array: &arrow_array::PrimitiveArray<T>,
    row: usize,
) -> Option<T::Native> {
    use arrow_array::Array;
    array.is_valid(row).then(|| array.value(row))
}

pub(crate) fn null_value(path: &Path, column: &str, row: u64) -> RecordsError {
    RecordsError::NullValue {
        path: path.to_path_buf(),
        column: column.to_string(),
        row,
    }
}
