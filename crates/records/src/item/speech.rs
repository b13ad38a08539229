//! Recordings of speech as Whisper's encoder takes them: log-mel spectrograms.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde::{Deserialize, Serialize};
use symphonia::core::codecs::audio::AudioDecoderOptions;
use symphonia::core::codecs::audio::well_known::CODEC_ID_MP3;
use symphonia::core::errors::Error;
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::{FormatOptions, FormatReader, TrackType};
use symphonia::core::io::MediaSourceStream;
use symphonia::core::meta::MetadataOptions;

use super::Decoded;
use super::log_mel::{HOP_SAMPLES, log_mel};
use super::resample::resample;
use super::waveform::{item_error, unreadable, whole_samples};
use crate::RecordsError;

/// How a recording becomes a spectrogram. The default is Whisper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpeechOptions {
    /// Samples a second that recordings are brought to. Whisper's frames of 400 samples, 160 apart,
    /// are meant for 16 kHz.
    pub rate_hz: u32,
    /// Mel filters: 80, or 128 for `large-v3`.
    pub mel_bins: usize,
    /// What lies later than this is cut off, and how much that was is told.
    pub max_seconds: f64,
    /// Whether silence follows up to `max_seconds`, as Whisper's encoder wants it: every item then
    /// has the same number of frames.
    pub pad_to_max: bool,
}

impl Default for SpeechOptions {
    fn default() -> Self {
        Self {
            rate_hz: 16000,
            mel_bins: 80,
            max_seconds: 30.0,
            pad_to_max: true,
        }
    }
}

/// An hour of sound.
const LONGEST_S: f64 = 3600.0;
/// More filters than there are frequencies in a spectrum.
const MOST_BINS: usize = 200;
/// More than any microphone array of a clinic.
const MOST_CHANNELS: usize = 64;

const OPTIONS_HINT: &str = "correct the speech options";
const SOUND_HINT: &str = "give a sound .wav, .flac or .mp3 file";
const EMPTY_HINT: &str = "correct the file or take it out of the cohort";

impl SpeechOptions {
    /// What is wrong with the options whatever the file, if anything is.
    pub fn problem(&self) -> Option<String> {
        if !(8000..=48000).contains(&self.rate_hz) {
            return Some("`rate_hz` must lie between 8000 and 48000".into());
        }
        if !(1..=MOST_BINS).contains(&self.mel_bins) {
            return Some(format!("`mel_bins` must lie between 1 and {MOST_BINS}"));
        }
        let hop_s = HOP_SAMPLES as f64 / f64::from(self.rate_hz);
        if !(hop_s..=LONGEST_S).contains(&self.max_seconds) {
            return Some(format!(
                "`max_seconds` must lie between {hop_s} and {LONGEST_S}"
            ));
        }
        None
    }

    /// Samples of an item at the limit.
    fn max_samples(&self) -> usize {
        (self.max_seconds * f64::from(self.rate_hz)).round() as usize
    }
}

/// Reads a recording, mixes its channels and gives its log-mel spectrogram `[mel_bins, frames]`,
/// `frames = samples / 160`: 3,000 with the default options, whatever the recording's length.
///
/// Reads `.wav` (PCM of 8 to 32 bits, float, A-law and µ-law), `.flac` and `.mp3`.
/// `RecordsError::Item` for a file that is missing, damaged, truncated or of another kind, shorter
/// than one frame, or silent throughout.
pub fn decode_speech(path: &Path, options: &SpeechOptions) -> Result<Decoded, RecordsError> {
    if let Some(problem) = options.problem() {
        return Err(item_error(path, problem, OPTIONS_HINT));
    }
    // On damaged bytes the decoders mostly give an error, but some damage trips their assertions.
    let sound = catch_unwind(AssertUnwindSafe(|| read(path, options.max_seconds)))
        .unwrap_or_else(|_| Err(damaged(path, "the decoder gave up on it")))?;
    if sound.samples.iter().any(|sample| !sample.is_finite()) {
        return Err(item_error(path, "samples that are no numbers", EMPTY_HINT));
    }
    let silent = sound
        .samples
        .first()
        .is_none_or(|first| sound.samples.iter().all(|sample| sample == first));
    if silent {
        return Err(item_error(path, "the recording is silent", EMPTY_HINT));
    }

    let rate_hz = f64::from(options.rate_hz);
    let Some(resampled) = resample(&sound.samples, sound.rate_hz, rate_hz) else {
        return Err(damaged(path, "its sampling rate is out of range"));
    };
    let mut samples: Vec<f32> = resampled
        .iter()
        .take(options.max_samples())
        .map(|&sample| sample as f32)
        .collect();
    if options.pad_to_max {
        samples.resize(options.max_samples(), 0.0);
    }
    let frames = samples.len() / HOP_SAMPLES;
    if frames == 0 {
        return Err(item_error(path, "shorter than one frame", EMPTY_HINT));
    }
    Ok(Decoded {
        shape: vec![options.mel_bins, frames],
        values: log_mel(&samples, rate_hz, options.mel_bins),
        cut_s: (sound.length_s - options.max_seconds).max(0.0),
        layout: 0,
    })
}

