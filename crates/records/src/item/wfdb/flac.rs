//! Samples of WFDB's compressed formats (508, 516, 524): a FLAC stream with a channel a signal.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};

use symphonia::core::codecs::audio::{AudioDecoder, AudioDecoderOptions};
use symphonia::core::errors::Error;
use symphonia::core::formats::{FormatOptions, FormatReader, TrackType};
use symphonia::core::io::MediaSourceStream;
use symphonia::default::formats::FlacReader;

/// Bits that a sample of this format has at most; `None` for formats that are not compressed.
pub(super) fn bits(code: u32) -> Option<u32> {
    matches!(code, 508 | 516 | 524).then(|| code - 500)
}

/// Samples in the order of a packed file: frame by frame, signal by signal.
pub(super) struct FlacSamples {
    reader: Box<dyn FormatReader>,
    decoder: Box<dyn AudioDecoder>,
    signals: usize,
    samples_per_frame: usize,
    /// Decoded samples are scaled to 32 bits.
    shift: u32,
    /// Decoded samples, the signals taking turns; the first `used` belong to earlier frames.
    decoded: Vec<i32>,
    used: usize,
    /// Samples of this frame that were given.
    given: usize,
    packet: Vec<i32>,
}

impl FlacSamples {
    /// Opens a file of so many signals, all with so many samples a frame, and skips `offset`
    /// samples of each. Also says how many of each remain. The error is what is wrong.
    pub(super) fn open(
        file: File,
        max_bits: u32,
        signals: usize,
        samples_per_frame: usize,
        offset: u64,
    ) -> Result<(FlacSamples, u64), String> {
        let (reader, decoder, length) = guarded(|| {
            let stream = MediaSourceStream::new(Box::new(file), Default::default());
            let reader = FlacReader::try_new(stream, FormatOptions::default())?;
            let track = reader
                .default_track(TrackType::Audio)
                .ok_or(Error::Unsupported("flac: no track"))?;
            let parameters = track
                .codec_params
                .as_ref()
                .and_then(|parameters| parameters.audio())
                .ok_or(Error::Unsupported("flac: no parameters"))?;
            let decoder = symphonia::default::get_codecs()
                .make_audio_decoder(parameters, &AudioDecoderOptions::default())?;
            let length = track.num_frames;
            Ok((Box::new(reader) as Box<dyn FormatReader>, decoder, length))
        })?
        .ok_or("ends too early")?;
        let parameters = decoder.codec_params();
        let found_bits = parameters.bits_per_sample.unwrap_or(0);
        if found_bits == 0 || found_bits > max_bits {
            return Err(format!(
                "has samples of {found_bits} bits where its format has at most {max_bits}"
            ));
        }
        let channels = parameters
            .channels
            .as_ref()
            .map_or(0, |channels| channels.count());
        if channels != signals {
            return Err(format!(
                "has {channels} channels for {signals} signals of the header"
            ));
        }
        let length = length.ok_or("does not say how long it is")?;
        let mut samples = FlacSamples {
            reader,
            decoder,
            signals,
            samples_per_frame,
            shift: 32 - found_bits,
            decoded: Vec::new(),
            used: 0,
            given: 0,
            packet: Vec::new(),
        };
        let mut skip = offset.min(length);
        while skip > 0 {
            if samples.decoded.is_empty() && !samples.decode()? {
                return Err("ends too early".into());
            }
            let held = (samples.decoded.len() / signals) as u64;
            let dropped = held.min(skip);
            samples.decoded.drain(..dropped as usize * signals);
            skip -= dropped;
        }
        Ok((samples, length.saturating_sub(offset)))
    }

    /// The next sample; `None` at the end of the stream.
    pub(super) fn next(&mut self) -> Result<Option<i32>, String> {
        let frame = self.signals * self.samples_per_frame;
        if self.given == frame {
            self.used += frame;
            self.given = 0;
        }
        while self.decoded.len() - self.used < frame {
            self.decoded.drain(..self.used);
            self.used = 0;
            if !self.decode()? {
                return Ok(None);
            }
        }
        let (signal, turn) = (
            self.given / self.samples_per_frame,
            self.given % self.samples_per_frame,
        );
        self.given += 1;
        Ok(Some(self.decoded[self.used + turn * self.signals + signal]))
    }

    /// Decodes one packet; false at the end of the stream.
    fn decode(&mut self) -> Result<bool, String> {
        let Self {
            reader,
            decoder,
            packet: samples,
            ..
        } = self;
        let more = guarded(|| {
            let Some(packet) = reader.next_packet()? else {
                return Ok(false);
            };
            decoder
                .decode(&packet)?
                .copy_to_vec_interleaved::<i32>(samples);
            Ok(true)
        })?;
        if more != Some(true) {
            return Ok(false);
        }
        let shift = self.shift;
        self.decoded
            .extend(self.packet.iter().map(|&sample| sample >> shift));
        Ok(true)
    }
}

/// Runs a step of the decoder; `None` where the file ends. Damage that trips the decoder's
/// assertions is an error as well.
fn guarded<T>(step: impl FnOnce() -> Result<T, Error>) -> Result<Option<T>, String> {
    match catch_unwind(AssertUnwindSafe(step)) {
        Ok(Ok(value)) => Ok(Some(value)),
        Ok(Err(Error::IoError(error))) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Ok(None)
        }
        Ok(Err(error)) => Err(format!("is no sound FLAC stream ({error})")),
        Err(_) => Err("is no sound FLAC stream".into()),
    }
}
