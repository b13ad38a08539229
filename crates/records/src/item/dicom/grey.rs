//! From stored values to grey levels: padding, modality, window.

use std::path::Path;

use dicom_core::Tag;
use dicom_dictionary_std::tags;

use super::Header;
use super::dataset::{DataSet, ItemAt};
use crate::RecordsError;
use crate::item::image::levels::{chosen_range, full_range};
use crate::item::image::{ImageOptions, item_error};

/// Grey levels 0…255 of a monochrome frame.
pub(super) fn grey(
    path: &Path,
    mut values: Vec<f32>,
    data: &DataSet,
    header: &Header,
    frame: usize,
    options: &ImageOptions,
) -> Result<Vec<f32>, RecordsError> {
    blank_padding(&mut values, data, header);
    let table = |sequence| {
        let (descriptor, entries) = (tags::LUT_DESCRIPTOR, tags::LUT_DATA);
        Table::read(path, data, header, &[(sequence, 0)], descriptor, entries)
    };
    if let Some(table) = table(tags::MODALITY_LUT_SEQUENCE)? {
        for value in values.iter_mut().filter(|value| !value.is_nan()) {
            *value = table.at(f64::from(*value)) as f32;
        }
    } else {
        let group = tags::PIXEL_VALUE_TRANSFORMATION_SEQUENCE;
        let number = |tag| {
            let numbers = framed(data, frame, group, tag);
            numbers.first().copied().filter(|number| number.is_finite())
        };
        let slope = number(tags::RESCALE_SLOPE).unwrap_or(1.0);
        let intercept = number(tags::RESCALE_INTERCEPT).unwrap_or(0.0);
        if (slope, intercept) != (1.0, 0.0) {
            for value in &mut values {
                *value = (f64::from(*value) * slope + intercept) as f32;
            }
        }
    }
    let shown = if let Some((low, high)) = chosen_range(&values, options) {
        Shown::Range(low, high)
    } else if let Some(window) = own_window(data, frame) {
        window
    } else if let Some(table) = table(tags::VOILUT_SEQUENCE)? {
        Shown::Table(table)
    } else if let Some((low, high)) = full_range(&values) {
        Shown::Range(low, high)
    } else {
        return Err(item_error(
            path,
            "has no pixel that is more than padding",
            "leave it out of the cohort",
        ));
    };
    let is_inverted = header.interpretation == "MONOCHROME1";
    for value in &mut values {
        *value = if value.is_nan() {
            0.0
        } else {
            let level = shown.level(f64::from(*value));
            (255.0 * if is_inverted { 1.0 - level } else { level }) as f32
        };
    }
    Ok(values)
}

/// Makes the pixels outside the image NaN (PS3.3, C.7.5.1.1.2): they are black whatever is shown,
/// and say nothing about its range.
fn blank_padding(values: &mut [f32], data: &DataSet, header: &Header) {
    let stored = |tag| {
        let number = data.number(&[], tag)?;
        Some(header.as_stored(number) as f32)
    };
    let Some(padding) = stored(tags::PIXEL_PADDING_VALUE) else {
        return;
    };
    let limit = stored(tags::PIXEL_PADDING_RANGE_LIMIT).unwrap_or(padding);
    let padding = padding.min(limit)..=padding.max(limit);
    for value in values.iter_mut().filter(|value| padding.contains(value)) {
        *value = f32::NAN;
    }
}

/// The file's first window, if it has one.
fn own_window(data: &DataSet, frame: usize) -> Option<Shown> {
    let first = |tag| {
        let numbers = framed(data, frame, tags::FRAME_VOILUT_SEQUENCE, tag);
        numbers.first().copied().filter(|number| number.is_finite())
    };
    let centre = first(tags::WINDOW_CENTER)?;
    let width = first(tags::WINDOW_WIDTH)?;
    let function = place_of(
        data,
        frame,
        tags::FRAME_VOILUT_SEQUENCE,
        tags::VOILUT_FUNCTION,
    )
    .map(|place| data.text(&place, tags::VOILUT_FUNCTION));
    match function.as_deref() {
        Some("SIGMOID") if width > 0.0 => Some(Shown::Sigmoid(centre, width)),
        Some("LINEAR_EXACT") if width > 0.0 => Some(Shown::LinearExact(centre, width)),
        Some("SIGMOID" | "LINEAR_EXACT") => None,
        _ => (width >= 1.0).then_some(Shown::Linear(centre, width)),
    }
}

/// The numbers of an attribute that stands in the data set itself or, in enhanced images, in a
/// functional group of the frame or of all frames.
fn framed(data: &DataSet, frame: usize, group: Tag, tag: Tag) -> Vec<f64> {
    place_of(data, frame, group, tag)
        .map(|place| data.numbers(&place, tag))
        .unwrap_or_default()
}

