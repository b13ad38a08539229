//! Cohort, labels and tokenizer become prepared sequences.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use calor_records::{Cohort, Labels, Modality, Split};
use calor_sequence::{
    ChatTemplate, ItemStore, NO_TARGET, Notes, PatientTokenizer, Prepared, SampleSet, Scaling,
    SequenceOptions, Targets, TaskLabels, TextTask, ValueStatistics, prepare, prepare_text,
};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::artifacts::report::SplitCounts;
use crate::objective::{ClassCounts, TargetScale};
use crate::observer::{Observer, Stage};
use crate::recipe::{ChatTemplateChoice, LossOn, ModalitySection, TaskKind, TextSection};

/// What an adapter has to know about the patients it was trained on: `task.json` beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskFile {
    /// Version of this file's format.
    pub format: u32,
    /// The task.
    pub kind: TaskKind,
    /// The label sets.
    pub labels: Vec<String>,
    /// Classes in the order of the outputs; the labels of a multilabel task.
    pub classes: Vec<String>,
    /// Regression: what an output of 0 and a step of 1 mean.
    pub scale: Option<TargetScale>,
    /// How patients are written.
    pub sequence: SequenceOptions,
    /// Quantiles of the training patients, with which others are written too.
    pub statistics: ValueStatistics,
    /// What standardises the items of each stream of `sequence`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scalings: Vec<Option<Scaling>>,
}

/// The version of [`TaskFile`] that is read and written.
pub const TASK_FORMAT: u32 = 1;
/// Its name in an adapter's folder.
pub const TASK_FILE: &str = "task.json";

/// Rows of a cohort that are held in memory when it is only looked through.
const ROWS_AT_ONCE: u64 = 1 << 17;

/// Where patients and their labels come from.
pub(crate) struct Source<'a> {
    pub cohort: &'a Path,
    /// Files that are read instead of a cohort, where there are any.
    pub text: &'a TextSection,
    pub kind: TaskKind,
    /// Language models: what is learned, and the codes of the notes that are learned.
    pub loss: LossOn,
    pub notes: &'a [String],
    /// Names of label sets, or paths; empty: every subject at its last event.
    pub labels: Vec<&'a str>,
    pub sequence: SequenceOptions,
    /// How the items of the streams of `sequence` are decoded.
    pub modality: &'a ModalitySection,
    /// The checkpoint's folder, for its tokenizer.
    pub checkpoint: &'a Path,
    pub cache: &'a Path,
    /// Of the model's training, where there is one already.
    pub trained: Option<&'a TaskFile>,
}

/// Prepared sequences and what belongs to them.
pub(crate) struct Data {
    pub prepared: Arc<Prepared>,
    pub items: Arc<ItemStore>,
    pub pad_id: u32,
    pub vocab_size: usize,
}

/// Where the labels of a task are: a name is a folder of the cohort, anything with a
/// separator is a path.
pub fn label_folder(cohort: &Path, name: &str) -> PathBuf {
    if name.contains(['/', '\\']) {
        PathBuf::from(name)
    } else {
        cohort.join("labels").join(name)
    }
}

/// What the first training item of a modality looks like.
pub(crate) struct ItemShape {
    /// Of the decoded item; `[variables]` of a series.
    pub shape: Vec<usize>,
    /// Where it was read.
    pub file: Option<PathBuf>,
}

impl Data {
    /// Opens everything and prepares the sequences, or takes them from the cache.
    pub fn load(source: &Source<'_>, observer: &mut dyn Observer) -> Result<Data, TrainError> {
        observer.stage(Stage::Open);
        let tokenizer = PatientTokenizer::open(source.checkpoint)?;
        if source.text.is_used() {
            return source.load_text(&tokenizer, observer);
        }
        let cohort = Cohort::open(source.cohort)?;
        let labels = source.read_labels(&cohort)?;
        observer.stage(Stage::Prepare);
        let shared = RefCell::new(&mut *observer);
        let statistics = source.trained.map(|trained| &trained.statistics);
        let progress = |progress| shared.borrow_mut().preparing(progress);
        let prepared = prepare(
            &cohort,
            &labels,
            &tokenizer,
            &source.sequence,
            statistics,
            source.cache,
            &progress,
        )?;
        source.finish(prepared, &tokenizer, observer)
    }

    /// Files of each modality that could not be decoded and counted as missing, where there were any.
    pub fn absent_items(&self) -> BTreeMap<String, u64> {
        let streams = self.prepared.streams().iter();
        let names = streams.map(|stream| stream.modality.name().to_owned());
        names
            .zip(self.items.absent())
            .filter(|(_, files)| *files > 0)
            .collect()
    }

