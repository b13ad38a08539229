//! Reading the `config.json` of a language model, by the rules and defaults of Transformers'
//! configuration classes.

use serde_json::{Map, Value};

use crate::config::{
    Activation, DecoderConfig, EncoderConfig, Kind, ModelConfig, ModelType, RopeScaling,
};
use crate::error::ModelError;
use crate::keys::Keys;

impl Keys<'_> {
    /// The whole configuration, checked.
    pub fn model(&self) -> Result<ModelConfig, ModelError> {
        let model_type = match self.text("model_type")? {
            Some("llama") => ModelType::Llama,
            Some("mistral") => ModelType::Mistral,
            Some("qwen2") => ModelType::Qwen2,
            Some("qwen3") => ModelType::Qwen3,
            Some("bert") => ModelType::Bert,
            Some("roberta") => ModelType::Roberta,
            _ => {
                return Err(self.unsupported(
                    "model_type",
                    "use llama (also SmolLM2), mistral, qwen2, qwen3, bert (also MiniLM) or roberta",
                ));
            }
        };
        let quantization = self.quantization()?;
        let hidden = self.required("hidden_size")?;
        let heads = self.required("num_attention_heads")?;
        let layers = self.layers("num_hidden_layers", None)?;
        let encoder = matches!(model_type, ModelType::Bert | ModelType::Roberta);
        let mut config = ModelConfig {
            path: self.path.to_owned(),
            model_type,
            architectures: self.texts("architectures")?,
            vocab: self.required("vocab_size")?,
            hidden,
            layers,
            heads,
            intermediate: self.required("intermediate_size")?,
            max_positions: self.max_positions(model_type)?,
            norm_epsilon: if encoder {
                self.number("layer_norm_eps")?.unwrap_or(1e-12)
            } else {
                self.number("rms_norm_eps")?.unwrap_or(1e-6)
            },
            initializer_range: self.number("initializer_range")?.unwrap_or(0.02),
            pad_token_id: self.pad_token_id(model_type)?,
            quantization,
            kind: Kind::Encoder(EncoderConfig {
                token_types: 0,
                activation: Activation::Gelu,
                position_offset: 0,
            }),
        };
        config.kind = if encoder {
            Kind::Encoder(self.encoder(&config)?)
        } else {
            Kind::Decoder(self.decoder(&config)?)
        };
        Ok(config)
    }

    fn max_positions(&self, model_type: ModelType) -> Result<usize, ModelError> {
        // The defaults of Transformers' configuration classes, for files that leave the key out.
        let default = match model_type {
            ModelType::Llama => 2048,
            ModelType::Mistral => 131_072,
            ModelType::Qwen2 | ModelType::Qwen3 => 32_768,
            ModelType::Bert | ModelType::Roberta => 512,
        };
        Ok(self.size("max_position_embeddings")?.unwrap_or(default))
    }

    fn pad_token_id(&self, model_type: ModelType) -> Result<Option<u32>, ModelError> {
        let default = match model_type {
            ModelType::Bert => Some(0),
            ModelType::Roberta => Some(1),
            _ => None,
        };
        if !self.object.contains_key("pad_token_id") {
            return Ok(default);
        }
        match self.get("pad_token_id") {
            None => Ok(None),
            // Llama files write -1 for "no padding token".
            Some(value) if value.as_i64() == Some(-1) => Ok(None),
            Some(value) => value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .map(Some)
                .ok_or_else(|| self.wrong("pad_token_id", "a token number")),
        }
    }

    fn decoder(&self, config: &ModelConfig) -> Result<DecoderConfig, ModelError> {
        let model_type = config.model_type;
        match self.text("hidden_act")? {
            None | Some("silu" | "swish") => {}
            Some(_) => return Err(self.unsupported("hidden_act", "decoders use silu")),
        }
        let kv_heads = match (self.object.get("num_key_value_heads"), model_type) {
            // Configuration classes with another default than `num_attention_heads`.
            (None, ModelType::Mistral) => 8,
            (None, ModelType::Qwen2 | ModelType::Qwen3) => 32,
            _ => self.size("num_key_value_heads")?.unwrap_or(config.heads),
        };
        if kv_heads == 0 || !config.heads.is_multiple_of(kv_heads) {
            return Err(self.config(format!(
                "`num_attention_heads` ({}) is not a multiple of `num_key_value_heads` ({kv_heads})",
                config.heads
            )));
        }
        let head_dim = match (self.size("head_dim")?, model_type) {
            (Some(head_dim), _) => head_dim,
            (None, ModelType::Qwen3) if !self.object.contains_key("head_dim") => 128,
            (None, _) if config.hidden.is_multiple_of(config.heads) => config.hidden / config.heads,
            (None, _) => {
                return Err(self.config(format!(
                    "`hidden_size` ({}) is not a multiple of `num_attention_heads` ({}) and \
                     `head_dim` is not given",
                    config.hidden, config.heads
                )));
            }
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(self.config(format!(
                "`head_dim` is {head_dim}; rotary positions need an even number"
            )));
        }
        let (rope_theta, rope_scaling) = self.rope(config)?;
        let attention_bias = self.flag("attention_bias")?.unwrap_or(false);
        let (qkv_bias, output_bias, mlp_bias) = match model_type {
            ModelType::Llama => (
                attention_bias,
                attention_bias,
                self.flag("mlp_bias")?.unwrap_or(false),
            ),
            ModelType::Qwen2 => (true, false, false),
            ModelType::Qwen3 => (attention_bias, attention_bias, false),
            _ => (false, false, false),
        };
        Ok(DecoderConfig {
            kv_heads,
            head_dim,
            rope_theta,
            rope_scaling,
            windows: self.windows(config)?,
            qkv_bias,
            output_bias,
            mlp_bias,
            query_key_norm: model_type == ModelType::Qwen3,
            tied_embeddings: self.flag("tie_word_embeddings")?.unwrap_or(false),
        })
    }

    /// One attention window a layer, by the rules of each configuration class of Transformers.
    fn windows(&self, config: &ModelConfig) -> Result<Vec<Option<usize>>, ModelError> {
        let layers = config.layers;
        let window = match (self.object.get("sliding_window"), config.model_type) {
            (_, ModelType::Llama) => None,
            (None, _) => Some(4096),
            (Some(_), _) => self.size("sliding_window")?,
        };
        if window == Some(0) {
            return Err(self.unsupported("sliding_window", "use null or at least 1"));
        }
        match config.model_type {
            ModelType::Mistral => {
                if self.get("layer_types").is_some() {
                    return Err(self.unsupported("layer_types", "Mistral has one window for all"));
                }
                return Ok(vec![window; layers]);
            }
            ModelType::Qwen2 | ModelType::Qwen3 => {}
            _ => return Ok(vec![None; layers]),
        }
        let window =
            window.filter(|_| self.flag("use_sliding_window").ok().flatten() == Some(true));
        let types = self.texts("layer_types")?;
        if types.is_empty() {
            let first = self.size("max_window_layers")?.unwrap_or(28);
            return Ok((0..layers)
                .map(|layer| window.filter(|_| layer >= first))
                .collect());
        }
        if types.len() != layers {
            return Err(self.config(format!(
                "`layer_types` has {} entries for {layers} layers",
                types.len()
            )));
        }
        types
            .iter()
            .map(|kind| match (kind.as_str(), window) {
                ("full_attention", _) => Ok(None),
                ("sliding_attention", Some(window)) => Ok(Some(window)),
                ("sliding_attention", None) => Err(self.config(
                    "`layer_types` has sliding_attention, but `use_sliding_window` or \
                     `sliding_window` is off",
                )),
                _ => Err(self.unsupported("layer_types", "full_attention and sliding_attention")),
            })
            .collect()
    }

    fn rope(&self, config: &ModelConfig) -> Result<(f64, RopeScaling), ModelError> {
        // `rope_parameters` is what Transformers 5 writes; `rope_scaling` beside `rope_theta` is
        // what most hub files have, and it wins where both are given.
        let key = if self.get("rope_scaling").is_some() {
            "rope_scaling"
        } else {
            "rope_parameters"
        };
        let empty = Map::new();
        let rope = match self.get(key) {
            None => &empty,
            Some(Value::Object(rope)) => rope,
            Some(_) => return Err(self.wrong(key, "an object")),
        };
        let rope = Keys::new(self.path, rope);
        let theta = match rope.number("rope_theta")? {
            Some(theta) => theta,
            None => self.number("rope_theta")?.unwrap_or(10_000.0),
        };
        for partial in [
            rope.number("partial_rotary_factor")?,
            self.number("partial_rotary_factor")?,
        ] {
            if partial.is_some_and(|factor| factor != 1.0) {
                return Err(self.unsupported("partial_rotary_factor", "only 1.0 is built"));
            }
        }
        let kind = match rope.text("rope_type")? {
            Some(kind) => Some(kind),
            None => rope.text("type")?,
        };
        let required = |name: &str| -> Result<f64, ModelError> {
            match rope.number(name)? {
                Some(value) if value > 0.0 => Ok(value),
                Some(_) => Err(rope.wrong(name, "a positive number")),
                None => Err(self.config(format!("`{key}` lacks `{name}`"))),
            }
        };
        let scaling = match kind {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear {
                factor: required("factor")?,
            },
            Some("llama3") => RopeScaling::Llama3 {
                factor: required("factor")?,
                low_frequency_factor: required("low_freq_factor")?,
                high_frequency_factor: required("high_freq_factor")?,
                original_positions: match rope.number("original_max_position_embeddings")? {
                    Some(positions) => positions,
                    None => config.max_positions as f64,
                },
            },
            Some(_) => {
                return Err(
                    self.unsupported(key, "rope types default, linear and llama3 are built")
                );
            }
        };
        if theta <= 0.0 {
            return Err(self.wrong("rope_theta", "a positive number"));
        }
        Ok((theta, scaling))
    }

    fn encoder(&self, config: &ModelConfig) -> Result<EncoderConfig, ModelError> {
        for key in ["is_decoder", "add_cross_attention"] {
            if self.flag(key)? == Some(true) {
                return Err(self.unsupported(key, "encoders attend in both directions"));
            }
        }
        if !matches!(
            self.text("position_embedding_type")?,
            None | Some("absolute")
        ) {
            return Err(self.unsupported("position_embedding_type", "only absolute is built"));
        }
        self.head_dim(
            ("hidden_size", config.hidden),
            ("num_attention_heads", config.heads),
        )?;
        let activation = self.activation("hidden_act", Activation::Gelu)?;
        let position_offset = match (config.model_type, config.pad_token_id) {
            (ModelType::Roberta, Some(padding)) => padding as usize + 1,
            (ModelType::Roberta, None) => {
                return Err(self.config(
                    "RoBERTa's positions start after `pad_token_id`, which is null".to_owned(),
                ));
            }
            _ => 0,
        };
        Ok(EncoderConfig {
            token_types: self.size("type_vocab_size")?.unwrap_or(2),
            activation,
            position_offset,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Family;

    fn parse(json: Value) -> Result<ModelConfig, ModelError> {
        let Value::Object(object) = json else {
            panic!("an object")
        };
        Keys::new(Path::new("config.json"), &object).model()
    }

    fn llama() -> Value {
        serde_json::json!({
            "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4,
            "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 48,
        })
    }

    fn decoder(config: &ModelConfig) -> &DecoderConfig {
        match &config.kind {
            Kind::Decoder(decoder) => decoder,
            Kind::Encoder(_) => panic!("a decoder"),
        }
    }

    #[test]
    fn defaults_follow_the_configuration_classes() {
        let config = parse(llama()).unwrap();
        assert_eq!(decoder(&config).kv_heads, 4);
        assert_eq!(decoder(&config).head_dim, 8);
        assert_eq!(decoder(&config).windows, [None, None]);
        let mut mistral = llama();
        mistral["model_type"] = "mistral".into();
        mistral["num_attention_heads"] = 8.into();
        let config = parse(mistral).unwrap();
        assert_eq!(decoder(&config).kv_heads, 8);
        assert_eq!(decoder(&config).windows, [Some(4096), Some(4096)]);
        let mut qwen3 = llama();
        qwen3["model_type"] = "qwen3".into();
        qwen3["num_key_value_heads"] = 2.into();
        assert_eq!(decoder(&parse(qwen3).unwrap()).head_dim, 128);
    }

    #[test]
    fn qwen_windows_start_at_max_window_layers() {
        let mut qwen = llama();
        qwen["model_type"] = "qwen2".into();
        qwen["num_key_value_heads"] = 2.into();
        qwen["sliding_window"] = 16.into();
        qwen["max_window_layers"] = 1.into();
        assert_eq!(decoder(&parse(qwen.clone()).unwrap()).windows, [None, None]);
        qwen["use_sliding_window"] = true.into();
        assert_eq!(
            decoder(&parse(qwen.clone()).unwrap()).windows,
            [None, Some(16)]
        );
        qwen["layer_types"] = serde_json::json!(["sliding_attention", "full_attention"]);
        assert_eq!(decoder(&parse(qwen).unwrap()).windows, [Some(16), None]);
    }

    #[test]
    fn rope_is_read_in_both_spellings() {
        let mut config = llama();
        config["rope_theta"] = 5e5.into();
        config["rope_scaling"] = serde_json::json!({"type": "linear", "factor": 4.0});
        let parsed = parse(config).unwrap();
        assert_eq!(decoder(&parsed).rope_theta, 5e5);
        assert_eq!(
            decoder(&parsed).rope_scaling,
            RopeScaling::Linear { factor: 4.0 }
        );
        let mut config = llama();
        config["rope_parameters"] = serde_json::json!({
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        });
        assert_eq!(
            decoder(&parse(config).unwrap()).rope_scaling,
            RopeScaling::Llama3 {
                factor: 8.0,
                low_frequency_factor: 1.0,
                high_frequency_factor: 4.0,
                original_positions: 2048.0,
            }
        );
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let cases: [(&str, Value); 8] = [
            ("model_type", "gpt2".into()),
            ("hidden_act", "gelu".into()),
            (
                "rope_scaling",
                serde_json::json!({"type": "yarn", "factor": 2.0}),
            ),
            ("partial_rotary_factor", 0.5.into()),
            ("quantization_config", serde_json::json!({"bits": 4})),
            ("num_key_value_heads", 3.into()),
            ("num_hidden_layers", 1_000_000_000.into()),
            ("hidden_size", "wide".into()),
        ];
        for (key, value) in cases {
            let mut config = llama();
            config[key] = value;
            let error = parse(config).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }

    #[test]
    fn roberta_positions_start_after_the_padding_token() {
        let config = parse(serde_json::json!({
            "model_type": "roberta", "hidden_size": 32, "num_attention_heads": 4,
            "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 48,
            "max_position_embeddings": 42, "pad_token_id": 1,
        }))
        .unwrap();
        assert_eq!(config.max_positions(), 40);
        assert_eq!(config.family(), Family::Encoder);
    }
}
