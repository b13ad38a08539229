//! What a soft token carries beside its item: where the item comes from and how long ago it was.

use burn::tensor::{Int, Tensor, TensorData};

use super::input::Placement;
use super::new::{New, floats};
use crate::parameter::{Parameter, Visit};

/// Periods of the time features, geometrically from [`SHORTEST_DAYS`] to [`LONGEST_DAYS`].
const PERIODS: usize = 24;
/// One hour.
const SHORTEST_DAYS: f64 = 1.0 / 24.0;
/// A hundred years.
const LONGEST_DAYS: f64 = 36_525.0;

/// Site embedding and Fourier time features, shared by all streams. Both start at zero.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    /// `[sites + 1, hidden]`; the first is for an unknown site. None where there are no sites.
    site: Option<Parameter<2>>,
    /// `[2 · PERIODS, hidden]`; no bias, so that an item without a time gets nothing.
    time: Parameter<2>,
}

impl Shared {
    pub fn new(new: &New, sites: usize, hidden: usize) -> Shared {
        Shared {
            site: (sites > 0).then(|| new.zeros("site", [sites + 1, hidden])),
            time: new.zeros("time", [2 * PERIODS, hidden]),
        }
    }

    /// What is added to all tokens of each placed item, `[placements, 1, hidden]`; nothing where
    /// there are neither sites nor times.
    pub fn of(&self, placements: &[&Placement]) -> Option<Tensor<3>> {
        let count = placements.len();
        let [_, hidden] = self.time.tensor.dims();
        let device = self.time.tensor.device().inner();
        let site = self.site.as_ref().map(|table| {
            let rows: Vec<i32> = placements
                .iter()
                .map(|placement| placement.site.map_or(0, |site| site as i32 + 1))
                .collect();
            let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), &device);
            table.tensor.clone().select(0, rows)
        });
        let timed = placements.iter().any(|place| place.days_before.is_some());
        let time = timed.then(|| {
            let features: Vec<f32> = placements
                .iter()
                .flat_map(|placement| features(placement.days_before))
                .collect();
            let features = floats(features, [count, 2 * PERIODS], &device);
            calor_kernels::matmul(features, self.time.tensor.clone())
                .div_scalar((PERIODS as f32).sqrt())
        });
        let sum = match (site, time) {
            (Some(site), Some(time)) => Some(site + time),
            (site, time) => site.or(time),
        };
        sum.map(|sum| sum.reshape([count, 1, hidden]))
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        if let Some(site) = &mut self.site {
            visitor.visit(site);
        }
        visitor.visit(&mut self.time);
    }
}

/// `sin(2π d / P)` of every period, then the cosines; zeros where the time is not known.
fn features(days_before: Option<f32>) -> [f32; 2 * PERIODS] {
    let mut features = [0.0; 2 * PERIODS];
    let Some(days) = days_before else {
        return features;
    };
    for index in 0..PERIODS {
        let step = index as f64 / (PERIODS - 1) as f64;
        let period = SHORTEST_DAYS * (LONGEST_DAYS / SHORTEST_DAYS).powf(step);
        let angle = std::f64::consts::TAU * (f64::from(days) / period).fract();
        features[index] = angle.sin() as f32;
        features[PERIODS + index] = angle.cos() as f32;
    }
    features
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_features_tell_hours_and_decades_apart() {
        let distance = |a: f32, b: f32| {
            let (a, b) = (features(Some(a)), features(Some(b)));
            let squares = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b));
            squares.sum::<f32>().sqrt()
        };
        // Half the shortest period flips its sine and cosine.
        assert!(distance(10.0, 10.0 + 0.5 / 24.0) > 1.9);
        assert!(distance(3_650.0, 3_650.0 + 7_305.0) > 1.0);
        assert_eq!(distance(5.0, 5.0), 0.0);
        assert!(features(None).iter().all(|&feature| feature == 0.0));
        // The first period is an hour, the last a hundred years.
        let quarter = features(Some(0.25 / 24.0));
        assert!((quarter[0] - 1.0).abs() < 1e-6 && quarter[PERIODS].abs() < 1e-6);
        let quarter = features(Some(9_131.25));
        assert!((quarter[PERIODS - 1] - 1.0).abs() < 1e-6);
    }
}
