//! A signal at another rate: band-limited, without delay, with its gaps kept.
//!
//! Rates whose ratio is a fraction of small numbers (360 → 250, 44,100 → 16,000) go through rubato's
//! synchronous FFT resampler: a sinc under a squared Blackman-Harris window. Its block is a multiple
//! of that fraction's terms, so for other rates (249.89 Hz, as MIMIC-IV's monitors have it) its
//! filter would reach over minutes, and its asynchronous one is not aligned to the sample; they are
//! interpolated with a windowed sinc at each moment instead. Either filter stops at the lower of
//! the two Nyquist frequencies.
//!
//! Filters need numbers everywhere and take what lies outside the signal for zero. So gaps are
//! bridged by straight lines, and the line through the first and the last value is taken off before
//! and put back after it: a baseline far from zero then does not ring at the ends. Samples over
//! gaps are missing again afterwards.

use std::f64::consts::{PI, TAU};

use rubato::audioadapter_buffers::owned::InterleavedOwned;
use rubato::{Fft, FixedSync, Resampler, WindowFunction};

/// The rates may differ by this factor; beyond it the filter would not fit into a block.
pub(super) const MAX_RATE_FACTOR: f64 = 1000.0;

/// Samples of an FFT block at the lower of the two rates: the pass band then ends at 95 % of its
/// Nyquist frequency.
const BLOCK_SAMPLES: usize = 512;
/// Samples of an FFT block at the higher rate, where the rates are far apart.
const MAX_BLOCK_SAMPLES: usize = 1 << 17;
/// Largest term of a fraction that is resampled by FFT.
const MAX_TERM: u64 = 1024;
/// Relative error of such a fraction: one sample in a million, which a rate that was measured from
/// timestamps has.
const RATIO_ERROR: f64 = 1e-6;

/// Samples, at the lower rate, that the interpolating sinc reaches to either side.
const REACH: usize = 64;
/// Its cutoff over that rate's Nyquist frequency: the window's main lobe is four steps of
/// `1 / (2 · REACH)` wide to either side, so that the stop band begins at Nyquist.
const CUTOFF: f64 = 1.0 - 4.0 / REACH as f64;
/// Places in its table for each sample. The error of linear interpolation is below 1e-6.
const TABLE_STEPS: usize = 1024;

/// `values` (NaN = missing), taken `from_hz` times a second, at `to_hz`: output `j` is the signal
/// at `j / to_hz` seconds after the first value, and there are as many outputs as fit into the
/// signal's duration, rounded up. An output is missing where less than half of the inputs within
/// one period of the lower rate around it are there.
///
/// The same rate gives the values back. `None` where a rate is not a positive number or they
/// differ by more than [`MAX_RATE_FACTOR`].
pub(super) fn resample(values: &[f64], from_hz: f64, to_hz: f64) -> Option<Vec<f64>> {
    // Inputs from one output to the next. Written so that NaN fails.
    let step = from_hz / to_hz;
    let apart = 1.0 / MAX_RATE_FACTOR..=MAX_RATE_FACTOR;
    if !(from_hz > 0.0 && to_hz > 0.0 && apart.contains(&step)) {
        return None;
    }
    let fraction = fraction(step);
    if fraction == Some((1, 1)) {
        return Some(values.to_vec());
    }
    let (length, step) = match fraction {
        Some((from, to)) => (
            (values.len() as u64 * to).div_ceil(from) as usize,
            from as f64 / to as f64,
        ),
        None => (
            (values.len() as f64 / step - RATIO_ERROR).ceil() as usize,
            step,
        ),
    };
    let Some(mut line_free) = bridged(values) else {
        return Some(vec![f64::NAN; length]);
    };

    let last = line_free.len() - 1;
    let start = line_free[0];
    let slope = match last {
        0 => 0.0,
        _ => (line_free[last] - start) / last as f64,
    };
    for (index, value) in line_free.iter_mut().enumerate() {
        *value -= start + slope * index as f64;
    }
    let mut output = match fraction {
        Some((from, to)) => by_transform(line_free, from as usize, to as usize)?,
        None => by_interpolation(&line_free, step, length),
    };
    output.resize(length, 0.0);
    for (index, value) in output.iter_mut().enumerate() {
        *value += start + slope * step * index as f64;
    }
    if values.iter().any(|value| value.is_nan()) {
        mask(&mut output, values, step);
    }
    Some(output)
}

