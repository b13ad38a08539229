use serde::{Deserialize, Serialize};

/// Mean and standard deviation of each feature over the vectors of the training patients, gathered
/// in one pass (Welford 1962), in parts that can be merged (Chan, Golub and LeVeque 1979). A
/// missing value does not count.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored")]
pub struct OmicsStatistics {
    /// Values seen of each feature.
    count: Vec<u64>,
    mean: Vec<f64>,
    /// Sum of the squared differences from the mean.
    squares: Vec<f64>,
}

impl OmicsStatistics {
    /// Of vectors of so many features, none seen yet.
    pub fn new(features: usize) -> OmicsStatistics {
        OmicsStatistics {
            count: vec![0; features],
            mean: vec![0.0; features],
            squares: vec![0.0; features],
        }
    }

    /// Number of features.
    pub fn len(&self) -> usize {
        self.count.len()
    }

    /// Whether it is of vectors without features.
    pub fn is_empty(&self) -> bool {
        self.count.is_empty()
    }

    /// Adds a patient's vector `[features]`.
    ///
    /// # Panics
    /// When it has another number of features.
    pub fn add(&mut self, values: &[f32]) {
        self.check(values.len());
        for (feature, &value) in values.iter().enumerate() {
            if value.is_finite() {
                let value = f64::from(value);
                self.count[feature] += 1;
                let before = value - self.mean[feature];
                self.mean[feature] += before / self.count[feature] as f64;
                self.squares[feature] += before * (value - self.mean[feature]);
            }
        }
    }

    /// Adds what was gathered of other patients.
    ///
    /// # Panics
    /// When it is of another number of features.
    pub fn merge(&mut self, other: &OmicsStatistics) {
        self.check(other.len());
        for feature in 0..self.len() {
            let (mine, theirs) = (self.count[feature], other.count[feature]);
            if theirs == 0 {
                continue;
            }
            let all = (mine + theirs) as f64;
            let apart = other.mean[feature] - self.mean[feature];
            self.mean[feature] += apart * (theirs as f64 / all);
            self.squares[feature] +=
                other.squares[feature] + apart * apart * (mine as f64 * theirs as f64 / all);
            self.count[feature] += theirs;
        }
    }

    /// Values seen of a feature.
    pub fn count(&self, feature: usize) -> u64 {
        self.count[feature]
    }

    /// What is taken off a feature: its mean, 0 if it was never seen.
    pub fn mean(&self, feature: usize) -> f64 {
        self.mean[feature]
    }

    /// What a feature is divided by: its standard deviation over all patients seen (divided by n,
    /// as scikit-learn's `StandardScaler`), 1 if it was never seen or is constant.
    pub fn standard_deviation(&self, feature: usize) -> f64 {
        let count = self.count[feature] as f64;
        if count == 0.0 {
            return 1.0;
        }
        let variance = self.squares[feature] / count;
        // What rounding alone may leave of a constant (scikit-learn's `_is_constant_feature`).
        let error =
            count * f64::EPSILON * variance + (count * self.mean[feature] * f64::EPSILON).powi(2);
        if variance <= error {
            1.0
        } else {
            variance.sqrt()
        }
    }

    /// Takes off the mean and divides by the standard deviation, in place; missing values stay
    /// missing, and a constant feature becomes 0.
    ///
    /// # Panics
    /// When the vector has another number of features.
    pub fn standardise(&self, values: &mut [f32]) {
        self.check(values.len());
        for (feature, value) in values.iter_mut().enumerate() {
            let centred = f64::from(*value) - self.mean[feature];
            *value = (centred / self.standard_deviation(feature)) as f32;
        }
    }

    fn check(&self, features: usize) {
        assert_eq!(
            self.len(),
            features,
            "vectors are decoded with the same list of features throughout"
        );
    }
}

/// What is on disk, before it is believed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    count: Vec<u64>,
    mean: Vec<f64>,
    squares: Vec<f64>,
}

impl TryFrom<Stored> for OmicsStatistics {
    type Error = &'static str;

