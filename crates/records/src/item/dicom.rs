//! DICOM images: one frame on the grey levels 0…255, as a viewer would show it.
//!
//! Grey values go through the modality's rescaling (PS3.3, C.11.1) and then through a window or a
//! lookup table (C.11.2); MONOCHROME1 is inverted, so that more is always brighter. Colours are
//! red, green and blue in the end. Overlays, presentation states and the pixels' physical size are
//! left aside.

use std::fs::File;
use std::io::{BufReader, Cursor, ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use dicom_dictionary_std::{tags, uids};
use dicom_encoding::TransferSyntaxIndex;
use dicom_transfer_syntax_registry::TransferSyntaxRegistry;
use flate2::read::DeflateDecoder;

use super::image::{
    ImageOptions, Picture, Planes, check_size, guarded, item_error, open, unreadable,
};
use crate::RecordsError;

mod codec;
mod colour;
mod dataset;
mod grey;

use codec::{Coding, Samples};
use colour::{colour, palette};
use dataset::{DataSet, FrameAt, FrameBytes, broken};
use grey::grey;

/// Where the file's header begins: after the preamble and `DICM`.
const HEADER_START: u64 = 132;

/// Reads one frame.
pub(super) fn read(path: &Path, options: &ImageOptions) -> Result<Picture, RecordsError> {
    let mut source = BufReader::new(open(path)?);
    let uid = transfer_syntax(path, &mut source)?;
    let registry = TransferSyntaxRegistry;
    let syntax = registry.get(&uid);
    let (Some(coding), Some(syntax)) = (Coding::of(&uid), syntax) else {
        let name = syntax.map_or("unknown", |syntax| syntax.name());
        return Err(item_error(
            path,
            format!("is coded as {name} ({uid}), which is not read here"),
            "transcode it, with `dcmconv` or `gdcmconv --raw` for instance",
        ));
    };
    let mut found = None;
    let choose = |data: &DataSet| -> Result<FrameAt, RecordsError> {
        let header = Header::read(path, data, options)?;
        let index = options.frame.among(header.frames).ok_or_else(|| {
            item_error(
                path,
                format!("has {} frames, and `frame` is beyond them", header.frames),
                "choose another frame, from 0",
            )
        })?;
        let frame = FrameAt {
            index,
            count: header.frames,
            native_bytes: header.native_bytes() as u64,
            fragment_is_frame: matches!(coding, Coding::Rle | Coding::Encapsulated),
        };
        found = Some((header, index));
        Ok(frame)
    };
    // The reader is not ours; it has been seen to assert on damaged sequences.
    let parsed = guarded(|| {
        if uid == uids::DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN {
            let inflated = Cursor::new(inflate(path, source, options)?);
            dataset::read_frame(path, inflated, syntax, choose)
        } else {
            dataset::read_frame(path, source, syntax, choose)
        }
    });
    let (data, bytes) = parsed.unwrap_or_else(|| Err(broken(path)))?;
    let (Some((header, frame)), Some(bytes)) = (found, matching(coding, bytes)) else {
        return Err(broken(path));
    };
    let samples = Samples::decode(coding, &bytes, &header, data.big_endian).ok_or_else(|| {
        item_error(
            path,
            format!(
                "has pixel data that do not decode to {} × {} pixels of {} samples",
                header.rows, header.columns, header.channels
            ),
            "write the file again, or transcode it to an uncompressed syntax",
        )
    })?;
    drop(bytes);
    let planes = match header.interpretation.as_str() {
        "MONOCHROME1" | "MONOCHROME2" => Planes::Floats(vec![grey(
            path,
            samples.values,
            &data,
            &header,
            frame,
            options,
        )?]),
        "PALETTE COLOR" => Planes::Bytes(palette(path, &samples.values, &data, &header)?),
        _ => colour(samples, &header),
    };
    Ok(Picture {
        height: header.rows,
        width: header.columns,
        planes,
    })
}

/// Pixel data in fragments belong to compressed syntaxes, and others do not have them.
fn matching(coding: Coding, bytes: FrameBytes) -> Option<Vec<u8>> {
    match (coding, bytes) {
        (Coding::Native, FrameBytes::Native(bytes)) => Some(bytes),
        (Coding::Native, FrameBytes::Encapsulated(_)) | (_, FrameBytes::Native(_)) => None,
        (_, FrameBytes::Encapsulated(bytes)) => Some(bytes),
    }
}

/// The transfer syntax, from the file's meta information (PS3.10, 7.1), which is always explicit
/// and little endian. Leaves the source where the data set begins.
fn transfer_syntax(path: &Path, source: &mut BufReader<File>) -> Result<String, RecordsError> {
    let failed = |error: std::io::Error| match error.kind() {
        ErrorKind::UnexpectedEof => broken(path),
        _ => unreadable(path, &error),
    };
    let mut uid = None;
    let mut at = source.seek(SeekFrom::Start(HEADER_START)).map_err(failed)?;
    loop {
        let mut head = [0; 8];
        source.read_exact(&mut head).map_err(failed)?;
        let [
            group_low,
            group_high,
            element_low,
            element_high,
            vr @ ..,
            length_low,
            length_high,
        ] = head;
        if u16::from_le_bytes([group_low, group_high]) != 0x0002 {
            source.seek(SeekFrom::Start(at)).map_err(failed)?;
            break;
        }
        let length = if matches!(&vr, b"OB" | b"OW" | b"UN" | b"UT" | b"SQ") {
            let mut length = [0; 4];
            source.read_exact(&mut length).map_err(failed)?;
            u64::from(u32::from_le_bytes(length))
        } else {
            u64::from(u16::from_le_bytes([length_low, length_high]))
        };
        let element = u16::from_le_bytes([element_low, element_high]);
        let start = source.stream_position().map_err(failed)?;
        if element == tags::TRANSFER_SYNTAX_UID.element() {
            let mut text = Vec::new();
            source
                .by_ref()
                .take(length.min(64))
                .read_to_end(&mut text)
                .map_err(failed)?;
            let text = String::from_utf8_lossy(&text);
            uid = Some(text.trim_matches(['\0', ' ']).to_string());
        }
        at = source
            .seek(SeekFrom::Start(start + length))
            .map_err(failed)?;
    }
    uid.filter(|uid| {
        uid.bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'.')
    })
    .ok_or_else(|| broken(path))
}

