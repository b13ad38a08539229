use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::error::RecordsError;
use crate::files::parquet_files;
use crate::fingerprint::Fingerprint;
use crate::inspect::tasks;
use crate::item::path_columns;
use crate::metadata::{CodeTable, DatasetMetadata, Splits, null_value, value_at};
use crate::patient::Patient;
use crate::reader::ShardReader;
use crate::table::{DATA_COLUMNS, Decode, Kind, Table, optional, type_name};
use crate::values::int64;

/// Rows decoded at a time while the index is built (one int64 column: half a MiB).
const INDEX_BATCH_ROWS: usize = 65_536;

/// An opened MEDS folder: its shards with their columns checked, and an index from each subject to
/// its rows. No event is held in memory; a subject costs 20 bytes.
#[derive(Debug)]
pub struct Cohort {
    path: PathBuf,
    shards: Vec<Shard>,
    /// Subjects in the order of shards and rows.
    entries: Vec<SubjectEntry>,
    /// Positions in `entries`, sorted by subject.
    by_subject: Vec<u32>,
    codes: CodeTable,
    splits: Splits,
    dataset: DatasetMetadata,
    site_column: Option<String>,
}

/// One file under `data/`.
#[derive(Clone, Debug)]
pub struct Shard {
    pub path: PathBuf,
    pub rows: u64,
    pub subjects: usize,
    /// Position of its first subject in the cohort's index.
    pub(crate) first_entry: usize,
}

/// Where a subject's rows start; they end where the next subject's start, or with the shard.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SubjectEntry {
    pub subject_id: i64,
    pub first_row: u64,
}

/// Some whole subjects of one shard, a unit of parallel work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Position in [`Cohort::shards`].
    pub shard: usize,
    /// Number of the first subject within the shard.
    pub first_subject: usize,
    pub subjects: usize,
    pub rows: u64,
}

impl Cohort {
    /// Opens a MEDS folder. Reads the metadata, checks the columns of every shard, and streams the
    /// `subject_id` column alone to build the index.
    ///
    /// # Errors
    /// Names the file (and row) that is missing, truncated, corrupt or mistyped, and a subject
    /// whose rows are not together. The order in time is checked when rows are read.
    pub fn open(path: &Path) -> Result<Cohort, RecordsError> {
        let data = path.join("data");
        if !data.is_dir() {
            return Err(RecordsError::NotACohort {
                path: path.to_path_buf(),
                reason: if path.is_dir() {
                    "it has no folder `data`".to_string()
                } else {
                    "there is no such folder".to_string()
                },
            });
        }
        let files = parquet_files(&data)?;
        if files.is_empty() {
            return Err(RecordsError::NotACohort {
                path: path.to_path_buf(),
                reason: "there is no .parquet file under `data`".to_string(),
            });
        }
        let dataset = DatasetMetadata::read(path)?;
        let codes = CodeTable::read(path)?;
        let splits = Splits::read(path)?;

        let named_site = dataset.site_id_columns.first().cloned();
        let indexed: Vec<Result<(ShardIndex, bool), RecordsError>> = files
            .par_iter()
            .map(|file| index_shard(file, named_site.as_deref()))
            .collect();
        let mut shards = Vec::with_capacity(files.len());
        let mut entries = Vec::new();
        let mut has_site = false;
        for (file, indexed) in files.into_iter().zip(indexed) {
            let (index, site) = indexed?;
            has_site |= site;
            shards.push(Shard {
                path: file,
                rows: index.rows,
                subjects: index.entries.len(),
                first_entry: entries.len(),
            });
            entries.extend(index.entries);
        }
        entries.shrink_to_fit();
        if u32::try_from(entries.len()).is_err() {
            return Err(RecordsError::NotACohort {
                path: path.to_path_buf(),
                reason: format!("more than {} subjects in one cohort", u32::MAX),
            });
        }
        let mut by_subject: Vec<u32> = (0..entries.len() as u32).collect();
        by_subject.par_sort_unstable_by_key(|&at| (entries[at as usize].subject_id, at));

        let cohort = Cohort {
            path: path.to_path_buf(),
            shards,
            entries,
            by_subject,
            codes,
            splits,
            dataset,
            site_column: named_site.or_else(|| has_site.then(|| "site".to_string())),
        };
        cohort.check_scattered()?;
        Ok(cohort)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn subject_count(&self) -> usize {
        self.entries.len()
    }

    pub fn row_count(&self) -> u64 {
        self.shards.iter().map(|shard| shard.rows).sum()
    }

    /// The files under `data/`, sorted by path.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// All subjects in ascending order.
    pub fn subjects(&self) -> impl ExactSizeIterator<Item = i64> + '_ {
        self.by_subject
            .iter()
            .map(|&at| self.entries[at as usize].subject_id)
    }