    fn try_from(stored: Stored) -> Result<OmicsStatistics, &'static str> {
        let Stored {
            count,
            mean,
            squares,
        } = stored;
        if count.len() != mean.len() || count.len() != squares.len() {
            return Err("`count`, `mean` and `squares` must be of one length");
        }
        if !mean.iter().chain(&squares).all(|value| value.is_finite())
            || squares.iter().any(|square| *square < 0.0)
        {
            return Err("`mean` must be finite, and `squares` finite and not negative");
        }
        Ok(OmicsStatistics {
            count,
            mean,
            squares,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MISSING: f32 = f32::NAN;

    #[test]
    fn they_are_those_of_scikit_learn() {
        // sklearn.preprocessing.StandardScaler().fit([[1, nan, 5], [2, 4, 5], [6, nan, 5]]):
        // mean_ [3, 4, 5], scale_ [2.160246899469287, 1, 1], n_samples_seen_ [3, 1, 3].
        let mut statistics = OmicsStatistics::new(4);
        statistics.add(&[1.0, MISSING, 5.0, MISSING]);
        statistics.add(&[2.0, 4.0, 5.0, MISSING]);
        statistics.add(&[6.0, MISSING, 5.0, MISSING]);
        let of = |get: fn(&OmicsStatistics, usize) -> f64| -> Vec<f64> {
            (0..4).map(|feature| get(&statistics, feature)).collect()
        };
        assert_eq!(of(OmicsStatistics::mean), [3.0, 4.0, 5.0, 0.0]);
        assert_eq!(
            of(OmicsStatistics::standard_deviation),
            [2.160_246_899_469_287, 1.0, 1.0, 1.0]
        );
        assert_eq!(
            (
                statistics.count(0),
                statistics.count(1),
                statistics.count(3)
            ),
            (3, 1, 0)
        );

        let mut values = [6.0, MISSING, 5.0, 0.25];
        statistics.standardise(&mut values);
        assert_eq!(values[0], 1.388_730_2);
        assert!(values[1].is_nan());
        assert_eq!(values[2..], [0.0, 0.25]);
    }

    #[test]
    fn a_constant_stays_one_whatever_the_parts() {
        let mut first = OmicsStatistics::new(1);
        for part in 1..50 {
            let mut other = OmicsStatistics::new(1);
            for _ in 0..part {
                other.add(&[0.1]);
            }
            first.merge(&other);
        }
        assert_eq!(first.standard_deviation(0), 1.0);
        let mut value = [0.1];
        first.standardise(&mut value);
        assert_eq!(value, [0.0]);
    }

    #[test]
    fn they_are_stored_exactly() {
        let mut statistics = OmicsStatistics::new(2);
        for value in [0.1, 0.7, -3.3e-7, 5e9] {
            statistics.add(&[value, MISSING]);
        }
        let json = serde_json::to_string(&statistics).unwrap();
        let back: OmicsStatistics = serde_json::from_str(&json).unwrap();
        assert_eq!(back, statistics);
        for damaged in [
            r#"{"count": [1], "mean": [0.0, 1.0], "squares": [0.0]}"#,
            r#"{"count": [1], "mean": [0.0], "squares": [-1.0]}"#,
            r#"{"count": [1], "mean": [0.0]}"#,
        ] {
            assert!(
                serde_json::from_str::<OmicsStatistics>(damaged).is_err(),
                "{damaged}"
            );
        }
    }

    #[test]
    #[should_panic(expected = "same list of features")]
    fn a_vector_of_another_length_is_refused() {
        OmicsStatistics::new(2).standardise(&mut [0.0; 3]);
    }

    proptest! {
        /// Parts merged are the whole, and both are what two passes over the values give.
        #[test]
        fn parts_merged_are_the_whole(
            values in prop::collection::vec(
                prop_oneof![4 => -1e4f32..1e4, 1 => Just(MISSING)], 0..60),
            cut in 0usize..60,
        ) {
            let of = |values: &[f32]| {
                let mut statistics = OmicsStatistics::new(1);
                for &value in values {
                    statistics.add(&[value]);
                }
                statistics
            };
            let whole = of(&values);
            let cut = cut.min(values.len());
            let mut merged = of(&values[..cut]);
            merged.merge(&of(&values[cut..]));
            let seen: Vec<f64> = values
                .iter()
                .filter(|value| !value.is_nan())
                .map(|value| f64::from(*value))
                .collect();
            prop_assert_eq!(whole.count(0), seen.len() as u64);
            prop_assert_eq!(merged.count(0), seen.len() as u64);
            let n = seen.len().max(1) as f64;
            let mean = seen.iter().sum::<f64>() / n;
            let variance = seen.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n;
            let deviation = if variance > 0.0 { variance.sqrt() } else { 1.0 };
            for statistics in [&whole, &merged] {
                prop_assert!((statistics.mean(0) - mean).abs() < 1e-8);
                prop_assert!(
                    (statistics.standard_deviation(0) - deviation).abs() < 1e-8 * deviation
                );
            }
        }
    }
}
