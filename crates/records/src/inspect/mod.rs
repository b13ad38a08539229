//! What is in a cohort, counted in one pass over its shards.

mod labels;
mod tally;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde::Serialize;

use crate::cohort::Cohort;
use crate::error::RecordsError;
use crate::item::{Modality, path_columns};
use crate::labels::{LabelKind, Labels, SurvivalLabels};
use crate::patient::Split;
use crate::table::{DATA_COLUMNS, Table, type_name};
use crate::time::format_time_us;
use labels::{summarise_labels, summarise_survival};
use tally::{Counts, Tally, count_chunk};

/// Rows of a unit of parallel work.
const CHUNK_ROWS: u64 = 1 << 20;
/// Mean length of a Gregorian year.
const DAYS_PER_YEAR: f64 = 365.2425;

/// What [`inspect`] shows.
#[derive(Clone, Copy, Debug)]
pub struct InspectOptions {
    /// How many of the most frequent codes are listed.
    pub top_codes: usize,
}

impl Default for InspectOptions {
    fn default() -> Self {
        InspectOptions { top_codes: 20 }
    }
}

/// What is in a cohort.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    pub path: PathBuf,
    pub dataset_name: Option<String>,
    pub dataset_version: Option<String>,
    pub meds_version: Option<String>,
    pub data_files: usize,
    /// Size of the data files.
    pub data_bytes: u64,
    pub patients: u64,
    pub events: u64,
    pub static_events: u64,
    pub events_per_patient: Option<Distribution>,
    /// ISO 8601, over all events with a time; `MEDS_BIRTH` aside.
    pub first_time: Option<String>,
    pub last_time: Option<String>,
    /// Years from a patient's first to last event with a time; `MEDS_BIRTH` aside.
    pub span_years: Option<Distribution>,
    /// The column that tells where rows come from.
    pub site_column: Option<String>,
    /// Most events first; the site `None` stands for rows without one.
    pub sites: Vec<SiteSummary>,
    /// Files that rows point to, by modality; empty without any.
    pub items: Vec<ItemSummary>,
    pub codes: CodeSummary,
    pub splits: Vec<SplitSummary>,
    pub labels: Vec<TaskSummary>,
    pub survival: Vec<SurvivalSummary>,
    pub missingness: Missingness,
    /// Columns that are not MEDS's own.
    pub extra_columns: Vec<ColumnSummary>,
}

/// A distribution in a few numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Distribution {
    pub minimum: f64,
    pub lower_quartile: f64,
    pub median: f64,
    pub upper_quartile: f64,
    pub maximum: f64,
    pub mean: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SiteSummary {
    pub site: Option<String>,
    pub events: u64,
    pub patients: u64,
}

