//! Log-mel spectrograms as OpenAI's Whisper was trained on.
//!
//! Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022, section 2.2,
//! in the details of Transformers' `WhisperFeatureExtractor`: frames of 400 samples, 160 apart, the
//! signal mirrored at both ends, a periodic Hann window, the power spectrum, triangular filters on
//! Slaney's mel scale (each of unit area), log10 with a floor, at most 8 below the loudest, scaled.
//! The numbers are for 16 kHz: 25 ms frames, 10 ms apart.

use std::f64::consts::TAU;

use realfft::RealFftPlanner;

/// Samples of a frame.
pub(super) const FRAME_SAMPLES: usize = 400;
/// Samples from one frame to the next.
pub(super) const HOP_SAMPLES: usize = 160;
/// Frequencies of a frame's spectrum.
const FREQUENCIES: usize = FRAME_SAMPLES / 2 + 1;
/// The highest filter ends here.
const MAX_HZ: f64 = 8000.0;
/// Power below this is silence.
const FLOOR: f64 = 1e-10;
/// Decades kept below the loudest value.
const RANGE: f64 = 8.0;

/// The spectrogram of `samples` (-1…1) taken `rate_hz` times a second: `[mel_bins, frames]`
/// row-major, `frames = samples / 160`. Empty where there is not one frame.
pub(super) fn log_mel(samples: &[f32], rate_hz: f64, mel_bins: usize) -> Vec<f32> {
    let frames = samples.len() / HOP_SAMPLES;
    if frames == 0 || mel_bins == 0 {
        return Vec::new();
    }
    let window: Vec<f64> = (0..FRAME_SAMPLES)
        .map(|index| 0.5 - 0.5 * (TAU * index as f64 / FRAME_SAMPLES as f64).cos())
        .collect();
    let filters = mel_filters(rate_hz, mel_bins);
    let transform = RealFftPlanner::<f64>::new().plan_fft_forward(FRAME_SAMPLES);
    let mut frame = transform.make_input_vec();
    let mut spectrum = transform.make_output_vec();
    let mut scratch = transform.make_scratch_vec();
    let mut power = [0.0; FREQUENCIES];

    let mut log = vec![FLOOR.log10(); mel_bins * frames];
    for column in 0..frames {
        let begin = (column * HOP_SAMPLES) as i64 - (FRAME_SAMPLES / 2) as i64;
        let mut silent = true;
        for (offset, (value, weight)) in frame.iter_mut().zip(&window).enumerate() {
            let sample = samples[mirrored(begin + offset as i64, samples.len())];
            silent &= sample == 0.0;
            *value = f64::from(sample) * weight;
        }
        // Padding to 30 s is most of many items.
        if silent {
            continue;
        }
        // The buffers have the lengths that the transform itself asked for.
        if transform
            .process_with_scratch(&mut frame, &mut spectrum, &mut scratch)
            .is_err()
        {
            return Vec::new();
        }
        for (power, value) in power.iter_mut().zip(&spectrum) {
            *power = value.norm_sqr();
        }
        for (bin, filter) in filters.iter().enumerate() {
            let energy: f64 = filter
                .weights
                .iter()
                .zip(&power[filter.first..])
                .map(|(weight, power)| weight * power)
                .sum();
            log[bin * frames + column] = energy.max(FLOOR).log10();
        }
    }
    let loudest = log.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    log.into_iter()
        .map(|value| ((value.max(loudest - RANGE) + 4.0) / 4.0) as f32)
        .collect()
}

/// The index that mirroring at the first and last sample (neither repeated) leads to, however far
/// outside `index` lies.
fn mirrored(index: i64, samples: usize) -> usize {
    let last = samples as i64 - 1;
    if last == 0 {
        return 0;
    }
    let folded = index.rem_euclid(2 * last);
    folded.min(2 * last - folded) as usize
}

/// A triangular filter: its weights from the spectrum's frequency `first` on.
struct Filter {
    first: usize,
    weights: Vec<f64>,
}

/// Filters of unit area, equally spaced on the mel scale from 0 Hz to 8 kHz (or to the Nyquist
/// frequency, where that is lower).
fn mel_filters(rate_hz: f64, mel_bins: usize) -> Vec<Filter> {
    let top = mel_from_hz(MAX_HZ.min(rate_hz / 2.0));
    let corners: Vec<f64> = (0..mel_bins + 2)
        .map(|index| hz_from_mel(top * index as f64 / (mel_bins + 1) as f64))
        .collect();
    let spacing_hz = rate_hz / FRAME_SAMPLES as f64;
    corners
        .windows(3)
        .map(|corner| {
            let &[low, middle, high] = corner else {
                return Filter {
                    first: 0,
                    weights: Vec::new(),
                };
            };
            let weight = |frequency: usize| {
                let hz = frequency as f64 * spacing_hz;
                let rise = (hz - low) / (middle - low);
                let fall = (high - hz) / (high - middle);
                rise.min(fall).max(0.0) * 2.0 / (high - low)
            };
            let first = (0..FREQUENCIES)
                .find(|&frequency| weight(frequency) > 0.0)
                .unwrap_or(0);
            let weights = (first..FREQUENCIES)
                .map(weight)
                .take_while(|&weight| weight > 0.0)
                .collect();
            Filter { first, weights }
        })
        .collect()
}

