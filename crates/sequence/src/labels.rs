use std::collections::BTreeSet;

use calor_records::{LabelKind, LabelValue, Labels, SurvivalLabels};
use serde::{Deserialize, Serialize};

use crate::SequenceError;
use crate::notes::Notes;

/// Stands for a token that nothing is to be said about, as in PyTorch.
pub const NO_TARGET: i32 = -100;

/// What a model is to say about one sample.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// Nothing is known: a sample to predict for.
    None,
    /// Number of the class; binary tasks have 0 (false) and 1 (true).
    Class(i32),
    /// 0 or 1 for each label, NaN where it is not known.
    Multilabel(Vec<f32>),
    Real(f32),
    /// Days to the event or to the end of observation; 0 censored, 1 and up the causes.
    Survival {
        duration_days: f32,
        event: i32,
    },
    /// Of each token, the number of its class, or, of a language model, the token itself;
    /// [`NO_TARGET`] where nothing is learned.
    Tokens(Vec<i32>),
}

/// Which of [`Targets`]'s forms the samples of a task have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetKind {
    None,
    Class,
    Multilabel,
    Real,
    Survival,
    Tokens,
}

/// The samples of a task: subject, prediction time and target, sorted by subject and time.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskLabels {
    task: String,
    kind: TargetKind,
    classes: Vec<String>,
    /// Subject and prediction time in microseconds.
    keys: Vec<(i64, i64)>,
    /// `[samples, width]`, the bits of an `i32` or `f32` each.
    bits: Vec<u32>,
    width: usize,
    /// The notes that are learned, whose samples these are.
    notes: Option<Notes>,
}

impl Targets {
    /// Labels that contribute to the loss: unknown ones do not.
    pub fn supervised_count(&self) -> usize {
        match self {
            Targets::None => 0,
            Targets::Class(_) | Targets::Real(_) | Targets::Survival { .. } => 1,
            Targets::Multilabel(values) => values.iter().filter(|value| !value.is_nan()).count(),
            Targets::Tokens(targets) => {
                let learned = targets.iter().filter(|target| **target != NO_TARGET);
                learned.count()
            }
        }
    }

    pub(crate) fn from_bits(kind: TargetKind, bits: &[u32]) -> Targets {
        match kind {
            TargetKind::None => Targets::None,
            TargetKind::Class => Targets::Class(bits[0] as i32),
            TargetKind::Multilabel => {
                Targets::Multilabel(bits.iter().map(|&bits| f32::from_bits(bits)).collect())
            }
            TargetKind::Real => Targets::Real(f32::from_bits(bits[0])),
            TargetKind::Survival => Targets::Survival {
                duration_days: f32::from_bits(bits[0]),
                event: bits[1] as i32,
            },
            TargetKind::Tokens => Targets::Tokens(bits.iter().map(|&bits| bits as i32).collect()),
        }
    }
}

impl TargetKind {
    pub(crate) const ALL: [TargetKind; 6] = [
        TargetKind::None,
        TargetKind::Class,
        TargetKind::Multilabel,
        TargetKind::Real,
        TargetKind::Survival,
        TargetKind::Tokens,
    ];

    pub(crate) fn number(self) -> u32 {
        Self::ALL
            .iter()
            .position(|kind| *kind == self)
            .expect("it is one of all") as u32
    }
}

impl TaskLabels {
    /// A task with the answers no and yes.
    ///
    /// # Errors
    /// Labels that are not boolean; two labels for one subject and time.
    pub fn binary(task: &str, labels: &Labels) -> Result<TaskLabels, SequenceError> {
        Self::need(
            task,
            labels,
            "binary",
            "boolean_value",
            &[LabelKind::Boolean],
        )?;
        let bits = labels
            .rows()
            .iter()
            .map(|row| u32::from(row.value == LabelValue::Boolean(true)))
            .collect();
        let classes = truth_classes();
        Self::new(task, TargetKind::Class, classes, keys(labels), bits, 1)
    }

