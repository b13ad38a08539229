//! Configurations of encoders.

use serde_json::Value;

use super::Sizes;
use super::rope::RopeKeys;
use crate::config::{
    Activation, ClassifierDesign, Design, Family, ModelType, NormKind, RelativeConfig,
};
use crate::error::ModelError;
use crate::keys::Keys;

impl Keys<'_> {
    /// BERT, RoBERTa and ELECTRA.
    pub(super) fn bert(&self, sizes: &Sizes) -> Result<Design, ModelError> {
        self.off(
            &["is_decoder", "add_cross_attention"],
            "encoders attend in both directions",
        )?;
        if !matches!(
            self.text("position_embedding_type")?,
            None | Some("absolute")
        ) {
            return Err(self.unsupported("position_embedding_type", "only absolute is built"));
        }
        let electra = sizes.model_type == ModelType::Electra;
        let mut design = self.encoder(sizes)?;
        design.learned_positions = Some(match (sizes.model_type, sizes.pad_token_id) {
            (ModelType::Roberta, Some(padding)) => padding as usize + 1,
            (ModelType::Roberta, None) => {
                return Err(self.config(
                    "RoBERTa's positions start after `pad_token_id`, which is null".to_owned(),
                ));
            }
            _ => 0,
        });
        design.token_types = self.size("type_vocab_size")?.unwrap_or(2);
        if electra {
            design.embedding_width = self.sized("embedding_size", 128)?;
            design.classifier.activation = Activation::Gelu;
        }
        Ok(design)
    }

    pub(super) fn modernbert(&self, sizes: &Sizes) -> Result<Design, ModelError> {
        let head_dim = self.encoder_head_dim(sizes)?;
        if !head_dim.is_multiple_of(2) {
            return Err(self.config(format!(
                "heads have {head_dim} dimensions; rotary positions need an even number"
            )));
        }
        let attention_bias = self.flag("attention_bias")?.unwrap_or(false);
        let rope = |theta, default_theta, layers| {
            let keys = RopeKeys {
                theta,
                default_theta,
                layers: Some(layers),
                scaled: true,
            };
            self.rope(sizes, head_dim, &keys)
        };
        let mut design = Design {
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            mlp_bias: self.flag("mlp_bias")?.unwrap_or(false),
            norm: NormKind::Layer {
                bias: self.flag("norm_bias")?.unwrap_or(false),
            },
            activation: self.activation("hidden_activation", Activation::Gelu)?,
            ropes: vec![
                rope("global_rope_theta", 160_000.0, "full_attention")?,
                rope("local_rope_theta", 10_000.0, "sliding_attention")?,
            ],
            classifier: ClassifierDesign {
                activation: self.activation("classifier_activation", Activation::Gelu)?,
                bias: self.flag("classifier_bias")?.unwrap_or(false),
                mean: match self.text("classifier_pooling")? {
                    None | Some("cls") => false,
                    Some("mean") => true,
                    Some(_) => return Err(self.unsupported("classifier_pooling", "cls and mean")),
                },
            },
            ..Design::plain(Family::Encoder, sizes, head_dim)
        };
        let every = self.sized("global_attn_every_n_layers", 3)?;
        let sliding = self.sliding(sizes.layers, |layer| layer % every != 0)?;
        // Half of `local_attention` to each side, and the token itself.
        let window = self.sized("local_attention", 128)? / 2 + 1;
        for (layer, sliding) in design.layers.iter_mut().zip(sliding) {
            layer.window = sliding.then_some(window);
            layer.rope = Some(usize::from(sliding));
        }
        Ok(design)
    }

    pub(super) fn deberta(&self, sizes: &Sizes) -> Result<Design, ModelError> {
        if self.flag("relative_attention")? != Some(true) {
            return Err(self.unsupported("relative_attention", "only true is built"));
        }
        if self.size("conv_kernel_size")?.is_some_and(|size| size > 0) {
            return Err(self.unsupported(
                "conv_kernel_size",
                "layers without a convolution are built (DeBERTa-v3)",
            ));
        }
        for key in ["embedding_size", "pooler_hidden_size"] {
            if self.size(key)?.is_some_and(|size| size != sizes.hidden) {
                return Err(self.unsupported(key, "only that of `hidden_size` is built"));
            }
        }
        let mut design = self.encoder(sizes)?;
        if self
            .size("attention_head_size")?
            .is_some_and(|size| size != design.head_dim)
        {
            return Err(self.unsupported(
                "attention_head_size",
                "heads have hidden_size / num_attention_heads",
            ));
        }
        let kinds = match self.get("pos_att_type") {
            Some(Value::String(kinds)) => kinds
                .split('|')
                .map(|kind| kind.trim().to_lowercase())
                .collect(),
            _ => self.texts("pos_att_type")?,
        };
        let known = ["c2p", "p2c"];
        if kinds.is_empty() || kinds.iter().any(|kind| !known.contains(&kind.as_str())) {
            return Err(self.unsupported("pos_att_type", "c2p, p2c or both are built"));
        }
        let norm = match self.text("norm_rel_ebd")?.unwrap_or("none") {
            "none" => false,
            "layer_norm" => true,
            _ => return Err(self.unsupported("norm_rel_ebd", "none and layer_norm are built")),
        };
        // Both keys say -1 for "not given".
        let given = |key: &str| -> Result<Option<usize>, ModelError> {
            match self.get(key) {
                Some(value) if value.as_i64().is_some_and(|value| value < 1) => Ok(None),
                _ => self.size(key),
            }
        };
        let relative = RelativeConfig {
            buckets: given("position_buckets")?,
            max_distance: given("max_relative_positions")?.unwrap_or(sizes.max_positions),
            content_to_position: kinds.iter().any(|kind| kind == "c2p"),
            position_to_content: kinds.iter().any(|kind| kind == "p2c"),
            shared: self.flag("share_att_key")?.unwrap_or(false),
            norm,
        };
        if relative
            .buckets
            .is_some_and(|buckets| buckets < 2 || buckets / 2 + 1 >= relative.max_distance)
        {
            return Err(self.config(
                "`position_buckets` has to be at least 2, and half of it below `max_relative_positions`",
            ));
        }
        let parts = 1
            + usize::from(relative.content_to_position)
            + usize::from(relative.position_to_content);
        for layer in &mut design.layers {
            layer.scale = ((design.head_dim * parts) as f32).powf(-0.5);
        }
        design.relative = Some(relative);
        let absolute = self.flag("position_biased_input")?.unwrap_or(true);
        design.learned_positions = absolute.then_some(0);
        design.token_types = self.size("type_vocab_size")?.unwrap_or(0);
        design.classifier.activation = self.activation("pooler_hidden_act", Activation::Gelu)?;
        Ok(design)
    }

    /// What BERT and those after it share: biases everywhere, layer norms, as many heads for keys
    /// as for queries.
    fn encoder(&self, sizes: &Sizes) -> Result<Design, ModelError> {
        Ok(Design {
            qkv_bias: true,
            output_bias: true,
            mlp_bias: true,
            activation: self.activation("hidden_act", Activation::Gelu)?,
            ..Design::plain(Family::Encoder, sizes, self.encoder_head_dim(sizes)?)
        })
    }

    fn encoder_head_dim(&self, sizes: &Sizes) -> Result<usize, ModelError> {
        self.head_dim(
            ("hidden_size", sizes.hidden),
            ("num_attention_heads", sizes.heads),
        )
    }
}
