use std::sync::Arc;

use calor_records::{Decoded, Modality};

use crate::labels::Targets;
use crate::plan::MicroBatch;
use crate::prepared::{Prepared, Sample};
use crate::stream::{SOFT_SLOT, SeriesValue};

/// A micro-batch on the host, ready to be uploaded. Arrays are `[rows, seq]`, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct HostBatch {
    pub rows: usize,
    /// Length of the longest row, rounded up where that was asked for.
    pub seq: usize,
    /// The padding token where there is no other.
    pub input_ids: Vec<i32>,
    /// From 0 in every segment; 0 in padding.
    pub positions: Vec<i32>,
    /// Number of the sample within its row, from 1; 0 in padding.
    pub segments: Vec<i32>,
    /// Where each sample is, row by row and from left to right.
    pub spans: Vec<Span>,
    /// Position of each sample in [`Prepared`], in the order of `spans`.
    pub samples: Vec<u64>,
    /// Target of each sample, in the order of `spans`.
    pub targets: Vec<Targets>,
    /// Tokens of samples.
    pub token_count: usize,
    /// `rows * seq`.
    pub padded_token_count: usize,
    /// Labels that contribute to the loss.
    pub supervised_count: usize,
    /// Modality items, in the order of their soft tokens.
    pub items: Vec<PlacedItem>,
}

/// A modality item and the positions that its soft tokens take. `input_ids` has the padding token
/// there.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacedItem {
    /// Position in [`SequenceOptions::streams`](crate::SequenceOptions::streams).
    pub stream: usize,
    pub row: usize,
    pub start: usize,
    /// Position of the sample in [`HostBatch::spans`].
    pub span: usize,
    /// Before the prediction; `None` for an item without time.
    pub days_before: Option<f32>,
    /// Number of the site among those of the training patients.
    pub site: Option<usize>,
    pub content: ItemContent,
}

#[derive(Clone, Debug, PartialEq)]
pub enum ItemContent {
    /// The patient has none, or it is withheld.
    Missing,
    /// A file of the cohort that has not been read yet.
    File(Arc<str>),
    Decoded(Arc<Decoded>),
    Series(Vec<SeriesValue>),
}

/// The tokens of one sample in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub row: usize,
    pub start: usize,
    pub length: usize,
}

/// Puts the samples of a micro-batch side by side. `seq` is the longest row rounded up to a
/// multiple of `seq_multiple` (1 or 0: as it is), since some devices compile a kernel for every
/// shape they meet.
///
/// # Panics
/// When a sample's number is not below `prepared.len()`.
pub fn collate(
    prepared: &Prepared,
    micro_batch: &MicroBatch,
    pad_id: u32,
    seq_multiple: usize,
) -> HostBatch {
    let used = |row: &Vec<u32>| -> usize {
        row.iter()
            .map(|&sample| prepared.length(sample as usize))
            .sum()
    };
    let longest = micro_batch.rows.iter().map(used).max().unwrap_or(0);
    let rows = micro_batch.rows.len();
    let seq = longest.next_multiple_of(seq_multiple.max(1));
    let padded_token_count = rows * seq;
    let mut batch = HostBatch {
        rows,
        seq,
        input_ids: vec![pad_id as i32; padded_token_count],
        positions: vec![0; padded_token_count],
        segments: vec![0; padded_token_count],
        spans: Vec::new(),
        samples: Vec::new(),
        targets: Vec::new(),
        token_count: 0,
        padded_token_count,
        supervised_count: 0,
        items: Vec::new(),
    };
    for (row, samples) in micro_batch.rows.iter().enumerate() {
        let mut start = 0;
        for (segment, &number) in (1..).zip(samples) {
            let sample = prepared.sample(number as usize);
            let length = sample.tokens.len();
            let first = row * seq + start;
            for (offset, &token) in sample.tokens.iter().enumerate() {
                let token = if token == SOFT_SLOT { pad_id } else { token };
                batch.input_ids[first + offset] = token as i32;
                batch.positions[first + offset] = offset as i32;
                batch.segments[first + offset] = segment;
            }
            place_items(&mut batch, prepared, &sample, row, start);
            batch.spans.push(Span { row, start, length });
            batch.samples.push(u64::from(number));
            batch.supervised_count += sample.targets.supervised_count();
            batch.targets.push(sample.targets);
            batch.token_count += length;
            start += length;
        }
    }
    batch
}

/// Gives each item of a sample the soft slots that stand there for it, one after the other.
fn place_items(
    batch: &mut HostBatch,
    prepared: &Prepared,
    sample: &Sample<'_>,
    row: usize,
    start: usize,
) {
    const US_PER_DAY: f64 = 86_400_000_000.0;
    let slots = sample.tokens.iter().position(|&token| token == SOFT_SLOT);
    let Some(mut offset) = slots else {
        return;
    };
    for item in sample.items.iter() {
        let stream = &prepared.streams()[item.stream];
        let content = match stream.modality {
            Modality::Series if !item.is_missing() => ItemContent::Series(item.series().to_vec()),
            _ => match item.path() {
                Some(path) => ItemContent::File(path.into()),
                None => ItemContent::Missing,
            },
        };
        batch.items.push(PlacedItem {
            stream: item.stream,
            row,
            start: start + offset,
            span: batch.spans.len(),
            days_before: item
                .time_us
                .map(|time_us| ((sample.prediction_time_us - time_us) as f64 / US_PER_DAY) as f32),
            site: item.site,
            content,
        });
        offset += stream.tokens;
    }
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
