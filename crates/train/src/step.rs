//! One optimizer step, whatever is trained and on which loss.
//!
//! The training loop and the benchmarks run this very code.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::tensor::{Device, Tensor};
use calor_meter::{Meter, Phase};
use calor_model::{ParameterGroup, ParameterVisitor};

use crate::TrainError;
use crate::loss_scale::LossScale;
use crate::optimizer::{
    AccumulatedGradients, Ema, Optimizer, OptimizerOptions, Parameters, SavedState, TensorRules,
};
use crate::recipe::TrainSection;

/// The optimizer with what is done to gradients before it sees them and to tensors after it moved them.
pub struct TrainStep {
    optimizer: Optimizer,
    rules: TensorRules,
    ema: Option<Ema>,
    max_grad_norm: f64,
    /// Whether the adapter is still to be watched for its first move.
    watch_adapter: bool,
    /// Where activations are f16.
    pub loss_scale: Option<LossScale>,
    /// Told of the end of every phase, where someone measures them: the device may not be there yet.
    pub(crate) phase_end: Option<PhaseEnd>,
}

/// See [`TrainStep::phase_end`].
pub(crate) type PhaseEnd = Box<dyn Fn(Phase) + Send + Sync>;

/// A step that was done.
#[derive(Clone, Debug, PartialEq)]
pub struct StepResult {
    /// Sum of the micro-batches' losses over the step's supervised count.
    pub loss: f64,
    /// Norm of all gradients together, before clipping; none where they overflowed under the loss
    /// scale, so that nothing was updated.
    pub grad_norm: Option<f64>,
    /// Adapter tensors that the first update left as they were; empty otherwise.
    pub unmoved: Vec<String>,
}

impl TrainStep {
    /// `max_grad_norm` of 0 switches clipping off. `has_adapter`: the first update with a
    /// learning rate above zero has to move it.
    pub fn new(
        options: OptimizerOptions,
        rules: TensorRules,
        max_grad_norm: f64,
        has_adapter: bool,
    ) -> TrainStep {
        TrainStep {
            optimizer: Optimizer::new(options),
            rules,
            ema: None,
            max_grad_norm,
            watch_adapter: has_adapter,
            loss_scale: None,
            phase_end: None,
        }
    }

    /// What a recipe asks for, for the tensors of a model.
    ///
    /// # Errors
    /// A parameter group without a tensor.
    pub fn from_recipe<P: Parameters>(
        train: &TrainSection,
        model: &mut P,
        has_adapter: bool,
    ) -> Result<TrainStep, TrainError> {
        let rules = TensorRules::from_recipe(train)?;
        rules.check(model)?;
        let options = OptimizerOptions::from_recipe(train);
        Ok(TrainStep {
            ema: train.ema_decay.map(Ema::new),
            ..TrainStep::new(options, rules, train.max_grad_norm, has_adapter)
        })
    }

