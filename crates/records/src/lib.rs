//! Patients: MEDS cohorts read and validated, events in time order.
//!
//! [`Cohort::open`] checks every shard's columns and indexes its subjects; patients are then
//! streamed ([`Cohort::read_shard`], [`Cohort::read_chunk`]) or read one at a time
//! ([`Cohort::read_subject`]) with memory that does not grow with the cohort. [`validate`] checks
//! a folder against each rule of MEDS 0.4, [`inspect`] says what is in it.
//!
//! No message of this crate carries a patient's identifier or value: it names the file and the
//! row, counted from 0.

#![forbid(unsafe_code)]

mod cohort;
mod error;
mod files;
mod fingerprint;
mod inspect;
mod item;
mod labels;
mod metadata;
mod numbers;
mod patient;
mod reader;
mod rules;
mod synth;
mod table;
mod time;
mod validate;
mod values;
mod writer;

pub use cohort::{Chunk, Cohort, Shard};
pub use error::RecordsError;
pub use fingerprint::{FileFingerprint, Fingerprint};
pub use inspect::{
    CodeCount, CodeSummary, ColumnSummary, Distribution, InspectOptions, Inspection, ItemSummary,
    Missingness, SiteSummary, SplitSummary, SurvivalSplitSummary, SurvivalSummary,
    TaskSplitSummary, TaskSummary, inspect,
};
pub use item::{
    Decoded, FeatureSet, ImageFilter, ImageOptions, ImagePlane, ImagePosition, ImageResize,
    ImageWindow, ItemPath, Modality, OmicsGroups, OmicsOptions, OmicsVector, SpeechOptions,
    WaveformOptions, decode_image, decode_omics, decode_speech, decode_waveform, omics_features,
    omics_names_file, read_omics,
};
pub use labels::{Label, LabelKind, LabelValue, Labels, SurvivalLabel, SurvivalLabels};
pub use metadata::{CodeEntry, CodeTable, DatasetMetadata, Splits};
pub use patient::{BIRTH_CODE, DEATH_CODE, Event, Patient, Split};
pub use reader::ShardReader;
pub use rules::{Finding, Rule, RuleReport, Severity, ValidationReport};
pub use synth::{
    HeldOutModality, HeldOutOptimum, ModalityOptimum, Optimum, SourceOptimum, SubsetOptimum,
    SynthModality, SynthOptions, SynthReport, ensure_synthetic, synthesize,
};
pub use time::{MICROSECONDS_PER_DAY, MICROSECONDS_PER_SECOND, format_time_us};
pub use validate::validate;
pub use writer::{
    ShardOptions, ShardWriter, write_codes, write_dataset, write_labels, write_shard, write_splits,
    write_survival,
};