/// A number as a fraction of small terms, by continued fractions; `None` where it is not near one.
fn fraction(target: f64) -> Option<(u64, u64)> {
    let (mut before, mut best) = ((0, 1), (1, 0));
    let mut rest = target;
    loop {
        let whole = rest.floor();
        if whole > MAX_TERM as f64 {
            return None;
        }
        let next: (u64, u64) = (
            whole as u64 * best.0 + before.0,
            whole as u64 * best.1 + before.1,
        );
        if next.0 > MAX_TERM || next.1 > MAX_TERM {
            return None;
        }
        (before, best) = (best, next);
        if (best.0 as f64 / best.1 as f64 / target - 1.0).abs() <= RATIO_ERROR {
            return Some(best);
        }
        rest = 1.0 / (rest - whole);
    }
}

/// The values with straight lines over the gaps and the nearest value before the first and after
/// the last; `None` where there is no value at all.
fn bridged(values: &[f64]) -> Option<Vec<f64>> {
    let first = values.iter().position(|value| !value.is_nan())?;
    let mut filled = values.to_vec();
    filled[..first].fill(values[first]);
    let mut known = first;
    for index in first + 1..values.len() {
        if values[index].is_nan() {
            continue;
        }
        let rise = (values[index] - values[known]) / (index - known) as f64;
        for (steps, value) in filled[known + 1..index].iter_mut().enumerate() {
            *value = values[known] + rise * (steps + 1) as f64;
        }
        known = index;
    }
    filled[known + 1..].fill(values[known]);
    Some(filled)
}

/// `to` outputs for each `from` inputs; zero outside the signal, the filter's delay taken off.
fn by_transform(values: Vec<f64>, from: usize, to: usize) -> Option<Vec<f64>> {
    let length = values.len();
    // Even, so that half a block, the filter's delay, is a whole number of samples at both rates.
    let blocks = BLOCK_SAMPLES
        .div_ceil(from.min(to))
        .min(MAX_BLOCK_SAMPLES / from.max(to))
        .max(2)
        .next_multiple_of(2);
    let mut resampler = Fft::<f64>::new_custom(
        from,
        to,
        blocks * from,
        1,
        1,
        WindowFunction::BlackmanHarris2,
        FixedSync::Both,
    )
    .ok()?;
    let input = InterleavedOwned::new_from(values, 1, length).ok()?;
    let output = resampler.process_all(&input, length, None).ok()?;
    Some(output.take_data())
}

/// One output every `step` inputs, each the sum of the inputs around it under a sinc.
fn by_interpolation(values: &[f64], step: f64, length: usize) -> Vec<f64> {
    // Inputs in units of the lower rate's samples.
    let scale = 1.0 / step.max(1.0);
    let table: Vec<f64> = (0..=REACH * TABLE_STEPS + 1)
        .map(|index| scale * windowed_sinc(index as f64 / TABLE_STEPS as f64))
        .collect();
    let reach = REACH as f64 / scale;
    (0..length)
        .map(|output| {
            let centre = output as f64 * step;
            let begin = (centre - reach).ceil().max(0.0) as usize;
            let end = ((centre + reach).floor() as usize + 1).min(values.len());
            let inputs = values.get(begin..end).unwrap_or_default();
            inputs
                .iter()
                .enumerate()
                .map(|(offset, value)| {
                    let distance = ((begin + offset) as f64 - centre).abs() * scale;
                    let place = distance * TABLE_STEPS as f64;
                    let (below, rest) = (place as usize, place.fract());
                    value * (table[below] + rest * (table[below + 1] - table[below]))
                })
                .sum()
        })
        .collect()
}

/// The interpolating filter at a distance from its centre: a sinc under a four-term
/// Blackman-Harris window (Harris, Proc. IEEE 66(1), 1978), whose side lobes are 92 dB down.
fn windowed_sinc(samples: f64) -> f64 {
    if samples >= REACH as f64 {
        return 0.0;
    }
    let angle = TAU * (samples / (2 * REACH) as f64);
    let window = 0.35875
        + 0.48829 * angle.cos()
        + 0.14128 * (2.0 * angle).cos()
        + 0.01168 * (3.0 * angle).cos();
    let phase = PI * CUTOFF * samples;
    let sinc = if phase == 0.0 {
        1.0
    } else {
        phase.sin() / phase
    };
    CUTOFF * sinc * window
}

