//! Waveforms: beats of one lead, written as a WFDB record (`.hea` and `.dat` of format 16).

use std::fmt::Write;

use super::model::{Draw, Latent};
use super::random::{Draws, Stream};

pub(super) const RATE_HZ: usize = 100;
pub(super) const SAMPLES: usize = 4 * RATE_HZ;
/// Digital units of a millivolt.
const GAIN: f64 = 1000.0;

const RATE_PER_MINUTE: f64 = 75.0;
const RATE_BY_FACTOR: f64 = 15.0;
const R_MV: f64 = 1.0;
const R_BY_AMPLITUDE_MV: f64 = 0.35;
const R_WIDTH_S: f64 = 0.025;
/// The T wave does not follow the amplitude, so that the amplitude is left in the shape when a
/// reader scales each record.
const T_MV: f64 = 0.3;
const T_AFTER_S: f64 = 0.22;
const T_WIDTH_S: f64 = 0.05;
const NOISE_MV: f64 = 0.01;

/// Millivolts times [`GAIN`].
pub(super) fn samples(seed: u64, draw: &Draw) -> Vec<i16> {
    let mut draws = Draws::of(seed, draw.subject_id, Stream::Waveform);
    let beat_s = 60.0 / (RATE_PER_MINUTE + RATE_BY_FACTOR * draw.value(Latent::HeartRate));
    let r_mv = R_MV + R_BY_AMPLITUDE_MV * draw.value(Latent::Amplitude);
    let mut signal = [0.0; SAMPLES];
    // From a beat before the record on, for its T wave.
    let mut at_s = -beat_s * draws.unit();
    while at_s < SAMPLES as f64 / RATE_HZ as f64 + 4.0 * R_WIDTH_S {
        add_wave(&mut signal, at_s, r_mv, R_WIDTH_S);
        add_wave(&mut signal, at_s + T_AFTER_S, T_MV, T_WIDTH_S);
        at_s += beat_s;
    }
    signal
        .iter()
        .map(|value| ((value + NOISE_MV * draws.noise()) * GAIN).round() as i16)
        .collect()
}

/// Adds a Gaussian, as far as it is worth anything.
fn add_wave(signal: &mut [f64; SAMPLES], centre_s: f64, height_mv: f64, width_s: f64) {
    let rate_hz = RATE_HZ as f64;
    let first = ((centre_s - 4.0 * width_s) * rate_hz).ceil().max(0.0) as usize;
    let last = ((centre_s + 4.0 * width_s) * rate_hz).floor();
    if last < 0.0 {
        return;
    }
    let last = (last as usize).min(SAMPLES - 1);
    for (at, value) in signal.iter_mut().enumerate().take(last + 1).skip(first) {
        let distance = (at as f64 / rate_hz - centre_s) / width_s;
        *value += height_mv * (-0.5 * distance * distance).exp();
    }
}

/// The signal file: 16-bit two's complement, least significant byte first (WFDB's format 16).
pub(super) fn dat(samples: &[i16]) -> Vec<u8> {
    samples
        .iter()
        .flat_map(|sample| sample.to_le_bytes())
        .collect()
}

/// The header file of the record `name`, whose signal file is `name.dat` (header(5) of WFDB: the
/// checksum is the sum of all samples, cut to 16 bits).
pub(super) fn hea(name: &str, samples: &[i16]) -> String {
    let first = samples.first().copied().unwrap_or(0);
    let checksum = samples
        .iter()
        .fold(0i16, |sum, &sample| sum.wrapping_add(sample));
    let mut header = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(header, "{name} 1 {RATE_HZ} {}", samples.len());
    let _ = writeln!(
        header,
        "{name}.dat 16 {GAIN}(0)/mV 16 0 {first} {checksum} 0 II"
    );
    header
}

#[cfg(test)]
mod tests {
    use super::super::model::Model;
    use super::super::options::SynthOptions;
    use super::super::testing::correlation;
    use super::*;

    #[test]
    fn rate_and_amplitude_can_be_read_back() {
        let model = Model::new(&SynthOptions::default());
        let mut rates = (Vec::new(), Vec::new());
        let mut heights = (Vec::new(), Vec::new());
        for subject_id in 0..500 {
            let draw = model.draw(subject_id);
            let samples = samples(0, &draw);
            let highest = f64::from(*samples.iter().max().unwrap());
            // The R waves: summits well above the T waves.
            let summits: Vec<usize> = (1..SAMPLES - 1)
                .filter(|&at| f64::from(samples[at]) > (0.75 * highest).max(350.0))
                .filter(|&at| samples[at] >= samples[at - 1] && samples[at] > samples[at + 1])
                .collect();
            let (first, last) = (summits[0], summits[summits.len() - 1]);
            let beat_samples = (last - first) as f64 / (summits.len() - 1) as f64;
            rates.0.push(60.0 * RATE_HZ as f64 / beat_samples);
            rates.1.push(draw.value(Latent::HeartRate));
            heights.0.push(highest);
            heights.1.push(draw.value(Latent::Amplitude));
        }
        assert!(correlation(&rates.0, &rates.1) > 0.995);
        assert!(correlation(&heights.0, &heights.1) > 0.995);
    }

    #[test]
    fn the_header_is_as_wfdb_has_it() {
        let samples = [5, -32_000, -32_000, 7];
        assert_eq!(
            hea("000012", &samples),
            "000012 1 100 4\n000012.dat 16 1000(0)/mV 16 0 5 1548 0 II\n"
        );
        assert_eq!(dat(&samples[..2]), [5, 0, 0, 131]);
    }
}