fn place_of(data: &DataSet, frame: usize, group: Tag, tag: Tag) -> Option<Vec<ItemAt>> {
    let places = [
        Vec::new(),
        vec![
            (tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE, frame),
            (group, 0),
        ],
        vec![(tags::SHARED_FUNCTIONAL_GROUPS_SEQUENCE, 0), (group, 0)],
    ];
    places
        .into_iter()
        .find(|place| data.get(place, tag).is_some())
}

/// How grey values are shown (PS3.3, C.11.2).
enum Shown {
    /// From black to white.
    Range(f64, f64),
    Linear(f64, f64),
    LinearExact(f64, f64),
    Sigmoid(f64, f64),
    Table(Table),
}

impl Shown {
    /// The grey level of a value, from 0 to 1.
    fn level(&self, value: f64) -> f64 {
        match self {
            Shown::Range(low, high) if low < high => (value - low) / (high - low),
            Shown::Range(..) => 0.0,
            // C.11.2.1.2.1. The bounds come first: a window of width 1 is a threshold.
            Shown::Linear(centre, width) => {
                let (centre, half) = (centre - 0.5, (width - 1.0) / 2.0);
                if value <= centre - half {
                    0.0
                } else if value > centre + half {
                    1.0
                } else {
                    (value - centre) / (width - 1.0) + 0.5
                }
            }
            Shown::LinearExact(centre, width) => (value - centre) / width + 0.5,
            Shown::Sigmoid(centre, width) => 1.0 / (1.0 + (-4.0 * (value - centre) / width).exp()),
            Shown::Table(table) => table.at(value) / table.white,
        }
        .clamp(0.0, 1.0)
    }
}

/// A lookup table; values beyond its ends are those of its ends.
pub(super) struct Table {
    first: f64,
    entries: Vec<f64>,
    /// The largest value its bits can hold.
    pub white: f64,
}

impl Table {
    pub fn read(
        path: &Path,
        data: &DataSet,
        header: &Header,
        place: &[ItemAt],
        descriptor: Tag,
        entries: Tag,
    ) -> Result<Option<Table>, RecordsError> {
        let [count, first, bits] = data.numbers(place, descriptor)[..] else {
            return Ok(None);
        };
        // 65,536 does not fit into the 16 bits of the count.
        let count = if count == 0.0 {
            65_536
        } else {
            count as i64 as u16 as usize
        };
        let first = header.as_stored(first);
        let bytes = data
            .get(place, entries)
            .map_or(0, |element| element.bytes.len());
        let mut values = if bits <= 8.0 && (bytes == count || bytes == count + 1) {
            // Two entries a word.
            let element = data.get(place, entries);
            let bytes = element.map_or(&[][..], |element| &element.bytes[..]);
            bytes.iter().map(|&byte| f64::from(byte)).collect()
        } else {
            data.numbers(place, entries)
        };
        values.truncate(count);
        if count == 0 || values.len() < count || !(1.0..=16.0).contains(&bits) {
            return Err(item_error(
                path,
                "has a lookup table that breaks off or has none of its bits",
                "write the file again",
            ));
        }
        Ok(Some(Table {
            first,
            entries: values,
            white: f64::from(u16::MAX >> (16 - bits as u32)),
        }))
    }

    pub fn at(&self, value: f64) -> f64 {
        // A cast of a negative float is 0, and of NaN too.
        let at = ((value - self.first).round() as usize).min(self.entries.len() - 1);
        self.entries[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_those_of_the_standard() {
        // PS3.3, C.11.2.1.2.1, its example of centre 2048 and width 4096, to 0…255.
        let window = Shown::Linear(2048.0, 4096.0);
        assert_eq!(window.level(0.0), 0.0);
        assert_eq!(window.level(4095.0), 1.0);
        let middle = (1000.0 - 2047.5) / 4095.0 + 0.5;
        assert_eq!(window.level(1000.0), middle);
        let threshold = Shown::Linear(10.0, 1.0);
        assert_eq!((threshold.level(9.5), threshold.level(9.6)), (0.0, 1.0));
        let exact = Shown::LinearExact(50.0, 100.0);
        assert_eq!(
            (exact.level(-1.0), exact.level(25.0), exact.level(101.0)),
            (0.0, 0.25, 1.0)
        );
        assert_eq!(Shown::Sigmoid(10.0, 5.0).level(10.0), 0.5);
        assert_eq!(Shown::Range(3.0, 3.0).level(3.0), 0.0);
    }
}
