//! An exponential moving average of the trained tensors, evaluated and saved in their place.
//!
//! As PyTorch's `AveragedModel` with `get_ema_multi_avg_fn`: the first update copies, each later one
//! is `average ← decay·average + (1 − decay)·p`.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use calor_model::{ParameterGroup, ParameterVisitor};

use super::saved::host;
use super::{Parameters, SavedState, bytes_of};

/// The name of its part in a checkpoint.
const PART: &str = "ema";

/// The averages of all trained tensors.
pub struct Ema {
    decay: f64,
    /// By name, flat, f32.
    averages: BTreeMap<String, Tensor<1>>,
}

impl Ema {
    /// An average of nothing yet. `decay` is from 0 to below 1.
    pub fn new(decay: f64) -> Ema {
        Ema {
            decay,
            averages: BTreeMap::new(),
        }
    }

    /// Takes in the tensors as they are after an update.
    pub fn update<P: Parameters>(&mut self, parameters: &mut P) {
        parameters.visit_parameters(&mut TakeIn(self));
    }

    /// A tensor's average, flat; none before the first update.
    pub(crate) fn average(&self, name: &str) -> Option<Tensor<1>> {
        self.averages.get(name).cloned()
    }

    /// Bytes of the averages on the device.
    pub fn bytes(&self) -> u64 {
        self.averages.values().map(bytes_of).sum()
    }

    /// Adds the averages to a state for a checkpoint.
    pub(crate) fn save(&self, states: &mut BTreeMap<String, SavedState>) {
        for (name, average) in &self.averages {
            states
                .entry(name.clone())
                .or_default()
                .insert(PART, host(average));
        }
    }

    /// Takes the averages out of a saved state.
    pub(crate) fn restore(
        &mut self,
        states: &mut BTreeMap<String, SavedState>,
        device: &Device,
    ) -> Result<(), String> {
        let device = device.clone().inner();
        self.averages.clear();
        for (name, state) in states {
            if state.has(PART) {
                self.averages
                    .insert(name.clone(), state.floats(PART, &device)?);
            }
        }
        Ok(())
    }
}

struct TakeIn<'a>(&'a mut Ema);

impl ParameterVisitor for TakeIn<'_> {
    fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
        let Ema { decay, averages } = &mut *self.0;
        let length = tensor.shape().num_elements();
        let values = tensor.clone().inner().reshape([length]);
        let average = match averages.remove(name) {
            Some(average) => average.clone() + (values - average).mul_scalar(1.0 - *decay),
            None => values,
        };
        averages.insert(name.to_owned(), average);
    }
}