    /// The model as it is evaluated and saved: with averages in place of the tensors in training,
    /// where the optimizer or `train.ema_decay` keeps some. The model itself stays as it is.
    pub fn evaluated<P: Parameters + Clone>(&self, model: &P) -> P {
        struct Averages<'a>(&'a TrainStep);
        impl ParameterVisitor for Averages<'_> {
            fn visit<const D: usize>(
                &mut self,
                name: &str,
                _: ParameterGroup,
                tensor: &mut Tensor<D>,
            ) {
                let shape = tensor.shape();
                let average = match &self.0.ema {
                    Some(ema) => ema.average(name),
                    None => {
                        let values = tensor.clone().inner().reshape([shape.num_elements()]);
                        self.0.optimizer.averaged(name, values)
                    }
                };
                if let Some(average) = average {
                    *tensor = average.reshape(shape).autodiff().require_grad();
                }
            }
        }
        let mut model = model.clone();
        model.visit_parameters(&mut Averages(self));
        model
    }

    /// Bytes of the optimizer's state and of averages on the device.
    pub fn state_bytes(&self) -> u64 {
        self.optimizer.bytes() + self.ema.as_ref().map_or(0, Ema::bytes)
    }

    /// What a checkpoint has to hold beside the tensors, by their names.
    pub fn save(&self) -> BTreeMap<String, SavedState> {
        let mut states = self.optimizer.save();
        if let Some(ema) = &self.ema {
            ema.save(&mut states);
        }
        states
    }

    /// Takes up what a checkpoint held. The adapter of such a run has moved before.
    ///
    /// # Errors
    /// The state is another optimizer's.
    pub fn restore(
        &mut self,
        mut states: BTreeMap<String, SavedState>,
        device: &Device,
    ) -> Result<(), String> {
        self.watch_adapter = false;
        if let Some(ema) = &mut self.ema {
            ema.restore(&mut states, device)?;
        }
        self.optimizer.restore(states, device)
    }

    /// Forward and backward over every micro-batch, gradients summed, clipping, one update.
    ///
    /// `forward` gives the loss of a micro-batch summed over its labels, `[1]`; the step's
    /// loss is the sum of these over `supervised`, so that accumulation equals the big
    /// batch whatever the micro-batches hold. `factor` is the schedule's, of every tensor's peak
    /// learning rate. `step` counts from 1, for messages.
    ///
    /// # Errors
    /// A loss or a gradient that is not finite, before anything is updated. An adapter
    /// that the first update left as it was. A gradient that overflows under a loss scale is none:
    /// the step is left out and the scale halved.
    #[allow(clippy::too_many_arguments)]
    pub fn run<P: Parameters, B>(
        &mut self,
        model: &mut P,
        micro_batches: impl Iterator<Item = B>,
        mut forward: impl FnMut(&P, B, &mut Meter) -> Result<Tensor<1>, TrainError>,
        supervised: f64,
        factor: f64,
        step: u64,
        meter: &mut Meter,
    ) -> Result<StepResult, TrainError> {
        let (mut gradients, losses) =
            self.gradients(model, micro_batches, &mut forward, supervised, meter)?;
        // The one place where the host waits for the device: it has to know both numbers
        // before anything is updated.
        let (loss, grad_norm) =
            meter.time(Phase::Backward, || read_loss_and_norm(losses, &gradients))?;
        self.ended(Phase::Backward);
        let mut grad_norm = grad_norm;
        if let Some(scale) = &mut self.loss_scale {
            if loss.is_finite() && !grad_norm.is_finite() && scale.overflowed() {
                return Ok(StepResult {
                    loss,
                    grad_norm: None,
                    unmoved: Vec::new(),
                });
            }
            let unscaled = scale.factor().recip();
            gradients.scale(unscaled);
            grad_norm *= unscaled;
            scale.succeeded();
        }
        for (what, value) in [("the loss", loss), ("the gradient norm", grad_norm)] {
            if !value.is_finite() {
                return Err(TrainError::NonFinite {
                    what,
                    value,
                    step,
                    last_checkpoint: None,
                });
            }
        }
        let unmoved = meter.time(Phase::Optimizer, || {
            if self.max_grad_norm > 0.0 {
                gradients.clip(grad_norm, self.max_grad_norm);
            }
            let watched = (self.watch_adapter && factor > 0.0).then(|| self.adapter_tensors(model));
            self.optimizer.update(model, gradients, &self.rules, factor);
            if let Some(ema) = &mut self.ema {
                ema.update(model);
            }
            match watched {
                Some(before) => {
                    self.watch_adapter = false;
                    unmoved(&before, &self.adapter_tensors(model), factor, step)
                }
                None => Ok(Vec::new()),
            }
        })?;
        self.ended(Phase::Optimizer);
        Ok(StepResult {
            loss,
            grad_norm: Some(grad_norm),
            unmoved,
        })
    }

    /// Forward and backward over every micro-batch: the summed gradients, under the loss scale if
    /// there is one, and the losses as they are. Changes nothing.
    pub(crate) fn gradients<P: Parameters, B>(
        &self,
        model: &mut P,
        mut micro_batches: impl Iterator<Item = B>,
        forward: &mut impl FnMut(&P, B, &mut Meter) -> Result<Tensor<1>, TrainError>,
        supervised: f64,
        meter: &mut Meter,
    ) -> Result<(AccumulatedGradients, Vec<Tensor<1>>), TrainError> {
        let mut gradients = AccumulatedGradients::default();
        let mut losses: Vec<Tensor<1>> = Vec::new();
        while let Some(batch) = meter.time(Phase::Data, || micro_batches.next()) {
            self.ended(Phase::Data);
            let started = std::time::Instant::now();
            let loss = forward(model, batch, meter)? / supervised;
            meter.add_phase(Phase::Forward, started.elapsed().as_secs_f64());
            self.ended(Phase::Forward);
            meter.time(Phase::Backward, || {
                let mut found = match &self.loss_scale {
                    Some(scale) => (loss.clone() * scale.factor()).backward(),
                    None => loss.backward(),
                };
                gradients.add(model, &mut found);
                losses.push(loss.inner());
            });
            self.ended(Phase::Backward);
        }
        Ok((gradients, losses))
    }

    fn ended(&self, phase: Phase) {
        if let Some(phase_end) = &self.phase_end {
            phase_end(phase);
        }
    }

    /// Copies of the adapter's tensors (they share memory until one is changed).
    fn adapter_tensors<P: Parameters>(&self, model: &mut P) -> Vec<Watched> {
        struct Copy<'a>(&'a TensorRules, Vec<Watched>);
        impl ParameterVisitor for Copy<'_> {
            fn visit<const D: usize>(
                &mut self,
                name: &str,
                group: ParameterGroup,
                tensor: &mut Tensor<D>,
            ) {
                let rule = self.0.of(name, group, D);
                // A group may hold tensors still.
                if group == ParameterGroup::Adapter && rule.learning_rate > 0.0 {
                    self.1.push(Watched {
                        name: name.to_owned(),
                        decay_rate: rule.learning_rate * rule.weight_decay,
                        values: tensor
                            .clone()
                            .inner()
                            .reshape([tensor.shape().num_elements()]),
                    });
                }
            }
        }
        let mut copy = Copy(&self.rules, Vec::new());
        model.visit_parameters(&mut copy);
        copy.1
    }
}

