//! `config.json` of a pretrained encoder, by the rules and defaults of Transformers' configuration
//! classes (5.17): hub files often leave out what equals the default.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::config::Activation;
use crate::error::ModelError;
use crate::keys::{Keys, read_object};

/// Which pretrained encoder a folder holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TowerType {
    /// ViT (`vit`), an image classifier's backbone.
    Vit,
    /// The vision tower of CLIP (`clip_vision_model`, or the vision part of `clip`).
    Clip,
    /// The vision tower of SigLIP (`siglip_vision_model`, or the vision part of `siglip`).
    Siglip,
    /// Whisper's encoder (`whisper`).
    Whisper,
}

/// What `config.json` says about a tower.
#[derive(Debug, Clone, PartialEq)]
pub struct TowerConfig {
    pub(super) path: PathBuf,
    pub(super) tower_type: TowerType,
    pub(super) width: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    pub(super) intermediate: usize,
    pub(super) activation: Activation,
    pub(super) norm_epsilon: f64,
    /// Whether query, key and value have biases; Whisper's key never has.
    pub(super) qkv_bias: bool,
    pub(super) reads: Reads,
}

/// What a tower reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    /// Height and width, in pixels, of the image and of a patch.
    Image {
        image: [usize; 2],
        patch: [usize; 2],
    },
    /// Mel bins, and the most tokens; a token is two frames.
    Mel { bins: usize, positions: usize },
}

/// Shape of an item, without the number of items.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ItemShape {
    /// Pixels.
    Image {
        /// 3: red, green, blue.
        channels: usize,
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// Log-mel spectrogram.
    Mel {
        /// Frequency bins.
        bins: usize,
        /// One every 10 ms.
        frames: usize,
    },
}

/// Channels of every image.
pub(super) const CHANNELS: usize = 3;

impl TowerConfig {
    /// Reads `config.json` of a checkpoint folder.
    ///
    /// # Errors
    /// An unsupported `model_type`, and every key that changes what the tower computes and that is
    /// not built.
    pub fn read(dir: &Path) -> Result<TowerConfig, ModelError> {
        let path = dir.join("config.json");
        parse(&path, &read_object(&path)?)
    }

    /// Which encoder it is.
    pub fn tower_type(&self) -> TowerType {
        self.tower_type
    }

    /// Width of the hidden states.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of transformer layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Height and width in pixels of the images it takes; `None` for speech.
    pub fn image_size(&self) -> Option<[usize; 2]> {
        match self.reads {
            Reads::Image { image, .. } => Some(image),
            Reads::Mel { .. } => None,
        }
    }

    /// Mel bins and the most frames it takes; `None` for images.
    pub fn mel_size(&self) -> Option<(usize, usize)> {
        match self.reads {
            Reads::Image { .. } => None,
            Reads::Mel { bins, positions } => Some((bins, 2 * positions)),
        }
    }

    /// How many hidden states the tower gives for an item of this shape: patches with the class
    /// token, where there is one; or half as many as frames, rounded up.
    ///
    /// # Errors
    /// A shape that the tower does not take. Position embeddings are not interpolated: an image has
    /// to have the pretrained size. Speech may be shorter than pretrained, never longer.
    pub fn token_count(&self, item: ItemShape) -> Result<usize, ModelError> {
        let folder = self.path.parent().unwrap_or(&self.path).display();
        match (self.reads, item) {
            (
                Reads::Image { image, .. },
                ItemShape::Image {
                    channels,
                    height,
                    width,
                },
            ) => {
                if channels != CHANNELS {
                    return Err(ModelError::options(format!(
                        "{folder}: an image has {channels} channels, the tower takes {CHANNELS}; \
                         decode images as RGB"
                    )));
                }
                if [height, width] != image {
                    return Err(ModelError::options(format!(
                        "{folder}: an image has {height}×{width} pixels (height×width), the \
                         tower's position embeddings are for {}×{}; set the image size of the \
                         recipe to that",
                        image[0], image[1]
                    )));
                }
                Ok(self.image_tokens())
            }
            (
                Reads::Mel { bins, positions },
                ItemShape::Mel {
                    bins: found,
                    frames,
                },
            ) => {
                if found != bins {
                    return Err(ModelError::options(format!(
                        "{folder}: a recording has {found} mel bins, the tower takes {bins}; set \
                         the mel bins of the recipe to that"
                    )));
                }
                let tokens = frames.div_ceil(2);
                if !(1..=positions).contains(&tokens) {
                    return Err(ModelError::options(format!(
                        "{folder}: a recording has {frames} frames of 10 ms, the tower takes 1 to \
                         {}; shorten or split it",
                        2 * positions
                    )));
                }
                Ok(tokens)
            }
            (Reads::Image { .. }, ItemShape::Mel { .. }) => Err(ModelError::options(format!(
                "{folder}: a vision tower reads images, not speech"
            ))),
            (Reads::Mel { .. }, ItemShape::Image { .. }) => Err(ModelError::options(format!(
                "{folder}: a speech tower reads mel spectrograms, not images"
            ))),
        }
    }