/// A data set that is deflated as a whole (PS3.5, A.5).
fn inflate(
    path: &Path,
    source: BufReader<File>,
    options: &ImageOptions,
) -> Result<Vec<u8>, RecordsError> {
    // Beyond this no image within `max_pixels` is left to come.
    let limit = options
        .max_pixels
        .saturating_mul(12)
        .saturating_add(1 << 26);
    let mut bytes = Vec::new();
    let read = DeflateDecoder::new(source)
        .take(limit)
        .read_to_end(&mut bytes);
    read.map_err(|_| broken(path))?;
    Ok(bytes)
}

/// What the data set says of the form of its pixels (PS3.3, C.7.6.3).
struct Header {
    rows: usize,
    columns: usize,
    frames: usize,
    channels: usize,
    interpretation: String,
    is_planar: bool,
    is_signed: bool,
    bits_allocated: u32,
    bits_stored: u32,
    high_bit: u32,
}

impl Header {
    fn read(path: &Path, data: &DataSet, options: &ImageOptions) -> Result<Header, RecordsError> {
        let number = |tag| data.number(&[], tag).filter(|&number| number >= 0.0);
        let required = |tag, name: &str| {
            number(tag).ok_or_else(|| {
                item_error(
                    path,
                    format!("has no {name}"),
                    "point to a DICOM image, or write the file again",
                )
            })
        };
        let rows = required(tags::ROWS, "Rows")? as usize;
        let columns = required(tags::COLUMNS, "Columns")? as usize;
        check_size(path, rows, columns, options)?;
        let bits_allocated = required(tags::BITS_ALLOCATED, "BitsAllocated")? as u32;
        let bits_stored = number(tags::BITS_STORED).map_or(bits_allocated, |bits| bits as u32);
        let high_bit =
            number(tags::HIGH_BIT).map_or(bits_stored.saturating_sub(1), |bit| bit as u32);
        let channels = number(tags::SAMPLES_PER_PIXEL).unwrap_or(1.0) as usize;
        let interpretation = data.text(&[], tags::PHOTOMETRIC_INTERPRETATION);
        let expected = match interpretation.as_str() {
            "MONOCHROME1" | "MONOCHROME2" | "PALETTE COLOR" => 1,
            "RGB" | "YBR_FULL" | "YBR_FULL_422" | "YBR_RCT" | "YBR_ICT" => 3,
            _ => {
                return Err(item_error(
                    path,
                    "has a photometric interpretation that is not read here",
                    "convert it to MONOCHROME2 or RGB",
                ));
            }
        };
        let header = Header {
            rows,
            columns,
            frames: number(tags::NUMBER_OF_FRAMES).map_or(1, |frames| (frames as usize).max(1)),
            channels,
            interpretation,
            is_planar: number(tags::PLANAR_CONFIGURATION) == Some(1.0),
            is_signed: number(tags::PIXEL_REPRESENTATION) == Some(1.0),
            bits_allocated,
            bits_stored,
            high_bit,
        };
        let consistent = channels == expected
            && matches!(bits_allocated, 8 | 16 | 32)
            && (1..=bits_allocated).contains(&bits_stored)
            && (bits_stored - 1..bits_allocated).contains(&high_bit);
        if !consistent {
            return Err(item_error(
                path,
                format!(
                    "has pixels of {channels} samples with {bits_stored} of {bits_allocated} bits, \
                     which is not read here"
                ),
                "convert it to MONOCHROME2 or RGB of 8, 16 or 32 bits",
            ));
        }
        Ok(header)
    }

    /// Samples of a frame.
    fn samples(&self) -> usize {
        self.rows * self.columns * self.channels
    }

    /// Bytes of a frame that is not compressed.
    fn native_bytes(&self) -> usize {
        let samples = if self.is_halved() {
            self.rows * self.columns * 2
        } else {
            self.samples()
        };
        samples * self.bits_allocated as usize / 8
    }

    /// Whether uncompressed pixels share their chrominance two and two.
    fn is_halved(&self) -> bool {
        self.interpretation == "YBR_FULL_422"
    }

    /// A sample's value from its bits, which begin at the lowest.
    fn value(&self, raw: u32) -> f32 {
        let unused = 32 - self.bits_stored;
        if self.is_signed {
            ((raw << unused) as i32 >> unused) as f32
        } else {
            (raw << unused >> unused) as f32
        }
    }

    /// A number of 16 bits of the header that is signed where the pixels are, whatever it is
    /// written as.
    fn as_stored(&self, number: f64) -> f64 {
        if self.is_signed && number > f64::from(i16::MAX) && number <= f64::from(u16::MAX) {
            number - 65_536.0
        } else {
            number
        }
    }

    /// The largest value of an unsigned sample.
    fn white(&self) -> f32 {
        (u32::MAX >> (32 - self.bits_stored)) as f32
    }
}

#[cfg(test)]
mod tests;
