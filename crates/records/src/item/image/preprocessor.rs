//! [`ImageOptions`] from a hub checkpoint's `preprocessor_config.json`, so that its vision tower
//! gets what it was trained on.
//!
//! Keys and their defaults are those of Transformers 5 (`ImagesKwargs` and the attributes of each
//! image processor). A key that asks for something else than resize, crop, rescale and normalise
//! is an error that names it, never passed over.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::resample::ImageFilter;
use super::{ImageOptions, ImageResize};
use crate::RecordsError;

/// Where such a configuration stands in a checkpoint's folder; errors name it.
const FILE: &str = "preprocessor_config.json";

/// Keys that say nothing about the pixels that a decoded image of three channels ends up with.
const WITHOUT_EFFECT: [&str; 13] = [
    "_valid_processor_keys",
    "auto_map",
    "data_format",
    "device",
    "disable_grouping",
    "do_convert_rgb",
    "feature_extractor_type",
    "image_processor_type",
    "image_seq_length",
    "input_data_format",
    "processor_class",
    "return_tensors",
    "use_fast",
];

/// What a processor does where its configuration is silent.
struct Processor {
    resample: ImageFilter,
    mean: [f32; 3],
    std: [f32; 3],
    size: Size,
    /// Side of the square crop; `None`: no crop.
    crop: Option<usize>,
    /// Whether a `size` that is one number is a square's side, or else the shortest edge.
    square: bool,
}

#[derive(Clone, Copy)]
enum Size {
    Exact { height: usize, width: usize },
    ShortestEdge(usize),
}

const VIT: Processor = Processor {
    resample: ImageFilter::Bilinear,
    mean: [0.5; 3],
    std: [0.5; 3],
    size: Size::Exact {
        height: 224,
        width: 224,
    },
    crop: None,
    square: true,
};

const SIGLIP: Processor = Processor {
    resample: ImageFilter::Bicubic,
    square: false,
    ..VIT
};

/// CLIP's, and Bit's, which DINOv2 and RAD-DINO use.
const CLIP: Processor = Processor {
    resample: ImageFilter::Bicubic,
    mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
    std: [0.268_629_55, 0.261_302_6, 0.275_777_1],
    size: Size::ShortestEdge(224),
    crop: Some(224),
    square: false,
};

