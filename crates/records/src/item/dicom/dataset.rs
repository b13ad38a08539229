//! The few elements of a DICOM data set that say what its pixels mean, and the bytes of one frame.
//!
//! Tokens come from dicom-rs' lazy reader; every other value, the patient's name among them, is
//! skipped without being looked at. No length is believed before the bytes are there, so that a
//! damaged file cannot ask for more memory than it has bytes.

use std::collections::BTreeMap;
use std::io::{Read, Seek};
use std::path::Path;

use dicom_core::{Tag, VR};
use dicom_dictionary_std::tags;
use dicom_encoding::TransferSyntax;
use dicom_parser::dataset::LazyDataToken;
use dicom_parser::dataset::lazy_read::LazyDataSetReader;
use dicom_parser::{DynStatefulDecoder, StatefulDecode};

use crate::RecordsError;
use crate::item::image::item_error;

/// Longest value kept: the 65,536 entries of 16 bits of a lookup table are 128 KiB.
const MAX_VALUE_BYTES: u32 = 1 << 20;

/// Deepest nesting followed; images have about four levels.
const MAX_DEPTH: usize = 64;

/// Sequences whose items are looked into.
const SEQUENCES: [Tag; 4] = [
    tags::MODALITY_LUT_SEQUENCE,
    tags::VOILUT_SEQUENCE,
    tags::SHARED_FUNCTIONAL_GROUPS_SEQUENCE,
    tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE,
];

/// The element group of everything about an image's pixels.
const IMAGE_GROUP: u16 = 0x0028;

/// A sequence and the number of one of its items, from 0.
pub(super) type ItemAt = (Tag, usize);

/// Values of a data set by where they stand: the items around them, and their tag.
#[derive(Default)]
pub(super) struct DataSet {
    pub big_endian: bool,
    elements: BTreeMap<(Vec<ItemAt>, Tag), Element>,
}

/// A value as it stands in the file.
pub(super) struct Element {
    pub vr: VR,
    pub bytes: Vec<u8>,
}

/// The bytes of one frame.
pub(super) enum FrameBytes {
    Native(Vec<u8>),
    /// A compressed stream, its fragments joined.
    Encapsulated(Vec<u8>),
}

/// Which frame is wanted of how many.
pub(super) struct FrameAt {
    pub index: usize,
    pub count: usize,
    /// Bytes of a frame that is not compressed.
    pub native_bytes: u64,
    /// Whether every fragment is a frame of its own (RLE and uncompressed fragments).
    pub fragment_is_frame: bool,
}

impl DataSet {
    /// A value at the top, or inside the items named.
    pub fn get(&self, place: &[ItemAt], tag: Tag) -> Option<&Element> {
        self.elements.get(&(place.to_vec(), tag))
    }

    /// The numbers of a value. Empty where it is absent; text that is no number is left out.
    pub fn numbers(&self, place: &[ItemAt], tag: Tag) -> Vec<f64> {
        let Some(element) = self.get(place, tag) else {
            return Vec::new();
        };
        let bytes = &element.bytes;
        match element.vr {
            VR::DS | VR::IS => self
                .text(place, tag)
                .split('\\')
                .filter_map(|number| number.trim().parse().ok())
                .collect(),
            VR::SS => self.words(bytes, |word| f64::from(word as i16)),
            VR::UL => self.read(bytes, |bytes, big| {
                f64::from(if big {
                    u32::from_be_bytes(bytes)
                } else {
                    u32::from_le_bytes(bytes)
                })
            }),
            VR::SL => self.read(bytes, |bytes, big| {
                f64::from(if big {
                    i32::from_be_bytes(bytes)
                } else {
                    i32::from_le_bytes(bytes)
                })
            }),
            VR::FL => self.read(bytes, |bytes, big| {
                f64::from(if big {
                    f32::from_be_bytes(bytes)
                } else {
                    f32::from_le_bytes(bytes)
                })
            }),
            VR::FD => self.read(bytes, |bytes, big| {
                if big {
                    f64::from_be_bytes(bytes)
                } else {
                    f64::from_le_bytes(bytes)
                }
            }),
            // US, and OW where a table of numbers is written so.
            _ => self.words(bytes, f64::from),
        }
    }

    /// The first number of a value.
    pub fn number(&self, place: &[ItemAt], tag: Tag) -> Option<f64> {
        self.numbers(place, tag).into_iter().next()
    }