    /// An item of each stream, as training patients have it; `None` where there is none.
    ///
    /// # Errors
    /// An item that cannot be decoded.
    pub fn shapes(&self) -> Result<Vec<Option<ItemShape>>, TrainError> {
        let statistics = self.prepared.statistics();
        let training = self.set(Split::Train);
        let mut shapes = Vec::new();
        for (number, stream) in self.prepared.streams().iter().enumerate() {
            shapes.push(match stream.modality {
                Modality::Series => {
                    let variables = stream.variables(statistics).len();
                    (variables > 0).then(|| ItemShape {
                        shape: vec![variables],
                        file: None,
                    })
                }
                _ => {
                    let found = self.items.shape(&self.prepared, &training, number)?;
                    found.map(|(shape, file)| ItemShape {
                        shape,
                        file: Some(file),
                    })
                }
            });
        }
        Ok(shapes)
    }

    pub fn set(&self, split: Split) -> SampleSet {
        self.prepared.split(split)
    }

    /// Samples by class of a set, for class weights.
    pub fn class_counts(&self, kind: TaskKind, set: &SampleSet) -> ClassCounts {
        match kind {
            TaskKind::Binary | TaskKind::Multiclass => {
                ClassCounts::Classes(self.prepared.class_counts(set))
            }
            TaskKind::Regression | TaskKind::CausalLm => ClassCounts::None,
            TaskKind::Tokens => {
                let mut counts = vec![0u64; self.prepared.classes().len()];
                for sample in set.samples() {
                    if let Targets::Tokens(targets) = self.prepared.sample(*sample as usize).targets
                    {
                        for target in targets.iter().filter(|target| **target != NO_TARGET) {
                            counts[*target as usize] += 1;
                        }
                    }
                }
                ClassCounts::Classes(counts)
            }
            TaskKind::Multilabel => {
                let mut counts = vec![[0u64; 2]; self.prepared.classes().len()];
                for sample in set.samples() {
                    if let Targets::Multilabel(labels) =
                        self.prepared.sample(*sample as usize).targets
                    {
                        for (count, label) in counts
                            .iter_mut()
                            .zip(labels)
                            .filter(|(_, label)| !label.is_nan())
                        {
                            count[usize::from(label > 0.5)] += 1;
                        }
                    }
                }
                ClassCounts::Labels(counts)
            }
        }
    }

    /// Mean and standard deviation of a regression's training targets.
    pub fn target_scale(&self, set: &SampleSet) -> TargetScale {
        let values: Vec<f64> = set
            .samples()
            .iter()
            .filter_map(
                |sample| match self.prepared.sample(*sample as usize).targets {
                    Targets::Real(value) => Some(f64::from(value)),
                    _ => None,
                },
            )
            .collect();
        TargetScale::of(&values)
    }

    /// What a split holds, for the report.
    pub fn split_counts(&self, kind: TaskKind, set: &SampleSet) -> SplitCounts {
        let mut patients = BTreeSet::new();
        let mut tokens = 0;
        for sample in set.samples() {
            let sample = self.prepared.sample(*sample as usize);
            patients.insert(sample.subject_id);
            tokens += sample.tokens.len() as u64;
        }
        let names = self.prepared.classes();
        let by_class: BTreeMap<String, u64> = match self.class_counts(kind, set) {
            ClassCounts::Classes(counts) => names.iter().cloned().zip(counts).collect(),
            ClassCounts::Labels(counts) => names
                .iter()
                .cloned()
                .zip(counts.into_iter().map(|[_, positive]| positive))
                .collect(),
            ClassCounts::None => BTreeMap::new(),
        };
        SplitCounts {
            patients: patients.len() as u64,
            samples: set.len() as u64,
            tokens,
            by_class,
        }
    }
}

