//! DICOM files written here by dicom-rs; those of `image_tests.rs` are written by pydicom.

use std::path::PathBuf;

use dicom_core::{DataElement, PrimitiveValue, Tag, VR, value::PixelFragmentSequence};
use dicom_dictionary_std::{tags, uids};
use dicom_object::{FileMetaTableBuilder, InMemDicomObject, mem::InMemElement};
use tempfile::TempDir;

use super::*;
use crate::item::image::tests::{assert_close, levels, message, plain};
use crate::item::image::{ImagePosition, decode_image};

fn words(tag: Tag, value: u16) -> InMemElement {
    DataElement::new(tag, VR::US, PrimitiveValue::from(value))
}

fn text(tag: Tag, vr: VR, value: &str) -> InMemElement {
    DataElement::new(tag, vr, PrimitiveValue::from(value))
}

fn native(bytes: Vec<u8>) -> InMemElement {
    DataElement::new(tags::PIXEL_DATA, VR::OB, PrimitiveValue::U8(bytes.into()))
}

fn encapsulated(offsets: Vec<u32>, fragments: Vec<Vec<u8>>) -> InMemElement {
    let fragments = PixelFragmentSequence::new(offsets, fragments);
    DataElement::new(tags::PIXEL_DATA, VR::OB, fragments)
}

/// Elements that describe pixels of unsigned samples; more of them replace earlier ones.
fn form(rows: u16, columns: u16, interpretation: &str, bits: u16) -> Vec<InMemElement> {
    let channels = if interpretation.starts_with("MONO") {
        1
    } else {
        3
    };
    vec![
        text(
            tags::SOP_CLASS_UID,
            VR::UI,
            uids::SECONDARY_CAPTURE_IMAGE_STORAGE,
        ),
        text(tags::SOP_INSTANCE_UID, VR::UI, "1.2.3.4"),
        text(tags::PATIENT_NAME, VR::PN, "Nobody"),
        words(tags::SAMPLES_PER_PIXEL, channels),
        text(tags::PHOTOMETRIC_INTERPRETATION, VR::CS, interpretation),
        words(tags::ROWS, rows),
        words(tags::COLUMNS, columns),
        words(tags::BITS_ALLOCATED, bits),
        words(tags::BITS_STORED, bits),
        words(tags::HIGH_BIT, bits - 1),
        words(tags::PIXEL_REPRESENTATION, 0),
    ]
}

struct Dicoms(TempDir);

impl Dicoms {
    fn new() -> Dicoms {
        Dicoms(TempDir::new().unwrap())
    }

    fn write(
        &self,
        syntax: &str,
        form: Vec<InMemElement>,
        more: impl IntoIterator<Item = InMemElement>,
    ) -> PathBuf {
        let path = self.0.path().join("image");
        let elements = form.into_iter().chain(more);
        let meta = FileMetaTableBuilder::new().transfer_syntax(syntax);
        let object = InMemDicomObject::from_element_iter(elements).with_meta(meta);
        object.unwrap().write_to_file(&path).unwrap();
        path
    }

    fn native(
        &self,
        form: Vec<InMemElement>,
        more: impl IntoIterator<Item = InMemElement>,
        bytes: Vec<u8>,
    ) -> PathBuf {
        let more = more.into_iter().chain([native(bytes)]);
        self.write(uids::EXPLICIT_VR_LITTLE_ENDIAN, form, more)
    }
}

#[test]
fn dicom_colours_come_in_planes_or_halved() {
    let dicoms = Dicoms::new();
    let planar = [words(tags::PLANAR_CONFIGURATION, 1)];
    let path = dicoms.native(form(1, 2, "RGB", 8), planar, vec![10, 20, 30, 40, 50, 60]);
    let decoded = decode_image(&path, &plain(1, 2)).unwrap().values;
    let expected = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0].map(|level| level / 255.0);
    assert_close(&decoded, &expected, 1e-6, "planes");

    // Two grey pixels, then two reddish ones that share their chrominance.
    let halved = vec![50, 90, 128, 128, 100, 60, 128, 168];
    let path = dicoms.native(form(1, 4, "YBR_FULL_422", 8), [], halved);
    let decoded = decode_image(&path, &plain(1, 4)).unwrap().values;
    let red = [50.0, 90.0, 156.0, 116.0].map(|level| level / 255.0);
    assert_close(&decoded[..4], &red, 1e-6, "halved, red");
    let green = [50.0, 90.0, 71.0, 31.0].map(|level| level / 255.0);
    assert_close(&decoded[4..8], &green, 1e-6, "halved, green");
}

