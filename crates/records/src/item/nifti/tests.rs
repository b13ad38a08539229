//! Volumes written here byte by byte; those of `image_tests.rs` are written by nibabel.

use std::fs;

use tempfile::TempDir;

use super::*;
use crate::item::image::tests::{assert_close, message, plain};
use crate::item::image::{ImagePosition, ImageWindow, decode_image};

/// A NIfTI-1 file of floats, with an identity `sform`.
fn nifti_1(shape: &[i16], values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; 352];
    bytes[..4].copy_from_slice(&348i32.to_le_bytes());
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(40, &(shape.len() as i16).to_le_bytes());
    for (place, length) in shape.iter().enumerate() {
        put(42 + 2 * place, &length.to_le_bytes());
    }
    put(70, &16i16.to_le_bytes());
    put(108, &352f32.to_le_bytes());
    put(254, &1i16.to_le_bytes());
    for axis in 0..3 {
        put(280 + 20 * axis, &1f32.to_le_bytes());
    }
    put(344, b"n+1\0");
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

#[test]
fn nifti_slices_are_turned_scaled_and_checked() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("volume");
    let write = |bytes: &[u8]| fs::write(&path, bytes).unwrap();
    // 3 × 2 × 2, whose axes run to the right, the front and the head.
    let values: Vec<f32> = (0..12).map(|at| at as f32).collect();
    let good = nifti_1(&[3, 2, 2], &values);
    write(&good);
    let seen = |options: &ImageOptions| {
        let values = decode_image(&path, options).unwrap().values;
        values[..options.height * options.width].to_vec()
    };
    let axial = ImageOptions {
        slice: ImagePosition::Index(1),
        ..plain(2, 3)
    };
    // Right to left, front to back: 11 first.
    assert_close(
        &seen(&axial),
        &[1.0, 0.8, 0.6, 0.4, 0.2, 0.0],
        1e-6,
        "axial",
    );
    let window = ImageOptions {
        window: Some(ImageWindow {
            centre: 8.0,
            width: 4.0,
        }),
        ..axial.clone()
    };
    assert_close(
        &seen(&window),
        &[1.0, 1.0, 0.75, 0.5, 0.25, 0.0],
        1e-6,
        "window",
    );
    let sagittal = ImageOptions {
        plane: ImagePlane::Sagittal,
        slice: ImagePosition::Index(2),
        ..plain(2, 2)
    };
    // Of 2, 5, 8, 11: head on top, front on the left.
    assert_close(
        &seen(&sagittal),
        &[1.0, 2.0 / 3.0, 1.0 / 3.0, 0.0],
        1e-6,
        "sagittal",
    );

    // Scaling by −1 turns black to white.
    let mut scaled = good.clone();
    scaled[112..116].copy_from_slice(&(-1f32).to_le_bytes());
    scaled[116..120].copy_from_slice(&100f32.to_le_bytes());
    write(&scaled);
    assert_close(
        &seen(&axial),
        &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
        1e-6,
        "scaled",
    );

    let mut holes = values.clone();
    holes[11] = f32::NAN;
    holes[10] = f32::INFINITY;
    write(&nifti_1(&[3, 2, 2], &holes));
    assert_close(
        &seen(&axial),
        &[0.0, 1.0, 1.0, 2.0 / 3.0, 1.0 / 3.0, 0.0],
        1e-6,
        "holes",
    );
    write(&nifti_1(&[3, 2, 2], &[f32::NAN; 12]));
    assert!(message(&path, &axial).contains("no finite value"));
    write(&nifti_1(&[3, 2, 2], &[5.0; 12]));
    assert_eq!(seen(&axial), [0.0; 6]);

    write(&nifti_1(&[3, 2], &values[..6]));
    assert_close(
        &seen(&ImageOptions {
            slice: ImagePosition::Middle,
            ..axial.clone()
        }),
        &[1.0, 0.8, 0.6, 0.4, 0.2, 0.0],
        1e-6,
        "flat",
    );
    assert!(message(&path, &axial).contains("1 slices"));
    write(&good);
    assert!(
        message(
            &path,
            &ImageOptions {
                volume: 1,
                ..axial.clone()
            }
        )
        .contains("1 volumes")
    );
    write(&good[..good.len() - 1]);
    assert!(message(&path, &axial).contains("truncated"));
    write(&nifti_1(&[3, 0, 2], &[]));
    assert!(message(&path, &axial).contains("0 rows"));
    write(&nifti_1(&[3, -2, 2], &values));
    assert!(message(&path, &axial).contains("0 rows"));
    for (at, bytes, said) in [
        (70, &128i16.to_le_bytes()[..], "type 128"),
        (344, b"ni1\0", "pair"),
        (108, &100f32.to_le_bytes(), "corrupt"),
        (40, &9i16.to_le_bytes(), "corrupt"),
    ] {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        write(&bad);
        assert!(message(&path, &axial).contains(said), "{said}");
    }
    let mut endless = good.clone();
    endless[112..116].copy_from_slice(&1f32.to_le_bytes());
    endless[116..120].copy_from_slice(&f32::NAN.to_le_bytes());
    write(&endless);
    assert!(message(&path, &axial).contains("scl_inter"));
}
