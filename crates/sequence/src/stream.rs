//! Modality items on their way into a sequence: which of a patient's items a sample sees, and how
//! many soft tokens they take.

use std::collections::HashMap;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use calor_records::{Event, Modality, Patient};
use serde::{Deserialize, Serialize};

use crate::SequenceError;
use crate::options::SequenceOptions;
use crate::statistics::ValueStatistics;

/// Stands in the cache where a soft token goes; no vocabulary reaches it.
pub(crate) const SOFT_SLOT: u32 = u32::MAX;
/// Standardised values beyond this are taken for errors of measurement and cut to it.
const LARGEST_SCORE: f32 = 10.0;
/// Standard deviations of a normal distribution in its interquartile range.
const DEVIATIONS_IN_IQR: f32 = 1.349;
const US_PER_DAY: f64 = 86_400_000_000.0;

/// A modality of the cohort that becomes soft tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    pub modality: Modality,
    /// Soft tokens an item.
    pub tokens: usize,
    /// Items a sample at most; the latest are kept. A series is one item.
    pub max_items: usize,
    /// Series: values at most; the latest are kept.
    pub max_values: usize,
    /// Series: the codes whose numbers are taken; an entry ending in `*` stands for every code that
    /// begins so, and none for every code with statistics.
    pub codes: Vec<String>,
    /// Series: whether the rows are written as text as well.
    pub in_text: bool,
}

impl StreamOptions {
    /// One item of four soft tokens, its rows written as text as well.
    pub fn new(modality: Modality) -> StreamOptions {
        StreamOptions {
            modality,
            tokens: 4,
            max_items: 1,
            max_values: 512,
            codes: Vec::new(),
            in_text: true,
        }
    }

    fn takes(&self, code: &str) -> bool {
        self.codes.is_empty() || matches_any(&self.codes, code)
    }

    /// The variables of a series in the order of their numbers.
    pub fn variables<'a>(&self, statistics: &'a ValueStatistics) -> Vec<&'a str> {
        let codes = statistics.codes.keys().map(String::as_str);
        codes.filter(|code| self.takes(code)).collect()
    }
}

/// Whether one of the patterns is the text, or ends in `*` and the text begins like it.
pub(crate) fn matches_any(patterns: &[String], text: &str) -> bool {
    patterns
        .iter()
        .any(|pattern| match pattern.strip_suffix('*') {
            Some(prefix) => text.starts_with(prefix),
            None => text == pattern,
        })
}

pub(crate) fn check(streams: &[StreamOptions]) -> Result<(), SequenceError> {
    for (position, stream) in streams.iter().enumerate() {
        for (key, value) in [
            ("tokens", stream.tokens),
            ("max_items", stream.max_items),
            ("max_values", stream.max_values),
        ] {
            if value == 0 {
                return Err(SequenceError::Modality {
                    modality: stream.modality.name(),
                    problem: format!("`{key}` is 0; it is at least 1"),
                });
            }
        }
        let earlier = &streams[..position];
        if earlier
            .iter()
            .any(|other| other.modality == stream.modality)
        {
            return Err(SequenceError::Modality {
                modality: stream.modality.name(),
                problem: "it is there twice".to_string(),
            });
        }
    }
    Ok(())
}

/// One value of an irregular series.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct SeriesValue {
    /// Before the prediction.
    pub time_days: f32,
    /// Number of the variable, in the order of [`StreamOptions::variables`].
    pub variable: u32,
    /// Distance from the median of training patients in standard deviations, as estimated from
    /// their interquartile range; cut at ±10.
    pub value: f32,
}

/// An item of a sample before it is written to the cache.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DraftItem {
    /// Position in [`SequenceOptions::streams`].
    pub stream: usize,
    pub time_us: Option<i64>,
    pub site: Option<Arc<str>>,
    pub content: DraftContent,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum DraftContent {
    /// The patient has no such item.
    Missing,
    /// Path relative to the cohort.
    File(Arc<str>),
    Series(Vec<SeriesValue>),
}

/// The items that a sample sees, and how many there were beyond `max_items`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct DraftItems {
    pub items: Vec<DraftItem>,
    pub dropped: u32,
}

