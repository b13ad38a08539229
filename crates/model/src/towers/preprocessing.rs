//! `preprocessor_config.json` of a vision tower: how images looked in pretraining.

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::keys::{Keys, read_object};

use super::config::TowerType;

/// How Transformers prepares a picture for a tower: resize, crop, rescale, normalise, in this
/// order. A recipe that decodes images in another way feeds the tower what it has never seen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ImagePreprocessing {
    /// `None` where images are not resized.
    pub resize: Option<Resize>,
    /// Height and width in pixels of the crop from the centre.
    pub center_crop: Option<[usize; 2]>,
    /// Pillow's number of the resampling filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic.
    pub resample: usize,
    /// What bytes are multiplied with.
    pub rescale: Option<f64>,
    /// Mean and standard deviation of each channel after rescaling.
    pub normalize: Option<([f64; 3], [f64; 3])>,
}

/// The size that pictures are brought to, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Resize {
    /// Whatever the proportions were.
    Exact {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// The shorter side; the other keeps the proportions.
    ShortestEdge(usize),
}

impl ImagePreprocessing {
    /// Reads the file, with the defaults of the tower's image processor in Transformers 5.17;
    /// `None` where there is none.
    ///
    /// # Errors
    /// A file that cannot be read, or values of other types than expected.
    pub(super) fn read(
        dir: &Path,
        tower_type: TowerType,
    ) -> Result<Option<ImagePreprocessing>, ModelError> {
        let path = dir.join("preprocessor_config.json");
        if tower_type == TowerType::Whisper || !path.exists() {
            return Ok(None);
        }
        parse(&path, &read_object(&path)?, tower_type).map(Some)
    }
}

/// Statistics of the pictures that CLIP was trained on (Radford et al. 2021).
const CLIP_STATISTICS: ([f64; 3], [f64; 3]) = (
    [0.481_454_66, 0.457_827_5, 0.408_210_73],
    [0.268_629_54, 0.261_302_58, 0.275_777_11],
);

fn parse(
    path: &Path,
    object: &Map<String, Value>,
    tower_type: TowerType,
) -> Result<ImagePreprocessing, ModelError> {
    let keys = Keys::new(path, object);
    let clip = tower_type == TowerType::Clip;
    let on = |key: &str, default: bool| Ok::<_, ModelError>(keys.flag(key)?.unwrap_or(default));
    let resize = match keys.get("size") {
        None if clip => Resize::ShortestEdge(224),
        None => Resize::Exact {
            height: 224,
            width: 224,
        },
        // One number is a square for ViT and the shorter side for the others.
        Some(Value::Number(_)) if tower_type == TowerType::Vit => {
            let side = keys.sized("size", 224)?;
            Resize::Exact {
                height: side,
                width: side,
            }
        }
        Some(Value::Number(_)) => Resize::ShortestEdge(keys.sized("size", 224)?),
        Some(Value::Object(size)) => match size.get("shortest_edge") {
            Some(_) => Resize::ShortestEdge(Keys::new(path, size).required("shortest_edge")?),
            None => {
                let [height, width] = rectangle(&Keys::new(path, size))?;
                Resize::Exact { height, width }
            }
        },
        Some(_) => return Err(keys.wrong("size", "a number or an object")),
    };
    let crop = match keys.get("crop_size") {
        Some(Value::Object(size)) => rectangle(&Keys::new(path, size))?,
        _ => [keys.sized("crop_size", 224)?; 2],
    };
    let statistics = match clip {
        true => CLIP_STATISTICS,
        false => ([0.5; 3], [0.5; 3]),
    };
    let bilinear_or_bicubic = if tower_type == TowerType::Vit { 2 } else { 3 };
    Ok(ImagePreprocessing {
        resize: on("do_resize", true)?.then_some(resize),
        center_crop: on("do_center_crop", clip)?.then_some(crop),
        resample: keys.size("resample")?.unwrap_or(bilinear_or_bicubic),
        rescale: match on("do_rescale", true)? {
            true => Some(keys.number("rescale_factor")?.unwrap_or(1.0 / 255.0)),
            false => None,
        },
        normalize: match on("do_normalize", true)? {
            true => Some((
                channels(&keys, "image_mean", statistics.0)?,
                channels(&keys, "image_std", statistics.1)?,
            )),
            false => None,
        },
    })
}

fn rectangle(size: &Keys) -> Result<[usize; 2], ModelError> {
    Ok([size.required("height")?, size.required("width")?])
}

fn channels(keys: &Keys, key: &str, default: [f64; 3]) -> Result<[f64; 3], ModelError> {
    match keys.get(key) {
        None => Ok(default),
        Some(Value::Array(values)) => values
            .iter()
            .map(Value::as_f64)
            .collect::<Option<Vec<f64>>>()
            .and_then(|values| <[f64; 3]>::try_from(values).ok())
            .ok_or_else(|| keys.wrong(key, "three numbers")),
        Some(_) => Err(keys.wrong(key, "three numbers")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(json: Value, tower_type: TowerType) -> Result<ImagePreprocessing, ModelError> {
        let Value::Object(object) = json else {
            panic!("an object")
        };
        parse(Path::new("preprocessor_config.json"), &object, tower_type)
    }

    #[test]
    fn hub_files_of_all_ages_are_read() {
        // The keys of google/vit-base-patch16-224 and of openai/clip-vit-base-patch32.
        let vit = json!({
            "do_normalize": true, "do_resize": true, "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5], "size": 224,
        });
        let vit = read(vit, TowerType::Vit).unwrap();
        assert_eq!(
            vit.resize,
            Some(Resize::Exact {
                height: 224,
                width: 224
            })
        );
        assert_eq!((vit.center_crop, vit.resample), (None, 2));
        assert_eq!(vit.rescale, Some(1.0 / 255.0));
        let clip = json!({
            "crop_size": 224, "do_center_crop": true, "do_normalize": true, "do_resize": true,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 224,
        });
        let clip = read(clip, TowerType::Clip).unwrap();
        assert_eq!(clip.resize, Some(Resize::ShortestEdge(224)));
        assert_eq!(clip.center_crop, Some([224, 224]));
        // What those files say is what the class says.
        assert_eq!(clip, read(json!({}), TowerType::Clip).unwrap());
        let siglip = json!({
            "size": {"height": 384, "width": 384}, "resample": 3, "do_rescale": true,
            "rescale_factor": 0.00392156862745098, "do_normalize": false,
        });
        let siglip = read(siglip, TowerType::Siglip).unwrap();
        assert_eq!(
            siglip.resize,
            Some(Resize::Exact {
                height: 384,
                width: 384
            })
        );
        assert_eq!((siglip.center_crop, siglip.normalize), (None, None));
    }

    #[test]
    fn wrong_values_are_named() {
        for (key, file) in [
            ("size", json!({"size": [224, 224]})),
            ("width", json!({"size": {"height": 3}})),
            ("image_mean", json!({"image_mean": [0.5]})),
            ("crop_size", json!({"crop_size": "large"})),
            ("do_resize", json!({"do_resize": 1})),
        ] {
            let error = read(file, TowerType::Vit).unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}`")), "{key}: {error}");
        }
    }
}