/// An adapter tensor before or after its first update.
struct Watched {
    name: String,
    /// Weight decay times the peak learning rate.
    decay_rate: f64,
    /// Flat.
    values: Tensor<1>,
}

/// Both numbers in one transfer.
pub(crate) fn read_loss_and_norm(
    losses: Vec<Tensor<1>>,
    gradients: &AccumulatedGradients,
) -> Result<(f64, f64), TrainError> {
    let Some(norm) = gradients.global_norm() else {
        return Err(TrainError::Corrupt { path: PathBuf::new(), problem: "nothing that is trained has a gradient: the step has no micro-batch or the model nothing to train".to_owned() });
    };
    let loss = Tensor::cat(losses, 0).sum();
    let data = Tensor::cat(vec![loss, norm], 0)
        .try_into_data()
        .map_err(|error| TrainError::Execution {
            doing: "training",
            problem: error.to_string(),
        })?;
    let values: Vec<f32> = data.try_to_vec().map_err(|error| TrainError::Execution {
        doing: "reading the loss",
        problem: format!("{error:?}"),
    })?;
    Ok((f64::from(values[0]), f64::from(values[1])))
}

/// Names of adapter tensors that did nothing but decay; an error if that is all of them.
///
/// One half of a pair starts at zero, so the other has no gradient yet and only the half that is
/// zero is looked at: `lora_B` of a linear layer, `lora_embedding_A` of an embedding.
fn unmoved(
    before: &[Watched],
    after: &[Watched],
    factor: f64,
    step: u64,
) -> Result<Vec<String>, TrainError> {
    let looked_at = before.iter().zip(after).filter(|(before, _)| {
        !before.name.contains("lora_A") && !before.name.contains("lora_embedding_B")
    });
    let mut watched = 0;
    let mut unmoved = Vec::new();
    for (before, after) in looked_at {
        watched += 1;
        let decayed = before
            .values
            .clone()
            .mul_scalar(1.0 - factor * before.decay_rate);
        let difference = after.values.clone() - decayed;
        if difference.abs().max().into_scalar::<f32>() == 0.0 {
            unmoved.push(before.name.clone());
        }
    }
    if watched > 0 && unmoved.len() == watched {
        return Err(TrainError::AdapterDidNotMove {
            step,
            tensors: before.len(),
        });
    }
    Ok(unmoved)
}

#[cfg(test)]
#[path = "step_tests.rs"]
mod tests;