impl ImageOptions {
    /// Options that do what the image processor of a hub checkpoint does, from the text of its
    /// `preprocessor_config.json` (or of a `processor_config.json` with an `image_processor`).
    ///
    /// Reads ViT's, CLIP's, SigLIP's and Bit's, also under their older names. A configuration
    /// without a type is ViT's, or CLIP's where it crops. The options that concern medical images
    /// keep their defaults.
    ///
    /// # Errors
    ///
    /// [`RecordsError::Json`] where the text is no JSON, [`RecordsError::JsonShape`] naming the key
    /// that cannot be honoured.
    pub fn from_preprocessor(json: &str) -> Result<ImageOptions, RecordsError> {
        let value: Value = serde_json::from_str(json).map_err(|source| RecordsError::Json {
            path: PathBuf::from(FILE),
            source,
        })?;
        let keys = match &value {
            Value::Object(keys) => match keys.get("image_processor") {
                Some(Value::Object(inner)) => inner,
                _ => keys,
            },
            _ => return Err(wrong("the whole", "an object")),
        };
        let processor = processor(keys)?;
        for (key, value) in keys {
            let read = WITHOUT_EFFECT.contains(&key.as_str()) || READ.contains(&key.as_str());
            if !read && !matches!(value, Value::Null | Value::Bool(false)) {
                return Err(wrong(
                    key,
                    "left out, null or false: images are resized, cropped, rescaled and \
                     normalised, and nothing else",
                ));
            }
        }
        if !flag(keys, "do_resize", true)? {
            return Err(wrong("do_resize", "true: an encoder takes one size"));
        }
        let square = flag(keys, "default_to_square", processor.square)?;
        let size = size(keys, square)?.unwrap_or(processor.size);
        let crop = if flag(keys, "do_center_crop", processor.crop.is_some())? {
            Some(
                crop(keys)?
                    .or(processor.crop.map(|side| (side, side)))
                    .ok_or_else(|| wrong("crop_size", "given where `do_center_crop` is true"))?,
            )
        } else {
            None
        };
        let mut options = ImageOptions {
            filter: filter(keys)?.unwrap_or(processor.resample),
            ..ImageOptions::default()
        };
        match (size, crop) {
            (Size::Exact { height, width }, crop) => {
                if crop.is_some_and(|crop| crop != (height, width)) {
                    return Err(wrong(
                        "crop_size",
                        "equal to `size`: an image brought to an exact size is not cropped again",
                    ));
                }
                options.resize = ImageResize::Exact;
                (options.height, options.width) = (height, width);
            }
            (Size::ShortestEdge(edge), Some((height, width))) => {
                if height.max(width) > edge {
                    return Err(wrong(
                        "crop_size",
                        "no larger than the shortest edge of `size`: images are not padded",
                    ));
                }
                options.resize = ImageResize::ShortestEdgeThenCentreCrop;
                options.shortest_edge = Some(edge);
                (options.height, options.width) = (height, width);
            }
            (Size::ShortestEdge(_), None) => {
                return Err(wrong(
                    "size",
                    "a height and a width, or a shortest edge with `do_center_crop`: an encoder \
                     takes one size",
                ));
            }
        }
        options.rescale = if flag(keys, "do_rescale", true)? {
            match given(keys, "rescale_factor") {
                None => ImageOptions::default().rescale,
                Some(factor) => factor
                    .as_f64()
                    .ok_or_else(|| wrong("rescale_factor", "a number"))?,
            }
        } else {
            1.0
        };
        (options.mean, options.std) = if flag(keys, "do_normalize", true)? {
            (
                channels(keys, "image_mean")?.unwrap_or(processor.mean),
                channels(keys, "image_std")?.unwrap_or(processor.std),
            )
        } else {
            ([0.0; 3], [1.0; 3])
        };
        Ok(options)
    }
}

/// Keys that are read below.
const READ: [&str; 12] = [
    "crop_size",
    "default_to_square",
    "do_center_crop",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_processor",
    "image_std",
    "resample",
    "rescale_factor",
    "size",
];

fn processor(keys: &Map<String, Value>) -> Result<&'static Processor, RecordsError> {
    for key in ["image_processor_type", "feature_extractor_type"] {
        let Some(value) = given(keys, key) else {
            continue;
        };
        let name = value.as_str().unwrap_or_default();
        let name = name
            .strip_suffix("Fast")
            .or(name.strip_suffix("Pil"))
            .unwrap_or(name);
        let model = name
            .strip_suffix("ImageProcessor")
            .or(name.strip_suffix("FeatureExtractor"));
        return match model {
            Some("ViT") => Ok(&VIT),
            Some("Siglip") => Ok(&SIGLIP),
            Some("CLIP" | "Bit") => Ok(&CLIP),
            _ => Err(wrong(
                key,
                "ViTImageProcessor, CLIPImageProcessor, BitImageProcessor or SiglipImageProcessor",
            )),
        };
    }
    let crops = given(keys, "crop_size").is_some() || given(keys, "do_center_crop").is_some();
    Ok(if crops { &CLIP } else { &VIT })
}

