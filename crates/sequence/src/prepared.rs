use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use calor_records::Split;
use serde::{Deserialize, Serialize};

use crate::cache::{Cache, ItemRecord, NO_TIME, SampleRecord};
use crate::labels::{TargetKind, Targets};
use crate::statistics::ValueStatistics;
use crate::stream::{DraftContent, DraftItem, SeriesValue, StreamOptions};

/// The samples of a task as tokens, memory-mapped from a cache file. Sample `i` is the `i`-th of
/// the labelled ones that the cohort has data of, in the order of subject and time.
pub struct Prepared {
    pub(crate) cache: Cache,
    pub(crate) path: PathBuf,
    pub(crate) kind: TargetKind,
    pub(crate) streams: Vec<StreamOptions>,
    pub(crate) contents: Contents,
    pub(crate) cache_hit: bool,
    pub(crate) rebuilt_because: Option<String>,
}

/// What a cache file says about itself, beside the samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Contents {
    pub report: PrepareReport,
    pub classes: Vec<String>,
    pub statistics: ValueStatistics,
}

/// One sample: borrowed from the cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample<'a> {
    /// With the special tokens around them.
    pub tokens: &'a [u32],
    pub subject_id: i64,
    /// Microseconds since 1970-01-01; nothing later is in `tokens`.
    pub prediction_time_us: i64,
    pub targets: Targets,
    pub split: Option<Split>,
    pub items: Items<'a>,
}

/// The modality items of a sample, in the order of their soft tokens.
#[derive(Clone, Copy)]
pub struct Items<'a> {
    cache: &'a Cache,
    records: &'a [ItemRecord],
}

/// One of them, borrowed from the cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Item<'a> {
    /// Position of its modality in [`SequenceOptions::streams`](crate::SequenceOptions::streams).
    pub stream: usize,
    /// `None` for an item without time, and for one that is missing.
    pub time_us: Option<i64>,
    /// Number of the site in [`ValueStatistics::sites`].
    pub site: Option<usize>,
    /// UTF-8 of a path, or a series, as the modality has it; empty where the item is missing.
    bytes: &'a [u8],
}

impl<'a> Items<'a> {
    pub fn len(&self) -> usize {
        self.records.len()
    }

    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = Item<'a>> + use<'a> {
        let cache = self.cache;
        self.records.iter().map(move |record| Item {
            stream: record.stream as usize,
            time_us: (record.time_us != NO_TIME).then_some(record.time_us),
            site: (record.site > 0).then(|| record.site as usize - 1),
            bytes: cache.content(record),
        })
    }
}

impl PartialEq for Items<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl std::fmt::Debug for Items<'_> {
    /// Numbers alone: paths and values are patients' data.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} items", self.len())
    }
}

impl<'a> Item<'a> {
    pub fn is_missing(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The path relative to the cohort, of an item that is a file.
    pub fn path(&self) -> Option<&'a str> {
        (!self.bytes.is_empty())
            .then(|| std::str::from_utf8(self.bytes).ok())
            .flatten()
    }

    /// The values of a series, in time order.
    pub fn series(&self) -> &'a [SeriesValue] {
        bytemuck::try_cast_slice(self.bytes).unwrap_or(&[])
    }
}

/// Positions of samples, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleSet {
    samples: Arc<[u32]>,
}

/// What became of the patients on the way to tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PrepareReport {
    /// SHA-256, in hexadecimal, of everything that shaped the sequences.
    pub hash: String,
    pub samples: u64,
    pub patients: u64,
    /// Samples in train, tuning, held out and in no split.
    pub train_samples: u64,
    pub tuning_samples: u64,
    pub held_out_samples: u64,
    pub unassigned_samples: u64,
    /// Labelled samples left out because the cohort has no row of their subject; rows of a text
    /// file left out because truncation left nothing to learn of them.
    pub samples_without_data: u64,
    /// Samples with no visible row but birth and sex.
    pub samples_without_rows: u64,
    /// Special tokens included.
    pub tokens: u64,
    pub length_median: u64,
    pub length_p90: u64,
    pub length_p99: u64,
    pub length_max: u64,
    /// Lengths if nothing had been dropped.
    pub full_length_median: u64,
    pub full_length_p90: u64,
    pub full_length_p99: u64,
    pub full_length_max: u64,
    /// Samples, and patients with such a sample, that lost something to `max_tokens`.
    pub truncated_samples: u64,
    pub truncated_patients: u64,
    pub dropped_tokens: u64,
    /// Visible rows, birth and sex not counted.
    pub rows: u64,
    pub dropped_rows: u64,
    /// Of the dropped rows, those that exceed `max_tokens` alone.
    pub oversized_rows: u64,
    /// Codes with quantiles.
    pub codes_with_quantiles: u64,
    /// What there is of each modality that becomes soft tokens.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub modalities: BTreeMap<String, ItemCounts>,
    /// Items beyond the streams' `max_items`, left out.
    #[serde(default)]
    pub dropped_items: u64,
}

