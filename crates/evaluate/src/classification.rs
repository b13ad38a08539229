//! Predicted classes: accuracy, F1, and the losses of probabilities.

use crate::score::Value;

/// A case is predicted positive at this probability and above.
pub const BINARY_THRESHOLD: f64 = 0.5;

/// Whether a probability predicts the positive class ([`BINARY_THRESHOLD`]).
pub fn binary_label(probability: f64) -> bool {
    probability >= BINARY_THRESHOLD
}

/// The most probable class; the first of equals. `probabilities` is one row, not empty.
pub fn class_label(probabilities: &[f64]) -> usize {
    let mut best = 0;
    for (class, probability) in probabilities.iter().enumerate() {
        if *probability > probabilities[best] {
            best = class;
        }
    }
    best
}

/// Counts of (true class, predicted class) by resample.
#[derive(Debug, Clone)]
pub(crate) struct Confusion {
    classes: usize,
    /// `truth · classes + predicted` a row.
    cells: Vec<u32>,
}

/// Weighted counts of one class against the rest.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ClassCounts {
    pub true_positives: u64,
    pub false_positives: u64,
    pub false_negatives: u64,
}

impl ClassCounts {
    /// `2·TP / (2·TP + FP + FN)`; `None` for a class that neither occurs nor is predicted.
    pub(crate) fn f1(&self) -> Option<f64> {
        let twice = 2 * self.true_positives;
        let all = twice + self.false_positives + self.false_negatives;
        (all > 0).then(|| twice as f64 / all as f64)
    }

    pub(crate) fn add(&mut self, truth: bool, predicted: bool, weight: u64) {
        match (truth, predicted) {
            (true, true) => self.true_positives += weight,
            (false, true) => self.false_positives += weight,
            (true, false) => self.false_negatives += weight,
            (false, false) => {}
        }
    }
}

impl Confusion {
    /// Cases are `(truth, predicted)`, one a row.
    pub(crate) fn new(
        classes: usize,
        cases: impl IntoIterator<Item = (usize, usize)>,
    ) -> Confusion {
        let cells = cases
            .into_iter()
            .map(|(truth, predicted)| (truth * classes + predicted) as u32)
            .collect();
        Confusion { classes, cells }
    }

    /// Accuracy and macro F1 where row `i` occurs `weights[i]` times.
    ///
    /// Macro F1 is the plain mean over the classes that occur or are predicted (as scikit-learn
    /// takes it); it is undefined when only one class occurs.
    pub(crate) fn scores(&self, weights: &[u32]) -> (Value, Value) {
        let mut counts = vec![0_u64; self.classes * self.classes];
        for (&cell, &weight) in self.cells.iter().zip(weights) {
            counts[cell as usize] += u64::from(weight);
        }
        let total: u64 = counts.iter().sum();
        if total == 0 {
            return (
                Err("there are no cases".into()),
                Err("there are no cases".into()),
            );
        }
        let right: u64 = (0..self.classes)
            .map(|class| counts[class * self.classes + class])
            .sum();
        let accuracy = Ok(right as f64 / total as f64);

        let mut occurring = 0;
        let mut f1 = Vec::with_capacity(self.classes);
        for class in 0..self.classes {
            let true_positives = counts[class * self.classes + class];
            let occurs: u64 = counts[class * self.classes..(class + 1) * self.classes]
                .iter()
                .sum();
            let predicted: u64 = (0..self.classes)
                .map(|truth| counts[truth * self.classes + class])
                .sum();
            occurring += usize::from(occurs > 0);
            f1.extend(
                ClassCounts {
                    true_positives,
                    false_positives: predicted - true_positives,
                    false_negatives: occurs - true_positives,
                }
                .f1(),
            );
        }
        if occurring < 2 {
            return (accuracy, Err("only one class occurs".into()));
        }
        (accuracy, Ok(f1.iter().sum::<f64>() / f1.len() as f64))
    }
}

/// `−ln p` of what happened, with `p` kept from the ends by the machine epsilon of f64 as
/// scikit-learn does, so that one sure mistake costs 36 and not infinity.
pub(crate) fn log_loss_of(probability_of_truth: f64) -> f64 {
    -probability_of_truth
        .clamp(f64::EPSILON, 1.0 - f64::EPSILON)
        .ln()
}

/// `Σ w·v / Σ w`, summed in the order of the rows.
pub(crate) fn weighted_mean(values: &[f64], weights: &[u32]) -> Value {
    let mut sum = 0.0;
    let mut total = 0_u64;
    for (value, &weight) in values.iter().zip(weights) {
        sum += value * f64::from(weight);
        total += u64::from(weight);
    }
    if total == 0 {
        return Err("there are no cases".into());
    }
    finite(sum / total as f64)
}

/// A value, if it is one.
pub(crate) fn finite(value: f64) -> Value {
    if value.is_finite() {
        Ok(value)
    } else {
        Err("the sum overflows".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threshold_and_the_first_of_equals_decide() {
        assert!(binary_label(0.5) && !binary_label(0.499_999));
        assert_eq!(class_label(&[0.3, 0.4, 0.3]), 1);
        assert_eq!(class_label(&[0.4, 0.4, 0.2]), 0);
    }

    #[test]
    fn accuracy_and_f1_by_hand() {
        // truth 0 0 1 2, predicted 0 1 1 1: F1 = 2/3, 1/2, 0.
        let confusion = Confusion::new(3, [(0, 0), (0, 1), (1, 1), (2, 1)]);
        let (accuracy, macro_f1) = confusion.scores(&[1; 4]);
        assert_eq!(accuracy, Ok(0.5));
        assert!((macro_f1.unwrap() - (2.0 / 3.0 + 0.5) / 3.0).abs() < 1e-15);
        // Without the row of class 2 it neither occurs nor is predicted: the mean is over two.
        let (_, macro_f1) = confusion.scores(&[1, 1, 1, 0]);
        assert!((macro_f1.unwrap() - (2.0 / 3.0 + 2.0 / 3.0) / 2.0).abs() < 1e-15);
    }

    #[test]
    fn one_class_has_an_accuracy_and_no_macro_f1() {
        let (accuracy, macro_f1) = Confusion::new(2, [(1, 1), (1, 0)]).scores(&[1, 1]);
        assert_eq!(accuracy, Ok(0.5));
        assert!(macro_f1.unwrap_err().contains("only one class"));
        let (accuracy, macro_f1) = Confusion::new(2, [(1, 1)]).scores(&[0]);
        assert!(accuracy.is_err() && macro_f1.is_err());
    }

    #[test]
    fn a_sure_mistake_costs_36_and_not_infinity() {
        assert!((log_loss_of(0.0) - 36.043_653_389_117_15).abs() < 1e-9);
        assert!(log_loss_of(1.0) >= 0.0);
    }

    #[test]
    fn overflow_is_no_number() {
        assert!(weighted_mean(&[f64::MAX, f64::MAX], &[1, 1]).is_err());
        assert_eq!(weighted_mean(&[1.0, 4.0], &[2, 1]), Ok(2.0));
    }
}
