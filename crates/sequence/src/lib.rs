//! Patient sequences: events to text, text to tokens, tokens to packed batches.
//!
//! [`prepare`] writes every labelled patient as text up to the prediction time, encodes it with
//! the tokenizer of the checkpoint, keeps it within a length by dropping the oldest events, and
//! leaves the tokens in a memory-mapped cache. [`BatchPlan`] says which samples make up a step,
//! [`collate`] puts them side by side ([`HostBatch`]), and [`Prefetcher`] does so ahead of time.
//!
//! A patient reads like this: age and sex, rows without time, then the rows of each day under the
//! time that has passed, with values as a quantile word and a number.
//!
//! ```text
//! 67 year old man, smoker. 2 years ago weight high 92.1, creatinine normal 0.9. 3 months later
//! type 2 diabetes, creatinine very high 1.42.
//! ```

#![deny(unsafe_code)]

mod batch;
mod cache;
mod calendar;
mod error;
mod fit;
mod histogram;
mod items;
mod labels;
mod mmap;
mod notes;
mod numbers;
mod options;
mod pack;
mod plan;
mod prefetch;
mod prepare;
mod prepared;
mod random;
mod render;
mod sample;
mod scaling;
mod statistics;
mod stream;
#[cfg(test)]
mod testing;
mod text;
mod tokenizer;
mod windows;

pub use batch::{HostBatch, ItemContent, PlacedItem, Span, collate};
pub use error::SequenceError;
pub use items::{Decode, Decoding, ItemStore, MissingItem};
pub use labels::{NO_TARGET, TargetKind, Targets, TaskLabels};
pub use notes::Notes;
pub use options::{Intervals, NumberStyle, Overlength, Repeat, SequenceOptions, TimeResolution};
pub use pack::pack;
pub use plan::{BatchPlan, MicroBatch, Order, PlanOptions, Step};
pub use prefetch::{PrefetchedBatch, Prefetcher};
pub use prepare::{Phase, Progress, prepare};
pub use prepared::{Item, ItemCounts, Items, PrepareReport, Prepared, Sample, SampleSet};
pub use sample::{RenderedSample, render_sample};
pub use scaling::Scaling;
pub use statistics::{CodeStatistics, ValueStatistics};
pub use stream::{SeriesValue, StreamOptions};
pub use text::{ChatTemplate, DialogueEncoder, LossOn, TextFiles, TextTask, prepare_text};
pub use tokenizer::PatientTokenizer;
pub use windows::{WINDOW_STATISTICS, series_windows};