    /// A task with one of several classes as the answer: integers in numeric order, categories in
    /// alphabetical order, or the order of `classes` if it is given (a model trained before).
    ///
    /// # Errors
    /// Labels that are neither integers nor categories; a class that `classes` does not name; two
    /// labels for one subject and time.
    pub fn multiclass(
        task: &str,
        labels: &Labels,
        classes: Option<&[String]>,
    ) -> Result<TaskLabels, SequenceError> {
        Self::need(
            task,
            labels,
            "multiclass",
            "integer_value or categorical_value",
            &[LabelKind::Integer, LabelKind::Categorical],
        )?;
        let name = |value: &LabelValue| match value {
            LabelValue::Integer(number) => number.to_string(),
            LabelValue::Categorical(name) => name.to_string(),
            LabelValue::Boolean(_) | LabelValue::Float(_) => unreachable!("checked above"),
        };
        let classes: Vec<String> = match classes {
            Some(classes) => classes.to_vec(),
            None => {
                let mut classes: Vec<String> = labels
                    .rows()
                    .iter()
                    .map(|row| name(&row.value))
                    .collect::<BTreeSet<_>>()
                    .into_iter()
                    .collect();
                if labels.kind() == LabelKind::Integer {
                    classes.sort_by_key(|class| class.parse::<i64>().expect("it was a number"));
                }
                classes
            }
        };
        let bits = labels
            .rows()
            .iter()
            .enumerate()
            .map(|(row, label)| {
                let name = name(&label.value);
                match classes.iter().position(|class| *class == name) {
                    Some(class) => Ok(class as u32),
                    None => Err(SequenceError::Label {
                        task: task.to_string(),
                        row,
                        problem: format!(
                            "its class is not one of the {} the model was trained on",
                            classes.len()
                        ),
                    }),
                }
            })
            .collect::<Result<_, _>>()?;
        Self::new(task, TargetKind::Class, classes, keys(labels), bits, 1)
    }

    /// Several yes-or-no tasks at once; a sample is wherever at least one of them has a label, and
    /// the others are unknown there.
    ///
    /// # Errors
    /// Labels that are not boolean; two labels of one task for one subject and time.
    pub fn multilabel(tasks: &[(&str, &Labels)]) -> Result<TaskLabels, SequenceError> {
        let width = tasks.len();
        let mut samples: Vec<(i64, i64)> = Vec::new();
        for (task, labels) in tasks {
            Self::need(
                task,
                labels,
                "multilabel",
                "boolean_value",
                &[LabelKind::Boolean],
            )?;
            check_unique(task, &keys(labels))?;
            samples.extend(keys(labels));
        }
        samples.sort_unstable();
        samples.dedup();
        let mut bits = vec![f32::NAN.to_bits(); samples.len() * width];
        for (column, (_, labels)) in tasks.iter().enumerate() {
            for row in labels.rows() {
                let sample = samples
                    .binary_search(&(row.subject_id, row.prediction_time_us))
                    .expect("every label has a sample");
                let value = row.value == LabelValue::Boolean(true);
                bits[sample * width + column] = f32::from(u8::from(value)).to_bits();
            }
        }
        let names: Vec<String> = tasks.iter().map(|(task, _)| task.to_string()).collect();
        let task = names.join("+");
        Self::new(&task, TargetKind::Multilabel, names, samples, bits, width)
    }

    /// A task with a number as the answer.
    ///
    /// # Errors
    /// Labels that are not numbers; two labels for one subject and time.
    pub fn regression(task: &str, labels: &Labels) -> Result<TaskLabels, SequenceError> {
        Self::need(
            task,
            labels,
            "regression",
            "float_value or integer_value",
            &[LabelKind::Float, LabelKind::Integer],
        )?;
        let bits = labels
            .rows()
            .iter()
            .map(|row| match row.value {
                LabelValue::Float(value) => value.to_bits(),
                LabelValue::Integer(value) => (value as f32).to_bits(),
                LabelValue::Boolean(_) | LabelValue::Categorical(_) => {
                    unreachable!("checked above")
                }
            })
            .collect();
        Self::new(task, TargetKind::Real, Vec::new(), keys(labels), bits, 1)
    }

    /// A task with the time to an event as the answer.
    ///
    /// # Errors
    /// Two labels for one subject and time.
    pub fn survival(task: &str, labels: &SurvivalLabels) -> Result<TaskLabels, SequenceError> {
        let keys = labels
            .rows()
            .iter()
            .map(|row| (row.subject_id, row.prediction_time_us))
            .collect();
        let bits = labels
            .rows()
            .iter()
            .flat_map(|row| [row.duration_days.to_bits(), row.event as u32])
            .collect();
        Self::new(task, TargetKind::Survival, Vec::new(), keys, bits, 2)
    }