    /// Rows and columns of patches; what does not fill a patch is left out.
    pub(super) fn grid(&self) -> [usize; 2] {
        match self.reads {
            Reads::Image { image, patch } => [image[0] / patch[0], image[1] / patch[1]],
            Reads::Mel { .. } => [0, 0],
        }
    }

    /// Whether a learned token stands before the patches.
    pub(super) fn class_token(&self) -> bool {
        matches!(self.tower_type, TowerType::Vit | TowerType::Clip)
    }

    /// Patches and class token; the number of position embeddings.
    pub(super) fn image_tokens(&self) -> usize {
        let [rows, columns] = self.grid();
        rows * columns + usize::from(self.class_token())
    }
}

fn parse(path: &Path, object: &Map<String, Value>) -> Result<TowerConfig, ModelError> {
    let keys = Keys::new(path, object);
    keys.not_quantized()?;
    match keys.text("model_type")? {
        Some("vit") => vision(&keys, TowerType::Vit),
        Some("clip_vision_model") => vision(&keys, TowerType::Clip),
        Some("siglip_vision_model") => vision(&keys, TowerType::Siglip),
        // Files of the first versions say it twice; Transformers lets the second win, defaults
        // and all.
        Some("clip") => part(
            &keys,
            &["vision_config_dict", "vision_config"],
            TowerType::Clip,
        ),
        Some("siglip") => part(&keys, &["vision_config"], TowerType::Siglip),
        Some("whisper") => whisper(&keys),
        _ => Err(keys.unsupported(
            "model_type",
            "towers are vit, clip, clip_vision_model, siglip, siglip_vision_model and whisper",
        )),
    }
}

/// The vision part of a model of images and texts.
fn part(keys: &Keys, names: &[&str], tower_type: TowerType) -> Result<TowerConfig, ModelError> {
    let found = names.iter().find_map(|name| Some((name, keys.get(name)?)));
    let empty = Map::new();
    let object = match found {
        None => &empty,
        Some((_, Value::Object(object))) => object,
        Some((name, _)) => return Err(keys.wrong(name, "an object")),
    };
    vision(&Keys::new(keys.path, object), tower_type)
}

