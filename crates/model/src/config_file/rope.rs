//! Rotary positions in `config.json`.

use serde_json::{Map, Value};

use super::Sizes;
use crate::config::{ModelType, RopeConfig, RopeScaling};
use crate::error::ModelError;
use crate::keys::Keys;

/// Where a type's rope is described and what holds where it is not.
pub(super) struct RopeKeys {
    /// The key beside `rope_parameters` that has the base.
    pub theta: &'static str,
    pub default_theta: f64,
    /// The entry of `rope_parameters` that belongs to some of the layers (`full_attention`, …).
    pub layers: Option<&'static str>,
    /// Whether `rope_scaling` stretches it.
    pub scaled: bool,
}

impl RopeKeys {
    pub const USUAL: RopeKeys = RopeKeys {
        theta: "rope_theta",
        default_theta: 10_000.0,
        layers: None,
        scaled: true,
    };
}

impl Keys<'_> {
    pub(super) fn rope(
        &self,
        sizes: &Sizes,
        head_dim: usize,
        keys: &RopeKeys,
    ) -> Result<RopeConfig, ModelError> {
        // `rope_parameters` is what Transformers 5 writes; `rope_scaling` beside `rope_theta` is
        // what most hub files have, and it wins where both are given.
        let key = match self.get("rope_scaling").is_some() && keys.scaled {
            true => "rope_scaling",
            false => "rope_parameters",
        };
        let empty = Map::new();
        let object = |key: &str, value: Option<&Value>| match value {
            None => Ok(empty.clone()),
            Some(Value::Object(rope)) => Ok(rope.clone()),
            Some(_) => Err(self.wrong(key, "an object")),
        };
        let mut rope = object(key, self.get(key))?;
        if let Some(layers) = keys.layers.filter(|_| key == "rope_parameters") {
            let nested = ["full_attention", "sliding_attention"];
            if nested.iter().any(|name| rope.contains_key(*name)) {
                rope = object(key, rope.get(layers).filter(|value| !value.is_null()))?;
            }
        }
        let rope = Keys::new(self.path, &rope);
        let theta = match rope.number("rope_theta")? {
            Some(theta) => theta,
            None => self.number(keys.theta)?.unwrap_or(keys.default_theta),
        };
        if theta <= 0.0 {
            return Err(self.wrong(keys.theta, "a positive number"));
        }
        let rotated = self.rotated(&rope, sizes.model_type, head_dim)?;
        Ok(RopeConfig {
            theta,
            scaling: self.scaling(&rope, key, sizes, rotated)?,
            rotated,
        })
    }

    /// How many of a head's dimensions are turned.
    fn rotated(
        &self,
        rope: &Keys,
        model_type: ModelType,
        head_dim: usize,
    ) -> Result<usize, ModelError> {
        let (key, default) = match model_type {
            ModelType::GptNeox => ("rotary_pct", 0.25),
            _ => ("partial_rotary_factor", 1.0),
        };
        let factor = match rope.number("partial_rotary_factor")? {
            Some(factor) => factor,
            None => self.number(key)?.unwrap_or(default),
        };
        let built = matches!(model_type, ModelType::Phi3 | ModelType::GptNeox);
        if factor != 1.0 && !built {
            return Err(self.unsupported(key, "only 1.0 is built"));
        }
        let rotated = (head_dim as f64 * factor) as usize;
        if !(factor > 0.0 && factor <= 1.0) || rotated < 2 || !rotated.is_multiple_of(2) {
            return Err(self.config(format!(
                "`{key}` is {factor}: of heads of {head_dim} dimensions an even number has to be \
                 turned"
            )));
        }
        Ok(rotated)
    }

    fn scaling(
        &self,
        rope: &Keys,
        key: &str,
        sizes: &Sizes,
        rotated: usize,
    ) -> Result<RopeScaling, ModelError> {
        let required = |name: &str| -> Result<f64, ModelError> {
            match rope.number(name)? {
                Some(value) if value > 0.0 => Ok(value),
                Some(_) => Err(rope.wrong(name, "a positive number")),
                None => Err(self.config(format!("`{key}` lacks `{name}`"))),
            }
        };
        let kind = match rope.text("rope_type")? {
            Some(kind) => Some(kind),
            None => rope.text("type")?,
        };
        match kind {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear {
                factor: required("factor")?,
            }),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: required("factor")?,
                low_frequency_factor: required("low_freq_factor")?,
                high_frequency_factor: required("high_freq_factor")?,
                original_positions: match rope.number("original_max_position_embeddings")? {
                    Some(positions) => positions,
                    None => sizes.max_positions as f64,
                },
            }),
            Some("longrope") => self.long(rope, key, sizes, rotated),
            // Two older names of Phi-3's.
            Some("su" | "yarn") if sizes.model_type == ModelType::Phi3 => {
                self.long(rope, key, sizes, rotated)
            }
            Some(_) => Err(self.unsupported(
                key,
                "rope types default, linear, llama3 and longrope are built",
            )),
        }
    }

    fn long(
        &self,
        rope: &Keys,
        key: &str,
        sizes: &Sizes,
        rotated: usize,
    ) -> Result<RopeScaling, ModelError> {
        let factors = |name: &str| -> Result<Vec<f32>, ModelError> {
            let values = rope.get(name).and_then(Value::as_array);
            let values: Vec<f32> = values
                .into_iter()
                .flatten()
                .filter_map(Value::as_f64)
                .filter(|factor| *factor > 0.0)
                .map(|factor| factor as f32)
                .collect();
            match values.len() == rotated / 2 {
                true => Ok(values),
                false => Err(self.config(format!(
                    "`{key}` needs `{name}`: {} positive numbers, one for each pair of dimensions \
                     that is turned",
                    rotated / 2
                ))),
            }
        };
        let name = "original_max_position_embeddings";
        let original_positions = match (self.size(name)?, rope.size(name)?) {
            (Some(positions), _) | (None, Some(positions)) => positions,
            (None, None) if sizes.model_type == ModelType::Phi3 => 4096,
            (None, None) => sizes.max_positions,
        };
        if original_positions < 2 {
            return Err(self.config(format!("`{name}` is {original_positions}; at least 2")));
        }
        let original = original_positions as f64;
        let factor = rope.number("factor")?;
        let factor = factor.unwrap_or(sizes.max_positions as f64 / original);
        let attention_factor = match rope.number("attention_factor")? {
            Some(factor) => factor,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original.ln()).sqrt(),
        };
        Ok(RopeScaling::Long {
            short_factors: factors("short_factor")?,
            long_factors: factors("long_factor")?,
            original_positions,
            attention_factor: attention_factor as f32,
        })
    }
}
