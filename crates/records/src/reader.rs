use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{Float32Array, Int64Array, RecordBatch, TimestampMicrosecondArray};
use parquet::arrow::arrow_reader::{RowSelection, RowSelector};

use crate::cohort::{Cohort, is_site_type};
use crate::error::RecordsError;
use crate::item::{ItemPath, Modality, path_columns, path_problem};
use crate::metadata::{null_value, value_at};
use crate::patient::{Event, Patient};
use crate::table::{Batches, Decode, Table};
use crate::values::{SharedStrings, Strings, float32, int64, timestamps};

/// Rows decoded at a time.
const BATCH_ROWS: usize = 8192;

/// Patients of a shard, one at a time. Ends after the first error.
pub struct ShardReader<'a> {
    cohort: &'a Cohort,
    path: PathBuf,
    site: Option<String>,
    /// The path columns that the shard has.
    path_columns: Vec<(Modality, &'static str)>,
    /// Positions in the cohort's index of the subjects still to come.
    pending: VecDeque<u32>,
    batches: Option<Batches>,
    batch: Option<OpenBatch>,
    codes: SharedStrings,
    sites: SharedStrings,
}

/// The columns of a decoded batch and how far they have been used.
struct OpenBatch {
    rows: usize,
    next: usize,
    subjects: Option<Int64Array>,
    times: Option<TimestampMicrosecondArray>,
    numbers: Option<Float32Array>,
    texts: Strings,
    /// One for each of the shard's path columns.
    paths: Vec<PathColumn>,
}

struct PathColumn {
    modality: Modality,
    name: &'static str,
    paths: Strings,
}

impl<'a> ShardReader<'a> {
    pub(crate) fn new(
        cohort: &'a Cohort,
        shard: usize,
        positions: Vec<u32>,
    ) -> Result<ShardReader<'a>, RecordsError> {
        let path = cohort.shards()[shard].path.clone();
        let mut site = None;
        let mut paths = Vec::new();
        let mut batches = None;
        if let Some(&first) = positions.first() {
            let table = Table::open(&path)?;
            if table.rows() != cohort.shards()[shard].rows {
                return Err(RecordsError::ChangedSinceOpen { path, row: 0 });
            }
            site = cohort
                .sites()
                .filter(|name| {
                    table
                        .field(name)
                        .is_some_and(|field| is_site_type(field.data_type()))
                })
                .map(str::to_string);
            let mut columns = vec![
                ("subject_id", Decode::Plain),
                ("time", Decode::Plain),
                ("code", Decode::Dictionary),
                ("numeric_value", Decode::Plain),
                ("text_value", Decode::Large),
            ];
            if let Some(site) = &site {
                columns.push((site, Decode::Dictionary));
            }
            paths.extend(path_columns().filter(|(_, name)| table.field(name).is_some()));
            columns.extend(paths.iter().map(|&(_, name)| (name, Decode::Plain)));
            let ranges = positions.iter().map(|&at| cohort.rows_at(at as usize).1);
            let rows = select(&table.row_group_rows(), ranges);
            let (_, first_rows) = cohort.rows_at(first as usize);
            batches = Some(table.batches(&columns, Some(rows), BATCH_ROWS, first_rows.start)?);
        }
        Ok(ShardReader {
            cohort,
            path,
            site,
            path_columns: paths,
            pending: positions.into(),
            batches,
            batch: None,
            codes: SharedStrings::default(),
            sites: SharedStrings::default(),
        })
    }

    fn open_batch(&mut self, batch: &RecordBatch) {
        self.codes.load(batch, "code");
        if let Some(site) = &self.site {
            self.sites.load(batch, site);
        }
        self.batch = Some(OpenBatch {
            rows: batch.num_rows(),
            next: 0,
            subjects: int64(batch, "subject_id"),
            times: timestamps(batch, "time"),
            numbers: float32(batch, "numeric_value"),
            texts: Strings::of(batch, "text_value"),
            paths: self
                .path_columns
                .iter()
                .map(|&(modality, name)| PathColumn {
                    modality,
                    name,
                    paths: Strings::of(batch, name),
                })
                .collect(),
        });
    }

    /// The rows of one subject, put together from as many batches as they span.
    fn read_patient(&mut self, at: u32) -> Result<Patient, RecordsError> {
        let subject_id = self.cohort.entry(at as usize).subject_id;
        let (_, rows) = self.cohort.rows_at(at as usize);
        let mut events = Vec::with_capacity((rows.end - rows.start) as usize);
        let mut row = rows.start;
        let mut previous: Option<i64> = None;
        while row < rows.end {
            let changed = || RecordsError::ChangedSinceOpen {
                path: self.path.clone(),
                row,
            };
            let Some(batch) = self.batch.as_mut().filter(|batch| batch.next < batch.rows) else {
                let next = self.batches.as_mut().and_then(Iterator::next);
                let batch = next
                    .ok_or_else(changed)?
                    .map_err(|error| at_row(error, row))?;
                self.open_batch(&batch);
                continue;
            };
            let position = batch.next;
            let found = batch
                .subjects
                .as_ref()
                .and_then(|ids| value_at(ids, position));
            if found != Some(subject_id) {
                return Err(changed());
            }
            let time_us = batch
                .times
                .as_ref()
                .and_then(|times| value_at(times, position));
            match (previous, time_us) {
                (Some(_), None) => {
                    return Err(RecordsError::StaticAfterTimed {
                        path: self.path.clone(),
                        row,
                    });
                }
                (Some(before), Some(now)) if now < before => {
                    return Err(RecordsError::Unsorted {
                        path: self.path.clone(),
                        row,
                    });
                }
                _ => previous = time_us,
            }
            let code = self
                .codes
                .get(position)
                .ok_or_else(|| null_value(&self.path, "code", row))?;
            events.push(Event {
                time_us,
                code,
                numeric_value: batch
                    .numbers
                    .as_ref()
                    .and_then(|numbers| value_at(numbers, position))
                    .filter(|number| !number.is_nan()),
                text_value: batch.texts.get(position).map(Arc::from),
                site: if self.site.is_some() {
                    self.sites.get(position)
                } else {
                    None
                },
                items: items_at(&batch.paths, position, &self.path, row)?,
            });
            batch.next += 1;
            row += 1;
        }
        Ok(Patient { subject_id, events })
    }
}