    pub fn contains(&self, subject_id: i64) -> bool {
        self.find(subject_id).is_some()
    }

    /// Number of rows of a subject; `None` for a stranger.
    pub fn rows_of(&self, subject_id: i64) -> Option<u64> {
        let at = self.find(subject_id)?;
        let (_, rows) = self.rows_at(at);
        Some(rows.end - rows.start)
    }

    /// `metadata/codes.parquet`.
    pub fn codes(&self) -> &CodeTable {
        &self.codes
    }

    /// `metadata/subject_splits.parquet`.
    pub fn splits(&self) -> &Splits {
        &self.splits
    }

    /// Name of the column that says where a row comes from: the first of `site_id_columns` in
    /// `dataset.json`, otherwise a column called `site` if a shard has one.
    pub fn sites(&self) -> Option<&str> {
        self.site_column.as_deref()
    }

    /// `metadata/dataset.json`.
    pub fn dataset(&self) -> &DatasetMetadata {
        &self.dataset
    }

    /// Names of the tasks that have labels (`labels/<task>/`).
    pub fn label_tasks(&self) -> Result<Vec<String>, RecordsError> {
        task_names(&self.path.join("labels"))
    }

    /// Names of the tasks that have a survival sidecar (`survival/<task>/`).
    pub fn survival_tasks(&self) -> Result<Vec<String>, RecordsError> {
        task_names(&self.path.join("survival"))
    }

    /// Identifies the bytes of the data and the metadata, for the keys of caches. Quick: files
    /// above 16 MiB are known by their size, time of change and last 64 KiB; smaller ones are
    /// hashed whole.
    pub fn fingerprint(&self) -> Result<Fingerprint, RecordsError> {
        Fingerprint::quick(&self.path)
    }

    /// As [`Cohort::fingerprint`], with every file hashed whole: the same wherever the cohort
    /// lies, for the record of a run.
    pub fn content_fingerprint(&self) -> Result<Fingerprint, RecordsError> {
        Fingerprint::content(&self.path)
    }

