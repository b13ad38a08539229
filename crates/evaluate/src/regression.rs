//! Predicted numbers.

use crate::classification::finite;
use crate::score::Value;

/// Squared errors and targets, kept so that each resample is one pass.
#[derive(Debug, Clone)]
pub(crate) struct Residuals {
    squared_errors: Vec<f64>,
    /// Targets less their mean, which keeps the sum of squares from cancelling.
    centred_targets: Vec<f64>,
}

impl Residuals {
    /// `predicted` and `targets` are finite and of one length, not empty.
    pub(crate) fn new(predicted: &[f64], targets: &[f64]) -> Residuals {
        let mean = targets.iter().sum::<f64>() / targets.len() as f64;
        Residuals {
            squared_errors: predicted
                .iter()
                .zip(targets)
                .map(|(predicted, target)| (predicted - target).powi(2))
                .collect(),
            centred_targets: targets.iter().map(|target| target - mean).collect(),
        }
    }

    /// RMSE `√(Σ w·e² / Σ w)` and R² `1 − Σ w·e² / Σ w·(y − ȳ)²`, the latter undefined for fewer
    /// than two cases or a target that does not vary.
    pub(crate) fn scores(&self, weights: &[u32]) -> (Value, Value) {
        let (mut errors, mut sum, mut squares) = (0.0, 0.0, 0.0);
        let mut total = 0_u64;
        let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
        let targets = self.centred_targets.iter();
        for ((squared_error, target), &weight) in
            self.squared_errors.iter().zip(targets).zip(weights)
        {
            if weight == 0 {
                continue;
            }
            let times = f64::from(weight);
            total += u64::from(weight);
            errors += times * squared_error;
            sum += times * target;
            squares += times * target * target;
            least = least.min(*target);
            most = most.max(*target);
        }
        if total == 0 {
            return (
                Err("there are no cases".into()),
                Err("there are no cases".into()),
            );
        }
        let rmse = finite((errors / total as f64).sqrt());
        let r2 = if total < 2 {
            Err("there is only one case".into())
        } else if least == most {
            Err("the target does not vary".into())
        } else {
            finite(1.0 - errors / (squares - sum * sum / total as f64))
        };
        (rmse, r2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let residuals = Residuals::new(&[1.0, 2.0, 4.0], &[1.0, 3.0, 5.0]);
        let (rmse, r2) = residuals.scores(&[1, 1, 1]);
        assert!((rmse.unwrap() - (2.0_f64 / 3.0).sqrt()).abs() < 1e-15);
        assert!((r2.unwrap() - (1.0 - 2.0 / 8.0)).abs() < 1e-15);
    }

    #[test]
    fn a_large_offset_does_not_cost_precision() {
        let offset = 1e9;
        let residuals = Residuals::new(
            &[offset + 1.0, offset + 2.0, offset + 4.0],
            &[offset + 1.0, offset + 3.0, offset + 5.0],
        );
        let (_, r2) = residuals.scores(&[1, 1, 1]);
        assert!((r2.unwrap() - 0.75).abs() < 1e-9);
    }

    #[test]
    fn a_constant_target_has_an_rmse_and_no_r2() {
        let (rmse, r2) = Residuals::new(&[1.0, 3.0], &[2.0, 2.0]).scores(&[1, 1]);
        assert_eq!(rmse, Ok(1.0));
        assert!(r2.unwrap_err().contains("does not vary"));
        let (_, r2) = Residuals::new(&[1.0, 3.0], &[2.0, 5.0]).scores(&[1, 0]);
        assert!(r2.unwrap_err().contains("one case"));
        let (rmse, _) = Residuals::new(&[1e200], &[-1e200]).scores(&[1]);
        assert!(rmse.is_err());
    }
}
