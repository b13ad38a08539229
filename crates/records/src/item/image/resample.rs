//! Resizing a plane exactly as Pillow does, so that a pretrained encoder sees the pixels it was
//! trained on.
//!
//! Pillow resamples with two passes, along the rows and along the columns. An output sample is the
//! weighted mean of the input samples under a filter that is stretched by the scale when the image
//! shrinks (antialiasing) and cut off at the edges. Bytes are weighted in fixed point with 22
//! fractional bits and rounded and clipped after each pass; floats are summed in f64 and never
//! clipped (`libImaging/Resample.c` of Pillow 13).

use std::f64::consts::PI;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The filter of a resize, named as Pillow names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageFilter {
    /// The triangle, 2 in `resample` of a preprocessor; ViT's.
    #[default]
    Bilinear,
    /// Catmull–Rom (a = −0.5), 3; CLIP's and SigLIP's.
    Bicubic,
    /// The sinc windowed by a sinc over three lobes, 1.
    Lanczos,
}

impl ImageFilter {
    /// How far the filter reaches to each side, in samples of an unscaled image.
    fn reach(self) -> f64 {
        match self {
            ImageFilter::Bilinear => 1.0,
            ImageFilter::Bicubic => 2.0,
            ImageFilter::Lanczos => 3.0,
        }
    }

    fn at(self, distance: f64) -> f64 {
        let x = distance.abs();
        match self {
            ImageFilter::Bilinear => (1.0 - x).max(0.0),
            ImageFilter::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            ImageFilter::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
            ImageFilter::Bicubic => 0.0,
            // The window is closed on the left, as Pillow's.
            ImageFilter::Lanczos if (-3.0..3.0).contains(&distance) => sinc(x) * sinc(x / 3.0),
            ImageFilter::Lanczos => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        1.0
    } else {
        (x * PI).sin() / (x * PI)
    }
}

/// What is kept of a resized axis: the axis is scaled from `from` to `to` samples, and of those the
/// samples `keep` are computed.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    pub from: usize,
    pub to: usize,
    pub keep: Range<usize>,
}

/// A kind of sample that can be resampled.
pub(super) trait Sample: Copy {
    type Weight: Copy;
    type Sum: Copy;
    /// What a sum starts from.
    const START: Self::Sum;
    fn weight(weight: f64) -> Self::Weight;
    fn add(sum: Self::Sum, sample: Self, weight: Self::Weight) -> Self::Sum;
    fn finish(sum: Self::Sum) -> Self;
}

/// Fractional bits of a byte's weight: 32, less 8 for the sample and 2 for filters that overshoot.
const FRACTION_BITS: u32 = 22;

impl Sample for u8 {
    type Weight = i32;
    type Sum = i32;
    /// One half, so that cutting the fraction off rounds.
    const START: i32 = 1 << (FRACTION_BITS - 1);

    fn weight(weight: f64) -> i32 {
        let scaled = weight * f64::from(1 << FRACTION_BITS);
        (scaled + if weight < 0.0 { -0.5 } else { 0.5 }) as i32
    }

    fn add(sum: i32, sample: u8, weight: i32) -> i32 {
        sum + i32::from(sample) * weight
    }

    fn finish(sum: i32) -> u8 {
        (sum >> FRACTION_BITS).clamp(0, 255) as u8
    }
}

impl Sample for f32 {
    type Weight = f64;
    type Sum = f64;
    const START: f64 = 0.0;

    fn weight(weight: f64) -> f64 {
        weight
    }

    fn add(sum: f64, sample: f32, weight: f64) -> f64 {
        sum + f64::from(sample) * weight
    }

    fn finish(sum: f64) -> f32 {
        sum as f32
    }
}