fn size(keys: &Map<String, Value>, square: bool) -> Result<Option<Size>, RecordsError> {
    let expected = "a positive number, [height, width], or an object with height and width or with \
                    shortest_edge";
    let size = match given(keys, "size") {
        None => return Ok(None),
        Some(Value::Object(sides)) => {
            let unread = sides.iter().find(|(key, value)| {
                !["height", "width", "shortest_edge"].contains(&key.as_str()) && !value.is_null()
            });
            if let Some((key, _)) = unread {
                return Err(wrong(&format!("size.{key}"), "left out"));
            }
            let side = |key| sides.get(key).and_then(length);
            match (side("height"), side("width"), side("shortest_edge")) {
                (Some(height), Some(width), None) => Some(Size::Exact { height, width }),
                (None, None, Some(edge)) => Some(Size::ShortestEdge(edge)),
                _ => None,
            }
        }
        Some(Value::Array(sides)) => match sides.as_slice() {
            [height, width] => length(height)
                .zip(length(width))
                .map(|(height, width)| Size::Exact { height, width }),
            _ => None,
        },
        Some(side) => length(side).map(|side| {
            if square {
                Size::Exact {
                    height: side,
                    width: side,
                }
            } else {
                Size::ShortestEdge(side)
            }
        }),
    };
    size.map(Some).ok_or_else(|| wrong("size", expected))
}

/// Height and width of the crop.
fn crop(keys: &Map<String, Value>) -> Result<Option<(usize, usize)>, RecordsError> {
    let crop = match given(keys, "crop_size") {
        None => return Ok(None),
        Some(Value::Object(sides)) if sides.len() == 2 => sides
            .get("height")
            .and_then(length)
            .zip(sides.get("width").and_then(length)),
        Some(Value::Array(sides)) => match sides.as_slice() {
            [height, width] => length(height).zip(length(width)),
            _ => None,
        },
        Some(side) => length(side).map(|side| (side, side)),
    };
    crop.map(Some).ok_or_else(|| {
        wrong(
            "crop_size",
            "a positive number, [height, width], or an object with height and width",
        )
    })
}

fn filter(keys: &Map<String, Value>) -> Result<Option<ImageFilter>, RecordsError> {
    match given(keys, "resample").map(Value::as_u64) {
        None => Ok(None),
        Some(Some(1)) => Ok(Some(ImageFilter::Lanczos)),
        Some(Some(2)) => Ok(Some(ImageFilter::Bilinear)),
        Some(Some(3)) => Ok(Some(ImageFilter::Bicubic)),
        Some(_) => Err(wrong(
            "resample",
            "1 (lanczos), 2 (bilinear) or 3 (bicubic)",
        )),
    }
}

/// One number a channel, or one for all.
fn channels(keys: &Map<String, Value>, key: &str) -> Result<Option<[f32; 3]>, RecordsError> {
    let number = |value: &Value| value.as_f64().map(|number| number as f32);
    let read = match given(keys, key) {
        None => return Ok(None),
        Some(Value::Array(values)) => match values.as_slice() {
            [red, green, blue] => number(red)
                .zip(number(green))
                .zip(number(blue))
                .map(|((red, green), blue)| [red, green, blue]),
            _ => None,
        },
        Some(value) => number(value).map(|value| [value; 3]),
    };
    read.map(Some)
        .ok_or_else(|| wrong(key, "a number or three of them"))
}

fn flag(keys: &Map<String, Value>, key: &str, default: bool) -> Result<bool, RecordsError> {
    match given(keys, key) {
        None => Ok(default),
        Some(value) => value.as_bool().ok_or_else(|| wrong(key, "true or false")),
    }
}

/// A key's value; null is as good as left out.
fn given<'a>(keys: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    keys.get(key).filter(|value| !value.is_null())
}

fn length(value: &Value) -> Option<usize> {
    value
        .as_u64()
        .filter(|&length| length > 0)
        .and_then(|length| usize::try_from(length).ok())
}

