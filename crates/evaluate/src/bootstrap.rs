//! Intervals by resampling patients.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::EvaluateError;
use crate::score::{Interval, Value};

/// How intervals are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BootstrapOptions {
    /// Resamples; 0 for no intervals. Default 1000.
    pub resamples: usize,
    /// Share of the resamples inside the interval. Default 0.95.
    pub level: f64,
    pub seed: u64,
}

impl Default for BootstrapOptions {
    fn default() -> BootstrapOptions {
        BootstrapOptions {
            resamples: 1000,
            level: 0.95,
            seed: 0,
        }
    }
}

impl BootstrapOptions {
    /// Refuses a level that is no share.
    pub fn check(&self) -> Result<(), EvaluateError> {
        if self.level > 0.0 && self.level < 1.0 {
            Ok(())
        } else {
            Err(EvaluateError::InvalidOption {
                key: "level",
                reason: "must be between 0 and 1, such as 0.95",
            })
        }
    }
}

/// Which patient each row belongs to.
#[derive(Debug, Clone)]
pub struct Patients {
    of_row: Vec<u32>,
    count: usize,
}

impl Patients {
    /// Numbers the patients by their identifier, so that the order of the rows does not matter to
    /// the resamples. Fails on no rows, or more than 2³² − 1.
    pub fn new(ids: &[i64]) -> Result<Patients, EvaluateError> {
        if ids.is_empty() {
            return Err(EvaluateError::Empty);
        }
        if u32::try_from(ids.len()).is_err() {
            return Err(EvaluateError::TooManyRows { rows: ids.len() });
        }
        let mut unique = ids.to_vec();
        unique.sort_unstable();
        unique.dedup();
        let of_row = ids
            .iter()
            .map(|id| unique.partition_point(|known| known < id) as u32)
            .collect();
        Ok(Patients {
            of_row,
            count: unique.len(),
        })
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn rows(&self) -> usize {
        self.of_row.len()
    }
}

/// The percentile interval of `metric` over resamples of the patients with replacement.
///
/// `metric` gets the number of times each row occurs, `[rows]`, and returns `None` where it has
/// no value. Resamples run in parallel; each has its own generator, seeded by the options' seed
/// and its number, so the interval does not depend on the number of threads.
pub fn bootstrap(
    patients: &Patients,
    options: &BootstrapOptions,
    metric: impl Fn(&[u32]) -> Option<f64> + Sync,
) -> Interval {
    let all = bootstrap_all(patients, options, |weights| {
        vec![metric(weights).ok_or("no value".into())]
    });
    all.into_iter().next().unwrap_or_else(no_resamples)
}

/// One interval for each entry that `metrics` returns; empty if there are no resamples.
pub(crate) fn bootstrap_all(
    patients: &Patients,
    options: &BootstrapOptions,
    metrics: impl Fn(&[u32]) -> Vec<Value> + Sync,
) -> Vec<Interval> {
    let resample = |(drawn, weights): &mut (Vec<u32>, Vec<u32>), number: usize| {
        let mut generator = Generator::new(options.seed, number as u64);
        drawn.clear();
        drawn.resize(patients.count, 0);
        for _ in 0..patients.count {
            drawn[generator.below(patients.count)] += 1;
        }
        weights.clear();
        weights.extend(
            patients
                .of_row
                .iter()
                .map(|&patient| drawn[patient as usize]),
        );
        metrics(weights)
    };
    let values: Vec<Vec<Value>> = (0..options.resamples)
        .into_par_iter()
        .map_init(|| (Vec::new(), Vec::new()), resample)
        .collect();
    let width = values.first().map_or(0, Vec::len);
    (0..width)
        .map(|metric| {
            let mut defined: Vec<f64> = values
                .iter()
                .filter_map(|values| values[metric].as_ref().ok().copied())
                .collect();
            defined.sort_unstable_by(f64::total_cmp);
            interval(&defined, patients, options)
        })
        .collect()
}

/// The interval of a metric when no resample was drawn.
pub(crate) fn no_resamples() -> Interval {
    Interval::Unavailable {
        reason: "no resamples were asked for".to_owned(),
    }
}

/// More undefined resamples than this share leave an interval that speaks of other data.
const MOST_UNDEFINED: f64 = 0.05;

fn interval(sorted: &[f64], patients: &Patients, options: &BootstrapOptions) -> Interval {
    let unavailable = |reason: String| Interval::Unavailable { reason };
    if patients.count < 2 {
        return unavailable("all rows belong to one patient".to_owned());
    }
    let undefined_resamples = options.resamples - sorted.len();
    if undefined_resamples as f64 > MOST_UNDEFINED * options.resamples as f64 {
        return unavailable(format!(
            "the metric has no value in {undefined_resamples} of {} resamples: too few patients of one class",
            options.resamples
        ));
    }
    let tail = (1.0 - options.level) / 2.0;
    Interval::Percentile {
        low: percentile(sorted, tail),
        high: percentile(sorted, 1.0 - tail),
        level: options.level,
        resamples: sorted.len(),
        undefined_resamples,
    }
}

/// The quantile `share` of ascending values, linear between neighbours (numpy's default). The
/// values are not empty.
pub(crate) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let position = share.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    let part = position - below as f64;
    sorted[below] + part * (sorted[above] - sorted[below])
}

