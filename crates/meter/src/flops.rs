//! How many floating-point operations a step needs, and how many the device could have done.

use serde::{Deserialize, Serialize};

/// The operations a model needs for a sequence, after the accounting of Kaplan et al. (2020) and
/// Chowdhery et al. (2022), with the base frozen:
///
/// * a token meets every base parameter once forward (2 operations: multiply and add) and once
///   backward for the gradient of the activations (2 more): `4·N`; were the base trained, the
///   gradient of its weights would add 2;
/// * an adapter or head parameter takes all three: `6·P`;
/// * attention multiplies queries with keys and weights with values, 4·S·d operations a token and
///   layer forward and twice that backward: `12·S·d·L`, and half of it, `6·S·d·L`, when each
///   position sees only those before it.
///
/// Lengths are those of the real segments, so padding does no useful work and packed patients do
/// not attend to each other. Recomputed activations are left out (they count in the hardware's
/// figure only, [`FlopModel::recomputed_flops`]).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FlopModel {
    /// N: parameters of the base that take part in a matrix product for every token (embeddings
    /// that are only looked up do not).
    pub base_parameters: u64,
    /// P: parameters of adapters and heads.
    pub adapter_parameters: u64,
    /// L.
    pub layers: u64,
    /// d: heads × head_dim of the queries; the hidden size in most models.
    pub attention_width: u64,
    /// Whether a position sees only itself and those before it.
    pub causal: bool,
    /// Positions that a position sees at most on one side, itself included.
    pub window: Option<u64>,
    /// Whether the base is trained as well.
    pub base_trained: bool,
    /// Share of the forward pass that is run a second time in the backward pass, from 0 to 1.
    pub recomputed_share: f64,
}

impl FlopModel {
    /// Operations of the forward pass over one segment.
    pub fn forward_flops(&self, segment_length: usize) -> f64 {
        let tokens = segment_length as f64;
        let parameters = (self.base_parameters + self.adapter_parameters) as f64;
        2.0 * parameters * tokens + self.attention_forward(tokens)
    }

    /// Operations of the forward and backward pass over one segment, each counted once.
    pub fn training_flops(&self, segment_length: usize) -> f64 {
        let tokens = segment_length as f64;
        let base = if self.base_trained { 6.0 } else { 4.0 } * self.base_parameters as f64;
        let adapter = 6.0 * self.adapter_parameters as f64;
        (base + adapter) * tokens + 3.0 * self.attention_forward(tokens)
    }

    /// Operations done a second time to save memory, for one segment.
    pub fn recomputed_flops(&self, segment_length: usize) -> f64 {
        self.recomputed_share * self.forward_flops(segment_length)
    }

    /// 4·d operations for each pair of a query and a key it sees, in each layer.
    fn attention_forward(&self, tokens: f64) -> f64 {
        let hidden_pairs = match self.window {
            Some(window) => (tokens - window as f64).max(0.0).powi(2),
            None => 0.0,
        };
        let mut pairs = tokens * tokens - hidden_pairs;
        if self.causal {
            pairs *= 0.5;
        }
        4.0 * (self.attention_width * self.layers) as f64 * pairs
    }
}

/// The arithmetic of the matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    F32,
    /// f32 storage with products in the tensor cores' 19-bit format.
    Tf32,
    /// bf16 or f16.
    Half,
}

/// The most floating-point operations a second the device can do, and how that is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum PeakFlops {
    /// By the vendor's data sheet or the recipe.
    Stated { flops_per_s: f64, source: String },
    /// By a measurement on this machine, such as a large matrix product.
    Measured { flops_per_s: f64, source: String },
}

impl PeakFlops {
    pub fn flops_per_s(&self) -> f64 {
        match self {
            PeakFlops::Stated { flops_per_s, .. } | PeakFlops::Measured { flops_per_s, .. } => {
                *flops_per_s
            }
        }
    }

    /// A sentence that names the peak and its source.
    pub fn describe(&self) -> String {
        let (how, flops_per_s, source) = match self {
            PeakFlops::Stated {
                flops_per_s,
                source,
            } => ("stated", flops_per_s, source),
            PeakFlops::Measured {
                flops_per_s,
                source,
            } => ("measured", flops_per_s, source),
        };
        format!(
            "{how} peak of {:.4} TFLOP/s ({source})",
            flops_per_s * 1e-12
        )
    }

