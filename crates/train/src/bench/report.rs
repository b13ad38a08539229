//! What a benchmark of steps found.

use calor_meter::{MeterReport, PeakFlops, Quantity};
use serde::Serialize;

use super::{BenchTask, StepProfile};
use crate::recipe::{Dtype, KernelChoice};

/// What a benchmark found.
#[derive(Clone, Debug, Serialize)]
pub struct StepBenchReport {
    /// The checkpoint's folder.
    pub model: String,
    /// The recipe's name, where there is one.
    pub recipe: Option<String>,
    /// What was minimised.
    pub task: BenchTask,
    /// The device.
    pub device: String,
    /// What the device is.
    pub device_description: String,
    /// Type of the frozen weights and of the activations.
    pub dtype: Dtype,
    /// What operations were computed with.
    pub kernels: KernelChoice,
    /// What a reader has to know.
    pub notes: Vec<String>,
    /// Rows.
    pub batch: usize,
    /// Tokens a row, padding included.
    pub seq: usize,
    /// Bytes of the frozen weights.
    pub frozen_bytes: u64,
    /// Loss of every step before its update, warm-up steps first; of profiled steps none.
    pub losses: Vec<f64>,
    /// Norm of the gradients before clipping, likewise.
    pub gradient_norms: Vec<f64>,
    /// Wall time of each timed step.
    pub step_s: Vec<f64>,
    /// Tokens without padding over the median step time.
    pub tokens_per_s: f64,
    /// The windows, each by itself.
    pub windows: Vec<WindowReport>,
    /// Tokens without padding a second, over the windows.
    pub window_tokens_per_s: Spread,
    /// Joules a token, over the windows; none where a window has none.
    pub window_energy_j_per_token: Option<Spread>,
    /// Joules of the timed steps.
    pub energy_j: Quantity,
    /// The same a token.
    pub energy_j_per_token: Quantity,
    /// Useful operations a second over `peak`.
    pub mfu: Quantity,
    /// The same with recomputed operations counted as well.
    pub hfu: Quantity,
    /// What they were divided by.
    pub peak: PeakFlops,
    /// The fastest large product that was measured here, which `peak` is where no data sheet is known.
    pub fastest_product: PeakFlops,
    /// Peak memory of the process.
    pub peak_memory_bytes: Quantity,
    /// Peak memory of the device, where it has its own.
    pub device_peak_bytes: Quantity,
    /// Bytes that a step was predicted to hold at its peak: on the device, or on the host beside the
    /// program itself.
    pub predicted_peak_bytes: u64,
    /// Where the time of a step goes; none where no step was profiled.
    pub profile: Option<StepProfile>,
    /// All that was measured.
    pub meter: MeterReport,
}

/// Some steps one after the other.
#[derive(Clone, Debug, Serialize)]
pub struct WindowReport {
    /// Wall time, the device's work done at both ends.
    pub elapsed_s: f64,
    /// Tokens without padding over it.
    pub tokens_per_s: f64,
    /// Joules of it.
    pub energy_j: Quantity,
    /// The same a token.
    pub energy_j_per_token: Quantity,
}

/// A number that was measured several times.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The one in the middle.
    pub median: f64,
    /// The lowest.
    pub least: f64,
    /// The highest.
    pub most: f64,
}

impl Spread {
    /// NaN where nothing was measured.
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Spread {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        Spread {
            median: match count {
                0 => f64::NAN,
                _ => (at((count - 1) / 2) + at(count / 2)) / 2.0,
            },
            least: at(0),
            most: at(count.wrapping_sub(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_measurements_and_their_ends() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied());
        let found = spread(&[3.0, 1.0, 2.0]);
        assert_eq!((found.median, found.least, found.most), (2.0, 1.0, 3.0));
        assert_eq!(spread(&[4.0, 1.0]).median, 2.5);
        assert!(spread(&[]).median.is_nan() && spread(&[]).most.is_nan());
    }
}
