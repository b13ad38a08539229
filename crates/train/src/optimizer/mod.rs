//! Optimizers over a model's trainable tensors: gradients summed over micro-batches, clipped by
//! the global norm, and one update of each tensor by its own rule.
//!
//! One file an algorithm: each says what it keeps of a tensor and how it moves it, as a
//! [`TensorState`]; AdamW moves all its tensors together. All state is f32 (8-bit moments aside),
//! whatever the type of the frozen weights.

mod adamw;
mod adamw_8bit;
mod ema;
mod gradients;
mod muon;
mod rules;
mod saved;
mod schedule_free;
mod sgd;

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use calor_kernels::{AdamWTensor, AdamWUpdate};
use calor_model::{Model, ParameterGroup, ParameterVisitor};
use serde::{Deserialize, Serialize};

pub use adamw::AdamWOptions;
pub use ema::Ema;
pub use gradients::AccumulatedGradients;
pub use muon::{MuonOptions, MuonScale};
pub use rules::{LearningRates, LoraPlus, TensorRule, TensorRules};
pub use saved::{SavedPart, SavedState};
pub use sgd::SgdOptions;

use crate::recipe::TrainSection;

/// Something with trainable tensors, visited in an order that never changes.
pub trait Parameters {
    /// Shows every trainable tensor to `visitor`.
    fn visit_parameters<V: ParameterVisitor>(&mut self, visitor: &mut V);
}

impl Parameters for Model {
    fn visit_parameters<V: ParameterVisitor>(&mut self, visitor: &mut V) {
        self.visit_trainable(visitor);
    }
}

/// The algorithm, as recipes name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// AdamW with f32 moments.
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW with moments in eight bits.
    #[serde(rename = "adamw_8bit")]
    AdamW8Bit,
    /// AdamW that averages its iterates in place of a decaying learning rate.
    #[serde(rename = "schedule_free_adamw")]
    ScheduleFreeAdamW,
    /// Orthogonalised momentum for low-rank factors, AdamW for the rest.
    Muon,
    /// Stochastic gradient descent with momentum.
    Sgd,
}

/// The algorithm with its constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptimizerOptions {
    /// See [`OptimizerKind::AdamW`].
    AdamW(AdamWOptions),
    /// See [`OptimizerKind::AdamW8Bit`].
    AdamW8Bit(AdamWOptions),
    /// See [`OptimizerKind::ScheduleFreeAdamW`].
    ScheduleFreeAdamW(AdamWOptions),
    /// See [`OptimizerKind::Muon`].
    Muon {
        /// Of low-rank factors.
        factors: MuonOptions,
        /// Of everything else.
        others: AdamWOptions,
    },
    /// See [`OptimizerKind::Sgd`].
    Sgd(SgdOptions),
}

impl OptimizerOptions {
    /// What a recipe asks for.
    pub fn from_recipe(train: &TrainSection) -> OptimizerOptions {
        let adamw = AdamWOptions {
            beta_1: train.beta_1,
            beta_2: train.beta_2,
            epsilon: train.epsilon,
        };
        match train.optimizer {
            OptimizerKind::AdamW => OptimizerOptions::AdamW(adamw),
            OptimizerKind::AdamW8Bit => OptimizerOptions::AdamW8Bit(adamw),
            OptimizerKind::ScheduleFreeAdamW => OptimizerOptions::ScheduleFreeAdamW(adamw),
            OptimizerKind::Muon => {
                let defaults = MuonOptions::default();
                OptimizerOptions::Muon {
                    factors: MuonOptions {
                        momentum: train.momentum.unwrap_or(defaults.momentum),
                        nesterov: train.nesterov.unwrap_or(defaults.nesterov),
                        newton_schulz_steps: train.newton_schulz_steps,
                        scale: train.muon_scale,
                    },
                    others: adamw,
                }
            }
            OptimizerKind::Sgd => {
                let defaults = SgdOptions::default();
                OptimizerOptions::Sgd(SgdOptions {
                    momentum: train.momentum.unwrap_or(defaults.momentum),
                    nesterov: train.nesterov.unwrap_or(defaults.nesterov),
                })
            }
        }
    }
}

impl Default for OptimizerOptions {
    /// AdamW with PyTorch's constants.
    fn default() -> Self {
        OptimizerOptions::AdamW(AdamWOptions::default())
    }
}

/// One update of one tensor.
pub(crate) struct Update<'a> {
    /// Its values, flat, f32, outside the autodiff graph.
    pub values: Tensor<1>,
    /// Its gradient, likewise; multiplied by what clips it, but where AdamW does that itself.
    pub gradient: Tensor<1>,
    /// Its shape.
    pub shape: &'a [usize],
    /// Learning rate of this step and weight decay.
    pub rule: TensorRule,
}

