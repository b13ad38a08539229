//! What is minimised: the loss of a task, summed over a micro-batch's labels.

use burn::tensor::activation::log_sigmoid;
use burn::tensor::{Device, Tensor};
use calor_model::{Mode, Model, ModelInput, loss};
use calor_sequence::{HostBatch, Targets};
use serde::{Deserialize, Serialize};

use crate::recipe::{ClassWeighting, ClassWeights, TaskKind};
use crate::upload;

/// The loss of a task with its class weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Objective {
    task: TaskKind,
    /// One a class; for a multilabel task one a label, for its positive.
    weights: Option<Vec<f32>>,
    scale: Option<TargetScale>,
}

/// What a regression's outputs mean: targets are learned less their mean, in standard
/// deviations, so that one learning rate fits days and fractions alike.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetScale {
    /// Mean of the training targets.
    pub mean: f64,
    /// Their standard deviation; 1 where they are all the same.
    pub deviation: f64,
}

impl TargetScale {
    /// Of training targets.
    pub fn of(values: &[f64]) -> TargetScale {
        let count = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / count;
        let deviation = (values
            .iter()
            .map(|value| (value - mean).powi(2))
            .sum::<f64>()
            / count)
            .sqrt();
        TargetScale {
            mean,
            deviation: if deviation > 0.0 { deviation } else { 1.0 },
        }
    }

    /// An output of the model in the targets' unit.
    pub fn in_own_unit(&self, output: f64) -> f64 {
        output * self.deviation + self.mean
    }
}

impl Objective {
    /// `counts` are the training samples by class (binary, multiclass), or by label the
    /// numbers of negative and positive ones (multilabel).
    ///
    /// # Errors
    /// What does not fit, in words: weights of another number than classes, a class
    /// without training samples where weights are balanced.
    pub fn new(
        task: TaskKind,
        weights: &ClassWeights,
        counts: &ClassCounts,
        scale: Option<TargetScale>,
    ) -> Result<Objective, String> {
        let weights = match (weights, counts) {
            (ClassWeights::Named(ClassWeighting::None), _) => None,
            (ClassWeights::Values(values), _) => {
                let expected = counts.width();
                if values.len() != expected {
                    return Err(format!(
                        "`task.class_weights` has {} weights for {expected} classes",
                        values.len()
                    ));
                }
                Some(values.iter().map(|value| *value as f32).collect())
            }
            (ClassWeights::Named(ClassWeighting::Balanced), counts) => Some(counts.balanced()?),
        };
        Ok(Objective {
            task,
            weights,
            scale,
        })
    }

    /// The logits of a model that knows nothing of a sample but how common the classes are, weighted as
    /// the loss weighs them: where the loss of a constant is lowest. Half a sample is added to each
    /// class. None for a regression, whose targets have mean 0.
    pub fn prior(&self, counts: &ClassCounts) -> Option<Vec<f32>> {
        let weight = |class: usize| {
            let weights = self.weights.as_ref();
            f64::from(weights.map_or(1.0, |weights| weights[class]))
        };
        let logits: Vec<f64> = match counts {
            ClassCounts::None => return None,
            ClassCounts::Labels(counts) => counts
                .iter()
                .enumerate()
                .map(|(label, &[negative, positive])| {
                    (weight(label) * (positive as f64 + 0.5) / (negative as f64 + 0.5)).ln()
                })
                .collect(),
            ClassCounts::Classes(counts) => {
                let shares = counts.iter().enumerate();
                let logs: Vec<f64> = shares
                    .map(|(class, &count)| (weight(class) * (count as f64 + 0.5)).ln())
                    .collect();
                match (self.task, &logs[..]) {
                    (TaskKind::Binary, &[negative, positive]) => vec![positive - negative],
                    _ => {
                        let mean = logs.iter().sum::<f64>() / logs.len().max(1) as f64;
                        logs.iter().map(|log| log - mean).collect()
                    }
                }
            }
        };
        // A weight of 0 has no logarithm.
        let logits = logits.iter().map(|logit| logit.clamp(-10.0, 10.0) as f32);
        Some(logits.collect())
    }