impl DraftItems {
    /// Soft tokens of all items.
    pub fn slots(&self, streams: &[StreamOptions]) -> usize {
        self.items
            .iter()
            .map(|item| streams[item.stream].tokens)
            .sum()
    }
}

/// Finds a sample's items. One per thread, like the renderer.
pub(crate) struct Collector<'a> {
    options: &'a SequenceOptions,
    /// Of the series stream: number, median and scale of each variable.
    variables: HashMap<&'a str, (u32, f32, f32)>,
}

impl<'a> Collector<'a> {
    pub fn new(statistics: &'a ValueStatistics, options: &'a SequenceOptions) -> Collector<'a> {
        let series = options
            .streams
            .iter()
            .find(|stream| stream.modality == Modality::Series);
        let names = series.map_or_else(Vec::new, |stream| stream.variables(statistics));
        let variables = (0u32..)
            .zip(names)
            .map(|(number, code)| {
                let found = &statistics.codes[code];
                let spread = found.interquartile_range / DEVIATIONS_IN_IQR;
                let scale = if spread > 0.0 { 1.0 / spread } else { 1.0 };
                (code, (number, found.median, scale))
            })
            .collect();
        Collector { options, variables }
    }

    /// Whether the code's numbers go into a series.
    pub fn has_variable(&self, code: &str) -> bool {
        self.variables.contains_key(code)
    }

    /// Items visible at `prediction_time_us`, stream by stream and in time order; one that is
    /// missing where a stream has none.
    pub fn collect(&self, patient: &Patient, prediction_time_us: i64) -> DraftItems {
        let mut found = DraftItems::default();
        if self.options.streams.is_empty() {
            return found;
        }
        let visible = patient.events_until(prediction_time_us);
        for (stream, options) in self.options.streams.iter().enumerate() {
            let before = found.items.len();
            if options.modality == Modality::Series {
                found
                    .items
                    .extend(self.series(stream, options, visible, prediction_time_us));
            } else {
                self.files(stream, options, visible, &mut found);
            }
            if found.items.len() == before {
                found.items.push(DraftItem {
                    stream,
                    time_us: None,
                    site: None,
                    content: DraftContent::Missing,
                });
            }
        }
        found
    }

    fn files(
        &self,
        stream: usize,
        options: &StreamOptions,
        visible: &[Event],
        found: &mut DraftItems,
    ) {
        let first = found.items.len();
        for event in visible.iter().filter(|event| self.options.sees(event)) {
            for item in event.items.iter().flatten() {
                if item.modality == options.modality {
                    found.items.push(DraftItem {
                        stream,
                        time_us: event.time_us,
                        site: event.site.clone(),
                        content: DraftContent::File(item.path.clone()),
                    });
                }
            }
        }
        let too_many = (found.items.len() - first).saturating_sub(options.max_items);
        found.items.drain(first..first + too_many);
        found.dropped += too_many as u32;
    }

    fn series(
        &self,
        stream: usize,
        options: &StreamOptions,
        visible: &[Event],
        prediction_time_us: i64,
    ) -> Option<DraftItem> {
        let mut values: Vec<SeriesValue> = Vec::new();
        let mut latest_us = None;
        for event in visible.iter().filter(|event| self.options.sees(event)) {
            let (Some(time_us), Some(value)) = (event.time_us, event.numeric_value) else {
                continue;
            };
            let Some(&(variable, median, scale)) = self.variables.get(&*event.code) else {
                continue;
            };
            if !value.is_finite() {
                continue;
            }
            let score = ((value - median) * scale).clamp(-LARGEST_SCORE, LARGEST_SCORE);
            latest_us = Some(time_us);
            values.push(SeriesValue {
                time_days: ((prediction_time_us - time_us) as f64 / US_PER_DAY) as f32,
                variable,
                value: score,
            });
        }
        let too_many = values.len().saturating_sub(options.max_values);
        values.drain(..too_many);
        (!values.is_empty()).then_some(DraftItem {
            stream,
            time_us: latest_us,
            site: None,
            content: DraftContent::Series(values),
        })
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
