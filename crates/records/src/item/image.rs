//! Images: PNG, JPEG, DICOM and NIfTI slices, as a pretrained vision tower expects them.
//!
//! A file is recognised by its content. What it shows is brought to the grey levels 0…255 of an
//! ordinary picture, bytes where the file holds bytes and floats where it holds more, so that one
//! path serves both: resize and crop as Pillow and Transformers do, rescale, normalise. Grey is
//! repeated to three channels; alpha is dropped, as Pillow's conversion to RGB drops it.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Decoded, dicom, nifti};
use crate::RecordsError;

pub(super) mod jpeg;
pub(super) mod levels;
mod preprocessor;
mod raster;
mod resample;

use resample::{Axis, Sample, resample};

pub use resample::ImageFilter;

/// How an image file becomes `[3, height, width]`.
///
/// The defaults are those of Transformers' `ViTImageProcessor`; a checkpoint's own come from
/// [`ImageOptions::from_preprocessor`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageOptions {
    /// Rows given to the encoder.
    pub height: usize,
    /// Columns given to the encoder.
    pub width: usize,
    pub resize: ImageResize,
    /// What the shorter edge is scaled to before the crop; the longer of `height` and `width`
    /// where left out. At least that.
    pub shortest_edge: Option<usize>,
    pub filter: ImageFilter,
    /// Factor from the grey levels 0…255 to what is normalised.
    pub rescale: f64,
    /// A channel's mean after rescaling, red, green, blue.
    pub mean: [f32; 3],
    /// A channel's standard deviation after rescaling.
    pub std: [f32; 3],
    /// The values shown from black to white, for grey images of more than 8 bits: in units of the
    /// file after its own rescaling (Hounsfield units in CT). Left out, a DICOM's own window holds.
    pub window: Option<ImageWindow>,
    /// Two percentiles of the image shown as black and white, in percent, where there is no
    /// `window`. Without either, and without a window in the file: the smallest and the largest
    /// value, for a 16-bit PNG the whole range of 16 bits.
    pub percentiles: Option<[f64; 2]>,
    /// Which frame of a DICOM with several.
    pub frame: ImagePosition,
    /// Which plane of a NIfTI volume.
    pub plane: ImagePlane,
    /// Which slice of that plane, from the left, the back or the feet.
    pub slice: ImagePosition,
    /// Which volume of a NIfTI with several, from 0.
    pub volume: usize,
    /// Images of more pixels than this are refused before they are decoded.
    pub max_pixels: u64,
}

impl Default for ImageOptions {
    fn default() -> Self {
        ImageOptions {
            height: 224,
            width: 224,
            resize: ImageResize::Exact,
            shortest_edge: None,
            filter: ImageFilter::Bilinear,
            rescale: 1.0 / 255.0,
            mean: [0.5; 3],
            std: [0.5; 3],
            window: None,
            percentiles: None,
            frame: ImagePosition::Index(0),
            plane: ImagePlane::Axial,
            slice: ImagePosition::Middle,
            volume: 0,
            max_pixels: 100_000_000,
        }
    }
}

/// How an image is brought to the encoder's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageResize {
    /// To height and width, whatever the aspect.
    #[default]
    Exact,
    /// The shorter edge to a length, the longer in proportion, then the centre is cut out.
    ShortestEdgeThenCentreCrop,
}

/// A range of values by its middle and its width, as radiology gives it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageWindow {
    pub centre: f64,
    pub width: f64,
}

impl ImageWindow {
    pub(super) fn is_usable(self) -> bool {
        self.centre.is_finite() && self.width.is_finite() && self.width > 0.0
    }
}

/// The planes of the body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImagePlane {
    /// Seen from the feet: the patient's right is on the left, the front on top.
    #[default]
    Axial,
    /// Seen from the front: the patient's right is on the left, the head on top.
    Coronal,
    /// Seen from the patient's left: the front is on the left, the head on top.
    Sagittal,
}

/// One of several frames or slices: `"middle"`, or a number from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "PositionForm", into = "PositionForm")]
pub enum ImagePosition {
    Middle,
    Index(usize),
}

impl ImagePosition {
    /// The position among `count`; `None` where it lies beyond.
    pub(super) fn among(self, count: usize) -> Option<usize> {
        let position = match self {
            ImagePosition::Middle => count / 2,
            ImagePosition::Index(index) => index,
        };
        (position < count).then_some(position)
    }
}