    /// A value of text without its padding; empty where it is absent.
    pub fn text(&self, place: &[ItemAt], tag: Tag) -> String {
        let bytes = self
            .get(place, tag)
            .map_or(&[][..], |element| &element.bytes[..]);
        String::from_utf8_lossy(bytes)
            .trim_matches(['\0', ' '])
            .to_string()
    }

    fn words<T>(&self, bytes: &[u8], convert: impl Fn(u16) -> T) -> Vec<T> {
        self.read(bytes, |bytes, big| {
            convert(if big {
                u16::from_be_bytes(bytes)
            } else {
                u16::from_le_bytes(bytes)
            })
        })
    }

    fn read<const N: usize, T>(&self, bytes: &[u8], read: impl Fn([u8; N], bool) -> T) -> Vec<T> {
        let (chunks, _) = bytes.as_chunks::<N>();
        chunks
            .iter()
            .map(|&chunk| read(chunk, self.big_endian))
            .collect()
    }
}

/// Reads up to the pixel data and of that the frame that `choose` names.
pub(super) fn read_frame<R: Read + Seek>(
    path: &Path,
    source: R,
    syntax: &TransferSyntax,
    choose: impl FnOnce(&DataSet) -> Result<FrameAt, RecordsError>,
) -> Result<(DataSet, FrameBytes), RecordsError> {
    let mut reader = LazyDataSetReader::new_with_ts(source, syntax).map_err(|_| broken(path))?;
    let mut data = DataSet {
        big_endian: syntax.endianness() == dicom_encoding::Endianness::Big,
        ..DataSet::default()
    };
    let mut place = Place::default();
    while let Some(token) = reader.advance() {
        match token.map_err(|_| broken(path))? {
            LazyDataToken::LazyValue { header, decoder } => {
                let length = header.len.get().ok_or_else(|| broken(path))?;
                if place.levels.is_empty() && header.tag == tags::PIXEL_DATA {
                    let frame = choose(&data)?;
                    let bytes = native_frame(path, decoder, &frame)?;
                    return Ok((data, FrameBytes::Native(bytes)));
                }
                if place.is_read() && header.tag.group() == IMAGE_GROUP && length <= MAX_VALUE_BYTES
                {
                    let mut bytes = Vec::new();
                    decoder
                        .read_to_vec(length, &mut bytes)
                        .map_err(|_| broken(path))?;
                    if bytes.len() != length as usize {
                        return Err(broken(path));
                    }
                    let element = Element {
                        vr: header.vr,
                        bytes,
                    };
                    data.elements.insert((place.items(), header.tag), element);
                } else {
                    decoder.skip_bytes(length).map_err(|_| broken(path))?;
                }
            }
            LazyDataToken::LazyItemValue { len, decoder } => {
                decoder.skip_bytes(len).map_err(|_| broken(path))?;
            }
            LazyDataToken::PixelSequenceStart if place.levels.is_empty() => {
                let frame = choose(&data)?;
                let bytes = encapsulated_frame(path, &mut reader, &frame)?;
                return Ok((data, FrameBytes::Encapsulated(bytes)));
            }
            LazyDataToken::PixelSequenceStart => {
                place.enter(Level::Sequence(tags::PIXEL_DATA, 0), path)?;
            }
            LazyDataToken::SequenceStart { tag, .. } => {
                place.enter(Level::Sequence(tag, 0), path)?;
            }
            LazyDataToken::ItemStart { .. } => place.enter(Level::Item, path)?,
            // The reader itself does not survive a delimiter of nothing, so that it is not asked
            // to go on after one.
            LazyDataToken::ItemEnd => place.leave(true, path)?,
            LazyDataToken::SequenceEnd => place.leave(false, path)?,
            _ => {}
        }
    }
    Err(item_error(
        path,
        "is a DICOM file without pixel data, or breaks off before them",
        "point to an image, or write the file again",
    ))
}

/// Where in the nesting of sequences the reader stands.
#[derive(Default)]
struct Place {
    levels: Vec<Level>,
}

enum Level {
    /// Its tag, and how many of its items have begun.
    Sequence(Tag, usize),
    Item,
}

impl Place {
    fn enter(&mut self, level: Level, path: &Path) -> Result<(), RecordsError> {
        match (&level, self.levels.last_mut()) {
            (Level::Item, Some(Level::Sequence(_, begun))) => *begun += 1,
            (Level::Sequence(..), None | Some(Level::Item)) => {}
            _ => return Err(broken(path)),
        }
        if self.levels.len() == MAX_DEPTH {
            return Err(broken(path));
        }
        self.levels.push(level);
        Ok(())
    }

