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

use super::saved::host;
use super::{SavedPart, SavedState, TensorState, Update, bytes_of};

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
        (
            first.mul_scalar(self.beta_1) + gradient.clone().mul_scalar(1.0 - self.beta_1),
            second.mul_scalar(self.beta_2) + gradient.square().mul_scalar(1.0 - self.beta_2),
        )
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
        let correction_1 = 1.0 - self.beta_1.powf(step as f64);
        let correction_2 = 1.0 - self.beta_2.powf(step as f64);
        let denominator = second
            .sqrt()
            .div_scalar(correction_2.sqrt())
            .add_scalar(self.epsilon);
        let change = (first / denominator).mul_scalar(rate / correction_1);
        values.mul_scalar(1.0 - rate * weight_decay) - change
    }
}

/// Both moments of one tensor.
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
}

impl TensorState for Moments {
    fn update(&mut self, update: Update<'_>) -> Tensor<1> {
        let (first, second) =
            self.options
                .moments(self.first.clone(), self.second.clone(), update.gradient);
        self.step += 1;
        self.first = first.clone();
        self.second = second.clone();
        let rule = update.rule;
        self.options.moved(
            (update.values, rule.learning_rate, rule.weight_decay),
            first,
            second,
            self.step,
        )
    }

    fn save(&self) -> SavedState {
        SavedState::default()
            .with("step", SavedPart::Count(self.step))
            .with("exp_avg", host(&self.first))
            .with("exp_avg_sq", host(&self.second))
    }

    fn bytes(&self) -> u64 {
        bytes_of(&self.first) + bytes_of(&self.second)
    }
}
