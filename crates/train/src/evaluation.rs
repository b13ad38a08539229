//! Scoring patients and evaluating the scores.

mod columns;

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, Tensor};
use calor_evaluate::{
    BootstrapOptions, CurveOptions, EvaluateOptions, Metrics, Predictions, class_label, curves,
    entity_scores, evaluate,
};
use calor_meter::{Counts, Meter, Purpose};
use calor_model::{Mode, Model, ModelInput};
use calor_sequence::{
    BatchPlan, HostBatch, NO_TARGET, Order, PlacedItem, PlanOptions, Prefetcher, SampleSet,
    SequenceOptions, Targets,
};

use columns::Owned;

use crate::TrainError;
use crate::artifacts::predictions;
use crate::artifacts::report::{LabelEvaluation, SplitEvaluation};
use crate::data::{Data, TaskFile};
use crate::device::DeviceSpec;
use crate::observer::{Observer, StopFlag};
use crate::recipe::TaskKind;
use crate::upload;

/// Samples that are sorted by length and packed together while scoring.
const SCORED_TOGETHER: usize = 512;
/// Micro-batches that wait, collated, for the device.
const PREFETCH: usize = 4;
/// Points of a scatter plot that a report keeps.
const SCATTER: usize = 1000;

/// Outputs of a model for patients at prediction times, in the order of subject and time.
#[derive(Clone, Debug)]
pub struct Scored {
    pub(crate) task: TaskFile,
    pub(crate) subject_ids: Vec<i64>,
    pub(crate) prediction_times_us: Vec<i64>,
    pub(crate) targets: Vec<Targets>,
    /// Logits, or a regression's numbers in their own unit; of a task of tokens the loss summed over
    /// the learned tokens. `[samples, width]`.
    pub(crate) outputs: Vec<f64>,
    pub(crate) width: usize,
    /// Tokens: the predicted class of each learned token, sample by sample; empty for other tasks.
    pub(crate) tags: Vec<Vec<usize>>,
}

/// What a model says of one sample.
struct Output {
    values: Vec<f64>,
    tags: Vec<usize>,
}

/// How a set is scored.
#[derive(Clone, Copy)]
pub(crate) struct Scoring<'a> {
    pub task: &'a TaskFile,
    pub sequence: &'a SequenceOptions,
    pub micro_batch: usize,
    pub device: DeviceSpec,
    /// Streams whose items count as missing.
    pub withheld: &'a [usize],
    /// What the meter counts it as.
    pub purpose: Purpose,
}