#[test]
fn dicom_padding_is_black_and_outside_the_range() {
    let dicoms = Dicoms::new();
    let pixels = |values: [i16; 4]| {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    };
    let signed = |interpretation| {
        let mut form = form(2, 2, interpretation, 16);
        form.push(words(tags::PIXEL_REPRESENTATION, 1));
        form
    };
    for interpretation in ["MONOCHROME2", "MONOCHROME1"] {
        // −2000 written as an unsigned word, as some do.
        let padding = [words(tags::PIXEL_PADDING_VALUE, 63_536)];
        let path = dicoms.native(signed(interpretation), padding, pixels([-2000, 0, 100, 50]));
        let expected = match interpretation {
            "MONOCHROME1" => [0.0, 255.0, 0.0, 127.5],
            _ => [0.0, 0.0, 255.0, 127.5],
        };
        assert_close(&levels(&path, 2, 2), &expected, 1e-3, interpretation);
    }
    let padding = [words(tags::PIXEL_PADDING_VALUE, 7)];
    let path = dicoms.native(signed("MONOCHROME2"), padding, pixels([7; 4]));
    assert!(message(&path, &plain(2, 2)).contains("padding"));
}

#[test]
fn dicom_bits_may_stand_high_in_their_words() {
    let dicoms = Dicoms::new();
    let shifted = [words(tags::BITS_STORED, 12), words(tags::HIGH_BIT, 15)];
    let values = [0u16, 4095 << 4 | 7, 2048 << 4, 1024 << 4];
    let bytes = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let path = dicoms.native(form(2, 2, "MONOCHROME2", 16), shifted, bytes);
    let expected = [0.0, 255.0, 2048.0 / 4095.0 * 255.0, 1024.0 / 4095.0 * 255.0];
    assert_close(&levels(&path, 2, 2), &expected, 1e-3, "shifted");
}