/// What an algorithm keeps of one tensor, and how it moves it.
pub(crate) trait TensorState {
    /// The tensor's new values.
    fn update(&mut self, update: Update<'_>) -> Tensor<1>;

    /// What stands for the tensor in evaluation and in files, given its values in training; none
    /// where that is the tensor itself.
    fn averaged(&self, values: Tensor<1>) -> Option<Tensor<1>> {
        let _ = values;
        None
    }

    /// The state for a checkpoint.
    fn save(&self) -> SavedState;

    /// Bytes that it takes on the device.
    fn bytes(&self) -> u64;
}

/// What is kept of one tensor.
enum State {
    /// Moved with all others that have moments in f32.
    AdamW(Box<adamw::Moments>),
    /// Moved by itself.
    Alone(Box<dyn TensorState>),
}

impl State {
    fn save(&self) -> SavedState {
        match self {
            State::AdamW(moments) => moments.save(),
            State::Alone(state) => state.save(),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            State::AdamW(moments) => moments.bytes(),
            State::Alone(state) => state.bytes(),
        }
    }

    /// See [`TensorState::averaged`].
    fn averaged(&self, values: Tensor<1>) -> Option<Tensor<1>> {
        match self {
            State::AdamW(_) => None,
            State::Alone(state) => state.averaged(values),
        }
    }
}

/// An algorithm with what it keeps of every tensor.
pub struct Optimizer {
    options: OptimizerOptions,
    states: BTreeMap<String, State>,
    /// What all 8-bit states share.
    codes: Option<adamw_8bit::CodeMaps>,
}

impl Optimizer {
    /// An optimizer that has seen no gradient.
    pub fn new(options: OptimizerOptions) -> Optimizer {
        Optimizer {
            options,
            states: BTreeMap::new(),
            codes: None,
        }
    }

