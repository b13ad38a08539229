//! Gradients of one optimizer step.

use std::collections::BTreeMap;

#[cfg(test)]
use burn::tensor::{Device, TensorData};
use burn::tensor::{Gradients, Tensor};
use calor_model::{ParameterGroup, ParameterVisitor};

use super::Parameters;

/// Gradients of the trainable tensors, summed over micro-batches.
pub struct AccumulatedGradients {
    /// By name, flattened, without autodiff. A tensor that took no part has no entry.
    by_name: BTreeMap<String, Tensor<1>>,
    /// What they are still to be multiplied by; the update does it, so that clipping rewrites none.
    factor: f32,
}

impl Default for AccumulatedGradients {
    fn default() -> Self {
        AccumulatedGradients {
            by_name: BTreeMap::new(),
            factor: 1.0,
        }
    }
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

    /// The 2-norm of all gradients together as they were added, before [`clip`](Self::clip) and
    /// [`scale`](Self::scale), shape `[1]`; none where there are none.
    pub fn global_norm(&self) -> Option<Tensor<1>> {
        calor_kernels::global_norm(self.by_name.values().cloned().collect())
    }

    /// Scales all gradients so that their norm is at most `max_norm`, given the norm they
    /// have: `torch.nn.utils.clip_grad_norm_`, with its factor `max_norm / (norm + 1e-6)`.
    pub fn clip(&mut self, norm: f64, max_norm: f64) {
        self.factor *= (max_norm as f32 / (norm as f32 + 1e-6)).min(1.0);
    }

    /// Multiplies all gradients.
    pub fn scale(&mut self, factor: f64) {
        self.factor *= factor as f32;
    }

    /// Names of the tensors that have a gradient.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// What every gradient is to be multiplied by.
    pub(super) fn factor(&self) -> f32 {
        self.factor
    }

    /// Takes a tensor's gradient out, before it is multiplied by [`factor`](Self::factor).
    pub(super) fn take(&mut self, name: &str) -> Option<Tensor<1>> {
        self.by_name.remove(name)
    }

    #[cfg(test)]
    pub(super) fn from_values(values: &BTreeMap<String, Vec<f32>>, device: &Device) -> Self {
        let by_name = values
            .iter()
            .map(|(name, values)| {
                (
                    name.clone(),
                    Tensor::from_data(TensorData::new(values.clone(), [values.len()]), device),
                )
            })
            .collect();
        AccumulatedGradients {
            by_name,
            ..AccumulatedGradients::default()
        }
    }

    /// As an update sees them.
    #[cfg(test)]
    pub(super) fn values(&self) -> BTreeMap<String, Vec<f32>> {
        self.by_name
            .iter()
            .map(|(name, tensor)| {
                let scaled = tensor.clone().mul_scalar(self.factor);
                (name.clone(), scaled.to_data().try_to_vec().unwrap())
            })
            .collect()
    }
}