/// Resizes a plane `[rows.from, columns.from]` and gives `[rows.keep, columns.keep]` of the result.
///
/// An axis that keeps its length is not filtered. No length may be 0, and what is kept must lie
/// inside the resized axis.
pub(super) fn resample<S: Sample>(
    plane: &[S],
    rows: &Axis,
    columns: &Axis,
    filter: ImageFilter,
) -> Vec<S> {
    let vertical = Taps::<S>::new(rows, filter);
    let horizontal = Taps::<S>::new(columns, filter);
    let whole = Part {
        samples: plane,
        width: columns.from,
        first_row: 0,
        first_column: 0,
    };
    // Bytes are rounded between the passes, so that their order is seen in the result. Only what
    // the second pass reads goes through the first.
    if goes_down_first(rows, columns) {
        let read = horizontal.reads();
        let shortened = vertical.down(&whole, read.clone());
        let part = Part {
            samples: &shortened,
            width: read.len(),
            first_row: 0,
            first_column: read.start,
        };
        horizontal.across(&part, 0..rows.keep.len())
    } else {
        let read = vertical.reads();
        let narrowed = horizontal.across(&whole, read.clone());
        let part = Part {
            samples: &narrowed,
            width: columns.keep.len(),
            first_row: read.start,
            first_column: 0,
        };
        vertical.down(&part, 0..columns.keep.len())
    }
}

/// Whether columns are filtered before rows: since Pillow 13 where that saves work, before it
/// never.
fn goes_down_first(rows: &Axis, columns: &Axis) -> bool {
    let lost = |axis: &Axis| axis.from as i64 - axis.to as i64;
    lost(rows) > 0 && lost(rows) > 2 * lost(columns)
}

/// Part of a plane, row by row, and where in the plane it begins.
struct Part<'a, S> {
    samples: &'a [S],
    width: usize,
    first_row: usize,
    first_column: usize,
}

impl<S: Copy> Part<'_, S> {
    fn row(&self, row: usize) -> &[S] {
        let start = (row - self.first_row) * self.width;
        &self.samples[start..start + self.width]
    }
}

/// The weights of an axis' kept samples.
struct Taps<S: Sample> {
    identity: bool,
    windows: Vec<Window>,
    /// Of all windows, one after the other.
    weights: Vec<S::Weight>,
    /// The output samples wanted, which are also the input samples where the axis keeps its length.
    kept: Range<usize>,
}

/// The input samples that make one output sample.
struct Window {
    first: usize,
    /// Where its weights stand among those of the axis.
    weights: Range<usize>,
}

impl<S: Sample> Taps<S> {
    fn new(axis: &Axis, filter: ImageFilter) -> Taps<S> {
        let mut taps = Taps {
            identity: axis.from == axis.to,
            windows: Vec::new(),
            weights: Vec::new(),
            kept: axis.keep.clone(),
        };
        if taps.identity {
            return taps;
        }
        let scale = axis.from as f64 / axis.to as f64;
        // A filter narrower than a sample would skip some, so an enlarged image keeps its width.
        let stretch = scale.max(1.0);
        let reach = filter.reach() * stretch;
        let mut window = Vec::new();
        for output in axis.keep.clone() {
            let centre = (output as f64 + 0.5) * scale;
            let first = (centre - reach + 0.5).max(0.0) as usize;
            let end = ((centre + reach + 0.5) as usize).min(axis.from);
            window.clear();
            window.extend(
                (first..end)
                    .map(|input| filter.at((input as f64 - centre + 0.5) * (1.0 / stretch))),
            );
            let total: f64 = window.iter().sum();
            let start = taps.weights.len();
            taps.weights.extend(
                window
                    .iter()
                    .map(|&weight| S::weight(if total == 0.0 { weight } else { weight / total })),
            );
            taps.windows.push(Window {
                first,
                weights: start..taps.weights.len(),
            });
        }
        taps
    }