    /// The weights in use.
    pub fn weights(&self) -> Option<&[f32]> {
        self.weights.as_deref()
    }

    /// The loss of a micro-batch, summed over its labels or learned tokens, `[1]`.
    pub(crate) fn loss_of(
        &self,
        model: &Model,
        input: &ModelInput,
        batch: &HostBatch,
        mode: Mode,
        device: &Device,
    ) -> Tensor<1> {
        match self.task {
            TaskKind::CausalLm => {
                let (places, targets) = upload::token_targets(batch, true, device);
                model.causal_lm_loss_at(input, places, targets, mode)
            }
            TaskKind::Tokens => {
                let (places, targets) = upload::token_targets(batch, false, device);
                let class_weights = self.class_weights(device);
                model.token_loss_at(input, places, targets, class_weights, mode)
            }
            _ => self.loss(model.forward(input, mode), &batch.targets, device),
        }
    }

    fn class_weights(&self, device: &Device) -> Option<Tensor<1>> {
        let weights = self.weights.as_ref()?;
        Some(upload::floats(weights.clone(), [weights.len()], device))
    }

    /// The loss of a task of whole samples, summed over the labels of the batch, `[1]`; outputs are
    /// `[samples, width]`.
    ///
    /// # Panics
    /// For a task of tokens.
    pub fn loss(&self, outputs: Tensor<2>, targets: &[Targets], device: &Device) -> Tensor<1> {
        match self.task {
            TaskKind::Binary => {
                let [samples, _] = outputs.dims();
                let weights = self
                    .weights
                    .as_ref()
                    .map(|weights| [weights[0], weights[1]]);
                loss::binary(
                    outputs,
                    upload::numbers(targets, device).reshape([samples]),
                    weights,
                )
            }
            TaskKind::Multiclass => {
                let classes = upload::classes(targets, device);
                loss::multiclass(outputs, classes, self.class_weights(device))
            }
            TaskKind::Multilabel => {
                let weights = self
                    .weights
                    .as_ref()
                    .map(|weights| upload::floats(weights.clone(), [1, weights.len()], device));
                multilabel(outputs, upload::numbers(targets, device), weights)
            }
            TaskKind::Regression => {
                let targets = upload::numbers(targets, device);
                let targets = match self.scale {
                    Some(scale) => targets.sub_scalar(scale.mean).div_scalar(scale.deviation),
                    None => targets,
                };
                loss::regression(outputs, targets)
            }
            TaskKind::Tokens | TaskKind::CausalLm => {
                unreachable!("a task of tokens has no outputs of samples")
            }
        }
    }
}

/// Binary cross-entropy with logits summed over the labels that are known: the others
/// are NaN in `targets`. Shapes `[samples, labels]`, `positive_weights` `[1, labels]`.
fn multilabel(
    logits: Tensor<2>,
    targets: Tensor<2>,
    positive_weights: Option<Tensor<2>>,
) -> Tensor<1> {
    let unknown = targets.clone().is_nan();
    let targets = targets.mask_fill(unknown.clone(), 0.0);
    // −log p and −log(1 − p)
    let positive = log_sigmoid(logits.clone()).neg() * targets.clone();
    let positive = match positive_weights {
        Some(weights) => positive * weights,
        None => positive,
    };
    let negative = log_sigmoid(logits.neg()).neg() * (targets.neg() + 1.0);
    (positive + negative).mask_fill(unknown, 0.0).sum()
}

/// Training samples by class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClassCounts {
    /// Of each class.
    Classes(Vec<u64>),
    /// Negative and positive ones of each label.
    Labels(Vec<[u64; 2]>),
    /// A task without classes.
    None,
}

impl ClassCounts {
    fn width(&self) -> usize {
        match self {
            ClassCounts::Classes(counts) => counts.len(),
            ClassCounts::Labels(counts) => counts.len(),
            ClassCounts::None => 0,
        }
    }