/// The items of one modality.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ItemSummary {
    pub modality: Modality,
    /// The column that holds their paths.
    pub column: &'static str,
    /// Rows with a path; whether the files are there is for [`validate`](crate::validate) to say.
    pub items: u64,
    /// Patients with at least one.
    pub patients: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CodeSummary {
    /// Different codes in the data.
    pub distinct: u64,
    /// Of these, the codes with a description in `codes.parquet`.
    pub described: u64,
    /// Codes in `codes.parquet`, met in the data or not.
    pub listed: u64,
    /// The most frequent ones.
    pub top: Vec<CodeCount>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CodeCount {
    pub code: String,
    pub description: Option<String>,
    pub events: u64,
    pub patients: u64,
    pub with_number: u64,
    pub with_text: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SplitSummary {
    /// `train`, `tuning`, `held_out`, a name of the cohort's own, or `None` for patients that are
    /// in no split.
    pub split: Option<String>,
    /// Subjects listed for the split; for `None`, patients of the data.
    pub patients: u64,
}

/// The labels of one task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskSummary {
    pub task: String,
    pub kind: LabelKind,
    pub labels: u64,
    pub patients: u64,
    /// Labels of subjects without data.
    pub without_data: u64,
    /// The three splits, then `None` for labels of subjects in none of them.
    pub by_split: Vec<TaskSplitSummary>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskSplitSummary {
    pub split: Option<Split>,
    pub labels: u64,
    pub patients: u64,
    /// Number of labels by value; empty for real values.
    pub values: BTreeMap<String, u64>,
    /// Of real values.
    pub distribution: Option<Distribution>,
}

/// The survival sidecar of one task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SurvivalSummary {
    pub task: String,
    pub labels: u64,
    pub patients: u64,
    pub without_data: u64,
    pub by_split: Vec<SurvivalSplitSummary>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SurvivalSplitSummary {
    pub split: Option<Split>,
    pub labels: u64,
    /// Number of labels by event; 0 is censored.
    pub events: BTreeMap<i32, u64>,
    pub duration_days: Option<Distribution>,
}

/// What is not there. Counts are of all events or of all patients.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Missingness {
    pub events_without_time: u64,
    pub events_without_number: u64,
    pub events_without_text: u64,
    pub events_without_number_and_text: u64,
    pub events_without_site: u64,
    pub events_without_description: u64,
    pub patients_without_birth: u64,
    pub patients_without_timed_events: u64,
    pub patients_without_split: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ColumnSummary {
    pub name: String,
    /// As MEDS and pyarrow spell it; several, when files differ.
    pub types: Vec<String>,
    /// Data files that have it.
    pub files: u64,
}

/// Counts what is in a cohort: one pass over all events, in parallel, with memory bounded by the
/// number of codes and of patients.
pub fn inspect(cohort: &Cohort, options: &InspectOptions) -> Result<Inspection, RecordsError> {
    let mut tally = cohort
        .chunks(CHUNK_ROWS)
        .par_iter()
        .map(|chunk| count_chunk(cohort, chunk))
        .try_reduce(Tally::default, |first, second| Ok(first.merge(second)))?;

    let mut data_bytes = 0;
    let mut columns: BTreeMap<String, (Vec<String>, u64)> = BTreeMap::new();
    for shard in cohort.shards() {
        let metadata = std::fs::metadata(&shard.path)
            .map_err(|source| RecordsError::io(&shard.path, source))?;
        data_bytes += metadata.len();
        for field in Table::open(&shard.path)?.fields() {
            if DATA_COLUMNS
                .iter()
                .any(|column| column.name == field.name())
            {
                continue;
            }
            let (types, files) = columns.entry(field.name().clone()).or_default();
            let name = type_name(field.data_type());
            if !types.contains(&name) {
                types.push(name);
            }
            *files += 1;
        }
    }

    let mut missingness = std::mem::take(&mut tally.missingness);
    missingness.patients_without_split = cohort
        .subjects()
        .filter(|&subject| cohort.splits().split_of(subject).is_none())
        .count() as u64;
    let codes = summarise_codes(cohort, &tally, options, &mut missingness);
    let mut sites: Vec<SiteSummary> = tally
        .sites
        .iter()
        .map(|(site, counts)| SiteSummary {
            site: site.as_deref().map(str::to_string),
            events: counts.events,
            patients: counts.patients,
        })
        .collect();
    sites.sort_by(|a, b| b.events.cmp(&a.events).then_with(|| a.site.cmp(&b.site)));
    let mut events_per_patient: Vec<f64> =
        tally.events_per_patient.iter().map(|&n| n as f64).collect();
    let dataset = cohort.dataset();
    Ok(Inspection {
        path: cohort.path().to_path_buf(),
        dataset_name: dataset.dataset_name.clone(),
        dataset_version: dataset.dataset_version.clone(),
        meds_version: dataset.meds_version.clone(),
        data_files: cohort.shards().len(),
        data_bytes,
        patients: cohort.subject_count() as u64,
        events: cohort.row_count(),
        static_events: missingness.events_without_time,
        events_per_patient: Distribution::of(&mut events_per_patient),
        first_time: tally.first_time.map(format_time_us),
        last_time: tally.last_time.map(format_time_us),
        span_years: Distribution::of(&mut tally.span_years),
        site_column: cohort.sites().map(str::to_string),
        sites: if cohort.sites().is_some() {
            sites
        } else {
            Vec::new()
        },
        items: path_columns()
            .filter_map(|(modality, column)| {
                let counts = tally.items.get(&modality)?;
                Some(ItemSummary {
                    modality,
                    column,
                    items: counts.events,
                    patients: counts.patients,
                })
            })
            .collect(),
        codes,
        splits: summarise_splits(cohort, missingness.patients_without_split),
        labels: tasks(&cohort.path().join("labels"))?
            .into_iter()
            .map(|(task, path)| Ok(summarise_labels(cohort, task, &Labels::read(&path)?)))
            .collect::<Result<_, RecordsError>>()?,
        survival: tasks(&cohort.path().join("survival"))?
            .into_iter()
            .map(|(task, path)| {
                Ok(summarise_survival(
                    cohort,
                    task,
                    &SurvivalLabels::read(&path)?,
                ))
            })
            .collect::<Result<_, RecordsError>>()?,
        missingness,
        extra_columns: columns
            .into_iter()
            .map(|(name, (types, files))| ColumnSummary { name, types, files })
            .collect(),
    })
}

/// The tasks of a folder of labels: its folders, by name.
pub(crate) fn tasks(folder: &Path) -> Result<Vec<(String, PathBuf)>, RecordsError> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut tasks = Vec::new();
    let entries = std::fs::read_dir(folder).map_err(|source| RecordsError::io(folder, source))?;
    for entry in entries {
        let entry = entry.map_err(|source| RecordsError::io(folder, source))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() && !name.starts_with('.') {
            tasks.push((name, entry.path()));
        }
    }
    tasks.sort();
    Ok(tasks)
}

impl Distribution {
    /// `None` of no values. Quantiles are interpolated linearly between the sorted values.
    pub(crate) fn of(values: &mut [f64]) -> Option<Distribution> {
        if values.is_empty() {
            return None;
        }
        values.sort_unstable_by(f64::total_cmp);
        let quantile = |q: f64| {
            let at = q * (values.len() - 1) as f64;
            let (low, high) = (values[at.floor() as usize], values[at.ceil() as usize]);
            low + (high - low) * at.fract()
        };
        Some(Distribution {
            minimum: values[0],
            lower_quartile: quantile(0.25),
            median: quantile(0.5),
            upper_quartile: quantile(0.75),
            maximum: values[values.len() - 1],
            mean: values.iter().sum::<f64>() / values.len() as f64,
        })
    }
}

fn summarise_codes(
    cohort: &Cohort,
    tally: &Tally,
    options: &InspectOptions,
    missingness: &mut Missingness,
) -> CodeSummary {
    let mut described = 0;
    let mut order: Vec<(&Arc<str>, &Counts)> = tally.codes.iter().collect();
    for (code, counts) in &order {
        if cohort.codes().description(code).is_some() {
            described += 1;
        } else {
            missingness.events_without_description += counts.events;
        }
    }
    order.sort_unstable_by(|a, b| b.1.events.cmp(&a.1.events).then_with(|| a.0.cmp(b.0)));
    CodeSummary {
        distinct: order.len() as u64,
        described,
        listed: cohort.codes().len() as u64,
        top: order
            .into_iter()
            .take(options.top_codes)
            .map(|(code, counts)| CodeCount {
                code: code.to_string(),
                description: cohort.codes().description(code).map(str::to_string),
                events: counts.events,
                patients: counts.patients,
                with_number: counts.with_number,
                with_text: counts.with_text,
            })
            .collect(),
    }
}

fn summarise_splits(cohort: &Cohort, without: u64) -> Vec<SplitSummary> {
    let splits = cohort.splits();
    if !splits.is_present() {
        return Vec::new();
    }
    let named = Split::ALL.map(|split| (split.name().to_string(), splits.count(split)));
    let other = splits
        .other()
        .iter()
        .map(|(name, count)| (name.clone(), *count));
    let mut summary: Vec<SplitSummary> = named
        .into_iter()
        .chain(other)
        .map(|(name, count)| SplitSummary {
            split: Some(name),
            patients: count as u64,
        })
        .collect();
    if without > 0 {
        summary.push(SplitSummary {
            split: None,
            patients: without,
        });
    }
    summary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_interpolates_as_numpy_does() {
        // numpy.quantile([4, 1, 7, 2], [.25, .5, .75]) == [1.75, 3., 4.75]
        let distribution = Distribution::of(&mut [4.0, 1.0, 7.0, 2.0]).unwrap();
        assert_eq!(
            distribution,
            Distribution {
                minimum: 1.0,
                lower_quartile: 1.75,
                median: 3.0,
                upper_quartile: 4.75,
                maximum: 7.0,
                mean: 3.5,
            }
        );
        assert_eq!(Distribution::of(&mut []), None);
    }
}