/// Items of one modality.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ItemCounts {
    pub items: u64,
    /// Samples that have none.
    pub missing_samples: u64,
}

impl ItemCounts {
    pub(crate) fn count(&mut self, item: &DraftItem) {
        *match item.content {
            DraftContent::Missing => &mut self.missing_samples,
            _ => &mut self.items,
        } += 1;
    }
}

impl Prepared {
    pub fn len(&self) -> usize {
        self.cache.records().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// # Panics
    /// When `sample` is not below `len()`.
    pub fn sample(&self, sample: usize) -> Sample<'_> {
        let record = &self.cache.records()[sample];
        Sample {
            tokens: self.cache.tokens(record),
            subject_id: record.subject_id,
            prediction_time_us: record.prediction_time_us,
            targets: match self.kind {
                TargetKind::Tokens => {
                    Targets::from_bits(self.kind, self.cache.token_targets(record))
                }
                _ => Targets::from_bits(self.kind, self.cache.targets(sample)),
            },
            split: split_of(record),
            items: Items {
                cache: &self.cache,
                records: self.cache.items(record),
            },
        }
    }

    /// Number of tokens of a sample.
    ///
    /// # Panics
    /// When `sample` is not below `len()`.
    pub fn length(&self, sample: usize) -> usize {
        self.cache.records()[sample].length as usize
    }

    /// The samples of the patients of one split.
    pub fn split(&self, split: Split) -> SampleSet {
        let wanted = split_number(Some(split));
        self.set(|record| record.split == wanted)
    }

    /// Every sample, of patients of any split or none.
    pub fn all(&self) -> SampleSet {
        self.set(|_| true)
    }

    fn set(&self, wanted: impl Fn(&SampleRecord) -> bool) -> SampleSet {
        SampleSet {
            samples: (0u32..)
                .zip(self.cache.records())
                .filter(|(_, record)| wanted(record))
                .map(|(sample, _)| sample)
                .collect(),
        }
    }

    pub fn kind(&self) -> TargetKind {
        self.kind
    }

    /// Names of the classes, or of the labels of a multilabel task.
    pub fn classes(&self) -> &[String] {
        &self.contents.classes
    }

    /// How many samples of a set have each class. Empty for tasks without classes.
    pub fn class_counts(&self, set: &SampleSet) -> Vec<u64> {
        if self.kind != TargetKind::Class {
            return Vec::new();
        }
        let mut counts = vec![0; self.contents.classes.len()];
        for &sample in set.samples() {
            if let Targets::Class(class) = self.sample(sample as usize).targets {
                counts[class as usize] += 1;
            }
        }
        counts
    }

    /// The modalities whose items became soft tokens.
    pub fn streams(&self) -> &[StreamOptions] {
        &self.streams
    }

    /// The quantiles the sequences were written with.
    pub fn statistics(&self) -> &ValueStatistics {
        &self.contents.statistics
    }

    pub fn report(&self) -> &PrepareReport {
        &self.contents.report
    }

    /// The cache file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the cache was there already.
    pub fn cache_hit(&self) -> bool {
        self.cache_hit
    }

    /// Why a file found in the cache's place could not be used.
    pub fn rebuilt_because(&self) -> Option<&str> {
        self.rebuilt_because.as_deref()
    }
}

impl SampleSet {
    /// Sorts and deduplicates.
    pub fn from_samples(mut samples: Vec<u32>) -> SampleSet {
        samples.sort_unstable();
        samples.dedup();
        SampleSet {
            samples: samples.into(),
        }
    }