impl Source<'_> {
    /// Rows of text files in the place of patients.
    fn load_text(
        &self,
        tokenizer: &PatientTokenizer,
        observer: &mut dyn Observer,
    ) -> Result<Data, TrainError> {
        let template = match (self.kind, self.text.chat_template) {
            (TaskKind::CausalLm, ChatTemplateChoice::Auto) => {
                ChatTemplate::open(self.checkpoint, &self.text.date)?
            }
            _ => None,
        };
        let classes = self.trained.map(|trained| trained.classes.as_slice());
        let task = match self.kind {
            TaskKind::CausalLm => TextTask::CausalLm {
                template: template.as_ref(),
                loss: self.loss,
            },
            TaskKind::Tokens => TextTask::Tokens { classes },
            kind => TextTask::Class {
                classes,
                binary: kind == TaskKind::Binary,
            },
        };
        observer.stage(Stage::Prepare);
        let shared = RefCell::new(&mut *observer);
        let prepared = prepare_text(
            &self.text.files(),
            &task,
            tokenizer,
            &self.sequence,
            self.cache,
            &|progress| shared.borrow_mut().preparing(progress),
        )?;
        let left_out = prepared.report().samples_without_data;
        if left_out > 0 {
            observer.warning(&format!(
                "{left_out} rows are left out: nothing that is learned of them is within `sequence.max_tokens`"
            ));
        }
        self.finish(prepared, tokenizer, observer)
    }

    fn finish(
        &self,
        prepared: Prepared,
        tokenizer: &PatientTokenizer,
        observer: &mut dyn Observer,
    ) -> Result<Data, TrainError> {
        if let Some(reason) = prepared.rebuilt_because() {
            observer.warning(&format!(
                "the cached sequences were prepared again: {reason}"
            ));
        }
        let items = self.item_store(&prepared)?;
        Ok(Data {
            prepared: Arc::new(prepared),
            items: Arc::new(items),
            pad_id: tokenizer.pad_id(),
            vocab_size: tokenizer.vocab_size(),
        })
    }

    /// The files behind modality items, standardised as in training.
    fn item_store(&self, prepared: &Prepared) -> Result<ItemStore, TrainError> {
        let streams = self.modality.streams();
        let decodings = self.sequence.streams.iter().map(|options| {
            let stream = streams
                .iter()
                .find(|stream| stream.options.modality == options.modality);
            stream.and_then(|stream| stream.decoding.clone())
        });
        let memory_bytes = self.modality.memory_mib << 20;
        let mut items = ItemStore::new(self.cohort, self.cache, decodings.collect(), memory_bytes);
        match self.trained {
            Some(trained) => items.set_scalings(trained.scalings.clone()),
            None => items.fit_scalings(prepared, &prepared.split(Split::Train))?,
        }
        Ok(items)
    }

    fn read_labels(&self, cohort: &Cohort) -> Result<TaskLabels, TrainError> {
        if self.kind == TaskKind::CausalLm {
            let notes = Notes {
                codes: self.notes.to_vec(),
                loss: self.loss,
            };
            let samples = note_times(cohort, &notes, &self.sequence)?;
            return Ok(TaskLabels::notes(notes, samples)?);
        }
        if self.labels.is_empty() {
            return Ok(TaskLabels::unlabelled(
                "every subject at its last event",
                last_events(cohort)?,
            )?);
        }
        let read = |name: &str| -> Result<Labels, TrainError> {
            let folder = label_folder(self.cohort, name);
            if !folder.exists() {
                return Err(TrainError::Task {
                    task: self.kind.name(),
                    problem: missing_labels(cohort, &folder, name),
                });
            }
            Ok(Labels::read(&folder)?)
        };
        let task = self.labels[0];
        Ok(match self.kind {
            TaskKind::Binary => TaskLabels::binary(task, &read(task)?)?,
            TaskKind::Multiclass => {
                let classes = self.trained.map(|trained| trained.classes.as_slice());
                TaskLabels::multiclass(task, &read(task)?, classes)?
            }
            TaskKind::Regression => TaskLabels::regression(task, &read(task)?)?,
            TaskKind::Multilabel => {
                let labels: Vec<Labels> = self
                    .labels
                    .iter()
                    .map(|name| read(name))
                    .collect::<Result<_, _>>()?;
                let pairs: Vec<(&str, &Labels)> =
                    self.labels.iter().copied().zip(&labels).collect();
                TaskLabels::multilabel(&pairs)?
            }
            TaskKind::Tokens | TaskKind::CausalLm => {
                unreachable!("tags come with rows of text, and notes were read above")
            }
        })
    }
}

fn missing_labels(cohort: &Cohort, folder: &Path, name: &str) -> String {
    let known = cohort.label_tasks().unwrap_or_default();
    let problem = format!(
        "the label set `{name}` is not there: {} does not exist",
        folder.display()
    );
    if known.is_empty() {
        format!("{problem}, and the cohort has none under `labels/`")
    } else {
        format!(
            "{problem}; the cohort has {}",
            known
                .iter()
                .map(|known| format!("`{known}`"))
                .collect::<Vec<_>>()
                .join(", ")
        )
    }
}

/// When notes that are learned were written.
fn note_times(
    cohort: &Cohort,
    notes: &Notes,
    sequence: &SequenceOptions,
) -> Result<Vec<(i64, i64)>, TrainError> {
    let mut samples = Vec::new();
    for chunk in cohort.chunks(ROWS_AT_ONCE) {
        for patient in cohort.read_chunk(&chunk, &|_| true)? {
            samples.extend(notes.samples(&patient?, sequence));
        }
    }
    Ok(samples)
}

/// Every subject with the time of its last event; subjects without a dated event are left out.
fn last_events(cohort: &Cohort) -> Result<Vec<(i64, i64)>, TrainError> {
    let mut samples = Vec::new();
    for chunk in cohort.chunks(ROWS_AT_ONCE) {
        for patient in cohort.read_chunk(&chunk, &|_| true)? {
            let patient = patient?;
            if let Some(time_us) = patient
                .events
                .iter()
                .filter_map(|event| event.time_us)
                .max()
            {
                samples.push((patient.subject_id, time_us));
            }
        }
    }
    Ok(samples)
}