fn wrong(key: &str, expected: &'static str) -> RecordsError {
    RecordsError::JsonShape {
        path: PathBuf::from(FILE),
        key: key.to_string(),
        expected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> ImageOptions {
        ImageOptions::from_preprocessor(json).unwrap()
    }

    /// The message for a configuration, which names the key.
    fn refused(json: &str, key: &str) {
        let message = ImageOptions::from_preprocessor(json)
            .unwrap_err()
            .to_string();
        assert!(message.contains(&format!("`{key}`")), "{key}: {message}");
    }

    #[test]
    fn a_type_alone_gives_its_defaults() {
        let vit = read(r#"{"image_processor_type": "ViTImageProcessor"}"#);
        assert_eq!(vit, ImageOptions::default());
        let siglip = read(r#"{"image_processor_type": "SiglipImageProcessorFast"}"#);
        assert_eq!(
            siglip,
            ImageOptions {
                filter: ImageFilter::Bicubic,
                ..ImageOptions::default()
            }
        );
        let clip = read(r#"{"feature_extractor_type": "CLIPFeatureExtractor"}"#);
        assert_eq!(clip.resize, ImageResize::ShortestEdgeThenCentreCrop);
        assert_eq!((clip.height, clip.shortest_edge), (224, Some(224)));
        assert_eq!(clip.mean, [0.481_454_66, 0.457_827_5, 0.408_210_73]);
    }

    #[test]
    fn every_form_of_size_is_read() {
        let old = read(r#"{"do_normalize": true, "do_resize": true, "size": 384}"#);
        assert_eq!((old.height, old.width), (384, 384));
        let clip =
            read(r#"{"crop_size": 224, "size": 256, "resample": 1, "do_center_crop": true}"#);
        assert_eq!(clip.shortest_edge, Some(256));
        assert_eq!((clip.height, clip.filter), (224, ImageFilter::Lanczos));
        let dino = read(
            r#"{"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 518},
                "crop_size": {"height": 518, "width": 500}, "image_mean": 0.5307, "image_std": [0.2, 0.3, 0.4]}"#,
        );
        assert_eq!(
            (dino.shortest_edge, dino.height, dino.width),
            (Some(518), 518, 500)
        );
        assert_eq!((dino.mean, dino.std), ([0.5307; 3], [0.2, 0.3, 0.4]));
        let pair = read(r#"{"size": [112, 96], "do_pad": false, "size_divisor": null}"#);
        assert_eq!((pair.height, pair.width), (112, 96));
        let nested = read(
            r#"{"processor_class": "P", "image_processor": {"image_processor_type": "SiglipImageProcessor",
                "size": {"height": 384, "width": 384, "longest_edge": null}}}"#,
        );
        assert_eq!((nested.height, nested.filter), (384, ImageFilter::Bicubic));
    }

    #[test]
    fn switched_off_steps_do_nothing() {
        let plain =
            read(r#"{"do_rescale": false, "do_normalize": false, "image_mean": [1, 2, 3]}"#);
        assert_eq!(plain.rescale, 1.0);
        assert_eq!((plain.mean, plain.std), ([0.0; 3], [1.0; 3]));
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        refused(
            r#"{"image_processor_type": "ConvNextImageProcessor"}"#,
            "image_processor_type",
        );
        refused(r#"{"do_resize": false}"#, "do_resize");
        refused(r#"{"do_pad": true}"#, "do_pad");
        refused(r#"{"crop_pct": 0.875, "size": 224}"#, "crop_pct");
        refused(r#"{"resample": 0}"#, "resample");
        refused(r#"{"resample": "bicubic"}"#, "resample");
        refused(
            r#"{"size": {"longest_edge": 800, "shortest_edge": 200}}"#,
            "size.longest_edge",
        );
        refused(r#"{"size": {"shortest_edge": 200}}"#, "size");
        refused(r#"{"size": 0}"#, "size");
        refused(
            r#"{"image_processor_type": "SiglipImageProcessor", "size": 224}"#,
            "size",
        );
        refused(
            r#"{"image_processor_type": "CLIPImageProcessor", "size": 200}"#,
            "crop_size",
        );
        refused(
            r#"{"image_processor_type": "ViTImageProcessor", "do_center_crop": true}"#,
            "crop_size",
        );
        refused(
            r#"{"size": {"height": 256, "width": 256}, "crop_size": 224}"#,
            "crop_size",
        );
        refused(r#"{"image_mean": [0.5]}"#, "image_mean");
        refused(r#"{"do_rescale": 1}"#, "do_rescale");
        assert!(matches!(
            ImageOptions::from_preprocessor("{").unwrap_err(),
            RecordsError::Json { .. }
        ));
        assert!(ImageOptions::from_preprocessor("[]").is_err());
    }
}
