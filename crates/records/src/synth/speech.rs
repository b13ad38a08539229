//! Speech: four voiced syllables a second with pauses between them, written as 16-bit PCM wav.

use super::model::{Draw, Latent};
use super::random::{Draws, Stream};

pub(super) const RATE_HZ: usize = 8_000;
pub(super) const SAMPLES: usize = RATE_HZ;

const PITCH_HZ: f64 = 220.0;
const SYLLABLE_SAMPLES: usize = RATE_HZ / 4;
const SILENCE: f64 = 0.4;
const SILENCE_BY_PAUSES: f64 = 0.13;
/// A syllable fades in and out over 10 ms.
const FADE_SAMPLES: f64 = 0.01 * RATE_HZ as f64;
/// Of full scale; with its harmonics the voice reaches 1.3 times that.
const LOUDNESS: f64 = 0.35;
const NOISE: f64 = 0.002;

pub(super) fn samples(seed: u64, draw: &Draw) -> Vec<i16> {
    let mut draws = Draws::of(seed, draw.subject_id, Stream::Speech);
    // Uniform from an octave below to an octave above.
    let pitch_hz = PITCH_HZ * (draw.value(Latent::Pitch) / 3f64.sqrt()).exp2();
    let silence = SILENCE + SILENCE_BY_PAUSES * draw.value(Latent::Pauses);
    let voiced_samples = (1.0 - silence) * SYLLABLE_SAMPLES as f64;
    let offset = draws.below(SYLLABLE_SAMPLES);
    // The tone by turning a vector a step a sample: two products instead of a sine.
    let (turn_sin, turn_cos) = (std::f64::consts::TAU * pitch_hz / RATE_HZ as f64).sin_cos();
    let (mut sin, mut cos) = (std::f64::consts::TAU * draws.unit()).sin_cos();
    (0..SAMPLES)
        .map(|at| {
            let within = ((at + offset) % SYLLABLE_SAMPLES) as f64;
            let from_edge = within.min(voiced_samples - within) / FADE_SAMPLES;
            let envelope = from_edge.clamp(0.0, 1.0);
            // The second and third harmonics by the formulas for multiple angles.
            let voice = sin * (1.0 + cos + 0.25 * (3.0 - 4.0 * sin * sin));
            (sin, cos) = (
                sin * turn_cos + cos * turn_sin,
                cos * turn_cos - sin * turn_sin,
            );
            let value = LOUDNESS * envelope * voice + NOISE * draws.noise();
            (value * f64::from(i16::MAX)).round() as i16
        })
        .collect()
}

/// A RIFF file of one channel of 16-bit PCM.
pub(super) fn wav(samples: &[i16]) -> Vec<u8> {
    const CHANNELS: u16 = 1;
    const BYTES_PER_SAMPLE: u16 = 2;
    const PCM: u16 = 1;
    const FORMAT_BYTES: u32 = 16;
    let rate_hz = RATE_HZ as u32;
    let data_bytes = (samples.len() * usize::from(BYTES_PER_SAMPLE)) as u32;
    let mut bytes = Vec::with_capacity(44 + data_bytes as usize);
    bytes.extend(b"RIFF");
    bytes.extend((36 + data_bytes).to_le_bytes());
    bytes.extend(b"WAVEfmt ");
    bytes.extend(FORMAT_BYTES.to_le_bytes());
    bytes.extend(PCM.to_le_bytes());
    bytes.extend(CHANNELS.to_le_bytes());
    bytes.extend(rate_hz.to_le_bytes());
    bytes.extend((rate_hz * u32::from(CHANNELS * BYTES_PER_SAMPLE)).to_le_bytes());
    bytes.extend((CHANNELS * BYTES_PER_SAMPLE).to_le_bytes());
    bytes.extend((8 * BYTES_PER_SAMPLE).to_le_bytes());
    bytes.extend(b"data");
    bytes.extend(data_bytes.to_le_bytes());
    bytes.extend(samples.iter().flat_map(|sample| sample.to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::model::Model;
    use super::super::options::SynthOptions;
    use super::super::testing::correlation;
    use super::*;

    #[test]
    fn pitch_and_pauses_can_be_read_back() {
        let model = Model::new(&SynthOptions::default());
        let mut pitches = (Vec::new(), Vec::new());
        let mut pauses = (Vec::new(), Vec::new());
        for subject_id in 0..500 {
            let draw = model.draw(subject_id);
            let samples = samples(0, &draw);
            // Loud 10 ms windows are voice.
            let loud: Vec<bool> = samples
                .chunks(RATE_HZ / 100)
                .map(|part| part.iter().any(|sample| sample.unsigned_abs() > 3_000))
                .collect();
            let voiced = loud.iter().filter(|loud| **loud).count();
            // Upward crossings of zero after a trough, once a period: noise makes no trough.
            let mut after_trough = false;
            let mut crossings = Vec::new();
            for (at, &sample) in samples.iter().enumerate() {
                after_trough |= sample < -1_000;
                if after_trough && sample >= 0 {
                    crossings.push(at);
                    after_trough = false;
                }
            }
            // The middle half of the periods is not disturbed by the pauses.
            let mut periods: Vec<usize> =
                crossings.windows(2).map(|pair| pair[1] - pair[0]).collect();
            periods.sort_unstable();
            let middle = &periods[periods.len() / 4..periods.len() * 3 / 4];
            let period = middle.iter().sum::<usize>() as f64 / middle.len() as f64;
            pitches.0.push((RATE_HZ as f64 / period).log2());
            pitches.1.push(draw.value(Latent::Pitch));
            pauses.0.push(1.0 - voiced as f64 / loud.len() as f64);
            pauses.1.push(draw.value(Latent::Pauses));
        }
        assert!(correlation(&pitches.0, &pitches.1) > 0.99);
        assert!(correlation(&pauses.0, &pauses.1) > 0.99);
    }

    #[test]
    fn the_wav_header_says_what_follows() {
        let bytes = wav(&[1, -2]);
        assert_eq!(bytes.len(), 48);
        assert_eq!(&bytes[..4], b"RIFF");
        assert_eq!(bytes[4..8], 40u32.to_le_bytes());
        assert_eq!(&bytes[8..16], b"WAVEfmt ");
        assert_eq!(bytes[20..24], [1, 0, 1, 0]);
        assert_eq!(bytes[24..28], 8_000u32.to_le_bytes());
        assert_eq!(bytes[28..32], 16_000u32.to_le_bytes());
        assert_eq!(bytes[32..36], [2, 0, 16, 0]);
        assert_eq!(&bytes[36..40], b"data");
        assert_eq!(bytes[40..], [4, 0, 0, 0, 1, 0, 254, 255]);
    }
}