/// Makes outputs missing whose inputs mostly are.
fn mask(output: &mut [f64], values: &[f64], step: f64) {
    // An input at exactly one period's distance is not within it, whatever the rounding.
    const ROUNDING: f64 = 1e-6;
    let mut present_before = vec![0u32; values.len() + 1];
    for (index, value) in values.iter().enumerate() {
        present_before[index + 1] = present_before[index] + u32::from(!value.is_nan());
    }
    let reach = step.max(1.0) - ROUNDING;
    for (index, value) in output.iter_mut().enumerate() {
        let centre = index as f64 * step;
        // `as` takes what lies before the first input for it.
        let begin = (centre - reach).ceil() as usize;
        let end = ((centre + reach).floor() as usize + 1).min(values.len());
        let present = present_before[end] - present_before[begin.min(end)];
        if present == 0 || 2 * (present as usize) < end - begin.min(end) {
            *value = f64::NAN;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sine(hz: f64, rate_hz: f64, samples: usize) -> Vec<f64> {
        (0..samples)
            .map(|index| (TAU * hz * index as f64 / rate_hz).sin())
            .collect()
    }

    fn resampled_tone(hz: f64, from_hz: f64, to_hz: f64) -> Vec<f64> {
        let samples = (4.0 * BLOCK_SAMPLES as f64 * from_hz / from_hz.min(to_hz)) as usize;
        resample(&sine(hz, from_hz, samples), from_hz, to_hz).unwrap()
    }

    /// Outputs that the filter's reach from an end covers.
    fn edge(from_hz: f64, to_hz: f64) -> usize {
        (BLOCK_SAMPLES as f64 * to_hz / from_hz.min(to_hz)) as usize
    }

    /// Largest distance, away from the ends, where a signal that was cut off cannot be known.
    fn worst(found: &[f64], expected: &[f64], edge: usize) -> f64 {
        assert_eq!(found.len(), expected.len());
        found[edge..found.len() - edge]
            .iter()
            .zip(&expected[edge..])
            .map(|(found, expected)| (found - expected).abs())
            .fold(0.0, f64::max)
    }

    #[test]
    fn a_tone_below_nyquist_keeps_frequency_phase_and_amplitude() {
        for (from_hz, to_hz, hz) in [
            (360.0, 250.0, 10.0),
            (360.0, 250.0, 100.0),
            (250.0, 360.0, 100.0),
            (1000.0, 100.0, 40.0),
            (8000.0, 16000.0, 3000.0),
            (44100.0, 16000.0, 7000.0),
            (1000.0, 1.0, 0.3),
            (62.4725, 250.0, 20.0),
            (249.89, 250.0, 60.0),
            (250.0, 249.89, 105.0),
            (360.0123, 100.0, 30.0),
        ] {
            let found = resampled_tone(hz, from_hz, to_hz);
            let expected = sine(hz, to_hz, found.len());
            let worst = worst(&found, &expected, edge(from_hz, to_hz));
            assert!(worst < 1e-4, "{from_hz} → {to_hz} at {hz}: {worst}");
        }
    }

    /// SciPy's `resample_poly` under a Kaiser window is another filter: it lets some of what is near
    /// Nyquist through, and pads the ends in its own way.
    #[test]
    fn an_electrocardiogram_is_resampled_as_by_scipy() {
        #[derive(serde::Deserialize)]
        struct Reference {
            from_hz: f64,
            to_hz: f64,
            values: Vec<f64>,
            resampled: Vec<f64>,
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/resample.json");
        let reference: Reference =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let found = resample(&reference.values, reference.from_hz, reference.to_hz).unwrap();
        let worst = worst(&found, &reference.resampled, 25);
        let range = reference.values.iter().copied().fold(f64::MIN, f64::max)
            - reference.values.iter().copied().fold(f64::MAX, f64::min);
        assert!(worst < 0.01 * range, "{worst} of {range}");
    }

    #[test]
    fn a_tone_above_the_new_nyquist_is_gone() {
        for (from_hz, to_hz, hz) in [
            (360.0, 100.0, 55.0),
            (1000.0, 100.0, 70.0),
            (44100.0, 16000.0, 9000.0),
            (360.0123, 100.0, 55.0),
            (250.0, 249.89, 125.0),
        ] {
            let found = resampled_tone(hz, from_hz, to_hz);
            let silence = vec![0.0; found.len()];
            let worst = worst(&found, &silence, edge(from_hz, to_hz));
            assert!(worst < 1e-4, "{from_hz} → {to_hz} at {hz}: {worst}");
        }
    }

    #[test]
    fn a_baseline_and_a_drift_reach_both_ends() {
        let values: Vec<f64> = (0..1000).map(|index| 97.0 + 0.01 * index as f64).collect();
        for (from_hz, to_hz) in [
            (360.0, 250.0),
            (100.0, 360.0),
            (500.0, 100.0),
            (249.89, 250.0),
        ] {
            let found = resample(&values, from_hz, to_hz).unwrap();
            for (index, value) in found.iter().enumerate() {
                let expected = 97.0 + 0.01 * index as f64 * from_hz / to_hz;
                assert!(
                    (value - expected).abs() < 1e-9,
                    "{from_hz} → {to_hz}, {index}"
                );
            }
        }
    }

    #[test]
    fn lengths_are_the_duration_rounded_up() {
        for (samples, from_hz, to_hz, expected) in [
            (3600, 360.0, 250.0, 2500),
            (3601, 360.0, 250.0, 2501),
            (1, 360.0, 250.0, 1),
            (1, 250.0, 1000.0, 4),
            (2, 1000.0, 100.0, 1),
            (1440, 1.0 / 60.0, 1.0 / 60.0, 1440),
            (1440, 1.0 / 60.0, 1.0 / 300.0, 288),
            (500, 500.0, 499.9, 500),
        ] {
            let values: Vec<f64> = (0..samples).map(f64::from).collect();
            let found = resample(&values, from_hz, to_hz).unwrap();
            assert_eq!(found.len(), expected, "{samples} at {from_hz} → {to_hz}");
            assert!(found.iter().all(|value| value.is_finite()));
        }
        assert_eq!(resample(&[], 360.0, 250.0), Some(vec![]));
    }

    #[test]
    fn the_same_rate_gives_the_same_values() {
        let values = [1.0, f64::NAN, 3.5];
        let found = resample(&values, 256.0, 256.0).unwrap();
        assert_eq!(found[0], 1.0);
        assert!(found[1].is_nan());
        assert_eq!(found[2], 3.5);
    }

    #[test]
    fn rates_without_a_sensible_ratio_are_refused() {
        for (from_hz, to_hz) in [
            (0.0, 100.0),
            (100.0, 0.0),
            (-1.0, 100.0),
            (f64::NAN, 100.0),
            (f64::INFINITY, 100.0),
            (1e6, 1.0),
            (1.0, 1e6),
        ] {
            assert_eq!(
                resample(&[1.0, 2.0], from_hz, to_hz),
                None,
                "{from_hz} → {to_hz}"
            );
        }
    }

    #[test]
    fn fractions_are_in_lowest_terms_or_not_at_all() {
        assert_eq!(fraction(360.0 / 250.0), Some((36, 25)));
        assert_eq!(fraction(44100.0 / 16000.0), Some((441, 160)));
        assert_eq!(fraction(1.0 / 60.0), Some((1, 60)));
        assert_eq!(fraction(1000.0), Some((1000, 1)));
        assert_eq!(fraction(1.0 + 1e-7), Some((1, 1)));
        assert_eq!(fraction(249.89 / 250.0), None);
        assert_eq!(fraction(999.9), None);
    }

    /// Both filters on a signal that either leaves as it is.
    #[test]
    fn transform_and_interpolation_agree() {
        let tone = sine(20.0, 360.0, 3600);
        let (step, length) = (360.0 / 250.0, 2500);
        let transformed = by_transform(tone.clone(), 36, 25).unwrap();
        let interpolated = by_interpolation(&tone, step, length);
        assert!(worst(&interpolated, &transformed[..length], 512) < 1e-4);
    }

    #[test]
    fn a_gap_stays_a_gap_and_does_not_spread() {
        let (from_hz, to_hz, hz) = (360.0, 250.0, 5.0);
        let mut values = sine(hz, from_hz, 3600);
        values[1200..1800].fill(f64::NAN);
        let found = resample(&values, from_hz, to_hz).unwrap();
        for (index, value) in found.iter().enumerate() {
            let seconds = index as f64 / to_hz;
            if seconds > 1200.5 / from_hz && seconds < 1798.5 / from_hz {
                assert!(value.is_nan(), "{seconds}");
            } else if !(1199.0 / from_hz..=1800.0 / from_hz).contains(&seconds) {
                assert!(value.is_finite(), "{seconds}");
            }
        }
    }

    #[test]
    fn a_lone_missing_value_is_bridged() {
        let mut values = sine(5.0, 1000.0, 4000);
        values[2003] = f64::NAN;
        let found = resample(&values, 1000.0, 100.0).unwrap();
        assert!(found.iter().all(|value| value.is_finite()));
        assert!(worst(&found, &sine(5.0, 100.0, 400), 50) < 1e-2);
    }

    #[test]
    fn nothing_but_gaps_stays_missing() {
        let found = resample(&[f64::NAN; 36], 360.0, 250.0).unwrap();
        assert_eq!(found.len(), 25);
        assert!(found.iter().all(|value| value.is_nan()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn any_signal_gives_its_length_and_no_infinity(
            values in prop::collection::vec(prop_oneof![4 => -1e3..1e3f64, 1 => Just(f64::NAN)], 0..400),
            from_hz in 20.0..2000.0f64,
            to_hz in 20.0..500.0f64,
        ) {
            let found = resample(&values, from_hz, to_hz).unwrap();
            let exact = values.len() as f64 * to_hz / from_hz;
            prop_assert!((found.len() as f64 - exact).abs() < 1.0 + 1e-5 * exact);
            prop_assert!(found.iter().all(|value| !value.is_infinite()));
            prop_assert_eq!(&found.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
                &resample(&values, from_hz, to_hz).unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        }
    }
}
