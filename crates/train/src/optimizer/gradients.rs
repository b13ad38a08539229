//! Gradients of one optimizer step.

use std::collections::BTreeMap;

#[cfg(test)]
use burn::tensor::{Device, TensorData};
use burn::tensor::{Gradients, Tensor};
use calor_model::{ParameterGroup, ParameterVisitor};

use super::Parameters;

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
        // By 1 as well: on a GPU another list of operations would be another kernel to compile.
        let factor = (max_norm as f32 / (norm as f32 + 1e-6)).min(1.0);
        for gradient in self.by_name.values_mut() {
            *gradient = gradient.clone().mul_scalar(factor);
        }
    }

    /// Multiplies all gradients.
    pub fn scale(&mut self, factor: f64) {
        for gradient in self.by_name.values_mut() {
            *gradient = gradient.clone().mul_scalar(factor);
        }
    }

    /// Names of the tensors that have a gradient.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// Takes a tensor's gradient out.
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
        AccumulatedGradients { by_name }
    }

    #[cfg(test)]
    pub(super) fn values(&self) -> BTreeMap<String, Vec<f32>> {
        self.by_name
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.to_data().try_to_vec().unwrap()))
            .collect()
    }
}