    /// The peak that the vendor states for a GPU by the name its driver gives: dense matrix
    /// products, no sparsity. `None` for a GPU that is not in the table, never a guess.
    pub fn of_gpu(name: &str, precision: Precision) -> Option<PeakFlops> {
        // (start of the name, data sheet, f32, tf32, bf16 and f16), TFLOP/s.
        const TABLE: [(&str, &str, f64, f64, f64); 8] = [
            ("H200 NVL", "NVIDIA H200 NVL", 60.0, 417.5, 835.5),
            ("H200", "NVIDIA H200 SXM", 66.9, 494.7, 989.4),
            ("H100 PCIe", "NVIDIA H100 PCIe", 51.2, 378.0, 756.0),
            ("H100 80GB HBM3", "NVIDIA H100 SXM", 66.9, 494.7, 989.4),
            ("A100-SXM4", "NVIDIA A100", 19.5, 156.0, 312.0),
            ("A100-PCIE", "NVIDIA A100", 19.5, 156.0, 312.0),
            ("A100 80GB PCIe", "NVIDIA A100", 19.5, 156.0, 312.0),
            ("L40S", "NVIDIA L40S", 91.6, 183.0, 362.0),
        ];
        let product = name.trim_start_matches("NVIDIA ");
        let (_, sheet, f32_peak, tf32_peak, half_peak) =
            TABLE.iter().find(|(part, ..)| product.starts_with(part))?;
        let (peak, kind) = match precision {
            Precision::F32 => (f32_peak, "f32"),
            Precision::Tf32 => (tf32_peak, "tf32, dense"),
            Precision::Half => (half_peak, "bf16 and f16, dense"),
        };
        Some(PeakFlops::Stated {
            flops_per_s: peak * 1e12,
            source: format!("data sheet of the {sheet}, {kind}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> FlopModel {
        FlopModel {
            base_parameters: 1_000,
            adapter_parameters: 10,
            layers: 2,
            attention_width: 8,
            causal: true,
            window: None,
            base_trained: false,
            recomputed_share: 0.0,
        }
    }

    /// Counts the operations of the two attention products by hand: a pair of positions costs 2·d
    /// for its score and 2·d for its part of the sum.
    fn attention_by_pairs(length: u64, sees: impl Fn(i64, i64) -> bool) -> f64 {
        let length = length as i64;
        let pairs = (0..length)
            .flat_map(|query| (0..length).map(move |key| (query, key)))
            .filter(|&(query, key)| sees(query, key))
            .count();
        (pairs * 4 * 8 * 2) as f64
    }

    #[test]
    fn a_causal_token_costs_4n_6p_and_6sdl() {
        let length = 100.0;
        let expected = length * (4.0 * 1_000.0 + 6.0 * 10.0 + 6.0 * length * 8.0 * 2.0);
        assert_eq!(model().training_flops(100), expected);
    }

    #[test]
    fn attention_to_both_sides_costs_twice_as_much() {
        let both = FlopModel {
            causal: false,
            ..model()
        };
        let extra = both.training_flops(100) - model().training_flops(100);
        assert_eq!(extra, 100.0 * 6.0 * 100.0 * 8.0 * 2.0);
        let weights = 2.0 * 1_010.0 * 100.0;
        assert_eq!(
            both.forward_flops(100) - weights,
            attention_by_pairs(100, |_, _| true)
        );
    }

    #[test]
    fn a_window_leaves_out_the_pairs_it_hides() {
        let windowed = FlopModel {
            window: Some(300),
            ..model()
        };
        let weights = 2.0 * 1_010.0 * 1_000.0;
        let counted = windowed.forward_flops(1_000) - weights;
        let exact = attention_by_pairs(1_000, |query, key| key <= query && query - key < 300);
        // The formula halves the square, as the usual accounting does; the diagonal is the rest.
        assert!((counted / exact - 1.0).abs() < 2e-3, "{counted} {exact}");
        assert_eq!(windowed.forward_flops(200), model().forward_flops(200));
    }

    #[test]
    fn packed_segments_cost_less_than_one_long_one() {
        let model = model();
        assert!(2.0 * model.training_flops(50) < model.training_flops(100));
    }

    #[test]
    fn a_trained_base_costs_6n_and_recomputation_counts_apart() {
        let full = FlopModel {
            base_trained: true,
            recomputed_share: 0.5,
            ..model()
        };
        let extra = full.training_flops(10) - model().training_flops(10);
        assert_eq!(extra, 2.0 * 1_000.0 * 10.0);
        assert_eq!(full.recomputed_flops(10), 0.5 * full.forward_flops(10));
        assert_eq!(model().recomputed_flops(10), 0.0);
    }

    #[test]
    fn known_gpus_have_a_peak_with_a_source_and_unknown_ones_none() {
        let peak = PeakFlops::of_gpu("NVIDIA H100 80GB HBM3", Precision::Half).unwrap();
        assert_eq!(peak.flops_per_s(), 989.4e12);
        assert!(
            peak.describe()
                .contains("data sheet of the NVIDIA H100 SXM")
        );
        let pcie = PeakFlops::of_gpu("NVIDIA H100 PCIe", Precision::F32).unwrap();
        assert_eq!(pcie.flops_per_s(), 51.2e12);
        let nvl = PeakFlops::of_gpu("NVIDIA H200 NVL", Precision::F32).unwrap();
        assert_eq!(nvl.flops_per_s(), 60.0e12);
        assert_eq!(
            PeakFlops::of_gpu("NVIDIA GH200 480GB", Precision::F32),
            None
        );
        assert_eq!(PeakFlops::of_gpu("llvmpipe", Precision::F32), None);
    }
}
