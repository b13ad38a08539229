//! Reading the `config.json` of a language model, by the rules and defaults of Transformers'
//! configuration classes.

mod decoders;
mod encoders;
mod rope;
#[cfg(test)]
mod tests;

use crate::config::{
    Activation, ClassifierDesign, Design, Family, LayerDesign, ModelConfig, ModelType, NormKind,
};
use crate::error::ModelError;
use crate::keys::Keys;

/// What every configuration has, under whatever keys.
struct Sizes {
    model_type: ModelType,
    hidden: usize,
    layers: usize,
    heads: usize,
    max_positions: usize,
    pad_token_id: Option<u32>,
}

/// Defaults of a configuration class, for files that leave a key out.
struct Defaults {
    max_positions: usize,
    /// The norms' ε: its key and its value.
    norm_epsilon: (&'static str, f64),
    pad_token_id: Option<u32>,
}

impl Defaults {
    fn of(model_type: ModelType) -> Defaults {
        let (max_positions, norm_epsilon, pad_token_id) = match model_type {
            ModelType::Llama => (2048, ("rms_norm_eps", 1e-6), None),
            ModelType::Mistral => (131_072, ("rms_norm_eps", 1e-6), None),
            ModelType::Qwen2 | ModelType::Qwen3 => (32_768, ("rms_norm_eps", 1e-6), None),
            ModelType::Olmo2 => (2048, ("rms_norm_eps", 1e-5), Some(1)),
            ModelType::Phi3 => (4096, ("rms_norm_eps", 1e-5), Some(32_000)),
            ModelType::Gemma2 => (8192, ("rms_norm_eps", 1e-6), Some(0)),
            ModelType::Gemma3 => (131_072, ("rms_norm_eps", 1e-6), Some(0)),
            ModelType::Gpt2 => (1024, ("layer_norm_epsilon", 1e-5), None),
            ModelType::GptNeox => (2048, ("layer_norm_eps", 1e-5), None),
            ModelType::Bert => (512, ("layer_norm_eps", 1e-12), Some(0)),
            ModelType::Roberta => (512, ("layer_norm_eps", 1e-12), Some(1)),
            ModelType::Electra => (512, ("layer_norm_eps", 1e-12), Some(0)),
            ModelType::ModernBert => (8192, ("norm_eps", 1e-5), Some(50_283)),
            ModelType::Deberta => (512, ("layer_norm_eps", 1e-7), Some(0)),
        };
        Defaults {
            max_positions,
            norm_epsilon,
            pad_token_id,
        }
    }
}

impl Design {
    /// Plain attention without positions, norm, bias or window: what a type's own function starts
    /// from.
    fn plain(family: Family, sizes: &Sizes, head_dim: usize) -> Design {
        let layer = LayerDesign {
            window: None,
            rope: None,
            scale: (head_dim as f32).powf(-0.5),
        };
        Design {
            family,
            embedding_width: sizes.hidden,
            embedding_scale: None,
            padding_row: true,
            learned_positions: None,
            token_types: 0,
            kv_heads: sizes.heads,
            head_dim,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            fused_by_head: false,
            query_key_norm: None,
            attention_soft_cap: None,
            logit_soft_cap: None,
            norm: NormKind::Layer { bias: true },
            parallel: false,
            transposed: false,
            activation: Activation::Gelu,
            layers: vec![layer; sizes.layers],
            ropes: Vec::new(),
            relative: None,
            tied_embeddings: false,
            classifier: ClassifierDesign {
                activation: Activation::Tanh,
                bias: true,
                mean: false,
            },
        }
    }
}

impl Keys<'_> {
    /// The whole configuration, checked.
    pub fn model(&self) -> Result<ModelConfig, ModelError> {
        let model_type = self.model_type()?;
        let quantization = self.quantization()?;
        let defaults = Defaults::of(model_type);
        // GPT-2's own keys; its class takes the others too.
        let gpt2 = model_type == ModelType::Gpt2;
        let key = |own: &'static str, usual: &'static str| match gpt2 && self.get(own).is_some() {
            true => own,
            false => usual,
        };
        let hidden = self.required(key("n_embd", "hidden_size"))?;
        let positions = key("n_positions", "max_position_embeddings");
        let sizes = Sizes {
            model_type,
            hidden,
            layers: self.layers(key("n_layer", "num_hidden_layers"), None)?,
            heads: self.required(key("n_head", "num_attention_heads"))?,
            max_positions: self.size(positions)?.unwrap_or(defaults.max_positions),
            pad_token_id: self.pad_token_id(defaults.pad_token_id)?,
        };
        let intermediate = match gpt2 {
            true => self.size("n_inner")?.unwrap_or(4 * hidden),
            false => self.required("intermediate_size")?,
        };
        let (epsilon_key, epsilon) = defaults.norm_epsilon;
        Ok(ModelConfig {
            path: self.path.to_owned(),
            model_type,
            architectures: self.texts("architectures")?,
            vocab: self.required("vocab_size")?,
            hidden,
            heads: sizes.heads,
            intermediate,
            max_positions: sizes.max_positions,
            norm_epsilon: self.number(epsilon_key)?.unwrap_or(epsilon),
            initializer_range: self.number("initializer_range")?.unwrap_or(0.02),
            pad_token_id: sizes.pad_token_id,
            quantization,
            design: match model_type {
                ModelType::Gpt2 => self.gpt2(&sizes)?,
                ModelType::GptNeox => self.gpt_neox(&sizes)?,
                ModelType::Bert | ModelType::Roberta | ModelType::Electra => self.bert(&sizes)?,
                ModelType::ModernBert => self.modernbert(&sizes)?,
                ModelType::Deberta => self.deberta(&sizes)?,
                _ => self.llama(&sizes)?,
            },
        })
    }

