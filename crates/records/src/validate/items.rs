use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;
use arrow_schema::DataType;

use super::add_error;
use crate::item::{Modality, path_columns, path_problem};
use crate::rules::{Findings, Rule};
use crate::table::{Kind, Table, optional};
use crate::values::Strings;

/// The path columns of one shard that can be read.
pub(super) struct ItemChecks<'a> {
    cohort: &'a Path,
    shard: PathBuf,
    columns: Vec<(Modality, &'static str)>,
}

impl<'a> ItemChecks<'a> {
    /// Checks the types of the path columns that a shard has.
    pub(super) fn of(cohort: &'a Path, table: &Table, findings: &mut Findings) -> ItemChecks<'a> {
        let mut columns = Vec::new();
        for (modality, name) in path_columns() {
            match table.check(&optional(name, Kind::String)) {
                // A column without a type has no paths.
                Ok(true) => columns.extend(
                    table
                        .field(name)
                        .filter(|field| *field.data_type() != DataType::Null)
                        .map(|_| (modality, name)),
                ),
                Ok(false) => {}
                Err(error) => add_error(findings, Rule::PathType, table.path(), &error),
            }
        }
        ItemChecks {
            cohort,
            shard: table.path().to_path_buf(),
            columns,
        }
    }

    /// Checks the paths of a batch that starts at `first_row` of the shard.
    pub(super) fn check(&self, batch: &RecordBatch, first_row: u64, findings: &mut Findings) {
        for (modality, name) in &self.columns {
            let paths = Strings::of(batch, name);
            for position in 0..batch.num_rows() {
                let Some(path) = paths.get(position).filter(|path| !path.is_empty()) else {
                    continue;
                };
                let (rule, problem) = match path_problem(path) {
                    Some(problem) => (Rule::PathInside, problem.to_string()),
                    None => match file_problem(*modality, &self.cohort.join(path)) {
                        Some(problem) => (Rule::PathFile, problem),
                        None => continue,
                    },
                };
                findings.add(
                    rule,
                    Some(&self.shard),
                    Some(first_row + position as u64),
                    format!("`{name}` {problem}"),
                );
            }
        }
    }
}

/// What is wrong with the file of an item, told without its path, which may carry an identifier.
fn file_problem(modality: Modality, path: &Path) -> Option<String> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => None,
        Ok(metadata) if metadata.is_dir() => Some("names a folder and not a file".to_string()),
        Ok(_) => Some("names something that is not a file".to_string()),
        // A WFDB record is called by its header's name without `.hea`.
        Err(_) if modality == Modality::Waveform && has_header(path) => None,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Some("names a file that is not there".to_string())
        }
        Err(error) => Some(format!("names a file that cannot be read ({error})")),
    }
}

fn has_header(record: &Path) -> bool {
    let mut header = record.as_os_str().to_os_string();
    header.push(".hea");
    Path::new(&header).is_file()
}
