//! One update of many tensors by AdamW (Loshchilov and Hutter 2019).

#[cfg(feature = "cpu")]
mod cpu;
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

/// A tensor and what its update takes, all `[elements]`, f32, outside autodiff.
#[derive(Debug, Clone)]
pub struct AdamWTensor {
    /// The tensor.
    pub values: Tensor<1>,
    /// Its gradient, before `scale`.
    pub gradient: Tensor<1>,
    /// The mean of its gradients.
    pub first: Tensor<1>,
    /// The mean of its squared gradients.
    pub second: Tensor<1>,
    /// The constants.
    pub update: AdamWUpdate,
}

/// The values and both moments of each tensor after an update:
///
/// ```text
/// g ← scale·g
/// m ← β₁·m + (1 − β₁)·g
/// v ← β₂·v + (1 − β₂)·g²
/// p ← p·(1 − lr·weight_decay) − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
/// ```
///
/// as `torch.optim.AdamW` computes it from gradients that were multiplied by `scale`, which clipping
/// by their norm comes down to. One pass over each tensor; on a GPU a kernel takes several tensors
/// where the device binds as many. Tensors handed over for good are written in place where that helps.
pub fn adamw(tensors: Vec<AdamWTensor>, scale: f32) -> Vec<[Tensor<1>; 3]> {
    let Some(first) = tensors.first().map(|tensor| tensor.values.clone()) else {
        return vec![];
    };
    let name = profile::named(|| "adamw");
    let device = name.map(|_| first.device());
    let wait = || {
        if let Some(device) = &device {
            let _ = device.sync();
        }
    };
    profile::timed(name, Pass::Forward, wait, || {
        #[cfg(feature = "cpu")]
        if crate::on_cpu(&first) {
            drop(first);
            return cpu::adamw(tensors, scale);
        }
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if crate::gpu::serves(&first) {
            return cube::adamw(tensors, scale);
        }
        drop(first);
        reference::adamw(tensors, scale)
    })
}

impl AdamWUpdate {
    /// What the moments are divided with, see [`adamw`]: `1 − β₁ᵗ` and `1 − β₂ᵗ`.
    fn corrections(&self) -> [f64; 2] {
        [self.beta_1, self.beta_2].map(|beta| 1.0 - beta.powf(self.step as f64))
    }

    #[cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu"))]
    fn factors(&self) -> Factors {
        let [correction_1, correction_2] = self.corrections();
        Factors {
            beta_1: self.beta_1 as f32,
            rest_1: (1.0 - self.beta_1) as f32,
            beta_2: self.beta_2 as f32,
            rest_2: (1.0 - self.beta_2) as f32,
            correction: correction_2.sqrt() as f32,
            epsilon: self.epsilon as f32,
            rate: (self.learning_rate / correction_1) as f32,
            decay: (1.0 - self.learning_rate * self.weight_decay) as f32,
        }
    }
}

/// The constants as kernels use them.
#[cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu"))]
#[derive(Clone, Copy)]
struct Factors {
    beta_1: f32,
    rest_1: f32,
    beta_2: f32,
    rest_2: f32,
    /// `√(1 − β₂ᵗ)`
    correction: f32,
    epsilon: f32,
    /// `lr / (1 − β₁ᵗ)`
    rate: f32,
    /// What is left of the values.
    decay: f32,
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
