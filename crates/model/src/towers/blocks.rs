//! The transformer layer that all towers share: layer norm before each block, attention in both
//! directions.

use burn::tensor::{DType, Int, Tensor};
use calor_kernels::AttentionOptions;

use crate::attention::{Attention, Masking, Places, Projections};
use crate::builder::Builder;
use crate::error::ModelError;
use crate::mlp::Mlp;
use crate::norm::LayerNorm;
use crate::parameter::Visit;
use crate::run::Mode;

use super::config::{TowerConfig, TowerType};

#[derive(Debug, Clone)]
pub(super) struct Block {
    attention_norm: LayerNorm,
    attention: Attention,
    mlp_norm: LayerNorm,
    mlp: Mlp,
}

impl Block {
    pub fn build(
        builder: &Builder,
        config: &TowerConfig,
        layer: usize,
    ) -> Result<Block, ModelError> {
        let names = config.tower_type.names();
        let at = |name: &str| format!("{}.{layer}.{name}", names.layers);
        let linear = |name: &str, bias| builder.linear(&at(name), bias);
        let norm = |name: &str| builder.layer_norm(&at(name), config.norm_epsilon);
        let key_bias = config.qkv_bias && config.tower_type != TowerType::Whisper;
        Ok(Block {
            attention_norm: norm(names.attention_norm)?,
            attention: Attention {
                projections: Projections::Split(Box::new([
                    linear(names.query, config.qkv_bias)?,
                    linear(names.key, key_bias)?,
                    linear(names.value, config.qkv_bias)?,
                ])),
                output: linear(names.output, true)?,
                query_key_norm: None,
                relative: None,
                heads: config.heads,
                kv_heads: config.heads,
                head_dim: config.head_dim,
                options: AttentionOptions {
                    causal: false,
                    window: None,
                    scale: (config.head_dim as f32).powf(-0.5),
                    soft_cap: None,
                },
            },
            mlp_norm: norm(names.mlp_norm)?,
            mlp: Mlp {
                intermediate: linear(names.up, true)?,
                output: linear(names.down, true)?,
                activation: config.activation,
            },
        })
    }

    /// `states` `[items, tokens, width]`, `segments` `[items, tokens]`; returns as `states`.
    pub fn forward(&self, states: Tensor<3>, segments: &Tensor<2, Int>, mode: Mode) -> Tensor<3> {
        let context = self.attention.context(
            self.attention_norm.forward(states.clone()),
            &Places::default(),
            segments.clone(),
            Masking::Segments,
            mode,
        );
        let states = states + self.attention.output.forward(context, mode);
        let normed = self.mlp_norm.forward(states.clone());
        let states = states + self.mlp.forward(normed, mode);
        match states.dtype() {
            // As Transformers does for Whisper: its largest states leave the range of f16.
            DType::F16 => states.clamp(-F16_LIMIT, F16_LIMIT),
            _ => states,
        }
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.attention_norm.visit(visitor);
        self.attention.visit(visitor);
        self.mlp_norm.visit(visitor);
        self.mlp.visit(visitor);
    }
}

/// The largest f16 less 1000.
const F16_LIMIT: f32 = 64_504.0;