fn vision(keys: &Keys, tower_type: TowerType) -> Result<TowerConfig, ModelError> {
    let (patch, activation, epsilon) = match tower_type {
        TowerType::Vit => (16, Activation::Gelu, 1e-12),
        TowerType::Clip => (32, Activation::QuickGelu, 1e-5),
        _ => (16, Activation::GeluTanh, 1e-6),
    };
    let width = keys.sized("hidden_size", 768)?;
    let heads = keys.sized("num_attention_heads", 12)?;
    let head_dim = keys.head_dim(("hidden_size", width), ("num_attention_heads", heads))?;
    if tower_type == TowerType::Vit && keys.size("head_dim")?.is_some_and(|own| own != head_dim) {
        return Err(keys.unsupported("head_dim", "heads have hidden_size / num_attention_heads"));
    }
    if keys.sized("num_channels", CHANNELS)? != CHANNELS {
        return Err(keys.unsupported("num_channels", "images have 3 channels"));
    }
    // Only ViT's class takes heights and widths that differ.
    let pair = |key: &str, default: usize| match keys.get(key) {
        Some(Value::Array(values)) if tower_type == TowerType::Vit => values
            .iter()
            .map(|value| value.as_u64().and_then(|value| usize::try_from(value).ok()))
            .collect::<Option<Vec<usize>>>()
            .and_then(|values| <[usize; 2]>::try_from(values).ok())
            .filter(|values| !values.contains(&0))
            .ok_or_else(|| keys.wrong(key, "a height and a width")),
        _ => keys.sized(key, default).map(|value| [value; 2]),
    };
    let (image, patch) = (pair("image_size", 224)?, pair("patch_size", patch)?);
    let config = TowerConfig {
        path: keys.path.to_owned(),
        tower_type,
        width,
        layers: keys.layers("num_hidden_layers", Some(12))?,
        heads,
        head_dim,
        intermediate: keys.sized("intermediate_size", 3072)?,
        activation: keys.activation("hidden_act", activation)?,
        norm_epsilon: keys.number("layer_norm_eps")?.unwrap_or(epsilon),
        qkv_bias: tower_type != TowerType::Vit || keys.flag("qkv_bias")?.unwrap_or(true),
        reads: Reads::Image { image, patch },
    };
    let [rows, columns] = config.grid();
    match rows.checked_mul(columns) {
        Some(0) => Err(keys.config(format!(
            "`patch_size` ({}×{}) is larger than `image_size` ({}×{})",
            patch[0], patch[1], image[0], image[1]
        ))),
        Some(1..MOST_PATCHES) => Ok(config),
        _ => Err(keys.config(format!(
            "`image_size` ({}×{}) and `patch_size` ({}×{}) give more patches than any image has",
            image[0], image[1], patch[0], patch[1]
        ))),
    }
}

/// Keeps the arithmetic of damaged files from overflowing.
const MOST_PATCHES: usize = 1 << 24;

