//! Schedule-free AdamW (Defazio et al. 2024): an average of the iterates in place of a learning rate
//! that decays.
//!
//! Per tensor there are the iterate `z`, its average `x`, and `y = β₁·x + (1 − β₁)·z`, at which
//! gradients are taken. The model holds `y`; `x` is what is evaluated and saved. With `t` counted from
//! 1, as in the authors' `AdamWScheduleFree`:
//!
//! ```text
//! v ← β₂·v + (1 − β₂)·g²
//! d ← g / (√(v / (1 − β₂ᵗ)) + ε) + weight_decay·y
//! c ← γ² / Σ γ²,   γ the largest learning rate so far
//! y ← y + c·(z − y) + lr·(β₁·(1 − c) − 1)·d
//! z ← z − lr·d
//! x = y + (1 − 1/β₁)·(z − y)
//! ```
//!
//! `x` is computed from `y` and `z` when it is asked for and neither is changed by it, so training goes
//! on after an evaluation as if there had been none.

use burn::tensor::{Device, Tensor};

use super::adamw::AdamWOptions;
use super::saved::host;
use super::{SavedPart, SavedState, TensorState, Update, bytes_of};

/// What is kept of one tensor beside `y`.
pub(super) struct Averaging {
    options: AdamWOptions,
    step: u64,
    /// The largest learning rate so far.
    largest_rate: f64,
    /// Sum over steps of the square of the largest learning rate until then.
    weight_sum: f64,
    iterate: Tensor<1>,
    second: Tensor<1>,
}

impl Averaging {
    pub fn new(options: AdamWOptions, values: &Tensor<1>) -> Averaging {
        Averaging {
            options,
            step: 0,
            largest_rate: 0.0,
            weight_sum: 0.0,
            iterate: values.clone(),
            second: values.zeros_like(),
        }
    }

    pub fn restore(
        options: AdamWOptions,
        saved: &mut SavedState,
        device: &Device,
    ) -> Result<Averaging, String> {
        Ok(Averaging {
            options,
            step: saved.count("step")?,
            largest_rate: saved.number("largest_rate")?,
            weight_sum: saved.number("weight_sum")?,
            iterate: saved.floats("iterate", device)?,
            second: saved.floats("exp_avg_sq", device)?,
        })
    }
}

impl TensorState for Averaging {
    fn update(&mut self, update: Update<'_>) -> Tensor<1> {
        let AdamWOptions {
            beta_1,
            beta_2,
            epsilon,
        } = self.options;
        let rate = update.rule.learning_rate;
        self.step += 1;
        self.largest_rate = self.largest_rate.max(rate);
        let weight = self.largest_rate.powi(2);
        self.weight_sum += weight;
        // At the start of a warm-up from zero nothing weighs anything yet.
        let share = match self.weight_sum > 0.0 {
            true => weight / self.weight_sum,
            false => 0.0,
        };
        self.second = self.second.clone().mul_scalar(beta_2)
            + update.gradient.clone().square().mul_scalar(1.0 - beta_2);
        let correction = 1.0 - beta_2.powf(self.step as f64);
        let denominator = self
            .second
            .clone()
            .div_scalar(correction)
            .sqrt()
            .add_scalar(epsilon);
        let direction = update.gradient / denominator
            + update.values.clone().mul_scalar(update.rule.weight_decay);
        let towards = (self.iterate.clone() - update.values.clone()).mul_scalar(share);
        let moved = update.values
            + towards
            + direction
                .clone()
                .mul_scalar(rate * (beta_1 * (1.0 - share) - 1.0));
        self.iterate = self.iterate.clone() - direction.mul_scalar(rate);
        moved
    }

    fn averaged(&self, values: Tensor<1>) -> Option<Tensor<1>> {
        let share = 1.0 - 1.0 / self.options.beta_1;
        let towards = (self.iterate.clone() - values.clone()).mul_scalar(share);
        Some(values + towards)
    }

    fn save(&self) -> SavedState {
        SavedState::default()
            .with("step", SavedPart::Count(self.step))
            .with("largest_rate", SavedPart::Number(self.largest_rate))
            .with("weight_sum", SavedPart::Number(self.weight_sum))
            .with("iterate", host(&self.iterate))
            .with("exp_avg_sq", host(&self.second))
    }

    fn bytes(&self) -> u64 {
        bytes_of(&self.iterate) + bytes_of(&self.second)
    }
}
