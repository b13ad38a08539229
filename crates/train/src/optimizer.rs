//! AdamW over a model's trainable tensors, with parameter groups and clipping by the
//! global norm.
//!
//! The update is PyTorch's `torch.optim.AdamW` (Loshchilov & Hutter 2019) without
//! AMSGrad: per tensor, with `t` counted from 1,
//!
//! ```text
//! p ← p − lr·weight_decay·p
//! m ← β₁·m + (1 − β₁)·g
//! v ← β₂·v + (1 − β₂)·g²
//! p ← p − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! Moments are f32, whatever the type of the frozen weights.

use std::collections::BTreeMap;

use burn::tensor::{Device, Gradients, Tensor, TensorData};
use calor_model::{Model, ParameterGroup, ParameterVisitor};

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

/// AdamW's constants. The defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the mean of the gradients.
    pub beta_1: f64,
    /// Decay of the mean of the squared gradients.
    pub beta_2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        AdamWOptions {
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
        }
    }
}

/// The learning rates of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRates {
    /// Of adapter tensors.
    pub adapter: f64,
    /// Of the head and other tensors trained in full.
    pub head: f64,
    /// Of modality encoders.
    pub encoder: f64,
    /// Of what makes soft tokens of their output.
    pub projector: f64,
    /// Other rates for one half of each low-rank pair.
    pub lora_plus: Option<LoraPlus>,
}

/// LoRA+ (Hayou et al. 2024): `lora_B` learns faster than `lora_A`. As PEFT's
/// `create_loraplus_optimizer` groups an adapter: what has one dimension, trained biases and DoRA's
/// magnitudes, learns as `lora_B`, and both halves of a pair on an embedding at a rate of their own.
/// Heads keep theirs, where PEFT gives their biases the rate of `lora_B`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraPlus {
    /// What the rate of the tensor's group is multiplied with.
    pub ratio: f64,
    /// The rate of pairs on embeddings.
    pub embedding: f64,
}

impl LoraPlus {
    fn rate(self, name: &str, rate: f64) -> f64 {
        let name = name.strip_suffix(".weight").unwrap_or(name);
        if name.contains(".lora_embedding_") {
            self.embedding
        } else if [".lora_B", ".bias", ".lora_magnitude_vector"]
            .iter()
            .any(|end| name.ends_with(end))
        {
            rate * self.ratio
        } else {
            rate
        }
    }
}

impl LearningRates {
    /// One rate for all.
    pub fn uniform(rate: f64) -> LearningRates {
        LearningRates {
            adapter: rate,
            head: rate,
            encoder: rate,
            projector: rate,
            lora_plus: None,
        }
    }

    /// Of one tensor, by its key in the adapter file.
    pub fn of(self, name: &str, group: ParameterGroup) -> f64 {
        match group {
            ParameterGroup::Adapter => match self.lora_plus {
                Some(lora_plus) => lora_plus.rate(name, self.adapter),
                None => self.adapter,
            },
            ParameterGroup::Head => self.head,
            ParameterGroup::Encoder => self.encoder,
            ParameterGroup::Projector => self.projector,
        }
    }
}

/// Gradients of the trainable tensors, summed over micro-batches.
#[derive(Default)]
pub struct AccumulatedGradients {
    /// By name, flattened, without autodiff. A tensor that took no part has no entry.
    by_name: BTreeMap<String, Tensor<1>>,
}

impl AccumulatedGradients {
    /// Adds what one backward pass left.
    pub fn add<P: Parameters>(&mut self, parameters: &mut P, gradients: &mut Gradients) {
        struct Collect<'a> {
            gradients: &'a mut Gradients,
            by_name: &'a mut BTreeMap<String, Tensor<1>>,
        }
        impl ParameterVisitor for Collect<'_> {
            fn visit<const D: usize>(
                &mut self,
                name: &str,
                _: ParameterGroup,
                tensor: &mut Tensor<D>,
            ) {
                let Some(gradient) = tensor.grad_remove(self.gradients) else {
                    return;
                };
                let length = gradient.shape().num_elements();
                let gradient = gradient.reshape([length]);
                let sum = match self.by_name.remove(name) {
                    Some(earlier) => earlier + gradient,
                    None => gradient,
                };
                self.by_name.insert(name.to_owned(), sum);
            }
        }
        parameters.visit_parameters(&mut Collect {
            gradients,
            by_name: &mut self.by_name,
        });
    }

    /// The 2-norm of all gradients together, shape `[1]`; none where there are none.
    pub fn global_norm(&self) -> Option<Tensor<1>> {
        let squares: Vec<Tensor<1>> = self
            .by_name
            .values()
            .map(|gradient| gradient.clone().square().sum())
            .collect();
        if squares.is_empty() {
            None
        } else {
            Some(Tensor::cat(squares, 0).sum().sqrt())
        }
    }

    /// Scales all gradients so that their norm is at most `max_norm`, given the norm they
    /// have: `torch.nn.utils.clip_grad_norm_`, with its factor `max_norm / (norm + 1e-6)`.
    pub fn clip(&mut self, norm: f64, max_norm: f64) {
        let factor = max_norm as f32 / (norm as f32 + 1e-6);
        if factor < 1.0 {
            for gradient in self.by_name.values_mut() {
                *gradient = gradient.clone().mul_scalar(factor);
            }
        }
    }

    /// Names of the tensors that have a gradient.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    #[cfg(test)]
    fn from_values(values: &BTreeMap<String, Vec<f32>>, device: &Device) -> Self {
        let by_name = values
            .iter()
            .map(|(name, values)| {
                (
                    name.clone(),
                    Tensor::from_data(TensorData::new(values.clone(), [values.len()]), device),
                )
            })
            .collect();
        AccumulatedGradients { by_name }
    }

    #[cfg(test)]
    fn values(&self) -> BTreeMap<String, Vec<f32>> {
        self.by_name
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.to_data().try_to_vec().unwrap()))
            .collect()
    }
}

