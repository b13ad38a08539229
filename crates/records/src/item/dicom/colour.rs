//! From samples to red, green and blue.

use std::path::Path;

use dicom_dictionary_std::tags;

use super::Header;
use super::codec::Samples;
use super::dataset::DataSet;
use super::grey::Table;
use crate::RecordsError;
use crate::item::image::{Planes, item_error};

/// Red, green and blue of indices into a palette (PS3.3, C.7.9).
pub(super) fn palette(
    path: &Path,
    indices: &[f32],
    data: &DataSet,
    header: &Header,
) -> Result<Vec<Vec<u8>>, RecordsError> {
    let missing = || {
        item_error(
            path,
            "has a palette that is segmented or missing",
            "convert it to RGB",
        )
    };
    let channels = [
        (
            tags::RED_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
            tags::RED_PALETTE_COLOR_LOOKUP_TABLE_DATA,
        ),
        (
            tags::GREEN_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
            tags::GREEN_PALETTE_COLOR_LOOKUP_TABLE_DATA,
        ),
        (
            tags::BLUE_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
            tags::BLUE_PALETTE_COLOR_LOOKUP_TABLE_DATA,
        ),
    ];
    let mut planes = Vec::new();
    for (descriptor, entries) in channels {
        if data.get(&[], entries).is_none() {
            return Err(missing());
        }
        let table =
            Table::read(path, data, header, &[], descriptor, entries)?.ok_or_else(missing)?;
        // Of 16 bits the upper 8 are shown.
        let byte = |index: &f32| {
            let entry = table.at(f64::from(*index)) as u32;
            (if table.white > 255.0 {
                entry >> 8
            } else {
                entry
            }) as u8
        };
        planes.push(indices.iter().map(byte).collect());
    }
    Ok(planes)
}

/// Red, green and blue of a frame with three samples a pixel: bytes where they are, else floats.
pub(super) fn colour(samples: Samples, header: &Header) -> Planes {
    let mut values = samples.values;
    let is_chrominance = header.interpretation.starts_with("YBR") && !samples.is_rgb;
    let white = header.white();
    let (pixels, _) = values.as_chunks_mut::<3>();
    if is_chrominance {
        // PS3.3, C.7.6.3.1.2: luminance and chrominance of ITU-R BT.601 at full range.
        let middle = (white + 1.0) / 2.0;
        for [first, second, third] in pixels.iter_mut() {
            let (luminance, blue, red) = (*first, *second - middle, *third - middle);
            *first = luminance + 1.402 * red;
            *second = luminance - 0.344_136 * blue - 0.714_136 * red;
            *third = luminance + 1.772 * blue;
        }
    }
    let pixels: &[[f32; 3]] = pixels;
    let plane = |channel: usize| {
        pixels
            .iter()
            .map(move |pixel| pixel[channel].clamp(0.0, white))
    };
    if white == 255.0 {
        let bytes = |channel| plane(channel).map(|value| value.round() as u8).collect();
        Planes::Bytes((0..3).map(bytes).collect())
    } else {
        let floats = |channel| plane(channel).map(|value| value / white * 255.0).collect();
        Planes::Floats((0..3).map(floats).collect())
    }
}
