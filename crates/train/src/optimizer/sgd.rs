//! Stochastic gradient descent with momentum, as `torch.optim.SGD`: weight decay is added to the
//! gradient.
//!
//! ```text
//! g ← g + weight_decay·p
//! b ← μ·b + g
//! p ← p − lr·b                   (Nesterov: p − lr·(g + μ·b))
//! ```

use burn::tensor::{Device, Tensor};

use super::saved::host;
use super::{SavedState, TensorState, Update, bytes_of};

/// The constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdOptions {
    /// Decay of the sum of the gradients; 0 keeps none.
    pub momentum: f64,
    /// Whether the gradient is added once more.
    pub nesterov: bool,
}

impl Default for SgdOptions {
    fn default() -> Self {
        SgdOptions {
            momentum: 0.9,
            nesterov: false,
        }
    }
}

/// The momentum of one tensor.
pub(super) struct Momentum {
    options: SgdOptions,
    /// None before the first update, and without momentum.
    sum: Option<Tensor<1>>,
}

impl Momentum {
    pub fn new(options: SgdOptions) -> Momentum {
        Momentum { options, sum: None }
    }

    pub fn restore(
        options: SgdOptions,
        saved: &mut SavedState,
        device: &Device,
    ) -> Result<Momentum, String> {
        Ok(Momentum {
            options,
            sum: Some(saved.floats("momentum_sum", device)?),
        })
    }
}

impl TensorState for Momentum {
    fn update(&mut self, update: Update<'_>) -> Tensor<1> {
        let rule = update.rule;
        let gradient = match rule.weight_decay {
            0.0 => update.gradient,
            decay => update.gradient + update.values.clone().mul_scalar(decay),
        };
        let SgdOptions { momentum, nesterov } = self.options;
        let direction = if momentum == 0.0 {
            gradient
        } else {
            let sum = match self.sum.take() {
                Some(sum) => sum.mul_scalar(momentum) + gradient.clone(),
                None => gradient.clone(),
            };
            self.sum = Some(sum.clone());
            match nesterov {
                true => gradient + sum.mul_scalar(momentum),
                false => sum,
            }
        };
        update.values - direction.mul_scalar(rule.learning_rate)
    }

    fn save(&self) -> SavedState {
        match &self.sum {
            Some(sum) => SavedState::default().with("momentum_sum", host(sum)),
            None => SavedState::default(),
        }
    }

    fn bytes(&self) -> u64 {
        self.sum.as_ref().map_or(0, bytes_of)
    }
}