impl Iterator for ShardReader<'_> {
    type Item = Result<Patient, RecordsError>;

    fn next(&mut self) -> Option<Self::Item> {
        let at = self.pending.pop_front()?;
        let patient = self.read_patient(at);
        if patient.is_err() {
            self.pending.clear();
        }
        Some(patient)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (
            usize::from(!self.pending.is_empty()),
            Some(self.pending.len()),
        )
    }
}

/// The items of one row of a batch, which is row `row` of the file.
fn items_at(
    columns: &[PathColumn],
    position: usize,
    file: &Path,
    row: u64,
) -> Result<Option<Box<[ItemPath]>>, RecordsError> {
    // Allocates nothing until there is an item.
    let mut items = Vec::new();
    for column in columns {
        let Some(path) = column.paths.get(position).filter(|path| !path.is_empty()) else {
            continue;
        };
        if let Some(problem) = path_problem(path) {
            return Err(RecordsError::InvalidValue {
                path: file.to_path_buf(),
                column: column.name.to_string(),
                row,
                problem,
            });
        }
        items.push(ItemPath {
            modality: column.modality,
            path: path.into(),
        });
    }
    Ok((!items.is_empty()).then(|| items.into_boxed_slice()))
}

/// The row groups that hold some of `ranges` (ascending, disjoint), and the rows to read of them.
fn select(
    row_groups: &[u64],
    ranges: impl Iterator<Item = Range<u64>>,
) -> (Vec<usize>, RowSelection) {
    let mut groups = Vec::new();
    let mut selectors: Vec<RowSelector> = Vec::new();
    let mut push = |skip: bool, rows: u64| {
        if rows == 0 {
            return;
        }
        match selectors.last_mut() {
            Some(last) if last.skip == skip => last.row_count += rows as usize,
            _ if skip => selectors.push(RowSelector::skip(rows as usize)),
            _ => selectors.push(RowSelector::select(rows as usize)),
        }
    };
    let mut ranges = ranges.peekable();
    let mut current = ranges.next();
    let mut group_start = 0;
    for (group, &rows) in row_groups.iter().enumerate() {
        let group_end = group_start + rows;
        let mut used = group_start;
        while let Some(range) = &current {
            if range.start >= group_end {
                break;
            }
            if groups.last() != Some(&group) {
                groups.push(group);
            }
            let from = range.start.max(group_start);
            let to = range.end.min(group_end);
            push(true, from - used);
            push(false, to - from);
            used = to;
            if range.end > group_end {
                break;
            }
            current = ranges.next();
        }
        if groups.last() == Some(&group) {
            push(true, group_end - used);
        }
        group_start = group_end;
    }
    (groups, RowSelection::from(selectors))
}

/// A selection makes the decoder's own count of rows differ from the file's: put the row being
/// read in its place.
fn at_row(error: RecordsError, row: u64) -> RecordsError {
    match error {
        RecordsError::CorruptRows { path, source, .. } => {
            RecordsError::CorruptRows { path, row, source }
        }
        RecordsError::Undecodable { path, .. } => RecordsError::Undecodable { path, row },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    // A slice of one range is what these tests mean.
    #![allow(clippy::single_range_in_vec_init)]

    use super::*;

    fn selected(groups: &[usize], sizes: &[u64], selection: &RowSelection) -> Vec<u64> {
        let rows: Vec<u64> = groups
            .iter()
            .flat_map(|&group| {
                let start: u64 = sizes[..group].iter().sum();
                start..start + sizes[group]
            })
            .collect();
        let mut at = 0;
        let mut kept = Vec::new();
        for selector in selection.iter() {
            if !selector.skip {
                kept.extend(&rows[at..at + selector.row_count]);
            }
            at += selector.row_count;
        }
        assert_eq!(at, rows.len(), "the selection covers the groups exactly");
        kept
    }

    #[test]
    fn a_selection_names_exactly_the_rows_wanted() {
        let sizes = [4, 4, 0, 3, 5];
        for ranges in [
            vec![0..2, 3..9],
            vec![5..7],
            vec![8..11],
            vec![0..16],
            vec![2..3, 3..4, 15..16],
            vec![],
        ] {
            let (groups, selection) = select(&sizes, ranges.iter().cloned());
            let expected: Vec<u64> = ranges.into_iter().flatten().collect();
            assert_eq!(selected(&groups, &sizes, &selection), expected);
        }
        assert_eq!(select(&sizes, [5..7].into_iter()).0, [1]);
        assert_eq!(select(&sizes, [9..10].into_iter()).0, [3]);
    }
}