    /// `samples / (classes · samples of the class)`, scikit-learn's `balanced`; for a label
    /// the negatives over the positives.
    fn balanced(&self) -> Result<Vec<f32>, String> {
        let empty = "`task.class_weights = \"balanced\"` needs training samples of every class, and one has none";
        match self {
            ClassCounts::Classes(counts) => {
                let all: u64 = counts.iter().sum();
                if counts.contains(&0) {
                    return Err(empty.to_owned());
                }
                Ok(counts
                    .iter()
                    .map(|count| (all as f64 / (counts.len() as f64 * *count as f64)) as f32)
                    .collect())
            }
            ClassCounts::Labels(counts) => counts
                .iter()
                .map(|[negative, positive]| {
                    if *negative == 0 || *positive == 0 {
                        Err(empty.to_owned())
                    } else {
                        Ok((*negative as f64 / *positive as f64) as f32)
                    }
                })
                .collect(),
            ClassCounts::None => Err("a task without classes has no class weights".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;

    fn device() -> Device {
        Device::flex()
    }

    fn outputs(rows: &[&[f32]]) -> Tensor<2> {
        let width = rows[0].len();
        Tensor::from_data(
            TensorData::new(rows.concat(), [rows.len(), width]),
            &device(),
        )
    }

    fn value(loss: Tensor<1>) -> f64 {
        f64::from(loss.into_scalar::<f32>())
    }

    fn softplus(x: f64) -> f64 {
        (1.0 + x.exp()).ln()
    }

    #[test]
    fn each_task_sums_its_loss_over_labels() {
        let plain = |task, counts| {
            Objective::new(
                task,
                &ClassWeights::Named(ClassWeighting::None),
                &counts,
                None,
            )
            .unwrap()
        };
        let binary = plain(TaskKind::Binary, ClassCounts::Classes(vec![1, 1]));
        let found = value(binary.loss(
            outputs(&[&[0.3], &[-1.2]]),
            &[Targets::Class(1), Targets::Class(0)],
            &device(),
        ));
        assert!((found - (softplus(-0.3) + softplus(-1.2))).abs() < 1e-6);

        let multiclass = plain(TaskKind::Multiclass, ClassCounts::Classes(vec![1, 1, 1]));
        let found = value(multiclass.loss(
            outputs(&[&[1.0, 2.0, 0.5]]),
            &[Targets::Class(1)],
            &device(),
        ));
        let whole = (1f64.exp() + 2f64.exp() + 0.5f64.exp()).ln();
        assert!((found - (whole - 2.0)).abs() < 1e-6);

        let regression = plain(TaskKind::Regression, ClassCounts::None);
        let found = value(regression.loss(
            outputs(&[&[1.5], &[2.0]]),
            &[Targets::Real(1.0), Targets::Real(4.0)],
            &device(),
        ));
        assert!((found - 4.25).abs() < 1e-6);

        let scale = TargetScale::of(&[1.0, 5.0]);
        assert_eq!(
            (scale.mean, scale.deviation, scale.in_own_unit(1.5)),
            (3.0, 2.0, 6.0)
        );
        let scaled = Objective::new(
            TaskKind::Regression,
            &ClassWeights::Named(ClassWeighting::None),
            &ClassCounts::None,
            Some(scale),
        )
        .unwrap();
        let found = value(scaled.loss(outputs(&[&[1.5]]), &[Targets::Real(5.0)], &device()));
        assert!((found - 0.25).abs() < 1e-6);
    }

    /// Of all constants, the prior has the lowest loss: moving any of its logits raises it.
    #[test]
    fn no_constant_does_better_than_the_prior() {
        let rows = |logits: &[f32], samples: usize| {
            let rows: Vec<&[f32]> = vec![logits; samples];
            outputs(&rows)
        };
        let classes = |counts: &[u64]| -> Vec<Targets> {
            let of =
                |(class, &count): (usize, &u64)| vec![Targets::Class(class as i32); count as usize];
            counts.iter().enumerate().flat_map(of).collect()
        };
        let labels = |positive: [usize; 2], samples: usize| -> Vec<Targets> {
            let of = |row: usize| positive.map(|count| f32::from(u8::from(row < count)));
            (0..samples)
                .map(|row| Targets::Multilabel(of(row).to_vec()))
                .collect()
        };
        let cases = [
            (
                TaskKind::Binary,
                ClassWeights::Values(vec![1.0, 3.0]),
                ClassCounts::Classes(vec![700, 300]),
                classes(&[700, 300]),
            ),
            (
                TaskKind::Multiclass,
                ClassWeights::Values(vec![1.0, 2.0, 1.0]),
                ClassCounts::Classes(vec![500, 200, 300]),
                classes(&[500, 200, 300]),
            ),
            (
                TaskKind::Multilabel,
                ClassWeights::Values(vec![2.0, 1.0]),
                ClassCounts::Labels(vec![[900, 100], [400, 600]]),
                labels([100, 600], 1000),
            ),
        ];
        for (task, weights, counts, targets) in cases {
            let objective = Objective::new(task, &weights, &counts, None).unwrap();
            let prior = objective.prior(&counts).unwrap();
            let loss = |logits: &[f32]| {
                value(objective.loss(rows(logits, targets.len()), &targets, &device()))
            };
            let lowest = loss(&prior);
            for logit in 0..prior.len() {
                for step in [-0.1, 0.1] {
                    let mut other = prior.clone();
                    other[logit] += step;
                    assert!(loss(&other) > lowest, "{task:?} {logit} {step}");
                }
            }
        }
        let regression = Objective::new(
            TaskKind::Regression,
            &ClassWeights::Named(ClassWeighting::None),
            &ClassCounts::None,
            None,
        )
        .unwrap();
        assert_eq!(regression.prior(&ClassCounts::None), None);
    }

    #[test]
    fn unknown_labels_count_for_nothing_and_leave_no_gradient() {
        let task = Objective::new(
            TaskKind::Multilabel,
            &ClassWeights::Values(vec![2.0, 1.0]),
            &ClassCounts::Labels(vec![[1, 1], [1, 1]]),
            None,
        )
        .unwrap();
        let device = device().autodiff();
        let logits = Tensor::<2>::from_data(
            TensorData::new(vec![0.3f32, 1.0, -0.5, 2.0], [2, 2]),
            &device,
        )
        .require_grad();
        let targets = [
            Targets::Multilabel(vec![1.0, f32::NAN]),
            Targets::Multilabel(vec![f32::NAN, 0.0]),
        ];
        let loss = task.loss(logits.clone(), &targets, &device);
        let gradients = loss.backward();
        assert!((value(loss.inner()) - (2.0 * softplus(-0.3) + softplus(2.0))).abs() < 1e-6);
        let gradient: Vec<f32> = logits
            .grad(&gradients)
            .unwrap()
            .to_data()
            .try_to_vec()
            .unwrap();
        assert_eq!((gradient[1], gradient[2]), (0.0, 0.0));
        assert!(
            gradient[0] < 0.0
                && gradient[3] > 0.0
                && gradient.iter().all(|value| value.is_finite())
        );
    }

    #[test]
    fn weights_multiply_their_class() {
        let weighted = Objective::new(
            TaskKind::Binary,
            &ClassWeights::Named(ClassWeighting::Balanced),
            &ClassCounts::Classes(vec![9, 3]),
            None,
        )
        .unwrap();
        let weights = weighted.weights().unwrap();
        assert!((weights[0] - 12.0 / 18.0).abs() < 1e-6 && (weights[1] - 2.0).abs() < 1e-6);
        let found = value(weighted.loss(
            outputs(&[&[0.3], &[-1.2]]),
            &[Targets::Class(1), Targets::Class(0)],
            &device(),
        ));
        assert!((found - (2.0 * softplus(-0.3) + 12.0 / 18.0 * softplus(-1.2))).abs() < 1e-6);
        let none = Objective::new(
            TaskKind::Binary,
            &ClassWeights::Named(ClassWeighting::Balanced),
            &ClassCounts::Classes(vec![9, 0]),
            None,
        );
        assert!(
            none.unwrap_err()
                .contains("needs training samples of every class")
        );
        let three = Objective::new(
            TaskKind::Multiclass,
            &ClassWeights::Values(vec![1.0; 2]),
            &ClassCounts::Classes(vec![1; 3]),
            None,
        );
        assert!(three.unwrap_err().contains("2 weights for 3 classes"));
    }
}
