//! Samples of a frame from its bytes: native, RLE, JPEG, JPEG 2000.
//!
//! All decoders are Rust: packed bits here, `jpeg-decoder` for baseline, progressive and lossless
//! JPEG, `jpeg2k` over `openjp2` for JPEG 2000. What a stream says of its size has to agree with
//! the data set before anything is allocated for it.

use dicom_dictionary_std::uids;
use jpeg_decoder::{CodingProcess, ColorTransform, Decoder, PixelFormat};

use super::Header;
use crate::item::image::{guarded, jpeg::jpeg_frame};

/// Retired, and still found.
const EXPLICIT_VR_BIG_ENDIAN: &str = "1.2.840.10008.1.2.2";

/// How the bytes of a frame are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    Native,
    /// Native, but in fragments.
    Encapsulated,
    Rle,
    Jpeg,
    Jpeg2000,
}

impl Coding {
    /// Of a transfer syntax; `None` where it is not read.
    pub fn of(uid: &str) -> Option<Coding> {
        match uid {
            uids::IMPLICIT_VR_LITTLE_ENDIAN
            | uids::EXPLICIT_VR_LITTLE_ENDIAN
            | EXPLICIT_VR_BIG_ENDIAN
            | uids::DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN => Some(Coding::Native),
            uids::ENCAPSULATED_UNCOMPRESSED_EXPLICIT_VR_LITTLE_ENDIAN => Some(Coding::Encapsulated),
            uids::RLE_LOSSLESS => Some(Coding::Rle),
            uids::JPEG_BASELINE8_BIT
            | uids::JPEG_EXTENDED12_BIT
            | uids::JPEG_LOSSLESS
            | uids::JPEG_LOSSLESS_SV1 => Some(Coding::Jpeg),
            uids::JPEG2000_LOSSLESS | uids::JPEG2000 => Some(Coding::Jpeg2000),
            _ => None,
        }
    }
}

/// Samples of a frame, pixel by pixel with the channels of a pixel side by side.
pub(super) struct Samples {
    pub values: Vec<f32>,
    /// Whether a decoder has already turned luminance and chrominance into red, green and blue.
    pub is_rgb: bool,
}

impl Samples {
    /// Decodes a frame's bytes. `None` where they are truncated, corrupt or disagree with the data
    /// set.
    pub fn decode(
        coding: Coding,
        bytes: &[u8],
        header: &Header,
        big_endian: bool,
    ) -> Option<Samples> {
        let plain = |values| Samples {
            values,
            is_rgb: false,
        };
        let samples = match coding {
            Coding::Native | Coding::Encapsulated => plain(native(bytes, header, big_endian)?),
            Coding::Rle => plain(run_lengths(bytes, header)?),
            Coding::Jpeg => guarded(|| jpeg(bytes, header))??,
            Coding::Jpeg2000 => guarded(|| jpeg_2000(bytes, header))??,
        };
        (samples.values.len() == header.samples()).then_some(samples)
    }
}

fn native(bytes: &[u8], header: &Header, big_endian: bool) -> Option<Vec<f32>> {
    let shift = header.high_bit + 1 - header.bits_stored;
    let value = |raw: u32| header.value(raw >> shift);
    // A fragment may be padded by a byte.
    let bytes = bytes.get(..header.native_bytes())?;
    let values: Vec<f32> = match header.bits_allocated {
        8 => bytes.iter().map(|&byte| value(u32::from(byte))).collect(),
        16 => {
            let (words, _) = bytes.as_chunks::<2>();
            let word = |&bytes: &[u8; 2]| {
                u32::from(if big_endian {
                    u16::from_be_bytes(bytes)
                } else {
                    u16::from_le_bytes(bytes)
                })
            };
            words.iter().map(|bytes| value(word(bytes))).collect()
        }
        32 => {
            let (words, _) = bytes.as_chunks::<4>();
            let word = |&bytes: &[u8; 4]| {
                if big_endian {
                    u32::from_be_bytes(bytes)
                } else {
                    u32::from_le_bytes(bytes)
                }
            };
            words.iter().map(|bytes| value(word(bytes))).collect()
        }
        _ => return None,
    };
    if header.is_halved() {
        if header.bits_allocated != 8 || !header.columns.is_multiple_of(2) {
            return None;
        }
        // Two pixels share their chrominance: Y Y Cb Cr (PS3.3, C.7.6.3.1.2).
        let (pairs, _) = values.as_chunks::<4>();
        let pixels = pairs
            .iter()
            .flat_map(|&[first, second, blue, red]| [first, blue, red, second, blue, red]);
        return Some(pixels.collect());
    }
    Some(if header.is_planar {
        interleaved(&values, header.channels)
    } else {
        values
    })
}

/// Pixel by pixel, from one plane a channel.
fn interleaved(values: &[f32], channels: usize) -> Vec<f32> {
    let pixels = values.len() / channels;
    (0..pixels * channels)
        .map(|at| values[at % channels * pixels + at / channels])
        .collect()
}

/// RLE (PS3.5, G): a segment for every byte of every sample, the most significant first, each of
/// packed bits.
fn run_lengths(bytes: &[u8], header: &Header) -> Option<Vec<f32>> {
    let (words, _) = bytes.get(..64)?.as_chunks::<4>();
    let words: Vec<usize> = words
        .iter()
        .map(|&word| u32::from_le_bytes(word) as usize)
        .collect();
    let depth = header.bits_allocated as usize / 8;
    let segments = header.channels * depth;
    if words[0] != segments || segments > 15 {
        return None;
    }
    let pixels = header.rows * header.columns;
    let mut raw = vec![0u32; header.samples()];
    for segment in 0..segments {
        let start = words[1 + segment];
        let end = if segment + 1 < segments {
            words[2 + segment]
        } else {
            bytes.len()
        };
        let plane = unpacked(bytes.get(start..end)?, pixels)?;
        let channel = segment / depth;
        let samples = raw.iter_mut().skip(channel).step_by(header.channels);
        for (sample, byte) in samples.zip(plane) {
            *sample = *sample << 8 | u32::from(byte);
        }
    }
    let shift = header.high_bit + 1 - header.bits_stored;
    Some(
        raw.into_iter()
            .map(|raw| header.value(raw >> shift))
            .collect(),
    )
}

