//! PNG and JPEG: as many bits as the file has, upright, without alpha.

use std::io::{BufReader, Cursor, Read};
use std::path::Path;

use ::image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, ImageResult, Limits};

use super::jpeg::jpeg_frame;
use super::levels::{chosen_range, stretch};
use super::{ImageOptions, Picture, Planes, check_size, guarded, item_error, open, unreadable};
use crate::RecordsError;

pub(super) fn read_png(path: &Path, options: &ImageOptions) -> Result<Picture, RecordsError> {
    let broken = || {
        item_error(
            path,
            "is a truncated or corrupt PNG",
            "write the file again",
        )
    };
    let mut reader = ImageReader::with_format(BufReader::new(open(path)?), ImageFormat::Png);
    let mut limits = Limits::no_limits();
    // For the decoder's own buffers; eight bytes a pixel is the widest that PNG has.
    limits.max_alloc = Some(options.max_pixels.saturating_mul(8));
    reader.limits(limits);
    let image = guarded(|| -> Result<DynamicImage, RecordsError> {
        let decoder = reader.into_decoder().map_err(|_| broken())?;
        let (width, height) = decoder.dimensions();
        check_size(path, height as usize, width as usize, options)?;
        upright(decoder).map_err(|_| broken())
    })
    .unwrap_or_else(|| Err(broken()))?;
    picture(path, image, options)
}

pub(super) fn read_jpeg(path: &Path, options: &ImageOptions) -> Result<Picture, RecordsError> {
    let broken = || {
        item_error(
            path,
            "is a truncated or corrupt JPEG",
            "write the file again",
        )
    };
    let bytes = read_limited(path, options)?;
    let frame = jpeg_frame(&bytes).ok_or_else(broken)?;
    check_size(path, frame.height, frame.width, options)?;
    if frame.bits != 8 {
        return Err(item_error(
            path,
            format!("is a JPEG of {} bits a sample", frame.bits),
            "outside DICOM JPEGs are read with 8: convert it to PNG",
        ));
    }
    let image = guarded(|| -> Result<DynamicImage, RecordsError> {
        let decoder = ImageReader::with_format(Cursor::new(bytes), ImageFormat::Jpeg)
            .into_decoder()
            .map_err(|_| broken())?;
        upright(decoder).map_err(|_| broken())
    })
    .unwrap_or_else(|| Err(broken()))?;
    picture(path, image, options)
}

/// Decodes, and applies the EXIF orientation.
fn upright(mut decoder: impl ImageDecoder) -> ImageResult<DynamicImage> {
    let orientation = decoder.orientation()?;
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    Ok(image)
}

fn picture(
    path: &Path,
    image: DynamicImage,
    options: &ImageOptions,
) -> Result<Picture, RecordsError> {
    let (height, width) = (image.height() as usize, image.width() as usize);
    let planes = match image {
        DynamicImage::ImageLuma8(image) => Planes::Bytes(vec![image.into_raw()]),
        DynamicImage::ImageLumaA8(image) => Planes::Bytes(planes_of(&image, 2, 1, |byte| byte)),
        DynamicImage::ImageRgb8(image) => Planes::Bytes(planes_of(&image, 3, 3, |byte| byte)),
        DynamicImage::ImageRgba8(image) => Planes::Bytes(planes_of(&image, 4, 3, |byte| byte)),
        DynamicImage::ImageLuma16(image) => {
            Planes::Floats(vec![grey_16(planes_of(&image, 1, 1, f32::from), options)])
        }
        DynamicImage::ImageLumaA16(image) => {
            Planes::Floats(vec![grey_16(planes_of(&image, 2, 1, f32::from), options)])
        }
        DynamicImage::ImageRgb16(image) => Planes::Floats(planes_of(&image, 3, 3, level_of_16)),
        DynamicImage::ImageRgba16(image) => Planes::Floats(planes_of(&image, 4, 3, level_of_16)),
        _ => {
            return Err(item_error(
                path,
                "holds samples that are neither 8 nor 16 bits",
                "convert it to PNG",
            ));
        }
    };
    Ok(Picture {
        height,
        width,
        planes,
    })
}

/// The first `kept` of `channels` interleaved channels, a plane each.
fn planes_of<T: Copy, U>(
    samples: &[T],
    channels: usize,
    kept: usize,
    convert: impl Fn(T) -> U,
) -> Vec<Vec<U>> {
    (0..kept)
        .map(|channel| {
            let plane = samples.iter().skip(channel).step_by(channels);
            plane.map(|&sample| convert(sample)).collect()
        })
        .collect()
}

fn level_of_16(sample: u16) -> f32 {
    f32::from(sample) / 257.0
}

fn grey_16(mut planes: Vec<Vec<f32>>, options: &ImageOptions) -> Vec<f32> {
    let mut plane = planes.swap_remove(0);
    // Integers all, so that there is a range.
    let range = chosen_range(&plane, options).unwrap_or((0.0, f64::from(u16::MAX)));
    stretch(&mut plane, range);
    plane
}

/// A whole file, which may not be larger than an image of `max_pixels` could reasonably be.
fn read_limited(path: &Path, options: &ImageOptions) -> Result<Vec<u8>, RecordsError> {
    let limit = options.max_pixels.saturating_mul(8).saturating_add(1 << 26);
    let mut bytes = Vec::new();
    let read = open(path)?.take(limit + 1).read_to_end(&mut bytes);
    read.map_err(|source| unreadable(path, &source))?;
    if bytes.len() as u64 > limit {
        return Err(item_error(
            path,
            format!("is larger than {limit} bytes"),
            "raise `max_pixels` where memory allows",
        ));
    }
    Ok(bytes)
}
