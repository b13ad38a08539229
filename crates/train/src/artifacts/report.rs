//! `report.json`: what a run was, what it found and what it cost.

use std::collections::BTreeMap;

use calor_evaluate::{Curves, EntityScores, Metrics};
use calor_meter::MeterReport;
use calor_sequence::PrepareReport;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Session;
use crate::recipe::{Metric, TaskKind};

/// The number in `schema` of a report of this version.
pub const REPORT_SCHEMA: u32 = 1;

/// A run, from its recipe to its joules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the report's format.
    pub schema: u32,
    /// The recipe's name.
    pub name: String,
    /// How training ended.
    pub outcome: Outcome,
    /// Seconds since 1970-01-01 when the report was written.
    pub written_unix_s: u64,
    /// The task.
    pub task: TaskReport,
    /// The model.
    pub model: ModelReport,
    /// The patients.
    pub data: DataReport,
    /// Training.
    pub training: TrainingReport,
    /// Evaluation of the kept model, by split.
    pub evaluation: BTreeMap<String, SplitEvaluation>,
    /// Throughput, memory and energy of this process.
    pub meter: MeterReport,
    /// Throughput, memory and energy of processes that worked on the run before, as of
    /// their last checkpoints; what they did after those is done again and counted here.
    pub earlier_sessions: Vec<Session>,
    /// What the run can be repeated from.
    pub provenance: Provenance,
}

/// How training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// All steps were done.
    Finished,
    /// The patience ran out.
    StoppedEarly,
}

/// The task of a report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskReport {
    /// Its kind.
    pub kind: TaskKind,
    /// The label sets.
    pub labels: Vec<String>,
    /// Names of the classes, or of the labels of a multilabel task.
    pub classes: Vec<String>,
    /// `last`, `cls` or `mean`.
    pub pooling: String,
    /// Weights of the classes in the loss, if any.
    pub class_weights: Option<Vec<f64>>,
}

/// The model of a report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    /// As the recipe names it.
    pub id: String,
    /// `config.json`'s `model_type`.
    pub model_type: String,
    /// Type of the frozen weights.
    pub dtype: String,
    /// Parameters that are not trained.
    pub frozen_parameters: u64,
    /// Bytes of those as they are kept.
    #[serde(default)]
    pub frozen_bytes: u64,
    /// Parameters of the adapter.
    pub adapter_parameters: u64,
    /// Parameters of the head and of modules trained in full.
    pub head_parameters: u64,
    /// Trained parameters of modality encoders, their towers' adapters included.
    #[serde(default)]
    pub encoder_parameters: u64,
    /// Trained parameters between the encoders and the backbone.
    #[serde(default)]
    pub projector_parameters: u64,
}

/// The patients of a report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataReport {
    /// The cohort's folder.
    pub cohort: String,
    /// Samples by split.
    pub splits: BTreeMap<String, SplitCounts>,
    /// The report of the preparation: tokens, truncation, quantiles.
    pub sequences: PrepareReport,
    /// Files of each modality that could not be decoded and counted as missing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub absent_items: BTreeMap<String, u64>,
    /// Items that `max_seconds` cut, and the seconds that went.
    #[serde(default)]
    pub cut_items: u64,
    /// See `cut_items`.
    #[serde(default)]
    pub cut_s: f64,
}

/// What a split holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitCounts {
    /// Patients.
    pub patients: u64,
    /// Patients at prediction times.
    pub samples: u64,
    /// Tokens.
    pub tokens: u64,
    /// Samples by class, or with a positive label by label.
    pub by_class: BTreeMap<String, u64>,
}

/// Training in a report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainingReport {
    /// Optimizer steps done.
    pub steps: u64,
    /// Optimizer steps of an epoch.
    pub steps_per_epoch: u64,
    /// Epochs done, as a fraction.
    pub epochs: f64,
    /// The evaluation whose model was kept; none without `tuning` patients.
    pub best: Option<BestEvaluation>,
    /// Mean loss over the last epoch's steps, or all steps if there were fewer.
    pub final_loss: Option<f64>,
}

/// The evaluation whose model was kept.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestEvaluation {
    /// Optimizer steps done when it was made.
    pub step: u64,
    /// What was compared.
    pub metric: Metric,
    /// Its value.
    pub value: f64,
}

/// Evaluation of a split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SplitEvaluation {
    /// Patients at prediction times.
    pub samples: u64,
    /// Of these, samples left out of `metrics` because one of their labels is not known.
    pub samples_with_unknown_label: u64,
    /// Mean loss, without class weights.
    pub loss: Option<f64>,
    /// Metrics with their intervals.
    pub metrics: Metrics,
    /// Curves of each class or label.
    pub curves: Vec<Curves>,
    /// Tokens: each type of entity by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entities: Vec<EntityScores>,
    /// Each label of a multilabel task by itself, over the samples where it is known.
    pub labels: Vec<LabelEvaluation>,
    /// Regression: predicted and observed, at most a thousand points.
    pub scatter: Vec<[f64; 2]>,
}

/// One label of a multilabel task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LabelEvaluation {
    /// The label.
    pub label: String,
    /// Its metrics; none where it is never known.
    pub metrics: Option<Metrics>,
}

/// What a run can be repeated from, together with `recipe.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Version of Calor.
    pub calor_version: String,
    /// The device as the command line names it.
    pub device: String,
    /// What the device is.
    pub device_description: String,
    /// The recipe's seed.
    pub seed: u64,
    /// SHA-256 of the resolved recipe.
    pub recipe_sha256: String,
    /// Hash of the prepared sequences: cohort, labels, tokenizer and options.
    pub data_hash: String,
    /// Files of the checkpoint.
    pub checkpoint_files: Vec<FileHash>,
    /// Operating system and processor architecture.
    pub platform: String,
}

/// A file by name, length and SHA-256.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHash {
    /// Relative to the checkpoint's folder.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
}
