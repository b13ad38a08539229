//! Whether a predicted probability means what it says.

use serde::{Deserialize, Serialize};

use crate::score::Value;

/// Bins of the expected calibration error and of the equal-width calibration curve.
pub const CALIBRATION_BINS: usize = 15;

/// One bin of a calibration curve. Empty bins are left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CalibrationPoint {
    /// The bin holds probabilities above `low` (the first bin also `low` itself) …
    pub low: f64,
    /// … up to and including `high`.
    pub high: f64,
    pub mean_predicted: f64,
    pub observed_rate: f64,
    pub rows: usize,
}

/// Probabilities sorted into [`CALIBRATION_BINS`] bins of equal width, for the expected
/// calibration error (Guo et al. 2017).
#[derive(Debug, Clone)]
pub(crate) struct Calibration {
    cases: Vec<(u32, u8, bool, f64)>,
}

impl Calibration {
    /// Cases are `(probability, happened, row)`.
    pub(crate) fn new(cases: impl IntoIterator<Item = (f64, bool, usize)>) -> Calibration {
        let edges = equal_width_edges(CALIBRATION_BINS);
        let cases = cases
            .into_iter()
            .map(|(probability, happened, row)| {
                let row = u32::try_from(row).expect("rows are counted before");
                let bin = bin_of(probability, &edges) as u8;
                (row, bin, happened, probability)
            })
            .collect();
        Calibration { cases }
    }

    /// `Σ_bins |Σ p − Σ y| / rows`: the mean over rows of their bin's gap between the mean
    /// probability and the observed rate.
    pub(crate) fn error(&self, weights: &[u32]) -> Value {
        let mut gaps = [0.0_f64; CALIBRATION_BINS];
        let mut total = 0.0;
        for &(row, bin, happened, probability) in &self.cases {
            let weight = f64::from(weights[row as usize]);
            total += weight;
            gaps[bin as usize] += weight * (probability - f64::from(u8::from(happened)));
        }
        if total == 0.0 {
            return Err("there are no cases".into());
        }
        Ok(gaps.iter().map(|gap| gap.abs()).sum::<f64>() / total)
    }
}

/// The calibration curve over the bins between `edges` (ascending, at least two).
pub(crate) fn calibration_points(cases: &[(f64, bool)], edges: &[f64]) -> Vec<CalibrationPoint> {
    let bins = edges.len() - 1;
    let mut sums = vec![(0_usize, 0.0_f64, 0_usize); bins];
    for &(probability, happened) in cases {
        let (rows, predicted, observed) = &mut sums[bin_of(probability, edges)];
        *rows += 1;
        *predicted += probability;
        *observed += usize::from(happened);
    }
    sums.iter()
        .zip(edges.windows(2))
        .filter(|((rows, ..), _)| *rows > 0)
        .map(|(&(rows, predicted, observed), edges)| CalibrationPoint {
            low: edges[0],
            high: edges[1],
            mean_predicted: predicted / rows as f64,
            observed_rate: observed as f64 / rows as f64,
            rows,
        })
        .collect()
}

/// 0, 1/bins, …, 1.
pub(crate) fn equal_width_edges(bins: usize) -> Vec<f64> {
    (0..=bins).map(|edge| edge as f64 / bins as f64).collect()
}

/// The quantiles of the probabilities that cut them into `bins` equal shares.
pub(crate) fn quantile_edges(cases: &[(f64, bool)], bins: usize) -> Vec<f64> {
    let mut sorted: Vec<f64> = cases.iter().map(|case| case.0).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    (0..=bins)
        .map(|edge| crate::bootstrap::percentile(&sorted, edge as f64 / bins as f64))
        .collect()
}

/// The bin `(low, high]` that a probability falls into; what lies at or below the first edge is
/// in the first bin.
fn bin_of(probability: f64, edges: &[f64]) -> usize {
    let inner = &edges[1..edges.len() - 1];
    inner.partition_point(|&edge| edge < probability)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_belong_to_the_bin_below() {
        let edges = equal_width_edges(15);
        let bins: Vec<usize> = [0.0, 1.0 / 15.0, 0.067, 0.2, 0.2001, 0.9999, 1.0]
            .iter()
            .map(|&probability| bin_of(probability, &edges))
            .collect();
        assert_eq!(bins, [0, 0, 1, 2, 3, 14, 14]);
    }

    #[test]
    fn calibrated_bins_have_no_error_and_a_sure_mistake_has_all_of_it() {
        let calibrated = [(0.5, true, 0), (0.5, false, 1)];
        assert_eq!(Calibration::new(calibrated).error(&[1, 1]), Ok(0.0));
        let wrong = [(1.0, false, 0), (0.0, true, 1)];
        assert_eq!(Calibration::new(wrong).error(&[1, 1]), Ok(1.0));
        assert!(Calibration::new(wrong).error(&[0, 0]).is_err());
    }

    #[test]
    fn quantile_bins_hold_equal_shares() {
        let cases: Vec<(f64, bool)> = (0..100)
            .map(|i| (f64::from(i) / 99.0, i % 2 == 0))
            .collect();
        let points = calibration_points(&cases, &quantile_edges(&cases, 10));
        assert_eq!(points.len(), 10);
        assert!(points.iter().all(|point| point.rows == 10));
        assert!(points.iter().all(|point| point.observed_rate == 0.5));
    }
}