    pub fn samples(&self) -> &[u32] {
        &self.samples
    }

    pub fn len(&self) -> usize {
        self.samples.len()
    }

    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }
}

pub(crate) fn split_number(split: Option<Split>) -> u32 {
    match split {
        None => 0,
        Some(Split::Train) => 1,
        Some(Split::Tuning) => 2,
        Some(Split::HeldOut) => 3,
    }
}

fn split_of(record: &SampleRecord) -> Option<Split> {
    Split::ALL
        .into_iter()
        .find(|split| split_number(Some(*split)) == record.split)
}

impl PrepareReport {
    /// Adds up the samples, which are sorted by subject.
    pub(crate) fn of(records: &[SampleRecord]) -> PrepareReport {
        let mut report = PrepareReport {
            samples: records.len() as u64,
            ..PrepareReport::default()
        };
        let mut last_subject = None;
        let mut last_truncated = None;
        for record in records {
            // Rows of text files are numbered in each.
            let subject = Some((record.split, record.subject_id));
            report.patients += u64::from(last_subject != subject);
            last_subject = subject;
            *match record.split {
                1 => &mut report.train_samples,
                2 => &mut report.tuning_samples,
                3 => &mut report.held_out_samples,
                _ => &mut report.unassigned_samples,
            } += 1;
            report.samples_without_rows += u64::from(record.rows == 0);
            report.tokens += u64::from(record.length);
            report.rows += u64::from(record.rows);
            report.dropped_items += u64::from(record.dropped_items);
            if record.full_length > record.length {
                report.truncated_samples += 1;
                report.truncated_patients += u64::from(last_truncated != subject);
                last_truncated = subject;
                report.dropped_rows += u64::from(record.dropped_rows);
                report.oversized_rows += u64::from(record.oversized_rows);
                report.dropped_tokens +=
                    u64::from(record.full_length.saturating_sub(record.length));
            }
        }
        let mut lengths: Vec<u32> = records.iter().map(|record| record.length).collect();
        lengths.sort_unstable();
        report.length_median = at_level(&lengths, 0.5);
        report.length_p90 = at_level(&lengths, 0.9);
        report.length_p99 = at_level(&lengths, 0.99);
        report.length_max = at_level(&lengths, 1.0);
        lengths.clear();
        lengths.extend(records.iter().map(|record| record.full_length));
        lengths.sort_unstable();
        report.full_length_median = at_level(&lengths, 0.5);
        report.full_length_p90 = at_level(&lengths, 0.9);
        report.full_length_p99 = at_level(&lengths, 0.99);
        report.full_length_max = at_level(&lengths, 1.0);
        report
    }
}

/// The smallest of the sorted values that at least `level` of them do not exceed.
fn at_level(sorted: &[u32], level: f64) -> u64 {
    let rank = (level * sorted.len() as f64).ceil() as usize;
    sorted
        .get(rank.saturating_sub(1))
        .map_or(0, |&value| u64::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_counts_patients_and_not_only_samples() {
        let record = |subject_id, length, full_length, dropped_rows, split| SampleRecord {
            subject_id,
            length,
            full_length,
            rows: 10,
            dropped_rows,
            split,
            ..Default::default()
        };
        let report = PrepareReport::of(&[
            record(1, 10, 30, 2, 1),
            record(1, 10, 40, 3, 1),
            record(2, 8, 8, 0, 2),
            record(3, 9, 9, 0, 0),
            record(4, 10, 15, 1, 3),
        ]);
        assert_eq!((report.samples, report.patients), (5, 4));
        assert_eq!(
            (report.truncated_samples, report.truncated_patients),
            (3, 2)
        );
        assert_eq!((report.dropped_tokens, report.dropped_rows), (55, 6));
        assert_eq!(
            (
                report.train_samples,
                report.tuning_samples,
                report.held_out_samples,
                report.unassigned_samples
            ),
            (2, 1, 1, 1)
        );
        assert_eq!((report.length_median, report.length_max), (10, 10));
        assert_eq!(
            (report.full_length_median, report.full_length_max),
            (15, 40)
        );
        assert_eq!(PrepareReport::of(&[]).length_max, 0);
    }
}