    /// Filters along the rows given.
    fn across(&self, part: &Part<S>, rows: Range<usize>) -> Vec<S> {
        let mut filtered = Vec::with_capacity(rows.len() * self.kept.len());
        for row in rows {
            let line = part.row(row);
            if self.identity {
                let (start, end) = (self.kept.start, self.kept.end);
                filtered
                    .extend_from_slice(&line[start - part.first_column..end - part.first_column]);
                continue;
            }
            filtered.extend(self.windows.iter().map(|window| {
                let weights = &self.weights[window.weights.clone()];
                let samples = &line[window.first - part.first_column..][..weights.len()];
                let sum = samples
                    .iter()
                    .zip(weights)
                    .fold(S::START, |sum, (&sample, &weight)| {
                        S::add(sum, sample, weight)
                    });
                S::finish(sum)
            }));
        }
        filtered
    }

    /// Filters along the columns given.
    fn down(&self, part: &Part<S>, columns: Range<usize>) -> Vec<S> {
        let mut filtered = Vec::with_capacity(self.kept.len() * columns.len());
        if self.identity {
            for row in self.kept.clone() {
                filtered.extend_from_slice(&part.row(row)[columns.clone()]);
            }
            return filtered;
        }
        let mut sums = vec![S::START; columns.len()];
        for window in &self.windows {
            sums.fill(S::START);
            for (row, &weight) in (window.first..).zip(&self.weights[window.weights.clone()]) {
                for (sum, &sample) in sums.iter_mut().zip(&part.row(row)[columns.clone()]) {
                    *sum = S::add(*sum, sample, weight);
                }
            }
            filtered.extend(sums.iter().map(|&sum| S::finish(sum)));
        }
        filtered
    }

    /// The input samples that any window reads.
    fn reads(&self) -> Range<usize> {
        if self.identity {
            return self.kept.clone();
        }
        let first = self.windows.first().map_or(0, |window| window.first);
        let end = self
            .windows
            .last()
            .map_or(first, |window| window.first + window.weights.len());
        first..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(from: usize, to: usize) -> Axis {
        Axis {
            from,
            to,
            keep: 0..to,
        }
    }

    #[test]
    fn a_crop_is_part_of_the_whole() {
        let plane: Vec<u8> = (0..23 * 31).map(|at| (at * 37 % 251) as u8).collect();
        for (height, width) in [
            (9, 14),
            (40, 60),
            (23, 14),
            (9, 31),
            (7, 30),
            (7, 40),
            (23, 31),
        ] {
            for filter in [
                ImageFilter::Bilinear,
                ImageFilter::Bicubic,
                ImageFilter::Lanczos,
            ] {
                let rows = whole(23, height);
                let columns = whole(31, width);
                let all = resample(&plane, &rows, &columns, filter);
                let (top, left) = (2..6, 3..12);
                let part = resample(
                    &plane,
                    &Axis {
                        keep: top.clone(),
                        ..rows
                    },
                    &Axis {
                        keep: left.clone(),
                        ..columns
                    },
                    filter,
                );
                let expected: Vec<u8> = top
                    .flat_map(|row| all[row * width..][left.clone()].to_vec())
                    .collect();
                assert_eq!(part, expected, "{filter:?} to {height}×{width}");
            }
        }
    }

    #[test]
    fn a_constant_stays_constant() {
        for filter in [
            ImageFilter::Bilinear,
            ImageFilter::Bicubic,
            ImageFilter::Lanczos,
        ] {
            let bytes = resample(&[200u8; 11 * 7], &whole(11, 5), &whole(7, 20), filter);
            assert!(bytes.iter().all(|&sample| sample == 200), "{filter:?}");
            let floats = resample(&[0.25f32; 11 * 7], &whole(11, 5), &whole(7, 20), filter);
            assert!(floats.iter().all(|&sample| (sample - 0.25).abs() < 1e-6));
        }
    }

    #[test]
    fn one_sample_fills_any_size() {
        let enlarged = resample(&[9u8], &whole(1, 4), &whole(1, 3), ImageFilter::Lanczos);
        assert_eq!(enlarged, [9; 12]);
    }
}