    /// One update of every tensor that has a gradient, each with its peak learning rate times
    /// `factor`. A tensor without a gradient stays as it is and is not decayed, as in PyTorch.
    pub fn update<P: Parameters>(
        &mut self,
        parameters: &mut P,
        gradients: AccumulatedGradients,
        rules: &TensorRules,
        factor: f64,
    ) {
        struct Visit<'a> {
            optimizer: &'a mut Optimizer,
            gradients: AccumulatedGradients,
            rules: &'a TensorRules,
            factor: f64,
            /// What AdamW moves, by name.
            together: Vec<(String, AdamWTensor)>,
        }
        impl ParameterVisitor for Visit<'_> {
            fn visit<const D: usize>(
                &mut self,
                name: &str,
                group: ParameterGroup,
                tensor: &mut Tensor<D>,
            ) {
                let Some(gradient) = self.gradients.take(name) else {
                    return;
                };
                let shape = tensor.shape();
                let values = tensor.clone().inner().reshape([shape.num_elements()]);
                let update = |values, gradient| Update {
                    values,
                    gradient,
                    shape: &shape,
                    rule: self.rules.of(name, group, D).at(self.factor),
                };
                match self.optimizer.take_state(name, &shape, &values) {
                    State::AdamW(moments) => {
                        let next = moments.next(update(values, gradient));
                        self.together.push((name.to_owned(), next));
                    }
                    State::Alone(mut state) => {
                        // By 1 as well: on a GPU another list of operations would be another kernel
                        // to compile.
                        let gradient = gradient.mul_scalar(self.gradients.factor());
                        let values = state.update(update(values, gradient));
                        *tensor = values.reshape(shape).autodiff().require_grad();
                        let state = State::Alone(state);
                        self.optimizer.states.insert(name.to_owned(), state);
                    }
                }
            }
        }
        let scale = gradients.factor();
        let mut visit = Visit {
            optimizer: self,
            gradients,
            rules,
            factor,
            together: Vec::new(),
        };
        parameters.visit_parameters(&mut visit);
        let together = std::mem::take(&mut visit.together);
        self.move_together(parameters, together, scale);
    }

    /// AdamW's update of all its tensors.
    fn move_together<P: Parameters>(
        &mut self,
        parameters: &mut P,
        tensors: Vec<(String, AdamWTensor)>,
        scale: f32,
    ) {
        struct Replace(BTreeMap<String, Tensor<1>>);
        impl ParameterVisitor for Replace {
            fn visit<const D: usize>(
                &mut self,
                name: &str,
                _: ParameterGroup,
                tensor: &mut Tensor<D>,
            ) {
                if let Some(values) = self.0.remove(name) {
                    let shape = tensor.shape();
                    *tensor = values.reshape(shape).autodiff().require_grad();
                }
            }
        }
        let (names, tensors): (Vec<String>, Vec<AdamWTensor>) = tensors.into_iter().unzip();
        let updates: Vec<AdamWUpdate> = tensors.iter().map(|tensor| tensor.update).collect();
        let moved = calor_kernels::adamw(tensors, scale);
        let mut replace = Replace(BTreeMap::new());
        for ((name, update), [values, first, second]) in names.into_iter().zip(&updates).zip(moved)
        {
            let moments = adamw::Moments::after(update, first, second);
            self.states
                .insert(name.clone(), State::AdamW(Box::new(moments)));
            replace.0.insert(name, values);
        }
        parameters.visit_parameters(&mut replace);
    }

    /// What stands for a tensor in evaluation; see [`TensorState::averaged`].
    pub(crate) fn averaged(&self, name: &str, values: Tensor<1>) -> Option<Tensor<1>> {
        self.states.get(name)?.averaged(values)
    }

    /// Bytes of the state on the device.
    pub fn bytes(&self) -> u64 {
        self.states.values().map(|state| state.bytes()).sum()
    }

    /// The state for a checkpoint, by tensor name.
    pub fn save(&self) -> BTreeMap<String, SavedState> {
        self.states
            .iter()
            .map(|(name, state)| (name.clone(), state.save()))
            .collect()
    }

    /// Takes up a saved state. `device` is where the trainable tensors are.
    ///
    /// # Errors
    /// The state is another algorithm's; says of which tensor.
    pub fn restore(
        &mut self,
        saved: BTreeMap<String, SavedState>,
        device: &Device,
    ) -> Result<(), String> {
        let device = device.clone().inner();
        self.states.clear();
        for (name, mut saved) in saved {
            if saved.is_empty() {
                continue;
            }
            let state = self
                .restored(&mut saved, &device)
                .and_then(|state| saved.finish().map(|()| state))
                .map_err(|problem| {
                    format!("the optimizer's state of `{name}` {problem}; resume with the recipe that the run was started with")
                })?;
            self.states.insert(name, state);
        }
        Ok(())
    }

    /// The state of a tensor, new where it has none yet, to be put back after an update.
    fn take_state(&mut self, name: &str, shape: &[usize], values: &Tensor<1>) -> State {
        if let Some(state) = self.states.remove(name) {
            return state;
        }
        match self.options {
            OptimizerOptions::AdamW8Bit(options)
                if shape.iter().product::<usize>() >= adamw_8bit::SMALLEST =>
            {
                let codes = self.codes(&values.device());
                let moments = adamw_8bit::Moments8Bit::new(options, codes, values);
                State::Alone(Box::new(moments))
            }
            OptimizerOptions::AdamW(options) | OptimizerOptions::AdamW8Bit(options) => {
                State::AdamW(Box::new(adamw::Moments::new(options, values)))
            }
            OptimizerOptions::ScheduleFreeAdamW(options) => {
                State::Alone(Box::new(schedule_free::Averaging::new(options, values)))
            }
            OptimizerOptions::Muon { factors, others } => match muon::applies(name, shape) {
                true => State::Alone(Box::new(muon::Momentum::new(factors, values))),
                false => State::AdamW(Box::new(adamw::Moments::new(others, values))),
            },
            OptimizerOptions::Sgd(options) => State::Alone(Box::new(sgd::Momentum::new(options))),
        }
    }

    fn restored(&mut self, saved: &mut SavedState, device: &Device) -> Result<State, String> {
        let alone: Box<dyn TensorState> = match self.options {
            OptimizerOptions::AdamW8Bit(options) if adamw_8bit::Moments8Bit::wrote(saved) => {
                let codes = self.codes(device);
                let moments = adamw_8bit::Moments8Bit::restore(options, codes, saved, device);
                Box::new(moments?)
            }
            OptimizerOptions::Muon { factors, .. } if muon::Momentum::wrote(saved) => {
                Box::new(muon::Momentum::restore(factors, saved, device)?)
            }
            OptimizerOptions::AdamW(options)
            | OptimizerOptions::AdamW8Bit(options)
            | OptimizerOptions::Muon {
                others: options, ..
            } => {
                let moments = adamw::Moments::restore(options, saved, device)?;
                return Ok(State::AdamW(Box::new(moments)));
            }
            OptimizerOptions::ScheduleFreeAdamW(options) => {
                Box::new(schedule_free::Averaging::restore(options, saved, device)?)
            }
            OptimizerOptions::Sgd(options) => {
                Box::new(sgd::Momentum::restore(options, saved, device)?)
            }
        };
        Ok(State::Alone(alone))
    }

    fn codes(&mut self, device: &Device) -> adamw_8bit::CodeMaps {
        self.codes
            .get_or_insert_with(|| adamw_8bit::CodeMaps::new(device))
            .clone()
    }
}

/// Bytes of a flat f32 tensor.
pub(crate) fn bytes_of(tensor: &Tensor<1>) -> u64 {
    4 * tensor.dims()[0] as u64
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod trajectories;