/// Packed bits: a count of literals, or of repetitions of one byte. `None` where they end before
/// `length` bytes are made.
fn unpacked(bytes: &[u8], length: usize) -> Option<Vec<u8>> {
    let mut unpacked = Vec::new();
    let mut rest = bytes;
    while unpacked.len() < length {
        let (&count, after) = rest.split_first()?;
        rest = after;
        match count {
            0..=127 => {
                let (literal, after) = rest.split_at_checked(usize::from(count) + 1)?;
                unpacked.extend_from_slice(literal);
                rest = after;
            }
            128 => {}
            129.. => {
                let (&byte, after) = rest.split_first()?;
                unpacked.resize(unpacked.len() + 257 - usize::from(count), byte);
                rest = after;
            }
        }
    }
    unpacked.truncate(length);
    Some(unpacked)
}

fn jpeg(bytes: &[u8], header: &Header) -> Option<Samples> {
    let frame = jpeg_frame(bytes)?;
    if (frame.height, frame.width) != (header.rows, header.columns) {
        return None;
    }
    let mut decoder = Decoder::new(bytes);
    // Two bytes a sample at most.
    decoder.set_max_decoding_buffer_size(header.samples().checked_mul(2)?);
    // Without a marker of its own a stream means what the data set says.
    if header.channels == 3 && !frame.says_colour {
        decoder.set_color_transform(if header.interpretation.starts_with("YBR") {
            ColorTransform::YCbCr
        } else {
            ColorTransform::RGB
        });
    }
    let decoded = decoder.decode().ok()?;
    let info = decoder.info()?;
    let values = match (info.pixel_format, header.channels) {
        (PixelFormat::L8, 1) | (PixelFormat::RGB24, 3) => {
            let values = decoded.iter().map(|&byte| header.value(u32::from(byte)));
            values.collect()
        }
        (PixelFormat::L16, 1) => {
            let (words, _) = decoded.as_chunks::<2>();
            let values = words
                .iter()
                .map(|&word| header.value(u32::from(u16::from_ne_bytes(word))));
            values.collect()
        }
        _ => return None,
    };
    Some(Samples {
        values,
        // Lossless streams are given as they are.
        is_rgb: header.channels == 3 && info.coding_process != CodingProcess::Lossless,
    })
}

fn jpeg_2000(bytes: &[u8], header: &Header) -> Option<Samples> {
    if code_stream_size(bytes)? != (header.rows, header.columns) {
        return None;
    }
    let strict = jpeg2k::DecodeParameters::new().strict(true);
    let image = jpeg2k::Image::from_bytes_with(bytes, strict).ok()?;
    let components = image.components();
    let size = (header.rows, header.columns);
    let fits = components
        .iter()
        .all(|component| (component.height() as usize, component.width() as usize) == size);
    if components.len() != header.channels || !fits {
        return None;
    }
    let mut values = vec![0.0; header.samples()];
    for (channel, component) in components.iter().enumerate() {
        let signed = component.is_signed();
        let samples = values.iter_mut().skip(channel).step_by(header.channels);
        for (value, &sample) in samples.zip(component.data()) {
            *value = if signed {
                sample as f32
            } else {
                header.value(sample as u32)
            };
        }
    }
    Some(Samples {
        values,
        // The reversible and irreversible transforms of a stream are undone by its decoder.
        is_rgb: matches!(header.interpretation.as_str(), "YBR_RCT" | "YBR_ICT"),
    })
}

/// Rows and columns of a JPEG 2000 code stream (ITU-T T.800, A.5.1) that has its end marker.
fn code_stream_size(bytes: &[u8]) -> Option<(usize, usize)> {
    let end = bytes.iter().rposition(|&byte| byte != 0)?;
    if !bytes.starts_with(&[0xFF, 0x4F, 0xFF, 0x51]) || !bytes[..=end].ends_with(&[0xFF, 0xD9]) {
        return None;
    }
    let word = |at: usize| {
        let (words, _) = bytes.get(at..at + 4)?.as_chunks::<4>();
        Some(u32::from_be_bytes(*words.first()?) as usize)
    };
    let columns = word(8)?.checked_sub(word(16)?)?;
    let rows = word(12)?.checked_sub(word(20)?)?;
    Some((rows, columns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_bits_are_unpacked_and_truncation_noticed() {
        let packed = [
            0xFE, 0xAA, 0x02, 0x80, 0x00, 0x2A, 0x80, 0xFD, 0xAA, 0x00, 0x07,
        ];
        let expected = [
            0xAA, 0xAA, 0xAA, 0x80, 0x00, 0x2A, 0xAA, 0xAA, 0xAA, 0xAA, 7,
        ];
        assert_eq!(unpacked(&packed, 11).unwrap(), expected);
        assert_eq!(unpacked(&packed, 2).unwrap(), expected[..2]);
        for length in 0..packed.len() {
            assert_eq!(unpacked(&packed[..length], 11), None, "{length} bytes");
        }
    }

    #[test]
    fn planes_are_interleaved() {
        let values = [1.0, 2.0, 10.0, 20.0, 100.0, 200.0];
        assert_eq!(
            interleaved(&values, 3),
            [1.0, 10.0, 100.0, 2.0, 20.0, 200.0]
        );
    }
}