    /// Streams the patients of one shard in the file's order. Row groups without a wanted subject
    /// are not read, other subjects' rows are skipped before decoding; memory is bounded by the
    /// batch and the largest patient.
    ///
    /// # Panics
    /// When `shard` is not a position in [`Cohort::shards`].
    pub fn read_shard(
        &self,
        shard: usize,
        wanted: &dyn Fn(i64) -> bool,
    ) -> Result<ShardReader<'_>, RecordsError> {
        let entry = &self.shards[shard];
        self.read_chunk(
            &Chunk {
                shard,
                first_subject: 0,
                subjects: entry.subjects,
                rows: entry.rows,
            },
            wanted,
        )
    }

    /// Cuts the cohort into pieces of whole subjects with about `target_rows` rows each, for work
    /// in parallel whatever the sharding.
    pub fn chunks(&self, target_rows: u64) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        for (position, shard) in self.shards.iter().enumerate() {
            let mut first_subject = 0;
            let mut rows = 0;
            for subject in 0..shard.subjects {
                let (_, range) = self.rows_at(shard.first_entry + subject);
                rows += range.end - range.start;
                if rows >= target_rows.max(1) || subject + 1 == shard.subjects {
                    chunks.push(Chunk {
                        shard: position,
                        first_subject,
                        subjects: subject + 1 - first_subject,
                        rows,
                    });
                    first_subject = subject + 1;
                    rows = 0;
                }
            }
        }
        chunks
    }

    /// As [`Cohort::read_shard`], for the subjects of one chunk.
    pub fn read_chunk(
        &self,
        chunk: &Chunk,
        wanted: &dyn Fn(i64) -> bool,
    ) -> Result<ShardReader<'_>, RecordsError> {
        let shard = &self.shards[chunk.shard];
        let first = shard.first_entry + chunk.first_subject;
        let positions: Vec<u32> = (first..first + chunk.subjects)
            .filter(|&at| wanted(self.entries[at].subject_id))
            .map(|at| at as u32)
            .collect();
        ShardReader::new(self, chunk.shard, positions)
    }

    /// Reads one subject; `None` when the cohort does not know it.
    pub fn read_subject(&self, subject_id: i64) -> Result<Option<Patient>, RecordsError> {
        let Some(at) = self.find(subject_id) else {
            return Ok(None);
        };
        let (shard, _) = self.rows_at(at);
        ShardReader::new(self, shard, vec![at as u32])?
            .next()
            .transpose()
    }

    fn find(&self, subject_id: i64) -> Option<usize> {
        let position = self
            .by_subject
            .binary_search_by_key(&subject_id, |&at| self.entries[at as usize].subject_id)
            .ok()?;
        Some(self.by_subject[position] as usize)
    }

    pub(crate) fn entry(&self, at: usize) -> SubjectEntry {
        self.entries[at]
    }

    /// The shard of an index entry and its rows there.
    pub(crate) fn rows_at(&self, at: usize) -> (usize, std::ops::Range<u64>) {
        // Empty shards share their first entry with the next one; the last of them holds it.
        let shard = self.shards.partition_point(|shard| shard.first_entry <= at) - 1;
        let owner = &self.shards[shard];
        let start = self.entries[at].first_row;
        let end = if at + 1 < owner.first_entry + owner.subjects {
            self.entries[at + 1].first_row
        } else {
            owner.rows
        };
        (shard, start..end)
    }

    fn check_scattered(&self) -> Result<(), RecordsError> {
        // Of all repeated subjects, report the one met first in file order.
        let repeated = self
            .by_subject
            .windows(2)
            .filter(|pair| {
                self.entries[pair[0] as usize].subject_id
                    == self.entries[pair[1] as usize].subject_id
            })
            .map(|pair| (pair[1] as usize, pair[0] as usize))
            .min();
        match repeated {
            None => Ok(()),
            Some((second, first)) => {
                let (second_shard, second_rows) = self.rows_at(second);
                let (first_shard, first_rows) = self.rows_at(first);
                Err(RecordsError::SubjectScattered {
                    path: self.shards[second_shard].path.clone(),
                    row: second_rows.start,
                    first_path: self.shards[first_shard].path.clone(),
                    first_row: first_rows.start,
                })
            }
        }
    }
}

fn task_names(folder: &Path) -> Result<Vec<String>, RecordsError> {
    Ok(tasks(folder)?.into_iter().map(|(name, _)| name).collect())
}

struct ShardIndex {
    rows: u64,
    entries: Vec<SubjectEntry>,
}

/// Checks a shard's columns and finds where each subject starts; also whether it has a column of
/// sites.
fn index_shard(path: &Path, named_site: Option<&str>) -> Result<(ShardIndex, bool), RecordsError> {
    let table = Table::open(path)?;
    for column in &DATA_COLUMNS {
        table.check(column)?;
    }
    for (_, name) in path_columns() {
        table.check(&optional(name, Kind::String))?;
    }
    let site = table.field(named_site.unwrap_or("site"));
    let readable = site.is_some_and(|field| is_site_type(field.data_type()));
    if let (Some(name), Some(field)) = (named_site, site)
        && !readable
    {
        return Err(RecordsError::ColumnType {
            path: path.to_path_buf(),
            column: name.to_string(),
            expected: "string or an integer (it is named in `site_id_columns`)",
            found: type_name(field.data_type()),
        });
    }
    let mut entries: Vec<SubjectEntry> = Vec::new();
    let mut row = 0;
    for batch in table.batches(&[("subject_id", Decode::Plain)], None, INDEX_BATCH_ROWS, 0)? {
        let batch = batch?;
        let subjects = int64(&batch, "subject_id");
        for position in 0..batch.num_rows() {
            let subject_id = subjects
                .as_ref()
                .and_then(|ids| value_at(ids, position))
                .ok_or_else(|| null_value(path, "subject_id", row))?;
            if entries
                .last()
                .is_none_or(|last| last.subject_id != subject_id)
            {
                entries.push(SubjectEntry {
                    subject_id,
                    first_row: row,
                });
            }
            row += 1;
        }
    }
    Ok((ShardIndex { rows: row, entries }, readable))
}

pub(crate) fn is_site_type(data_type: &arrow_schema::DataType) -> bool {
    use arrow_schema::DataType;
    data_type.is_integer() || matches!(data_type, DataType::Utf8 | DataType::Null)
}