impl Scoring<'_> {
    /// Scores every sample of a set. None when `stop` was set before the end.
    pub fn score(
        &self,
        model: &Model,
        data: &Data,
        set: &SampleSet,
        meter: &mut Meter,
        observer: &mut dyn Observer,
        stop: &StopFlag,
    ) -> Result<Option<Scored>, TrainError> {
        let model = model.for_inference();
        let device = model.device().clone();
        let options = PlanOptions {
            order: Order::ByLength,
            global_batch: SCORED_TOGETHER,
            micro_batch: self.micro_batch,
            max_tokens: self.sequence.max_tokens,
            packing: self.sequence.packing,
        };
        let plan = BatchPlan::new(&data.prepared, set, options)?;
        let steps = (0..plan.steps()).map(move |step| plan.step(step));
        let batches = Prefetcher::new(
            data.prepared.clone(),
            data.items.clone(),
            steps,
            data.pad_id,
            self.device.seq_multiple(),
            PREFETCH,
        )
        .map_err(TrainError::io("start a thread for", "collating batches"))?;
        let mut found: Vec<(u64, Output)> = Vec::with_capacity(set.len());
        for batch in batches {
            if stop.is_set() {
                return Ok(None);
            }
            let batch = batch?.batch;
            let withheld = |item: &PlacedItem| self.withheld.contains(&item.stream);
            let input = upload::input(&batch, model.options().fusion.as_ref(), withheld, &device)?;
            model.check_soft(&input)?;
            let outputs = self.outputs(&model, &input, &batch, &device)?;
            found.extend(batch.samples.iter().copied().zip(outputs));
            let counts = Counts {
                sequences: batch.spans.len() as u64,
                padded_tokens: batch.padded_token_count as u64,
                tokens: batch.token_count as u64,
                supervised: batch.supervised_count as u64,
            };
            meter.count(self.purpose, counts, &[]);
            observer.scoring(found.len(), set.len());
        }
        found.sort_unstable_by_key(|(sample, _)| *sample);
        Ok(Some(self.assemble(data, found)))
    }

    /// What the model says of each sample of a batch.
    fn outputs(
        &self,
        model: &Model,
        input: &ModelInput,
        batch: &HostBatch,
        device: &Device,
    ) -> Result<Vec<Output>, TrainError> {
        let counts = batch.targets.iter().map(Targets::supervised_count);
        match self.task.kind {
            TaskKind::CausalLm => {
                let (places, targets) = upload::token_targets(batch, true, device);
                let losses = read(model.causal_lm_losses_at(input, places, targets))?;
                let mut losses = losses.into_iter().map(f64::from);
                let sums = counts.map(|count| Output {
                    values: vec![losses.by_ref().take(count).sum()],
                    tags: Vec::new(),
                });
                Ok(sums.collect())
            }
            TaskKind::Tokens => {
                let (places, _) = upload::token_targets(batch, false, device);
                let logits = model.token_logits(input, places, Mode::Infer);
                let [_, width] = logits.dims();
                let logits: Vec<f64> = read(logits)?.into_iter().map(f64::from).collect();
                let mut rows = logits.chunks(width);
                let tagged = batch.targets.iter().map(|targets| {
                    let Targets::Tokens(targets) = targets else {
                        unreachable!("a task of tokens has targets of tokens");
                    };
                    let mut output = Output {
                        values: vec![0.0],
                        tags: Vec::new(),
                    };
                    let learned = targets.iter().filter(|target| **target != NO_TARGET);
                    for (target, logits) in learned.zip(rows.by_ref()) {
                        output.values[0] += log_sum_exp(logits) - logits[*target as usize];
                        output.tags.push(class_label(logits));
                    }
                    output
                });
                Ok(tagged.collect())
            }
            _ => {
                let outputs = model.forward(input, Mode::Infer);
                let [_, width] = outputs.dims();
                let values = read(outputs)?;
                let rows = values.chunks(width).map(|row| Output {
                    values: row.iter().map(|value| f64::from(*value)).collect(),
                    tags: Vec::new(),
                });
                Ok(rows.collect())
            }
        }
    }

    fn assemble(&self, data: &Data, found: Vec<(u64, Output)>) -> Scored {
        let width = found.first().map_or(1, |(_, output)| output.values.len());
        let mut scored = Scored {
            task: self.task.clone(),
            subject_ids: Vec::new(),
            prediction_times_us: Vec::new(),
            targets: Vec::new(),
            outputs: Vec::new(),
            width,
            tags: Vec::new(),
        };
        for (index, output) in found {
            let sample = data.prepared.sample(index as usize);
            scored.subject_ids.push(sample.subject_id);
            scored.prediction_times_us.push(sample.prediction_time_us);
            scored.targets.push(sample.targets);
            let number = |output: f64| match &self.task.scale {
                Some(scale) => scale.in_own_unit(output),
                None => output,
            };
            scored.outputs.extend(output.values.into_iter().map(number));
            if self.task.kind == TaskKind::Tokens {
                scored.tags.push(output.tags);
            }
        }
        scored
    }
}