fn whisper(keys: &Keys) -> Result<TowerConfig, ModelError> {
    let width = keys.sized("d_model", 384)?;
    let heads = keys.sized("encoder_attention_heads", 6)?;
    let positions = keys.sized("max_source_positions", 1500)?;
    if positions >= MOST_PATCHES {
        return Err(keys.unsupported("max_source_positions", "recordings are shorter"));
    }
    Ok(TowerConfig {
        path: keys.path.to_owned(),
        tower_type: TowerType::Whisper,
        width,
        layers: keys.layers("encoder_layers", Some(4))?,
        heads,
        head_dim: keys.head_dim(("d_model", width), ("encoder_attention_heads", heads))?,
        intermediate: keys.sized("encoder_ffn_dim", 1536)?,
        activation: keys.activation("activation_function", Activation::Gelu)?,
        // PyTorch's default, which the class does not change.
        norm_epsilon: 1e-5,
        qkv_bias: true,
        reads: Reads::Mel {
            bins: keys.sized("num_mel_bins", 80)?,
            positions,
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(json: Value) -> Result<TowerConfig, ModelError> {
        let Value::Object(object) = json else {
            panic!("an object")
        };
        parse(Path::new("tower/config.json"), &object)
    }

    fn image(height: usize, width: usize) -> ItemShape {
        ItemShape::Image {
            channels: 3,
            height,
            width,
        }
    }

    #[test]
    fn what_hub_files_leave_out_is_the_classes_default() {
        let vit = read(json!({"model_type": "vit"})).unwrap();
        assert_eq!((vit.width, vit.layers, vit.head_dim), (768, 12, 64));
        assert_eq!(vit.token_count(image(224, 224)).unwrap(), 197);
        assert_eq!((vit.norm_epsilon, vit.qkv_bias), (1e-12, true));
        let clip = read(json!({"model_type": "clip", "vision_config": {}})).unwrap();
        assert_eq!(clip.token_count(image(224, 224)).unwrap(), 50);
        assert_eq!(clip.activation, Activation::QuickGelu);
        let clip = read(json!({
            "model_type": "clip",
            "vision_config": {"patch_size": 14, "hidden_size": 1024},
            "vision_config_dict": {"patch_size": 16},
        }))
        .unwrap();
        assert_eq!((clip.width, clip.image_tokens()), (768, 197));
        let siglip = read(json!({
            "model_type": "siglip",
            "vision_config": {"image_size": 384, "patch_size": 14},
        }))
        .unwrap();
        // 384 is 27 patches of 14 pixels and 6 pixels more.
        assert_eq!(siglip.token_count(image(384, 384)).unwrap(), 27 * 27);
        assert_eq!(siglip.activation, Activation::GeluTanh);
        let whisper = read(json!({"model_type": "whisper"})).unwrap();
        assert_eq!(whisper.mel_size(), Some((80, 3000)));
        let frames = |frames| ItemShape::Mel { bins: 80, frames };
        assert_eq!(whisper.token_count(frames(3000)).unwrap(), 1500);
        assert_eq!(whisper.token_count(frames(7)).unwrap(), 4);
    }

    #[test]
    fn only_vit_takes_two_lengths() {
        let config = json!({"model_type": "vit", "image_size": [32, 48], "patch_size": [8, 16]});
        let vit = read(config).unwrap();
        assert_eq!(vit.token_count(image(32, 48)).unwrap(), 13);
        for (model, value) in [
            ("clip_vision_model", json!([32, 48])),
            ("vit", json!([32, 48, 3])),
            ("vit", json!([32, 0])),
        ] {
            let error = read(json!({"model_type": model, "image_size": value})).unwrap_err();
            assert!(error.to_string().contains("image_size"), "{error}");
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused_with_a_hint() {
        let vit = read(json!({"model_type": "vit"})).unwrap();
        let whisper = read(json!({"model_type": "whisper"})).unwrap();
        let grey = ItemShape::Image {
            channels: 1,
            height: 224,
            width: 224,
        };
        for (tower, item, hint) in [
            (&vit, image(256, 224), "224×224; set the image size"),
            (&vit, grey, "decode images as RGB"),
            (
                &vit,
                ItemShape::Mel {
                    bins: 80,
                    frames: 10,
                },
                "not speech",
            ),
            (&whisper, image(224, 224), "not images"),
            (
                &whisper,
                ItemShape::Mel {
                    bins: 128,
                    frames: 10,
                },
                "takes 80",
            ),
            (
                &whisper,
                ItemShape::Mel {
                    bins: 80,
                    frames: 3001,
                },
                "1 to 3000",
            ),
            (
                &whisper,
                ItemShape::Mel {
                    bins: 80,
                    frames: 0,
                },
                "1 to 3000",
            ),
        ] {
            let error = tower.token_count(item).unwrap_err().to_string();
            assert!(error.contains(hint) && error.contains("tower:"), "{error}");
        }
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (key, config) in [
            ("model_type", json!({"model_type": "dinov2"})),
            ("model_type", json!({"hidden_size": 32})),
            (
                "hidden_act",
                json!({"model_type": "vit", "hidden_act": "mish"}),
            ),
            (
                "num_channels",
                json!({"model_type": "vit", "num_channels": 1}),
            ),
            ("head_dim", json!({"model_type": "vit", "head_dim": 32})),
            (
                "hidden_size",
                json!({"model_type": "vit", "hidden_size": 770}),
            ),
            (
                "hidden_size",
                json!({"model_type": "siglip", "vision_config": {"hidden_size": 0}}),
            ),
            (
                "vision_config",
                json!({"model_type": "clip", "vision_config": 3}),
            ),
            (
                "patch_size",
                json!({"model_type": "vit", "patch_size": 500}),
            ),
            (
                "patch_size",
                json!({"model_type": "vit", "image_size": u64::MAX, "patch_size": 1}),
            ),
            (
                "encoder_layers",
                json!({"model_type": "whisper", "encoder_layers": 100_000}),
            ),
            ("d_model", json!({"model_type": "whisper", "d_model": 385})),
            (
                "max_source_positions",
                json!({"model_type": "whisper", "max_source_positions": u64::MAX}),
            ),
            (
                "quantization_config",
                json!({"model_type": "vit", "quantization_config": {"bits": 8}}),
            ),
        ] {
            let error = read(config).unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}`")), "{key}: {error}");
        }
    }
}