    fn leave(&mut self, item: bool, path: &Path) -> Result<(), RecordsError> {
        match self.levels.pop() {
            Some(level) if matches!(level, Level::Item) == item => Ok(()),
            _ => Err(broken(path)),
        }
    }

    /// Whether values here are kept.
    fn is_read(&self) -> bool {
        match self.levels.first() {
            None => true,
            Some(Level::Sequence(tag, _)) => SEQUENCES.contains(tag),
            Some(Level::Item) => false,
        }
    }

    fn items(&self) -> Vec<ItemAt> {
        let sequences = self.levels.iter().filter_map(|level| match level {
            Level::Sequence(tag, begun) => Some((*tag, begun.saturating_sub(1))),
            Level::Item => None,
        });
        sequences.collect()
    }
}

fn native_frame(
    path: &Path,
    decoder: &mut impl StatefulDecode,
    frame: &FrameAt,
) -> Result<Vec<u8>, RecordsError> {
    let before = frame.native_bytes.checked_mul(frame.index as u64);
    let before = before.and_then(|bytes| u32::try_from(bytes).ok());
    let length = u32::try_from(frame.native_bytes).ok();
    let (Some(before), Some(length)) = (before, length) else {
        return Err(broken(path));
    };
    let mut bytes = Vec::new();
    decoder
        .skip_bytes(before)
        .and_then(|()| decoder.read_to_vec(length, &mut bytes))
        .map_err(|_| broken(path))?;
    if bytes.len() != length as usize {
        return Err(broken(path));
    }
    Ok(bytes)
}

/// The fragments of a frame (PS3.5, A.4): by the offset table where there is one; else all of them
/// where the file has one frame, and where it has more a frame ends with its stream's end marker.
fn encapsulated_frame<R: Read + Seek>(
    path: &Path,
    reader: &mut LazyDataSetReader<DynStatefulDecoder<R>>,
    frame: &FrameAt,
) -> Result<Vec<u8>, RecordsError> {
    let mut offsets: Option<Vec<u32>> = None;
    let mut bytes = Vec::new();
    // Of the next fragment, from the first one's item header.
    let mut offset = 0u64;
    let mut frames_ended = 0;
    while let Some(token) = reader.advance() {
        let (len, decoder) = match token.map_err(|_| broken(path))? {
            LazyDataToken::LazyItemValue { len, decoder } => (len, decoder),
            // An empty first item is an offset table without entries.
            LazyDataToken::ItemEnd => {
                offsets.get_or_insert_default();
                continue;
            }
            LazyDataToken::SequenceEnd => break,
            _ => continue,
        };
        let mut fragment = Vec::new();
        let Some(offsets) = &offsets else {
            decoder
                .read_to_vec(len, &mut fragment)
                .map_err(|_| broken(path))?;
            let (entries, _) = fragment.as_chunks::<4>();
            offsets = Some(
                entries
                    .iter()
                    .map(|&entry| u32::from_le_bytes(entry))
                    .collect(),
            );
            continue;
        };
        let start = offset;
        offset += 8 + u64::from(len);
        let by_table = offsets.len() >= frame.count || frame.count == 1;
        let wanted = if by_table {
            let first = offsets.get(frame.index).copied().unwrap_or(0);
            let next = offsets.get(frame.index + 1).copied().unwrap_or(u32::MAX);
            if start >= u64::from(next) {
                break;
            }
            start >= u64::from(first)
        } else {
            frames_ended == frame.index
        };
        decoder
            .read_to_vec(len, &mut fragment)
            .map_err(|_| broken(path))?;
        if fragment.len() != len as usize {
            return Err(broken(path));
        }
        if frame.fragment_is_frame || ends_stream(&fragment) {
            frames_ended += 1;
        }
        if wanted {
            bytes.append(&mut fragment);
            if !by_table && frames_ended > frame.index {
                break;
            }
        }
    }
    if bytes.is_empty() {
        return Err(broken(path));
    }
    Ok(bytes)
}

/// Whether a fragment ends with the end marker that JPEG and JPEG 2000 share, before its padding.
fn ends_stream(fragment: &[u8]) -> bool {
    let end = fragment.iter().rposition(|&byte| byte != 0);
    end.is_some_and(|end| fragment[..=end].ends_with(&[0xFF, 0xD9]))
}

pub(super) fn broken(path: &Path) -> RecordsError {
    item_error(
        path,
        "is a truncated or corrupt DICOM file",
        "write the file again",
    )
}
