//! Images against what Transformers, Pillow, pydicom and nibabel make of them (the fixtures of
//! `scripts/references/images.py`), files written here, and damage.

use std::fs;
use std::path::PathBuf;

use ::image::{DynamicImage, GrayImage, ImageBuffer, ImageFormat, Luma, LumaA, Rgb, Rgba};
use proptest::prelude::*;
use serde_json::Value;
use tempfile::TempDir;

use super::*;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/image")
}

fn cases(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(fixtures().join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Options that give the grey levels 0…1 themselves.
pub(in crate::item) fn plain(height: usize, width: usize) -> ImageOptions {
    ImageOptions {
        height,
        width,
        mean: [0.0; 3],
        std: [1.0; 3],
        ..ImageOptions::default()
    }
}

/// A case's options, and [`plain`] where it is silent.
fn options_of(case: &Value) -> ImageOptions {
    let mut keys = serde_json::to_value(plain(1, 1)).unwrap();
    for (key, value) in case["options"].as_object().unwrap() {
        keys[key] = value.clone();
    }
    serde_json::from_value(keys).unwrap()
}

#[track_caller]
pub(in crate::item) fn assert_close(values: &[f32], expected: &[f32], tolerance: f64, case: &str) {
    assert_eq!(values.len(), expected.len(), "{case}");
    for (at, (value, expected)) in values.iter().zip(expected).enumerate() {
        let difference = f64::from(value - expected).abs();
        assert!(
            difference <= tolerance,
            "{case}, {at}: {value}, not {expected}"
        );
    }
}

/// Grey levels 0…255 of an image of this size, first channel.
pub(in crate::item) fn levels(path: &Path, height: usize, width: usize) -> Vec<f32> {
    let decoded = decode_image(path, &plain(height, width)).unwrap();
    assert_eq!(decoded.shape, [3, height, width]);
    let plane = &decoded.values[..height * width];
    plane.iter().map(|level| level * 255.0).collect()
}

/// The message for a file, which names it and nobody in it.
#[track_caller]
pub(in crate::item) fn message(path: &Path, options: &ImageOptions) -> String {
    let error = decode_image(path, options).unwrap_err();
    assert!(matches!(error, RecordsError::Item { .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains(path.to_str().unwrap()), "{message}");
    assert!(!message.contains("Nobody"), "{message}");
    message
}

#[test]
fn processors_do_what_those_of_transformers_do() {
    for case in cases("processors.json") {
        let options = ImageOptions::from_preprocessor(&case["preprocessor"].to_string()).unwrap();
        let file = case["file"].as_str().unwrap();
        let decoded = decode_image(&fixtures().join(file), &options).unwrap();
        assert_eq!(serde_json::json!(decoded.shape), case["shape"]);
        let tolerance = case["tolerance"].as_f64().unwrap();
        let name = format!("{file} {}", case["preprocessor"]);
        assert_close(&decoded.values, &floats(&case["values"]), tolerance, &name);
    }
}

#[test]
fn sixteen_bits_are_resized_as_pillow_resizes_floats() {
    for case in cases("floats.json") {
        let options = options_of(&case);
        let path = fixtures().join(case["file"].as_str().unwrap());
        let decoded = decode_image(&path, &options).unwrap();
        let expected = floats(&case["values"]).repeat(3);
        assert_close(
            &decoded.values,
            &expected,
            1e-6,
            &case["options"].to_string(),
        );
    }
}

#[test]
fn slices_are_those_of_pydicom_and_nibabel() {
    for case in cases("slices.json") {
        let file = case["file"].as_str().unwrap();
        let decoded = decode_image(&fixtures().join(file), &options_of(&case)).unwrap();
        let planes: Vec<Vec<f32>> = serde_json::from_value(case["planes"].clone()).unwrap();
        let expected = if planes.len() == 1 {
            planes[0].repeat(3)
        } else {
            planes.concat()
        };
        let tolerance = case["tolerance"].as_f64().unwrap();
        let name = format!("{file} {}", case["options"]);
        assert_close(&decoded.values, &expected, tolerance, &name);
    }
}

#[test]
fn pngs_of_every_depth_are_read() {
    let folder = TempDir::new().unwrap();
    let save = |name: &str, image: DynamicImage| {
        let path = folder.path().join(name);
        image.save_with_format(&path, ImageFormat::Png).unwrap();
        path
    };
    let grey = GrayImage::from_raw(3, 2, vec![0, 50, 100, 150, 200, 255]).unwrap();
    let path = save("no-extension", grey.into());
    assert_close(
        &levels(&path, 2, 3),
        &[0.0, 50.0, 100.0, 150.0, 200.0, 255.0],
        1e-4,
        "grey",
    );

    let wide = ImageBuffer::<Luma<u16>, _>::from_raw(2, 2, vec![0, 257, 25_700, 65_535]).unwrap();
    let path = save("wide.jpg", wide.into());
    assert_close(
        &levels(&path, 2, 2),
        &[0.0, 1.0, 100.0, 255.0],
        1e-4,
        "16 bits",
    );
    let window = ImageOptions {
        window: Some(ImageWindow {
            centre: 12_850.0,
            width: 25_700.0,
        }),
        ..plain(2, 2)
    };
    let decoded = decode_image(&path, &window).unwrap();
    assert_close(
        &decoded.values[..4],
        &[0.0, 0.01, 1.0, 1.0],
        1e-6,
        "16 bits, window",
    );

    let alpha = ImageBuffer::<LumaA<u16>, _>::from_raw(2, 1, vec![514, 9, 771, 65_535]).unwrap();
    assert_close(
        &levels(&save("alpha", alpha.into()), 1, 2),
        &[2.0, 3.0],
        1e-4,
        "alpha",
    );

    let colour = ImageBuffer::<Rgb<u16>, _>::from_raw(1, 1, vec![257, 514, 65_535]).unwrap();
    let path = save("colour", colour.into());
    let values = decode_image(&path, &plain(1, 1)).unwrap().values;
    assert_close(
        &values,
        &[1.0 / 255.0, 2.0 / 255.0, 1.0],
        1e-6,
        "16-bit colour",
    );
    let clear = ImageBuffer::<Rgba<u16>, _>::from_raw(1, 1, vec![257, 514, 65_535, 0]).unwrap();
    let path = save("clear", clear.into());
    assert_eq!(decode_image(&path, &plain(1, 1)).unwrap().values, values);
}

#[test]
fn a_constant_image_is_an_image() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("flat.png");
    GrayImage::from_pixel(40, 30, Luma([7]))
        .save(&path)
        .unwrap();
    let decoded = decode_image(&path, &ImageOptions::default()).unwrap();
    assert_eq!(decoded.shape, [3, 224, 224]);
    let expected = (7.0f64 / 255.0) as f32;
    assert!(
        decoded
            .values
            .iter()
            .all(|&value| value == (expected - 0.5) / 0.5)
    );
}

#[test]
fn options_are_written_and_read_back() {
    let options = ImageOptions {
        slice: ImagePosition::Index(4),
        window: Some(ImageWindow {
            centre: 40.0,
            width: 400.0,
        }),
        resize: ImageResize::ShortestEdgeThenCentreCrop,
        filter: ImageFilter::Lanczos,
        plane: ImagePlane::Coronal,
        ..ImageOptions::default()
    };
    let text = serde_json::to_string(&options).unwrap();
    assert_eq!(
        serde_json::from_str::<ImageOptions>(&text).unwrap(),
        options
    );
    let read = |text| serde_json::from_str::<ImageOptions>(text);
    let middle =
        read(r#"{"frame": "middle", "resize": "shortest_edge_then_centre_crop"}"#).unwrap();
    assert_eq!(middle.frame, ImagePosition::Middle);
    assert_eq!(read("{}").unwrap(), ImageOptions::default());
    for wrong in [
        r#"{"frame": "last"}"#,
        r#"{"slice": -1}"#,
        r#"{"hight": 3}"#,
    ] {
        assert!(read(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn senseless_options_are_refused() {
    let good = ImageOptions::default;
    let cases = [
        (
            "`height`",
            ImageOptions {
                height: 0,
                ..good()
            },
        ),
        (
            "`max_pixels`",
            ImageOptions {
                max_pixels: 10,
                ..good()
            },
        ),
        (
            "`shortest_edge`",
            ImageOptions {
                shortest_edge: Some(223),
                ..good()
            },
        ),
        (
            "`std`",
            ImageOptions {
                std: [1.0, 0.0, 1.0],
                ..good()
            },
        ),
        (
            "`mean`",
            ImageOptions {
                mean: [f32::NAN; 3],
                ..good()
            },
        ),
        (
            "`percentiles`",
            ImageOptions {
                percentiles: Some([50.0, 50.0]),
                ..good()
            },
        ),
        (
            "`window`",
            ImageOptions {
                window: Some(ImageWindow {
                    centre: 0.0,
                    width: 0.0,
                }),
                ..good()
            },
        ),
    ];
    for (key, options) in cases {
        assert!(options.problem().unwrap().contains(key), "{key}");
        let message = message(&fixtures().join("grey.png"), &options);
        assert!(message.contains(key), "{message}");
    }
    assert_eq!(good().problem(), None);
}

#[test]
fn what_is_no_image_is_named() {
    let folder = TempDir::new().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let options = ImageOptions::default();
    let said = |path: &Path| message(path, &options);
    assert!(said(&folder.path().join("gone.png")).contains("does not exist"));
    assert!(said(folder.path()).contains("is a folder"));
    assert!(said(&write("empty.png", b"")).contains("is empty"));
    assert!(said(&write("note.png", b"a note")).contains("no image of a known kind"));
    assert!(said(&write("moving.png", b"GIF89a\x01\0")).contains("is a GIF"));
    assert!(said(&write("other.nii.gz", b"\x1f\x8b\x08\0\0")).contains("NIfTI"));
}

#[test]
fn too_many_pixels_are_refused_before_decoding() {
    let options = ImageOptions {
        max_pixels: 1_000,
        ..plain(2, 2)
    };
    for file in ["colour.png", "photo.jpg"] {
        let message = message(&fixtures().join(file), &options);
        assert!(message.contains("`max_pixels` is 1000"), "{message}");
    }
    let options = ImageOptions {
        max_pixels: 12,
        ..options
    };
    for file in [
        "explicit.dcm",
        "j2k_16.dcm",
        "volume_2.nii",
        "volume_1.nii.gz",
    ] {
        let message = message(&fixtures().join(file), &options);
        assert!(message.contains("`max_pixels` is 12"), "{message}");
    }
    // A header that names 2³¹ pixels, and nothing behind it.
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("vast.png");
    let mut bytes = fs::read(fixtures().join("grey.png")).unwrap();
    bytes[16..24].copy_from_slice(&[0, 0, 0x80, 0, 0, 1, 0, 0]);
    fs::write(&path, bytes).unwrap();
    // Its checksum is wrong now, so that it is one of the two.
    let message = message(&path, &ImageOptions::default());
    assert!(
        message.contains("`max_pixels`") || message.contains("corrupt"),
        "{message}"
    );
}

#[test]
fn half_a_file_is_an_error() {
    let folder = TempDir::new().unwrap();
    for entry in fs::read_dir(fixtures()).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let options = ImageOptions {
            slice: ImagePosition::Index(0),
            ..ImageOptions::default()
        };
        decode_image(&path, &options).unwrap();
        let half = folder.path().join(path.file_name().unwrap());
        fs::write(&half, &bytes[..bytes.len() / 2]).unwrap();
        let message = message(&half, &options);
        let known = [
            "truncated",
            "breaks off",
            "do not decode",
            "no image of a known",
        ];
        assert!(
            known.iter().any(|known| message.contains(known)),
            "{message}"
        );
    }
}

// --- damage --------------------------------------------------------------------------------------

/// Decodes bytes under several options: an error, or finite values of the shape asked for.
fn survives(path: &Path) {
    for plane in [ImagePlane::Axial, ImagePlane::Coronal, ImagePlane::Sagittal] {
        let options = ImageOptions {
            plane,
            slice: ImagePosition::Index(0),
            resize: ImageResize::ShortestEdgeThenCentreCrop,
            max_pixels: 1 << 20,
            ..plain(6, 5)
        };
        if let Ok(decoded) = decode_image(path, &options) {
            assert_eq!(decoded.shape, [3, 6, 5]);
            assert_eq!(decoded.values.len(), 90);
            assert!(decoded.values.iter().all(|value| value.is_finite()));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn random_bytes_do_not_panic(
        kind in 0usize..6,
        bytes in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let mut file = match kind {
            0 => b"\x89PNG\r\n\x1a\n".to_vec(),
            1 => vec![0xFF, 0xD8, 0xFF],
            2 => [vec![0; 128], b"DICM".to_vec()].concat(),
            3 => vec![0x1F, 0x8B, 8, 0],
            4 => [&348u32.to_le_bytes()[..], &[0; 36]].concat(),
            _ => Vec::new(),
        };
        file.extend(bytes);
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("image");
        fs::write(&path, file).unwrap();
        survives(&path);
    }

    #[test]
    fn damaged_files_do_not_panic(
        which in any::<prop::sample::Index>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        is_cut in any::<bool>(),
    ) {
        let files: Vec<PathBuf> = fs::read_dir(fixtures())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension != "json"))
            .collect();
        let mut bytes = fs::read(which.get(&files)).unwrap();
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if is_cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("image");
        fs::write(&path, bytes).unwrap();
        survives(&path);
    }
}
