//! One update of one tensor by AdamW (Loshchilov and Hutter 2019).

#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cube;
pub(crate) mod reference;

use burn::tensor::Tensor;

use crate::profile::{self, Pass};

/// The constants of one update, all f64 but computed with in f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWUpdate {
    /// Decay of the mean of the gradients.
    pub beta_1: f64,
    /// Decay of the mean of the squared gradients.
    pub beta_2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Times the learning rate: the share of the values that is taken off.
    pub weight_decay: f64,
    /// Number of this update, from 1.
    pub step: u64,
}

/// The values and both moments after an update:
///
/// ```text
/// m ← β₁·m + (1 − β₁)·g
/// v ← β₂·v + (1 − β₂)·g²
/// p ← p·(1 − lr·weight_decay) − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
/// ```
///
/// as `torch.optim.AdamW` computes it. On a GPU one kernel a tensor, whatever the gradient came from.
///
/// # Shapes
/// - values, gradient, first, second and the results: `[elements]`, f32, outside autodiff
pub fn adamw(
    values: Tensor<1>,
    gradient: Tensor<1>,
    first: Tensor<1>,
    second: Tensor<1>,
    update: &AdamWUpdate,
) -> [Tensor<1>; 3] {
    let name = profile::named(|| "adamw");
    let device = values.device();
    let wait = || {
        let _ = device.sync();
    };
    profile::timed(name, Pass::Forward, wait, || {
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if crate::gpu::serves(&values) {
            return cube::adamw(values, gradient, first, second, update);
        }
        reference::adamw(values, gradient, first, second, update)
    })
}

impl AdamWUpdate {
    /// What the moments are divided with, see [`adamw`]: `1 − β₁ᵗ` and `1 − β₂ᵗ`.
    fn corrections(&self) -> [f64; 2] {
        [self.beta_1, self.beta_2].map(|beta| 1.0 - beta.powf(self.step as f64))
    }
}