/// xoshiro256** (Blackman and Vigna 2018), its state filled by SplitMix64 from the seed and the
/// resample's number.
struct Generator([u64; 4]);

impl Generator {
    fn new(seed: u64, number: u64) -> Generator {
        // Hashing the seed first keeps (seed, number) and (seed + 1, number − 1) apart.
        let mut state = split_mix(&mut seed.wrapping_add(1)).wrapping_add(number);
        Generator([0; 4].map(|_: u64| split_mix(&mut state)))
    }

    fn next(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.0;
        let result = b.wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// A number from 0 to `bound − 1`. With 64 random bits and at most 2³² outcomes, no outcome
    /// is more likely than another by more than 2⁻³² of its probability.
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classification::weighted_mean;

    fn options(resamples: usize, seed: u64) -> BootstrapOptions {
        BootstrapOptions {
            resamples,
            seed,
            ..BootstrapOptions::default()
        }
    }

    fn mean_interval(ids: &[i64], values: &[f64], options: &BootstrapOptions) -> Interval {
        let patients = Patients::new(ids).unwrap();
        bootstrap(&patients, options, |weights| {
            weighted_mean(values, weights).ok()
        })
    }

    #[test]
    fn the_generator_is_the_published_one() {
        // SplitMix64 from 0 and xoshiro256** from the state 1, 2, 3, 4: the authors' sequences.
        let mut state = 0;
        assert_eq!(split_mix(&mut state), 0xE220_A839_7B1D_CDAF);
        let mut generator = Generator([1, 2, 3, 4]);
        let drawn: Vec<u64> = (0..4).map(|_| generator.next()).collect();
        assert_eq!(drawn, [11520, 0, 1_509_978_240, 1_215_971_899_390_074_240]);
    }

    #[test]
    fn draws_cover_the_range_evenly() {
        let mut generator = Generator::new(7, 0);
        let mut counts = [0_u32; 10];
        for _ in 0..100_000 {
            counts[generator.below(10)] += 1;
        }
        // 10,000 each with a standard deviation of 95: 5 of those either way.
        assert!(
            counts.iter().all(|&count| (9_525..10_475).contains(&count)),
            "{counts:?}"
        );
    }

    #[test]
    fn the_width_is_that_of_the_mean_of_independent_patients() {
        let count = 2_000;
        let ids: Vec<i64> = (0..count).collect();
        let values: Vec<f64> = (0..count)
            .map(|i| f64::from(u8::from(i % 4 == 0)))
            .collect();
        let (low, high) = mean_interval(&ids, &values, &options(4_000, 1))
            .bounds()
            .unwrap();
        // A share of a quarter: ±1.96·√(p(1 − p)/n) around it; the bootstrap's own noise at 4,000
        // resamples is about 2 % of the width.
        let half = 1.96 * (0.25 * 0.75 / count as f64).sqrt();
        assert!(
            ((high - low) / (2.0 * half) - 1.0).abs() < 0.08,
            "{low} {high}"
        );
        assert!((0.5 * (high + low) - 0.25).abs() < 0.1 * half);
    }

    #[test]
    fn repeating_a_patients_rows_does_not_narrow_the_interval() {
        let ids: Vec<i64> = (0..200).collect();
        let values: Vec<f64> = (0..200).map(|i| f64::from(i * i % 37)).collect();
        let once = mean_interval(&ids, &values, &options(500, 3));
        let repeat = |of: &[i64]| of.iter().flat_map(|&id| [id; 5]).collect::<Vec<_>>();
        let repeated_values: Vec<f64> = values.iter().flat_map(|&value| [value; 5]).collect();
        let five_times = mean_interval(&repeat(&ids), &repeated_values, &options(500, 3));
        let (once, five_times) = (once.bounds().unwrap(), five_times.bounds().unwrap());
        assert!((once.0 - five_times.0).abs() < 1e-12 && (once.1 - five_times.1).abs() < 1e-12);
    }

    #[test]
    fn the_interval_depends_on_the_seed_and_on_nothing_else() {
        let ids: Vec<i64> = (0..300).map(|i| i / 3).collect();
        let values: Vec<f64> = (0..300).map(|i| f64::from(i * 7919 % 101)).collect();
        let on = |threads: usize, seed: u64| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap()
                .install(|| mean_interval(&ids, &values, &options(200, seed)))
        };
        assert_eq!(on(1, 5), on(3, 5));
        assert_ne!(on(1, 5), on(1, 6));
        let reversed: Vec<i64> = ids.iter().rev().copied().collect();
        let reversed_values: Vec<f64> = values.iter().rev().copied().collect();
        let (low, high) = mean_interval(&reversed, &reversed_values, &options(200, 5))
            .bounds()
            .unwrap();
        let (known_low, known_high) = on(1, 5).bounds().unwrap();
        assert!((low - known_low).abs() < 1e-12 && (high - known_high).abs() < 1e-12);
    }

