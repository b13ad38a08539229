//! Muon (Jordan et al. 2024) for low-rank factors: momentum whose singular values are all brought near
//! 1 before it moves the matrix.
//!
//! As `torch.optim.Muon`, per matrix `[rows, columns]`, but with the iteration in f32, where PyTorch
//! computes it in bf16:
//!
//! ```text
//! m ← μ·m + (1 − μ)·g
//! u ← (1 − μ)·g + μ·m            (Nesterov; else u = m)
//! X ← u / ‖u‖;  k times:  X ← a·X + (b·XXᵀ + c·(XXᵀ)²)·X      (Newton-Schulz)
//! p ← p − lr·weight_decay·p − lr·scale·X
//! ```

use burn::tensor::{Device, Tensor};
use calor_kernels::matmul;
use serde::{Deserialize, Serialize};

use super::saved::host;
use super::{SavedState, TensorState, Update, bytes_of};

/// Coefficients `a`, `b`, `c` of the iteration: Jordan's, which are PyTorch's.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
/// The norm that a momentum is divided by is at least this.
const SMALLEST_NORM: f64 = 1e-7;

/// Muon's constants. The defaults are PyTorch's but for the scale, which is the one that makes
/// AdamW's learning rates right for Muon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonOptions {
    /// Decay of the mean of the gradients.
    pub momentum: f64,
    /// Whether the gradient is mixed in once more.
    pub nesterov: bool,
    /// Iterations of the orthogonalisation.
    pub newton_schulz_steps: usize,
    /// What the update is scaled with.
    pub scale: MuonScale,
}

impl Default for MuonOptions {
    fn default() -> Self {
        MuonOptions {
            momentum: 0.95,
            nesterov: true,
            newton_schulz_steps: 5,
            scale: MuonScale::MatchRmsAdamw,
        }
    }
}

/// What an update is scaled with, so that one learning rate suits matrices of all shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MuonScale {
    /// `0.2·√max(rows, columns)`: updates as large as AdamW's (Liu et al. 2025).
    MatchRmsAdamw,
    /// `√max(1, rows / columns)`: Jordan's.
    Original,
}

impl MuonScale {
    fn of(self, rows: usize, columns: usize) -> f64 {
        match self {
            MuonScale::MatchRmsAdamw => 0.2 * (rows.max(columns) as f64).sqrt(),
            MuonScale::Original => (rows as f64 / columns as f64).max(1.0).sqrt(),
        }
    }
}

/// Whether a tensor is a low-rank factor; everything else (heads, encoders, vectors) is AdamW's.
pub(super) fn applies(name: &str, shape: &[usize]) -> bool {
    shape.len() == 2 && (name.contains("lora_A") || name.contains("lora_B"))
}

/// The momentum of one matrix.
pub(super) struct Momentum {
    options: MuonOptions,
    mean: Tensor<1>,
}

impl Momentum {
    pub fn new(options: MuonOptions, values: &Tensor<1>) -> Momentum {
        Momentum {
            options,
            mean: values.zeros_like(),
        }
    }

    /// Whether a saved state is of this kind.
    pub fn wrote(saved: &SavedState) -> bool {
        saved.has("momentum")
    }

    pub fn restore(
        options: MuonOptions,
        saved: &mut SavedState,
        device: &Device,
    ) -> Result<Momentum, String> {
        Ok(Momentum {
            options,
            mean: saved.floats("momentum", device)?,
        })
    }
}

impl TensorState for Momentum {
    fn update(&mut self, update: Update<'_>) -> Tensor<1> {
        let momentum = self.options.momentum;
        let gradient = update.gradient;
        self.mean =
            self.mean.clone() + (gradient.clone() - self.mean.clone()).mul_scalar(1.0 - momentum);
        let direction = match self.options.nesterov {
            true => gradient.clone() + (self.mean.clone() - gradient).mul_scalar(momentum),
            false => self.mean.clone(),
        };
        let (rows, columns) = (update.shape[0], update.shape[1]);
        let direction = orthogonalised(
            direction.reshape([rows, columns]),
            self.options.newton_schulz_steps,
        );
        let rate = update.rule.learning_rate;
        update
            .values
            .mul_scalar(1.0 - rate * update.rule.weight_decay)
            - direction
                .reshape([rows * columns])
                .mul_scalar(rate * self.options.scale.of(rows, columns))
    }

    fn save(&self) -> SavedState {
        SavedState::default().with("momentum", host(&self.mean))
    }

    fn bytes(&self) -> u64 {
        bytes_of(&self.mean)
    }
}

/// The matrix with singular values near 1: `steps` Newton-Schulz iterations on the side with fewer
/// rows.
fn orthogonalised(matrix: Tensor<2>, steps: usize) -> Tensor<2> {
    let [rows, columns] = matrix.dims();
    let wide = match rows > columns {
        true => matrix.transpose(),
        false => matrix,
    };
    let norm = wide.clone().square().sum().sqrt().clamp_min(SMALLEST_NORM);
    let mut wide = wide / norm.reshape([1, 1]);
    let [a, b, c] = COEFFICIENTS;
    for _ in 0..steps {
        let gram = matmul(wide.clone(), wide.clone().transpose());
        let polynomial = gram.clone().mul_scalar(b) + matmul(gram.clone(), gram).mul_scalar(c);
        wide = wide.clone().mul_scalar(a) + matmul(polynomial, wide);
    }
    match rows > columns {
        true => wide.transpose(),
        false => wide,
    }
}
