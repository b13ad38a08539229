//! Images: a blob on a dark ground, written as 8-bit grey PNG.

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder, ImageError};

use super::model::{Draw, Latent};
use super::random::{Draws, Stream};

/// Width and height in pixels.
pub(super) const SIZE: usize = 32;

const GROUND: f64 = 40.0;
const PEAK: f64 = 100.0;
const PEAK_BY_BRIGHTNESS: f64 = 45.0;
/// Centres of the blob in the left and in the right half, give or take a pixel and a half.
const LEFT: f64 = 9.0;
const RIGHT: f64 = 22.0;
const JITTER: f64 = 1.5;
/// Standard deviation of the blob, in pixels.
const RADIUS: f64 = 4.0;
/// Standard deviation of a pixel, in grey levels.
const NOISE: f64 = 3.0;

/// Grey levels, row by row.
pub(super) fn pixels(seed: u64, draw: &Draw) -> Vec<u8> {
    let mut draws = Draws::of(seed, draw.subject_id, Stream::Image);
    let peak = PEAK + PEAK_BY_BRIGHTNESS * draw.value(Latent::Brightness);
    let side = if draw.value(Latent::Side) < 0.0 {
        LEFT
    } else {
        RIGHT
    };
    let centre_x = side + draws.uniform(-JITTER, JITTER);
    let centre_y = (SIZE - 1) as f64 / 2.0 + draws.uniform(-2.0 * JITTER, 2.0 * JITTER);
    // A Gaussian in two dimensions is a product of two.
    let profile = |centre: f64| -> [f64; SIZE] {
        std::array::from_fn(|at| {
            let distance = (at as f64 - centre) / RADIUS;
            (-0.5 * distance * distance).exp()
        })
    };
    let (across, down) = (profile(centre_x), profile(centre_y));
    let mut pixels = Vec::with_capacity(SIZE * SIZE);
    for y in down {
        for x in across {
            let level = GROUND + peak * x * y + NOISE * draws.noise();
            pixels.push(level.round().clamp(0.0, 255.0) as u8);
        }
    }
    pixels
}

pub(super) fn png(pixels: &[u8]) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::with_capacity(pixels.len() + 256);
    PngEncoder::new_with_quality(&mut bytes, CompressionType::Fast, FilterType::NoFilter)
        .write_image(pixels, SIZE as u32, SIZE as u32, ExtendedColorType::L8)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::model::Model;
    use super::super::options::SynthOptions;
    use super::super::testing::correlation;
    use super::*;

    #[test]
    fn brightness_and_side_can_be_read_back() {
        let model = Model::new(&SynthOptions::default());
        let (mut found, mut drawn) = (Vec::new(), Vec::new());
        for subject_id in 0..500 {
            let draw = model.draw(subject_id);
            let pixels = pixels(0, &draw);
            let above = |level: &u8| f64::from(*level) - GROUND;
            let sum: f64 = pixels.iter().map(above).sum();
            let moment: f64 = pixels
                .iter()
                .enumerate()
                .map(|(at, level)| ((at % SIZE) as f64 - 15.5) * above(level))
                .sum();
            assert_eq!(moment > 0.0, draw.value(Latent::Side) > 0.0);
            found.push(sum);
            drawn.push(draw.value(Latent::Brightness));
        }
        assert!(correlation(&found, &drawn) > 0.995);
    }

    #[test]
    fn the_png_holds_the_pixels() {
        let model = Model::new(&SynthOptions::default());
        let pixels = pixels(0, &model.draw(1));
        let read = image::load_from_memory(&png(&pixels).unwrap()).unwrap();
        assert_eq!(read.color(), image::ColorType::L8);
        assert_eq!(read.to_luma8().into_raw(), pixels);
    }
}