/// The state of one tensor: both moments, flattened.
struct Moments {
    step: u64,
    first: Tensor<1>,
    second: Tensor<1>,
}

/// The state of one tensor on the host, as checkpoints hold it.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedMoments {
    /// Updates this tensor has had.
    pub step: u64,
    /// Mean of the gradients.
    pub first: Vec<f32>,
    /// Mean of the squared gradients.
    pub second: Vec<f32>,
}

/// The optimizer.
pub struct AdamW {
    options: AdamWOptions,
    moments: BTreeMap<String, Moments>,
}

impl AdamW {
    /// An optimizer that has seen no gradient.
    pub fn new(options: AdamWOptions) -> AdamW {
        AdamW {
            options,
            moments: BTreeMap::new(),
        }
    }

    /// One update of every tensor that has a gradient. A tensor without one stays as it
    /// is and is not decayed, as in PyTorch.
    pub fn update<P: Parameters>(
        &mut self,
        parameters: &mut P,
        gradients: AccumulatedGradients,
        rates: LearningRates,
    ) {
        struct Update<'a> {
            optimizer: &'a mut AdamW,
            gradients: BTreeMap<String, Tensor<1>>,
            rates: LearningRates,
        }
        impl ParameterVisitor for Update<'_> {
            fn visit<const D: usize>(
                &mut self,
                name: &str,
                group: ParameterGroup,
                tensor: &mut Tensor<D>,
            ) {
                let Some(gradient) = self.gradients.remove(name) else {
                    return;
                };
                let shape = tensor.shape();
                let length = shape.num_elements();
                let value = tensor.clone().inner().reshape([length]);
                let value =
                    self.optimizer
                        .step_tensor(name, value, gradient, self.rates.of(name, group));
                *tensor = value.reshape(shape).autodiff().require_grad();
            }
        }
        parameters.visit_parameters(&mut Update {
            optimizer: self,
            gradients: gradients.by_name,
            rates,
        });
    }

    fn step_tensor(
        &mut self,
        name: &str,
        value: Tensor<1>,
        gradient: Tensor<1>,
        rate: f64,
    ) -> Tensor<1> {
        let AdamWOptions {
            beta_1,
            beta_2,
            epsilon,
            weight_decay,
        } = self.options;
        let (step, first, second) = match self.moments.remove(name) {
            Some(moments) => (
                moments.step + 1,
                moments.first.mul_scalar(beta_1) + gradient.clone().mul_scalar(1.0 - beta_1),
                moments.second.mul_scalar(beta_2) + gradient.square().mul_scalar(1.0 - beta_2),
            ),
            None => (
                1,
                gradient.clone().mul_scalar(1.0 - beta_1),
                gradient.square().mul_scalar(1.0 - beta_2),
            ),
        };
        let correction_1 = 1.0 - beta_1.powf(step as f64);
        let correction_2 = 1.0 - beta_2.powf(step as f64);
        let denominator = second
            .clone()
            .sqrt()
            .div_scalar(correction_2.sqrt())
            .add_scalar(epsilon);
        let change = (first.clone() / denominator).mul_scalar(rate / correction_1);
        self.moments.insert(
            name.to_owned(),
            Moments {
                step,
                first,
                second,
            },
        );
        value.mul_scalar(1.0 - rate * weight_decay) - change
    }

    /// The state for a checkpoint, by tensor name.
    pub fn save(&self) -> BTreeMap<String, SavedMoments> {
        self.moments
            .iter()
            .map(|(name, moments)| {
                (
                    name.clone(),
                    SavedMoments {
                        step: moments.step,
                        first: host(&moments.first),
                        second: host(&moments.second),
                    },
                )
            })
            .collect()
    }

    /// Takes up a saved state. `device` is where the trainable tensors are.
    pub fn restore(&mut self, saved: BTreeMap<String, SavedMoments>, device: &Device) {
        let device = device.clone().inner();
        let tensor = |values: Vec<f32>| {
            let length = values.len();
            Tensor::from_data(TensorData::new(values, [length]), &device)
        };
        self.moments = saved
            .into_iter()
            .map(|(name, moments)| {
                (
                    name,
                    Moments {
                        step: moments.step,
                        first: tensor(moments.first),
                        second: tensor(moments.second),
                    },
                )
            })
            .collect();
    }
}

/// The values of a flat f32 tensor on the host.
fn host(tensor: &Tensor<1>) -> Vec<f32> {
    tensor.to_data().try_to_vec().expect("moments are f32")
}

#[cfg(test)]
#[path = "optimizer_tests.rs"]
mod tests;