    #[test]
    fn too_many_resamples_without_a_value_give_no_interval() {
        let ids: Vec<i64> = (0..20).collect();
        let patients = Patients::new(&ids).unwrap();
        // Defined only where patient 0 was drawn: in about 64 % of the resamples.
        let interval = bootstrap(&patients, &options(200, 0), |weights| {
            (weights[0] > 0).then_some(1.0)
        });
        let Interval::Unavailable { reason } = interval else {
            panic!("{interval:?}");
        };
        assert!(reason.contains("of 200 resamples"), "{reason}");
    }

    #[test]
    fn one_patient_or_no_resamples_give_no_interval() {
        let interval = mean_interval(&[4, 4, 4], &[1.0, 2.0, 3.0], &options(100, 0));
        assert!(
            matches!(interval, Interval::Unavailable { reason } if reason.contains("one patient"))
        );
        let interval = mean_interval(&[4, 5], &[1.0, 2.0], &options(0, 0));
        assert!(
            matches!(interval, Interval::Unavailable { reason } if reason.contains("no resamples"))
        );
    }

    #[test]
    fn options_are_checked() {
        let bad = BootstrapOptions {
            level: 1.0,
            ..BootstrapOptions::default()
        };
        assert!(bad.check().is_err());
        assert_eq!(Patients::new(&[]).unwrap_err(), EvaluateError::Empty);
        assert_eq!(Patients::new(&[9, -4, 9]).unwrap().count(), 2);
    }
}