impl Scored {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.subject_ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.subject_ids.is_empty()
    }

    /// Probabilities `[samples, width]`: of the positive class, of each class, of each label;
    /// a regression's numbers, and the summed losses of tokens, as they are.
    pub fn probabilities(&self) -> Vec<f64> {
        match self.task.kind {
            TaskKind::Binary | TaskKind::Multilabel => {
                self.outputs.iter().map(|logit| sigmoid(*logit)).collect()
            }
            TaskKind::Multiclass => self.outputs.chunks(self.width).flat_map(softmax).collect(),
            TaskKind::Regression | TaskKind::Tokens | TaskKind::CausalLm => self.outputs.clone(),
        }
    }

    /// The mean loss over known labels or learned tokens, without class weights, as in training: of a
    /// regression on its scale. None without labels.
    pub fn loss(&self) -> Option<f64> {
        let (mut sum, mut count) = (0.0, 0usize);
        for (outputs, target) in self.outputs.chunks(self.width).zip(&self.targets) {
            count += target.supervised_count();
            sum += match target {
                Targets::Class(class) if self.task.kind == TaskKind::Binary => {
                    binary_loss(outputs[0], *class == 1)
                }
                Targets::Class(class) => log_sum_exp(outputs) - outputs[*class as usize],
                Targets::Multilabel(labels) => {
                    let known = outputs
                        .iter()
                        .zip(labels)
                        .filter(|(_, label)| !label.is_nan());
                    known
                        .map(|(logit, label)| binary_loss(*logit, *label > 0.5))
                        .sum()
                }
                Targets::Real(value) => {
                    let deviation = self.task.scale.map_or(1.0, |scale| scale.deviation);
                    ((outputs[0] - f64::from(*value)) / deviation).powi(2)
                }
                Targets::Tokens(_) => outputs[0],
                Targets::None | Targets::Survival { .. } => 0.0,
            };
        }
        (count > 0).then(|| sum / count as f64)
    }

    /// Metrics by name, `loss` among them; one that is undefined is none. For the loop.
    pub(crate) fn quick_metrics(&self) -> Result<BTreeMap<String, Option<f64>>, TrainError> {
        let mut values = BTreeMap::from([("loss".to_owned(), self.loss())]);
        if let Some(metrics) = self.metrics(0, 0)? {
            values.extend(
                metrics
                    .scores
                    .iter()
                    .map(|(name, score)| (name.clone(), score.value())),
            );
        }
        Ok(values)
    }

    /// Everything a report says about a split; none where no sample has a label.
    pub fn evaluation(
        &self,
        resamples: usize,
        seed: u64,
    ) -> Result<Option<SplitEvaluation>, TrainError> {
        let Some(metrics) = self.metrics(resamples, seed)? else {
            return Ok(None);
        };
        let rows = self.complete_rows();
        let mut owned = Owned::new(self, &rows);
        let options = CurveOptions {
            class_names: self.class_names(),
            ..CurveOptions::default()
        };
        let curves = match self.task.kind {
            TaskKind::Regression | TaskKind::Tokens | TaskKind::CausalLm => Vec::new(),
            _ => curves(&owned.predictions(self), &options)?,
        };
        let scatter = match self.task.kind {
            TaskKind::Regression => {
                let every = owned.numbers.len().div_ceil(SCATTER).max(1);
                owned
                    .probabilities
                    .iter()
                    .zip(&owned.numbers)
                    .step_by(every)
                    .map(|(predicted, observed)| [*predicted, *observed])
                    .collect()
            }
            _ => Vec::new(),
        };
        let mut labels = Vec::new();
        if self.task.kind == TaskKind::Multilabel {
            for (column, name) in self.task.classes.iter().enumerate() {
                labels.push(LabelEvaluation {
                    label: name.clone(),
                    metrics: self.label_metrics(column, resamples, seed)?,
                });
            }
        }
        owned.probabilities.clear();
        Ok(Some(SplitEvaluation {
            samples: self.len() as u64,
            samples_with_unknown_label: (self.len() - rows.len()) as u64,
            loss: self.loss(),
            metrics,
            curves,
            entities: match self.task.kind {
                TaskKind::Tokens => {
                    entity_scores(&self.task.classes, &owned.predicted_tags, &owned.tags)
                }
                _ => Vec::new(),
            },
            labels,
            scatter,
        }))
    }

    /// Writes subject, time, probability and label; see [`predictions`].
    pub fn write_parquet(&self, path: &Path) -> Result<(), TrainError> {
        predictions::write(path, self)
    }

    fn metrics(&self, resamples: usize, seed: u64) -> Result<Option<Metrics>, TrainError> {
        let rows = self.complete_rows();
        if rows.is_empty() {
            return Ok(None);
        }
        let owned = Owned::new(self, &rows);
        let patients: Vec<i64> = rows.iter().map(|row| self.subject_ids[*row]).collect();
        let options = EvaluateOptions {
            bootstrap: BootstrapOptions {
                resamples,
                seed,
                ..BootstrapOptions::default()
            },
            class_names: self.class_names(),
        };
        Ok(Some(evaluate(
            &owned.predictions(self),
            &patients,
            &options,
        )?))
    }

    /// One label of a multilabel task, over the samples where it is known.
    fn label_metrics(
        &self,
        column: usize,
        resamples: usize,
        seed: u64,
    ) -> Result<Option<Metrics>, TrainError> {
        let (mut probabilities, mut targets, mut patients) = (Vec::new(), Vec::new(), Vec::new());
        for (row, target) in self.targets.iter().enumerate() {
            if let Targets::Multilabel(labels) = target
                && !labels[column].is_nan()
            {
                probabilities.push(sigmoid(self.outputs[row * self.width + column]));
                targets.push(labels[column] > 0.5);
                patients.push(self.subject_ids[row]);
            }
        }
        if targets.is_empty() {
            return Ok(None);
        }
        let options = EvaluateOptions {
            bootstrap: BootstrapOptions {
                resamples,
                seed,
                ..BootstrapOptions::default()
            },
            class_names: Vec::new(),
        };
        Ok(Some(evaluate(
            &Predictions::Binary {
                probabilities: &probabilities,
                targets: &targets,
            },
            &patients,
            &options,
        )?))
    }

    /// Probabilities of the samples whose labels are all known.
    pub(crate) fn complete_probabilities(&self) -> Vec<f64> {
        Owned::new(self, &self.complete_rows()).probabilities
    }

    /// Calls `use_them` with the targets and the patients of the samples whose labels are all known.
    pub(crate) fn with_targets<T>(
        &self,
        use_them: impl FnOnce(calor_evaluate::Targets<'_>, &[i64]) -> T,
    ) -> T {
        let rows = self.complete_rows();
        let owned = Owned::new(self, &rows);
        let patients: Vec<i64> = rows.iter().map(|row| self.subject_ids[*row]).collect();
        let targets = match self.task.kind {
            TaskKind::Binary => calor_evaluate::Targets::Binary(&owned.flags),
            TaskKind::Multiclass => calor_evaluate::Targets::Multiclass {
                classes: self.width,
                targets: &owned.classes,
            },
            TaskKind::Multilabel => calor_evaluate::Targets::Multilabel {
                labels: self.width,
                targets: &owned.flags,
            },
            TaskKind::Regression => calor_evaluate::Targets::Regression(&owned.numbers),
            TaskKind::Tokens | TaskKind::CausalLm => {
                unreachable!("tasks of tokens are neither compared nor ablated")
            }
        };
        use_them(targets, &patients)
    }

    /// Samples whose labels are all known.
    fn complete_rows(&self) -> Vec<usize> {
        let complete = |target: &Targets| match target {
            Targets::None | Targets::Survival { .. } => false,
            Targets::Multilabel(labels) => !labels.iter().any(|label| label.is_nan()),
            Targets::Class(_) | Targets::Real(_) | Targets::Tokens(_) => true,
        };
        (0..self.len())
            .filter(|row| complete(&self.targets[*row]))
            .collect()
    }

    fn class_names(&self) -> Vec<String> {
        match self.task.kind {
            TaskKind::Multiclass | TaskKind::Multilabel => self.task.classes.clone(),
            TaskKind::Binary | TaskKind::Regression | TaskKind::Tokens | TaskKind::CausalLm => {
                Vec::new()
            }
        }
    }
}

/// The values of a tensor, row by row.
fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, TrainError> {
    let data = tensor
        .try_into_data()
        .map_err(|error| TrainError::Execution {
            doing: "scoring",
            problem: error.to_string(),
        })?;
    data.try_to_vec().map_err(|error| TrainError::Execution {
        doing: "reading scores",
        problem: format!("{error:?}"),
    })
}

fn sigmoid(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

fn log_sum_exp(logits: &[f64]) -> f64 {
    let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    highest
        + logits
            .iter()
            .map(|logit| (logit - highest).exp())
            .sum::<f64>()
            .ln()
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let whole = log_sum_exp(logits);
    logits.iter().map(|logit| (logit - whole).exp()).collect()
}

/// `−log p` or `−log(1 − p)` from the logit, without overflow.
fn binary_loss(logit: f64, label: bool) -> f64 {
    let toward = if label { logit } else { -logit };
    (-toward).max(0.0) + (-toward.abs()).exp().ln_1p()
}

#[cfg(test)]
#[path = "evaluation_tests.rs"]
pub(crate) mod tests;
