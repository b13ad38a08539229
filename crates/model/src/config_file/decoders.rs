//! Configurations of decoders.

use super::Sizes;
use super::rope::RopeKeys;
use crate::config::{Activation, Design, Family, ModelType, NormKind, NormSpan};
use crate::error::ModelError;
use crate::keys::Keys;

impl Keys<'_> {
    /// Llama and those that share its keys.
    pub(super) fn llama(&self, sizes: &Sizes) -> Result<Design, ModelError> {
        let model_type = sizes.model_type;
        let gemma = matches!(model_type, ModelType::Gemma2 | ModelType::Gemma3);
        let activation = match gemma {
            true => self.activation("hidden_activation", Activation::GeluTanh)?,
            false => match self.text("hidden_act")? {
                None | Some("silu" | "swish") => Activation::Silu,
                Some(_) => return Err(self.unsupported("hidden_act", "these decoders use silu")),
            },
        };
        self.off(
            &["use_bidirectional_attention"],
            "decoders attend to earlier tokens",
        )?;
        let head_dim = self.rotary_head_dim(sizes)?;
        let attention_bias = self.flag("attention_bias")?.unwrap_or(false);
        let (qkv_bias, output_bias, mlp_bias) = match model_type {
            ModelType::Llama => (
                attention_bias,
                attention_bias,
                self.flag("mlp_bias")?.unwrap_or(false),
            ),
            ModelType::Qwen2 => (true, false, false),
            ModelType::Mistral | ModelType::Phi3 => (false, false, false),
            _ => (attention_bias, attention_bias, false),
        };
        let mut design = Design {
            kv_heads: self.kv_heads(sizes)?,
            qkv_bias,
            output_bias,
            mlp_bias,
            query_key_norm: match model_type {
                ModelType::Qwen3 | ModelType::Gemma3 => Some(NormSpan::Head),
                ModelType::Olmo2 => Some(NormSpan::Width),
                _ => None,
            },
            norm: match gemma {
                true => NormKind::RmsOffset,
                false => NormKind::Rms,
            },
            activation,
            tied_embeddings: self.flag("tie_word_embeddings")?.unwrap_or(gemma),
            ..Design::plain(Family::Decoder, sizes, head_dim)
        };
        for (layer, window) in design.layers.iter_mut().zip(self.windows(sizes)?) {
            layer.window = window;
            layer.rope = Some(0);
        }
        match gemma {
            true => self.gemma(sizes, head_dim, &mut design)?,
            false => design.ropes = vec![self.rope(sizes, head_dim, &RopeKeys::USUAL)?],
        }
        Ok(design)
    }

    /// What Gemma 2 and 3 have beside.
    fn gemma(&self, sizes: &Sizes, head_dim: usize, design: &mut Design) -> Result<(), ModelError> {
        design.embedding_scale = Some((sizes.hidden as f64).sqrt());
        let scalar = self.number("query_pre_attn_scalar")?.unwrap_or(256.0);
        if scalar <= 0.0 {
            return Err(self.wrong("query_pre_attn_scalar", "a positive number"));
        }
        let second = sizes.model_type == ModelType::Gemma2;
        for layer in &mut design.layers {
            layer.scale = scalar.powf(-0.5) as f32;
            // Gemma 3's windows turn by frequencies of their own.
            layer.rope = Some(usize::from(!second && layer.window.is_some()));
        }
        if second {
            design.attention_soft_cap = self.positive_or("attn_logit_softcapping", 50.0)?;
            design.logit_soft_cap = self.positive_or("final_logit_softcapping", 30.0)?;
            design.ropes = vec![self.rope(sizes, head_dim, &RopeKeys::USUAL)?];
            return Ok(());
        }
        // Its class has a key for the cap of attention and does not use it.
        design.logit_soft_cap = self.positive("final_logit_softcapping")?;
        let global = RopeKeys {
            default_theta: 1_000_000.0,
            layers: Some("full_attention"),
            ..RopeKeys::USUAL
        };
        let local = RopeKeys {
            theta: "rope_local_base_freq",
            layers: Some("sliding_attention"),
            scaled: false,
            ..RopeKeys::USUAL
        };
        design.ropes = vec![
            self.rope(sizes, head_dim, &global)?,
            self.rope(sizes, head_dim, &local)?,
        ];
        Ok(())
    }

    pub(super) fn gpt2(&self, sizes: &Sizes) -> Result<Design, ModelError> {
        self.off(&["add_cross_attention"], "GPT-2 attends to its own tokens")?;
        let head_dim = self.head_dim(("n_embd", sizes.hidden), ("n_head", sizes.heads))?;
        let mut design = Design {
            padding_row: false,
            learned_positions: Some(0),
            qkv_bias: true,
            output_bias: true,
            mlp_bias: true,
            transposed: true,
            activation: self.activation("activation_function", Activation::GeluTanh)?,
            tied_embeddings: self.flag("tie_word_embeddings")?.unwrap_or(true),
            ..Design::plain(Family::Decoder, sizes, head_dim)
        };
        let scaled = self.flag("scale_attn_weights")?.unwrap_or(true);
        let by_layer = self
            .flag("scale_attn_by_inverse_layer_idx")?
            .unwrap_or(false);
        for (index, layer) in design.layers.iter_mut().enumerate() {
            if !scaled {
                layer.scale = 1.0;
            }
            if by_layer {
                layer.scale /= (index + 1) as f32;
            }
        }
        Ok(design)
    }

    pub(super) fn gpt_neox(&self, sizes: &Sizes) -> Result<Design, ModelError> {
        let head_dim = self.head_dim(
            ("hidden_size", sizes.hidden),
            ("num_attention_heads", sizes.heads),
        )?;
        let bias = self.flag("attention_bias")?.unwrap_or(true);
        let keys = RopeKeys {
            theta: "rotary_emb_base",
            ..RopeKeys::USUAL
        };
        let mut design = Design {
            padding_row: false,
            qkv_bias: bias,
            output_bias: bias,
            mlp_bias: true,
            fused_by_head: true,
            parallel: self.flag("use_parallel_residual")?.unwrap_or(true),
            activation: self.activation("hidden_act", Activation::Gelu)?,
            ropes: vec![self.rope(sizes, head_dim, &keys)?],
            tied_embeddings: self.flag("tie_word_embeddings")?.unwrap_or(false),
            ..Design::plain(Family::Decoder, sizes, head_dim)
        };
        for layer in &mut design.layers {
            layer.rope = Some(0);
        }
        Ok(design)
    }

    fn kv_heads(&self, sizes: &Sizes) -> Result<usize, ModelError> {
        let kv_heads = match (self.object.get("num_key_value_heads"), sizes.model_type) {
            // Configuration classes with another default than `num_attention_heads`.
            (None, ModelType::Mistral) => 8,
            (None, ModelType::Qwen2 | ModelType::Qwen3) => 32,
            (None, ModelType::Gemma2 | ModelType::Gemma3) => 4,
            _ => self.size("num_key_value_heads")?.unwrap_or(sizes.heads),
        };
        if kv_heads == 0 || !sizes.heads.is_multiple_of(kv_heads) {
            return Err(self.config(format!(
                "`num_attention_heads` ({}) is not a multiple of `num_key_value_heads` ({kv_heads})",
                sizes.heads
            )));
        }
        Ok(kv_heads)
    }

    fn rotary_head_dim(&self, sizes: &Sizes) -> Result<usize, ModelError> {
        let given = self.object.contains_key("head_dim");
        let head_dim = match (self.size("head_dim")?, sizes.model_type) {
            (Some(head_dim), _) => head_dim,
            (None, ModelType::Qwen3) if !given => 128,
            (None, ModelType::Gemma2 | ModelType::Gemma3) if !given => 256,
            (None, _) if sizes.hidden.is_multiple_of(sizes.heads) => sizes.hidden / sizes.heads,
            (None, _) => {
                return Err(self.config(format!(
                    "`hidden_size` ({}) is not a multiple of `num_attention_heads` ({}) and \
                     `head_dim` is not given",
                    sizes.hidden, sizes.heads
                )));
            }
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(self.config(format!(
                "`head_dim` is {head_dim}; rotary positions need an even number"
            )));
        }
        Ok(head_dim)
    }

    /// One attention window a layer, by the rules of each configuration class of Transformers.
    fn windows(&self, sizes: &Sizes) -> Result<Vec<Option<usize>>, ModelError> {
        let layers = sizes.layers;
        let window = match (self.object.get("sliding_window"), sizes.model_type) {
            (_, ModelType::Llama | ModelType::Olmo2) | (None, ModelType::Phi3) => None,
            (None, _) => Some(4096),
            (Some(_), _) => self.size("sliding_window")?,
        };
        if window == Some(0) {
            return Err(self.unsupported("sliding_window", "use null or at least 1"));
        }
        let sliding = match sizes.model_type {
            ModelType::Mistral | ModelType::Phi3 => {
                if self.get("layer_types").is_some() {
                    return Err(self.unsupported("layer_types", "this type has one window for all"));
                }
                return Ok(vec![window; layers]);
            }
            ModelType::Qwen2 | ModelType::Qwen3 => {
                let on = self.flag("use_sliding_window")? == Some(true) && window.is_some();
                let first = self.size("max_window_layers")?.unwrap_or(28);
                let sliding = self.sliding(layers, |layer| on && layer >= first)?;
                if !on && sliding.contains(&true) {
                    return Err(self.config(
                        "`layer_types` has sliding_attention, but `use_sliding_window` or \
                         `sliding_window` is off",
                    ));
                }
                sliding
            }
            ModelType::Gemma2 => self.sliding(layers, |layer| layer % 2 == 0)?,
            ModelType::Gemma3 => {
                let pattern = self.sized("sliding_window_pattern", 6)?;
                self.sliding(layers, |layer| (layer + 1) % pattern != 0)?
            }
            _ => return Ok(vec![None; layers]),
        };
        if window.is_none() && sliding.contains(&true) {
            return Err(self
                .config("some layers are to have a sliding window, but `sliding_window` is null"));
        }
        Ok(sliding
            .iter()
            .map(|&sliding| window.filter(|_| sliding))
            .collect())
    }
}
