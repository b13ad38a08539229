//! One optimizer step, whatever is trained and on which loss.
//!
//! The training loop and the benchmarks run this very code.

use std::path::PathBuf;

use burn::tensor::Tensor;
use calor_meter::{Meter, Phase};
use calor_model::{ParameterGroup, ParameterVisitor};

use crate::TrainError;
use crate::optimizer::{AccumulatedGradients, AdamW, AdamWOptions, LearningRates, Parameters};

/// The optimizer with what is done to gradients before it sees them.
pub struct TrainStep {
    /// The optimizer and its state.
    pub optimizer: AdamW,
    weight_decay: f64,
    max_grad_norm: f64,
    /// Whether the adapter is still to be watched for its first move.
    watch_adapter: bool,
}

/// A step that was done.
#[derive(Clone, Debug, PartialEq)]
pub struct StepResult {
    /// Sum of the micro-batches' losses over the step's supervised count.
    pub loss: f64,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// Adapter tensors that the first update left as they were; empty otherwise.
    pub unmoved: Vec<String>,
}

impl TrainStep {
    /// `max_grad_norm` of 0 switches clipping off. `has_adapter`: the first update with a
    /// learning rate above zero has to move it.
    pub fn new(options: AdamWOptions, max_grad_norm: f64, has_adapter: bool) -> TrainStep {
        TrainStep {
            optimizer: AdamW::new(options),
            weight_decay: options.weight_decay,
            max_grad_norm,
            watch_adapter: has_adapter,
        }
    }

    /// A resumed run's adapter has moved before.
    pub fn adapter_has_moved(&mut self) {
        self.watch_adapter = false;
    }

    /// Forward and backward over every micro-batch, gradients summed, clipping, one update.
    ///
    /// `forward` gives the loss of a micro-batch summed over its labels, `[1]`; the step's
    /// loss is the sum of these over `supervised`, so that accumulation equals the big
    /// batch whatever the micro-batches hold. `step` counts from 1, for messages.
    ///
    /// # Errors
    /// A loss or a gradient that is not finite, before anything is updated. An adapter
    /// that the first update left as it was.
    #[allow(clippy::too_many_arguments)]
    pub fn run<P: Parameters, B>(
        &mut self,
        model: &mut P,
        micro_batches: impl Iterator<Item = B>,
        mut forward: impl FnMut(&P, B, &mut Meter) -> Result<Tensor<1>, TrainError>,
        supervised: f64,
        rates: LearningRates,
        step: u64,
        meter: &mut Meter,
    ) -> Result<StepResult, TrainError> {
        let mut gradients = AccumulatedGradients::default();
        let mut losses: Vec<Tensor<1>> = Vec::new();
        let mut micro_batches = micro_batches;
        while let Some(batch) = meter.time(Phase::Data, || micro_batches.next()) {
            let started = std::time::Instant::now();
            let loss = forward(model, batch, meter)? / supervised;
            meter.add_phase(Phase::Forward, started.elapsed().as_secs_f64());
            meter.time(Phase::Backward, || {
                let mut found = loss.backward();
                gradients.add(model, &mut found);
                losses.push(loss.inner());
            });
        }
        // The one place where the host waits for the device: it has to know both numbers
        // before anything is updated.
        let (loss, grad_norm) =
            meter.time(Phase::Backward, || read_loss_and_norm(losses, &gradients))?;
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
            let watched =
                (self.watch_adapter && rates.adapter > 0.0).then(|| adapter_tensors(model));
            self.optimizer.update(model, gradients, rates);
            match watched {
                Some(before) => {
                    self.watch_adapter = false;
                    let decay = |name: &str| {
                        1.0 - rates.of(name, ParameterGroup::Adapter) * self.weight_decay
                    };
                    unmoved(model, &before, decay, step)
                }
                None => Ok(Vec::new()),
            }
        })?;
        Ok(StepResult {
            loss,
            grad_norm,
            unmoved,
        })
    }
}

/// Both numbers in one transfer.
fn read_loss_and_norm(
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

/// Copies of the adapter's tensors (they share memory until one is changed), flattened.
fn adapter_tensors<P: Parameters>(model: &mut P) -> Vec<(String, Tensor<1>)> {
    struct Copy(Vec<(String, Tensor<1>)>);
    impl ParameterVisitor for Copy {
        fn visit<const D: usize>(
            &mut self,
            name: &str,
            group: ParameterGroup,
            tensor: &mut Tensor<D>,
        ) {
            if group == ParameterGroup::Adapter {
                let length = tensor.shape().num_elements();
                self.0
                    .push((name.to_owned(), tensor.clone().inner().reshape([length])));
            }
        }
    }
    let mut copy = Copy(Vec::new());
    model.visit_parameters(&mut copy);
    copy.0
}

/// Names of adapter tensors that did nothing but decay; an error if that is all of them.
///
/// One half of a pair starts at zero, so the other has no gradient yet and only the half that is
/// zero is looked at: `lora_B` of a linear layer, `lora_embedding_A` of an embedding.
fn unmoved<P: Parameters>(
    model: &mut P,
    before: &[(String, Tensor<1>)],
    decay: impl Fn(&str) -> f64,
    step: u64,
) -> Result<Vec<String>, TrainError> {
    let after = adapter_tensors(model);
    let moved = |index: usize| {
        let (name, after) = &after[index];
        let difference = after.clone() - before[index].1.clone().mul_scalar(decay(name));
        difference.abs().max().into_scalar::<f32>() > 0.0
    };
    let watched = |name: &str| !name.contains("lora_A") && !name.contains("lora_embedding_B");
    let unmoved: Vec<String> = (0..after.len())
        .filter(|index| watched(&after[*index].0) && !moved(*index))
        .map(|index| after[index].0.clone())
        .collect();
    let watched = after.iter().filter(|(name, _)| watched(name)).count();
    if unmoved.len() == watched {
        return Err(TrainError::AdapterDidNotMove {
            step,
            tensors: after.len(),
        });
    }
    Ok(unmoved)
}

#[cfg(test)]
#[path = "step_tests.rs"]
mod tests;