/// Slaney's mel scale ("Auditory Toolbox", 1998): linear to 1 kHz, logarithmic above.
fn mel_from_hz(hz: f64) -> f64 {
    if hz < 1000.0 {
        hz * 3.0 / 200.0
    } else {
        15.0 + (hz / 1000.0).ln() * 27.0 / 6.4f64.ln()
    }
}

fn hz_from_mel(mel: f64) -> f64 {
    if mel < 15.0 {
        mel * 200.0 / 3.0
    } else {
        1000.0 * ((mel - 15.0) * 6.4f64.ln() / 27.0).exp()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Reference {
        /// 16-bit samples at 16 kHz.
        signals: BTreeMap<String, Vec<i16>>,
        cases: Vec<Case>,
        filters: Vec<FilterSums>,
    }

    /// What Transformers' extractor gives for the first `taken` samples of a signal.
    #[derive(Deserialize)]
    struct Case {
        name: String,
        signal: String,
        taken: usize,
        /// Samples with the zeros that pad them.
        padded: usize,
        mel_bins: usize,
        /// `[frame, value of every bin]`
        frames: Vec<(usize, Vec<f32>)>,
        mean: f64,
    }

    #[derive(Deserialize)]
    struct FilterSums {
        mel_bins: usize,
        sums: Vec<f64>,
    }

    fn reference() -> Reference {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mel.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn spectrograms_are_those_of_whisper() {
        let reference = reference();
        assert_eq!(reference.cases.len(), 5);
        for case in reference.cases {
            let mut samples: Vec<f32> = reference.signals[&case.signal][..case.taken]
                .iter()
                .map(|&sample| f32::from(sample) / 32768.0)
                .collect();
            samples.resize(case.padded, 0.0);
            let found = log_mel(&samples, 16000.0, case.mel_bins);
            let frames = case.padded / HOP_SAMPLES;
            assert_eq!(found.len(), case.mel_bins * frames, "{}", case.name);
            for (frame, expected) in &case.frames {
                assert_eq!(expected.len(), case.mel_bins);
                for (bin, expected) in expected.iter().enumerate() {
                    let value = found[bin * frames + frame];
                    // The reference rounds its spectrum to f32 (some 1e-7 in the logarithm) and the
                    // file to six decimals; Transformers' own torch code is up to 3e-5 away.
                    assert!(
                        (value - expected).abs() < 2e-6,
                        "{}, bin {bin}, frame {frame}: {value} for {expected}",
                        case.name
                    );
                }
            }
            let mean =
                found.iter().map(|&value| f64::from(value)).sum::<f64>() / found.len() as f64;
            assert!(
                (mean - case.mean).abs() < 1e-6,
                "{}: {mean} for {}",
                case.name,
                case.mean
            );
        }
    }

    #[test]
    fn filters_are_those_of_whisper() {
        for expected in reference().filters {
            let filters = mel_filters(16000.0, expected.mel_bins);
            assert_eq!(filters.len(), expected.sums.len());
            for (filter, sum) in filters.iter().zip(&expected.sums) {
                let found: f64 = filter.weights.iter().sum();
                assert!((found - sum).abs() < 1e-9, "{found} for {sum}");
            }
        }
    }

    #[test]
    fn a_tone_is_loudest_in_its_own_bin() {
        let samples: Vec<f32> = (0..16000)
            .map(|index| (TAU * 1000.0 * f64::from(index) / 16000.0).sin() as f32)
            .collect();
        let found = log_mel(&samples, 16000.0, 80);
        let column = 50;
        let loudest = (0..80)
            .max_by(|&a, &b| found[a * 100 + column].total_cmp(&found[b * 100 + column]))
            .unwrap();
        let centre = |bin: usize| hz_from_mel(mel_from_hz(8000.0) * (bin + 1) as f64 / 81.0);
        assert!((centre(loudest) - 1000.0).abs() < (centre(loudest + 1) - centre(loudest)));
    }

    #[test]
    fn short_inputs_have_the_frames_that_fit() {
        for (samples, frames) in [(0, 0), (1, 0), (159, 0), (160, 1), (161, 1), (480, 3)] {
            let found = log_mel(&vec![0.25; samples], 16000.0, 80);
            assert_eq!(found.len(), frames * 80, "{samples}");
            assert!(found.iter().all(|value| value.is_finite()));
        }
    }

    #[test]
    fn mirroring_repeats_neither_end() {
        let found: Vec<usize> = (-5..9).map(|index| mirrored(index, 4)).collect();
        assert_eq!(found, [1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2]);
        assert_eq!(mirrored(-7, 1), 0);
    }
}