/// Lossless JPEG (ITU-T T.81, H) with the left neighbour as predictor, all codes of five bits.
fn lossless_jpeg(pixels: &[u16], rows: usize, columns: usize, bits: u8) -> Vec<u8> {
    let mut stream = vec![0xFF, 0xD8, 0xFF, 0xC3, 0, 11, bits];
    stream.extend((rows as u16).to_be_bytes());
    stream.extend((columns as u16).to_be_bytes());
    stream.extend([1, 1, 0x11, 0, 0xFF, 0xC4, 0, 36, 0]);
    stream.extend([0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    stream.extend(0..=16);
    stream.extend([0xFF, 0xDA, 0, 8, 1, 1, 0, 1, 0, 0]);
    let mut code = String::new();
    for (at, &pixel) in pixels.iter().enumerate() {
        let prediction = match (at / columns, at % columns) {
            (0, 0) => 1 << (bits - 1),
            (_, 0) => pixels[at - columns],
            _ => pixels[at - 1],
        };
        let difference = i32::from(pixel) - i32::from(prediction);
        let length = (32 - difference.unsigned_abs().leading_zeros()) as usize;
        code += &format!("{length:05b}");
        if length > 0 {
            let low = if difference < 0 { (1 << length) - 1 } else { 0 };
            code += &format!("{:0length$b}", difference + low);
        }
    }
    while !code.len().is_multiple_of(8) {
        code.push('1');
    }
    for byte in code.as_bytes().chunks(8) {
        let byte = u8::from_str_radix(str::from_utf8(byte).unwrap(), 2).unwrap();
        stream.push(byte);
        if byte == 0xFF {
            stream.push(0);
        }
    }
    stream.extend([0xFF, 0xD9]);
    if stream.len() % 2 == 1 {
        stream.push(0);
    }
    stream
}

#[test]
fn dicom_frames_are_found_in_their_fragments() {
    let dicoms = Dicoms::new();
    let frames: Vec<Vec<u16>> = (0..3)
        .map(|frame| (0..20).map(|at| (at * 97 + frame * 1111) % 4096).collect())
        .collect();
    let mut form = form(4, 5, "MONOCHROME2", 16);
    form.push(words(tags::BITS_STORED, 12));
    form.push(words(tags::HIGH_BIT, 11));
    form.push(text(tags::NUMBER_OF_FRAMES, VR::IS, "3"));
    form.push(text(tags::WINDOW_CENTER, VR::DS, "2048"));
    form.push(text(tags::WINDOW_WIDTH, VR::DS, "4096"));
    let streams: Vec<Vec<u8>> = frames
        .iter()
        .map(|frame| lossless_jpeg(frame, 4, 5, 12))
        .collect();
    // Two fragments a frame.
    let halves: Vec<Vec<u8>> = streams
        .iter()
        .flat_map(|stream| [stream[..20].to_vec(), stream[20..].to_vec()])
        .collect();
    let mut offsets = vec![0];
    for stream in &streams[..2] {
        offsets.push(offsets[offsets.len() - 1] + stream.len() as u32 + 16);
    }
    let bytes = frames
        .iter()
        .flatten()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let jpeg = uids::JPEG_LOSSLESS_SV1;
    let files: [(&str, InMemElement); 4] = [
        (uids::EXPLICIT_VR_LITTLE_ENDIAN, native(bytes)),
        (jpeg, encapsulated(Vec::new(), streams)),
        (jpeg, encapsulated(Vec::new(), halves.clone())),
        (jpeg, encapsulated(offsets, halves)),
    ];
    for (number, (syntax, pixels)) in files.into_iter().enumerate() {
        let path = dicoms.write(syntax, form.clone(), [pixels]);
        for (index, frame) in frames.iter().enumerate() {
            let options = ImageOptions {
                frame: ImagePosition::Index(index),
                ..plain(4, 5)
            };
            let decoded = decode_image(&path, &options).unwrap();
            let expected: Vec<f32> = frame
                .iter()
                .map(|&value| f32::from(value) / 4095.0)
                .collect();
            assert_close(
                &decoded.values[..20],
                &expected,
                1e-6,
                &format!("{number}, {index}"),
            );
        }
        let middle = ImageOptions {
            frame: ImagePosition::Middle,
            ..plain(4, 5)
        };
        let second = ImageOptions {
            frame: ImagePosition::Index(1),
            ..plain(4, 5)
        };
        assert_eq!(
            decode_image(&path, &middle).unwrap(),
            decode_image(&path, &second).unwrap()
        );
        let beyond = ImageOptions {
            frame: ImagePosition::Index(3),
            ..plain(4, 5)
        };
        assert!(message(&path, &beyond).contains("3 frames"));
    }
}

#[test]
fn dicoms_that_are_not_read_say_why() {
    let dicoms = Dicoms::new();
    let grey = || form(2, 2, "MONOCHROME2", 8);
    let said = |path: PathBuf| message(&path, &plain(2, 2));

    let stream = encapsulated(Vec::new(), vec![vec![0; 8]]);
    let path = dicoms.write(uids::JPEGLS_LOSSLESS, grey(), [stream]);
    assert!(said(path).contains("JPEG-LS"));
    assert!(
        said(dicoms.write(uids::EXPLICIT_VR_LITTLE_ENDIAN, grey(), []))
            .contains("without pixel data")
    );
    let pixels = || native(vec![1, 2, 3, 4]);
    let hue = [
        text(tags::PHOTOMETRIC_INTERPRETATION, VR::CS, "HSV"),
        pixels(),
    ];
    assert!(
        said(dicoms.write(uids::EXPLICIT_VR_LITTLE_ENDIAN, grey(), hue)).contains("photometric")
    );
    let none = [words(tags::ROWS, 0), pixels()];
    assert!(said(dicoms.write(uids::EXPLICIT_VR_LITTLE_ENDIAN, grey(), none)).contains("0 rows"));
    let twelve = [words(tags::BITS_ALLOCATED, 12), pixels()];
    assert!(
        said(dicoms.write(uids::EXPLICIT_VR_LITTLE_ENDIAN, grey(), twelve))
            .contains("8 of 12 bits")
    );
    let short = [words(tags::ROWS, 3), pixels()];
    assert!(
        said(dicoms.write(uids::EXPLICIT_VR_LITTLE_ENDIAN, grey(), short)).contains("truncated")
    );
    // A stream of another size than the data set says.
    let stream = lossless_jpeg(&[1, 2, 3, 4, 5, 6], 2, 3, 8);
    let path = dicoms.write(
        uids::JPEG_LOSSLESS_SV1,
        grey(),
        [encapsulated(Vec::new(), vec![stream])],
    );
    assert!(said(path).contains("do not decode to 2 × 2 pixels"));
}

#[test]
fn stored_bits_become_values() {
    let header = Header {
        rows: 1,
        columns: 1,
        frames: 1,
        channels: 1,
        interpretation: "MONOCHROME2".to_string(),
        is_planar: false,
        is_signed: true,
        bits_allocated: 16,
        bits_stored: 12,
        high_bit: 11,
    };
    assert_eq!(header.value(0xFFFF), -1.0);
    assert_eq!(header.value(0x0800), -2048.0);
    let unsigned = Header {
        is_signed: false,
        ..header
    };
    assert_eq!(unsigned.value(0xFFFF), 4095.0);
    assert_eq!(unsigned.white(), 4095.0);
}
