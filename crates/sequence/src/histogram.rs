//! Counts of the values of one code, exact while there are few distinct ones, bounded in memory.

use std::collections::BTreeMap;

/// Distinct values kept apart for one code. Laboratory values with three or four digits stay exact.
const DISTINCT: usize = 8_192;

/// Counts of `f32` values in order.
///
/// When more than `DISTINCT` different values have been seen, the lowest bit of their
/// representation is given up, as often as needed: each such step doubles the width of the bins,
/// which starts at one unit in the last place and is relative to the value. What a histogram holds
/// depends on the multiset of values alone, not on their order or on how they were split into
/// parts and merged, so any number of threads gives the same quantiles.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Histogram {
    bins: BTreeMap<u32, u64>,
    shift: u32,
    total: u64,
}

impl Histogram {
    /// Values that are not finite are left out.
    pub(crate) fn add(&mut self, value: f32) {
        if !value.is_finite() {
            return;
        }
        *self
            .bins
            .entry(ordered_bits(value) >> self.shift)
            .or_default() += 1;
        self.total += 1;
        self.coarsen();
    }

    pub(crate) fn merge(&mut self, mut other: Histogram) {
        while self.shift < other.shift {
            self.halve();
        }
        while other.shift < self.shift {
            other.halve();
        }
        for (bin, count) in other.bins {
            *self.bins.entry(bin).or_default() += count;
        }
        self.total += other.total;
        self.coarsen();
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The smallest value that at least `level` of all values do not exceed (the inverse of the
    /// empirical distribution function, type 1 of Hyndman and Fan 1996). `None` without values.
    pub(crate) fn quantile(&self, level: f64) -> Option<f32> {
        let rank = ((level * self.total as f64).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (&bin, &count) in &self.bins {
            seen += count;
            if seen >= rank {
                // The middle of the bin; of a bin of one value, that value.
                let width = (1u64 << self.shift) - 1;
                let middle = (u64::from(bin) << self.shift) + width.div_ceil(2);
                return Some(from_ordered_bits(middle as u32));
            }
        }
        None
    }

    fn coarsen(&mut self) {
        while self.bins.len() > DISTINCT {
            self.halve();
        }
    }

    fn halve(&mut self) {
        self.shift += 1;
        let mut halved = BTreeMap::new();
        for (bin, count) in std::mem::take(&mut self.bins) {
            *halved.entry(bin >> 1).or_default() += count;
        }
        self.bins = halved;
    }
}

/// Maps finite floats to integers of the same order; both zeros to one.
fn ordered_bits(value: f32) -> u32 {
    let bits = (value + 0.0).to_bits();
    if bits >> 31 == 1 {
        !bits
    } else {
        bits | 1 << 31
    }
}

fn from_ordered_bits(ordered: u32) -> f32 {
    f32::from_bits(if ordered >> 31 == 1 {
        ordered & !(1 << 31)
    } else {
        !ordered
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn histogram(values: &[f32]) -> Histogram {
        let mut histogram = Histogram::default();
        values.iter().for_each(|&value| histogram.add(value));
        histogram
    }

    #[test]
    fn quantiles_of_few_values_are_those_values() {
        let histogram = histogram(&[3.0, -1.5, 2.0, f32::NAN, 10.0, f32::INFINITY]);
        assert_eq!(histogram.total(), 4);
        assert_eq!(histogram.quantile(0.01), Some(-1.5));
        assert_eq!(histogram.quantile(0.25), Some(-1.5));
        assert_eq!(histogram.quantile(0.26), Some(2.0));
        assert_eq!(histogram.quantile(0.5), Some(2.0));
        assert_eq!(histogram.quantile(0.75), Some(3.0));
        assert_eq!(histogram.quantile(0.99), Some(10.0));
        assert_eq!(Histogram::default().quantile(0.5), None);
    }

    #[test]
    fn the_zeros_are_one_value() {
        let histogram = histogram(&[0.0, -0.0]);
        assert_eq!(histogram.bins.len(), 1);
        assert_eq!(histogram.quantile(0.5), Some(0.0));
    }

    #[test]
    fn many_distinct_values_stay_bounded_and_close() {
        let values: Vec<f32> = (0..200_000).map(|i| 1.0 + i as f32 / 1e5).collect();
        let histogram = histogram(&values);
        assert!(histogram.bins.len() <= DISTINCT);
        assert!(histogram.shift > 0);
        for level in [0.05, 0.25, 0.5, 0.75, 0.95] {
            let exact = 1.0 + level * 2.0;
            let found = f64::from(histogram.quantile(level).unwrap());
            assert!((found - exact).abs() / exact < 1e-3, "{found} {exact}");
        }
    }

    proptest! {
        #[test]
        fn order_survives_the_mapping(a in -1e30f32..1e30, b in -1e30f32..1e30) {
            prop_assert_eq!(a < b, ordered_bits(a) < ordered_bits(b));
            prop_assert_eq!(from_ordered_bits(ordered_bits(a)), a);
        }

        #[test]
        fn parts_in_any_order_give_the_same_histogram(
            values in prop::collection::vec(-1e6f32..1e6, 0..30_000),
            cut in 0usize..30_000,
        ) {
            let cut = cut.min(values.len());
            let whole = histogram(&values);
            let mut parts = histogram(&values[cut..]);
            let mut first = values[..cut].to_vec();
            first.reverse();
            parts.merge(histogram(&first));
            prop_assert_eq!(parts, whole);
        }
    }
}