/// How a position is written in a recipe.
#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "a number from 0 or \"middle\"")]
enum PositionForm {
    Index(usize),
    Word(PositionWord),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PositionWord {
    Middle,
}

impl From<PositionForm> for ImagePosition {
    fn from(form: PositionForm) -> ImagePosition {
        match form {
            PositionForm::Index(index) => ImagePosition::Index(index),
            PositionForm::Word(PositionWord::Middle) => ImagePosition::Middle,
        }
    }
}

impl From<ImagePosition> for PositionForm {
    fn from(position: ImagePosition) -> PositionForm {
        match position {
            ImagePosition::Index(index) => PositionForm::Index(index),
            ImagePosition::Middle => PositionForm::Word(PositionWord::Middle),
        }
    }
}

impl ImageOptions {
    /// What is wrong with the options themselves, if anything.
    pub fn problem(&self) -> Option<&'static str> {
        let pixels = (self.height as u64).checked_mul(self.width as u64);
        let edge = self.height.max(self.width);
        let finite = |values: &[f32; 3]| values.iter().all(|value| value.is_finite());
        if self.height == 0 || self.width == 0 {
            Some("`height` and `width` must be at least 1")
        } else if pixels.is_none_or(|pixels| pixels > self.max_pixels) {
            Some("`height` times `width` is more than `max_pixels`")
        } else if self.shortest_edge.is_some_and(|length| length < edge) {
            Some("`shortest_edge` must be at least `height` and `width`: images are not padded")
        } else if !self.rescale.is_finite() || !finite(&self.mean) || !finite(&self.std) {
            Some("`rescale`, `mean` and `std` must be finite")
        } else if self.std.contains(&0.0) {
            Some("`std` may not be 0")
        } else if self.window.is_some_and(|window| !window.is_usable()) {
            Some("`window` must have a finite centre and a positive width")
        } else if self
            .percentiles
            .is_some_and(|[low, high]| !(0.0 <= low && low < high && high <= 100.0))
        {
            Some("`percentiles` must be two increasing numbers from 0 to 100")
        } else {
            None
        }
    }
}

/// Decodes an image to `[3, height, width]`, normalised as the options say.
///
/// PNG and JPEG are turned upright by their EXIF orientation, as Transformers' `load_image` does.
/// A plain image of one value is a value like any other.
///
/// # Errors
///
/// [`RecordsError::Item`] for a file that is missing, of another kind, truncated, corrupt, of no
/// pixels, of more than `max_pixels`, or without a single finite value.
pub fn decode_image(path: &Path, options: &ImageOptions) -> Result<Decoded, RecordsError> {
    if let Some(problem) = options.problem() {
        return Err(item_error(
            path,
            problem,
            "correct the options of this modality",
        ));
    }
    let picture = match kind(path)? {
        Kind::Png => raster::read_png(path, options)?,
        Kind::Jpeg => raster::read_jpeg(path, options)?,
        Kind::Dicom => dicom::read(path, options)?,
        Kind::Nifti => nifti::read(path, options)?,
    };
    Ok(picture.fit(options))
}

/// An image's pixels on the grey levels 0…255, one plane a channel, `[height, width]` each.
pub(super) struct Picture {
    pub height: usize,
    pub width: usize,
    pub planes: Planes,
}

/// One plane (grey) or three (red, green, blue).
pub(super) enum Planes {
    Bytes(Vec<Vec<u8>>),
    Floats(Vec<Vec<f32>>),
}

impl Picture {
    /// Resizes, crops, rescales and normalises.
    fn fit(&self, options: &ImageOptions) -> Decoded {
        let (rows, columns) = axes(self.height, self.width, options);
        let values = match &self.planes {
            Planes::Bytes(planes) => normalised(planes, &rows, &columns, options, f64::from),
            // An overshooting filter may not leave the range that is shown, as in bytes it cannot.
            Planes::Floats(planes) => normalised(planes, &rows, &columns, options, |level| {
                f64::from(level.clamp(0.0, 255.0))
            }),
        };
        Decoded {
            shape: vec![3, options.height, options.width],
            values,
            cut_s: 0.0,
            layout: 0,
        }
    }
}

/// The axes of the resize and what of them is kept, as Transformers computes both.
fn axes(height: usize, width: usize, options: &ImageOptions) -> (Axis, Axis) {
    let (to_height, to_width) = match options.resize {
        ImageResize::Exact => (options.height, options.width),
        ImageResize::ShortestEdgeThenCentreCrop => {
            let edge = options
                .shortest_edge
                .unwrap_or(options.height.max(options.width));
            let (short, long) = (height.min(width), height.max(width));
            let scaled = ((edge * long) as f64 / short as f64) as usize;
            if width <= height {
                (scaled, edge)
            } else {
                (edge, scaled)
            }
        }
    };
    let axis = |from: usize, to: usize, kept: usize| {
        let first = (to - kept) / 2;
        Axis {
            from,
            to,
            keep: first..first + kept,
        }
    };
    (
        axis(height, to_height, options.height),
        axis(width, to_width, options.width),
    )
}

