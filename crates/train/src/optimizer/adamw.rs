//! AdamW with f32 moments.
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

use burn::tensor::{Device, Tensor};
use calor_kernels::{AdamWTensor, AdamWUpdate, reference};

use super::saved::host;
use super::{SavedPart, SavedState, TensorRule, Update, bytes_of};

/// AdamW's constants. The defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the mean of the gradients.
    pub beta_1: f64,
    /// Decay of the mean of the squared gradients.
    pub beta_2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        AdamWOptions {
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
        }
    }
}

impl AdamWOptions {
    /// The moments with one more gradient in them.
    pub(super) fn moments(
        &self,
        first: Tensor<1>,
        second: Tensor<1>,
        gradient: Tensor<1>,
    ) -> (Tensor<1>, Tensor<1>) {
        let [first, second] = reference::moments(first, second, gradient, self.beta_1, self.beta_2);
        (first, second)
    }

    /// The values after update `step`, counted from 1, with moments that hold its gradient.
    pub(super) fn moved(
        &self,
        update: (Tensor<1>, f64, f64),
        first: Tensor<1>,
        second: Tensor<1>,
        step: u64,
    ) -> Tensor<1> {
        let (values, rate, weight_decay) = update;
        reference::moved(values, first, second, &self.at(rate, weight_decay, step))
    }

    fn at(&self, learning_rate: f64, weight_decay: f64, step: u64) -> AdamWUpdate {
        AdamWUpdate {
            beta_1: self.beta_1,
            beta_2: self.beta_2,
            epsilon: self.epsilon,
            learning_rate,
            weight_decay,
            step,
        }
    }
}

/// Both moments of one tensor. The tensors that have them are updated together.
pub(super) struct Moments {
    options: AdamWOptions,
    step: u64,
    first: Tensor<1>,
    second: Tensor<1>,
}

impl Moments {
    pub fn new(options: AdamWOptions, values: &Tensor<1>) -> Moments {
        Moments {
            options,
            step: 0,
            first: values.zeros_like(),
            second: values.zeros_like(),
        }
    }

    pub fn restore(
        options: AdamWOptions,
        saved: &mut SavedState,
        device: &Device,
    ) -> Result<Moments, String> {
        Ok(Moments {
            options,
            step: saved.count("step")?,
            first: saved.floats("exp_avg", device)?,
            second: saved.floats("exp_avg_sq", device)?,
        })
    }

    /// What the next update takes; nothing else holds the moments then.
    pub fn next(self, update: Update<'_>) -> AdamWTensor {
        let TensorRule {
            learning_rate,
            weight_decay,
        } = update.rule;
        AdamWTensor {
            values: update.values,
            gradient: update.gradient,
            first: self.first,
            second: self.second,
            update: self.options.at(learning_rate, weight_decay, self.step + 1),
        }
    }

    /// What that update leaves.
    pub fn after(update: &AdamWUpdate, first: Tensor<1>, second: Tensor<1>) -> Moments {
        let options = AdamWOptions {
            beta_1: update.beta_1,
            beta_2: update.beta_2,
            epsilon: update.epsilon,
        };
        Moments {
            options,
            step: update.step,
            first,
            second,
        }
    }

    pub fn save(&self) -> SavedState {
        SavedState::default()
            .with("step", SavedPart::Count(self.step))
            .with("exp_avg", host(&self.first))
            .with("exp_avg_sq", host(&self.second))
    }

    pub fn bytes(&self) -> u64 {
        bytes_of(&self.first) + bytes_of(&self.second)
    }
}