/// One channel, -1…1.
struct Sound {
    samples: Vec<f64>,
    rate_hz: f64,
    /// Of the whole recording, of which `samples` may only be the beginning.
    length_s: f64,
}

/// Decodes the first `max_seconds` of a recording and mixes its channels down to their mean. Checks
/// that the file is whole where it says how long it is.
fn read(path: &Path, max_seconds: f64) -> Result<Sound, RecordsError> {
    let named = |error: Error| failed(path, &error);
    let mut reader = open(path)?;
    let track = reader
        .default_track(TrackType::Audio)
        .ok_or_else(|| damaged(path, "there is no sound in it"))?;
    let (id, announced) = (track.id, track.num_frames);
    let parameters = track
        .codec_params
        .as_ref()
        .and_then(|parameters| parameters.audio())
        .cloned()
        .ok_or_else(|| damaged(path, "there is no sound in it"))?;
    // Without an encoder's delay, the length of an MP3 is an estimate.
    let exact = parameters.codec != CODEC_ID_MP3 || track.delay.is_some();

    let rate_hz = parameters.sample_rate.map_or(0.0, f64::from);
    let channels = parameters
        .channels
        .as_ref()
        .map_or(0, |channels| channels.count());
    if rate_hz == 0.0 || !(1..=MOST_CHANNELS).contains(&channels) {
        return Err(damaged(
            path,
            "its rate or number of channels is out of range",
        ));
    }
    let mut decoder = symphonia::default::get_codecs()
        .make_audio_decoder(&parameters, &AudioDecoderOptions::default().verify(true))
        .map_err(named)?;

    let limit = whole_samples(max_seconds, rate_hz);
    let mut samples: Vec<f64> = Vec::new();
    let mut interleaved: Vec<f32> = Vec::new();
    // Samples a channel that went by, decoded or not.
    let mut passed = 0u64;
    let mut broken_off = false;
    loop {
        let packet = match reader.next_packet() {
            Ok(Some(packet)) if packet.track_id == id => packet,
            Ok(Some(_)) => continue,
            Ok(None) => break,
            // How a stream of unknown length ends.
            Err(Error::IoError(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                broken_off = announced.is_some();
                break;
            }
            Err(error) => return Err(named(error)),
        };
        if passed >= limit {
            passed += packet.dur.get();
            continue;
        }
        let buffer = decoder.decode(&packet).map_err(named)?;
        let width = buffer.num_planes().max(1);
        buffer.copy_to_vec_interleaved::<f32>(&mut interleaved);
        passed += (interleaved.len() / width) as u64;
        let wanted = (limit as usize).saturating_sub(samples.len());
        samples.extend(interleaved.chunks_exact(width).take(wanted).map(|moment| {
            moment.iter().map(|&sample| f64::from(sample)).sum::<f64>() / width as f64
        }));
    }
    if broken_off || (exact && announced.is_some_and(|announced| passed < announced)) {
        return Err(damaged(path, "the recording breaks off before its end"));
    }
    // FLAC carries a digest of its samples, which says nothing if not all of them were decoded.
    if passed <= limit && decoder.finalize().verify_ok == Some(false) {
        return Err(damaged(
            path,
            "the recording was damaged: its digest does not hold",
        ));
    }
    Ok(Sound {
        samples,
        rate_hz,
        length_s: passed as f64 / rate_hz,
    })
}

fn open(path: &Path) -> Result<Box<dyn FormatReader>, RecordsError> {
    let file = File::open(path).map_err(|source| unreadable(path, &source))?;
    let stream = MediaSourceStream::new(Box::new(file), Default::default());
    let mut hint = Hint::new();
    if let Some(extension) = path.extension().and_then(|extension| extension.to_str()) {
        hint.with_extension(extension);
    }
    symphonia::default::get_probe()
        .probe(
            &hint,
            stream,
            FormatOptions::default(),
            MetadataOptions::default(),
        )
        .map_err(|error| failed(path, &error))
}

fn failed(path: &Path, error: &Error) -> RecordsError {
    match error {
        Error::IoError(source) if source.kind() != std::io::ErrorKind::UnexpectedEof => {
            unreadable(path, source)
        }
        Error::IoError(_) => damaged(path, "the recording breaks off before its end"),
        Error::Unsupported(_) => damaged(path, "not a kind of recording that is read here"),
        _ => damaged(path, "the recording is damaged"),
    }
}

fn damaged(path: &Path, problem: &str) -> RecordsError {
    item_error(path, problem, SOUND_HINT)
}

#[cfg(test)]
mod tests;