/// `[3, height, width]` of planes; `level` gives a sample's grey level.
fn normalised<S: Sample>(
    planes: &[Vec<S>],
    rows: &Axis,
    columns: &Axis,
    options: &ImageOptions,
    level: impl Fn(S) -> f64,
) -> Vec<f32> {
    let resized: Vec<Vec<S>> = planes
        .iter()
        .map(|plane| resample(plane, rows, columns, options.filter))
        .collect();
    let mut values = Vec::with_capacity(3 * options.height * options.width);
    for channel in 0..3 {
        let plane = resized.get(channel).unwrap_or(&resized[0]);
        let (mean, std) = (options.mean[channel], options.std[channel]);
        values.extend(
            plane
                .iter()
                .map(|&sample| ((level(sample) * options.rescale) as f32 - mean) / std),
        );
    }
    values
}

enum Kind {
    Png,
    Jpeg,
    Dicom,
    Nifti,
}

/// What a file is, by its first bytes.
fn kind(path: &Path) -> Result<Kind, RecordsError> {
    let mut head = Vec::with_capacity(352);
    open(path)?
        .take(352)
        .read_to_end(&mut head)
        .map_err(|source| unreadable(path, &source))?;
    let signature =
        |at: usize, bytes: &[u8]| head.get(at..).is_some_and(|head| head.starts_with(bytes));
    if head.is_empty() {
        return Err(item_error(path, "is empty", "write the file again"));
    }
    if signature(0, b"\x89PNG\r\n\x1a\n") {
        Ok(Kind::Png)
    } else if signature(0, &[0xFF, 0xD8, 0xFF]) {
        Ok(Kind::Jpeg)
    } else if signature(128, b"DICM") {
        Ok(Kind::Dicom)
    } else if signature(0, &[0x1F, 0x8B]) || nifti::is_header(&head) {
        Ok(Kind::Nifti)
    } else {
        let known: [(&[u8], &str); 7] = [
            (b"GIF8", "a GIF"),
            (b"BM", "a BMP"),
            (b"II*\0", "a TIFF"),
            (b"MM\0*", "a TIFF"),
            (b"RIFF", "a WebP"),
            (b"\0\0\0\x0cjP", "a JPEG 2000 file"),
            (&[0xFF, 0x4F, 0xFF, 0x51], "a JPEG 2000 stream"),
        ];
        let name = known
            .iter()
            .find(|(bytes, _)| head.starts_with(bytes))
            .map_or("no image of a known kind", |(_, name)| name);
        Err(item_error(
            path,
            format!("is {name}"),
            "images are read from PNG, JPEG, DICOM (with its preamble) and NIfTI-1 or -2: convert it",
        ))
    }
}

pub(super) fn check_size(
    path: &Path,
    height: usize,
    width: usize,
    options: &ImageOptions,
) -> Result<(), RecordsError> {
    if height == 0 || width == 0 {
        return Err(item_error(
            path,
            format!("has {height} rows and {width} columns"),
            "write the file again",
        ));
    }
    let pixels = (height as u64).saturating_mul(width as u64);
    if pixels > options.max_pixels {
        return Err(item_error(
            path,
            format!(
                "has {pixels} pixels, and `max_pixels` is {}",
                options.max_pixels
            ),
            "raise `max_pixels` where memory allows, or store the image smaller",
        ));
    }
    Ok(())
}

pub(super) fn open(path: &Path) -> Result<File, RecordsError> {
    let file = File::open(path).map_err(|source| unreadable(path, &source))?;
    let is_folder = file.metadata().is_ok_and(|metadata| metadata.is_dir());
    if is_folder {
        return Err(item_error(path, "is a folder", "name one file a row"));
    }
    Ok(file)
}

pub(super) fn unreadable(path: &Path, source: &std::io::Error) -> RecordsError {
    match source.kind() {
        ErrorKind::NotFound => item_error(
            path,
            "does not exist",
            "correct the path column, or copy the file to where it points",
        ),
        ErrorKind::PermissionDenied => {
            item_error(path, "may not be read", "give yourself the permission")
        }
        ErrorKind::UnexpectedEof => item_error(path, "breaks off", "write the file again"),
        kind => item_error(
            path,
            format!("cannot be read ({kind})"),
            "write the file again",
        ),
    }
}

pub(super) fn item_error(
    path: &Path,
    problem: impl Into<String>,
    hint: &'static str,
) -> RecordsError {
    RecordsError::Item {
        path: path.to_path_buf(),
        problem: problem.into(),
        hint,
    }
}

/// Runs a decoder that was not written here. On damaged bytes it should return an error; `None`
/// where it trips over an assertion instead, so that a bad file never takes the process down.
pub(super) fn guarded<T>(decode: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(decode)).ok()
}

#[cfg(test)]
#[path = "image_tests.rs"]
pub(super) mod tests;