    fn model_type(&self) -> Result<ModelType, ModelError> {
        let name = self.text("model_type")?;
        let known = ModelType::NAMES
            .iter()
            .find(|(known, _)| name == Some(known));
        if let Some((_, model_type)) = known {
            return Ok(*model_type);
        }
        if name == Some("gemma3") {
            return Err(self.unsupported(
                "model_type",
                "of Gemma 3 the text-only checkpoints are built (gemma3_text), not those that see",
            ));
        }
        let names = ModelType::NAMES.map(|(name, _)| name).join(", ");
        Err(self.unsupported(
            "model_type",
            &format!("use one of {names} (SmolLM2 is a llama, MiniLM a bert)"),
        ))
    }

    fn pad_token_id(&self, default: Option<u32>) -> Result<Option<u32>, ModelError> {
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

    /// Refuses what is switched on, by flags that are off in what is built.
    fn off(&self, flags: &[&str], supported: &str) -> Result<(), ModelError> {
        for key in flags {
            if self.flag(key)? == Some(true) {
                return Err(self.unsupported(key, supported));
            }
        }
        Ok(())
    }

    /// For each layer whether its attention has the window, from `layer_types`, else from `default`.
    fn sliding(
        &self,
        layers: usize,
        default: impl Fn(usize) -> bool,
    ) -> Result<Vec<bool>, ModelError> {
        let types = self.texts("layer_types")?;
        if types.is_empty() {
            return Ok((0..layers).map(default).collect());
        }
        if types.len() != layers {
            return Err(self.config(format!(
                "`layer_types` has {} entries for {layers} layers",
                types.len()
            )));
        }
        types
            .iter()
            .map(|kind| match kind.as_str() {
                "full_attention" => Ok(false),
                "sliding_attention" => Ok(true),
                _ => Err(self.unsupported("layer_types", "full_attention and sliding_attention")),
            })
            .collect()
    }

    /// A number above 0, where the file has one.
    fn positive(&self, key: &str) -> Result<Option<f32>, ModelError> {
        match self.number(key)? {
            Some(value) if value > 0.0 => Ok(Some(value as f32)),
            Some(_) => Err(self.wrong(key, "a positive number or null")),
            None => Ok(None),
        }
    }

    /// As [`Keys::positive`] with the default of the configuration class, which `null` switches off.
    fn positive_or(&self, key: &str, default: f32) -> Result<Option<f32>, ModelError> {
        match self.object.contains_key(key) {
            true => self.positive(key),
            false => Ok(Some(default)),
        }
    }
}