    /// Samples to predict for, in any order; repeated ones count once.
    ///
    /// # Errors
    /// No samples.
    pub fn unlabelled(
        task: &str,
        mut samples: Vec<(i64, i64)>,
    ) -> Result<TaskLabels, SequenceError> {
        samples.sort_unstable();
        samples.dedup();
        Self::new(task, TargetKind::None, Vec::new(), samples, Vec::new(), 0)
    }

    /// Samples of notes, in any order, as [`Notes::samples`] gives them.
    ///
    /// # Errors
    /// No samples.
    pub fn notes(notes: Notes, mut samples: Vec<(i64, i64)>) -> Result<TaskLabels, SequenceError> {
        samples.sort_unstable();
        samples.dedup();
        let task = format!("notes of {}", notes.codes.join(", "));
        let labels = Self::new(
            &task,
            TargetKind::Tokens,
            Vec::new(),
            samples,
            Vec::new(),
            0,
        )?;
        Ok(TaskLabels {
            notes: Some(notes),
            ..labels
        })
    }

    fn new(
        task: &str,
        kind: TargetKind,
        classes: Vec<String>,
        keys: Vec<(i64, i64)>,
        bits: Vec<u32>,
        width: usize,
    ) -> Result<TaskLabels, SequenceError> {
        if keys.is_empty() {
            return Err(SequenceError::NoLabels {
                task: task.to_string(),
            });
        }
        check_unique(task, &keys)?;
        debug_assert_eq!(bits.len(), keys.len() * width);
        Ok(TaskLabels {
            task: task.to_string(),
            kind,
            classes,
            keys,
            bits,
            width,
            notes: None,
        })
    }

    fn need(
        task: &str,
        labels: &Labels,
        expected: &'static str,
        needed: &'static str,
        kinds: &[LabelKind],
    ) -> Result<(), SequenceError> {
        if kinds.contains(&labels.kind()) {
            return Ok(());
        }
        Err(SequenceError::LabelKind {
            task: task.to_string(),
            expected,
            needed,
            found: labels.kind().column(),
        })
    }

    /// Name of the task, for reports.
    pub fn task(&self) -> &str {
        &self.task
    }

    pub fn kind(&self) -> TargetKind {
        self.kind
    }

    /// Names of the classes, or of the labels of a multilabel task, in the order of the targets.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Subject and prediction time (microseconds) of every sample, sorted.
    pub fn keys(&self) -> &[(i64, i64)] {
        &self.keys
    }

    /// # Panics
    /// When `sample` is not below `len()`.
    pub fn targets(&self, sample: usize) -> Targets {
        assert!(sample < self.keys.len(), "no sample {sample}");
        Targets::from_bits(self.kind, self.bits_of(sample))
    }

    pub(crate) fn bits_of(&self, sample: usize) -> &[u32] {
        &self.bits[sample * self.width..][..self.width]
    }

    pub(crate) fn learned_notes(&self) -> Option<&Notes> {
        self.notes.as_ref()
    }

    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Positions in `keys()` of a subject's samples.
    pub(crate) fn of_subject(&self, subject_id: i64) -> std::ops::Range<usize> {
        let start = self.keys.partition_point(|key| key.0 < subject_id);
        let count = self.keys[start..].partition_point(|key| key.0 == subject_id);
        start..start + count
    }
}

/// The classes of a yes-or-no task.
pub(crate) fn truth_classes() -> Vec<String> {
    vec!["false".to_string(), "true".to_string()]
}

fn keys(labels: &Labels) -> Vec<(i64, i64)> {
    labels
        .rows()
        .iter()
        .map(|row| (row.subject_id, row.prediction_time_us))
        .collect()
}

fn check_unique(task: &str, keys: &[(i64, i64)]) -> Result<(), SequenceError> {
    match keys.windows(2).position(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(row) => Err(SequenceError::Label {
            task: task.to_string(),
            row: row + 1,
            problem: "is the second one for its subject and prediction time".to_string(),
        }),
    }
}

#[cfg(test)]
#[path = "labels_tests.rs"]
mod tests;
