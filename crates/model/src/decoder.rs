//! The decoder family: Llama, SmolLM2, Mistral, Qwen2, Qwen3.

use burn::tensor::Tensor;
use calor_kernels::AttentionOptions;

use crate::attention::Attention;
use crate::builder::Builder;
use crate::config::{DecoderConfig, ModelConfig};
use crate::embedding::TokenEmbedding;
use crate::error::ModelError;
use crate::mlp::GatedMlp;
use crate::norm::RmsNorm;
use crate::parameter::Visit;
use crate::recompute::Block;
use crate::rope::{Angles, Rope};
use crate::run::Run;

#[derive(Debug, Clone)]
pub(crate) struct Decoder {
    pub embedding: TokenEmbedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    rope: Rope,
}

#[derive(Debug, Clone)]
struct Layer {
    attention: Attention,
    mlp: GatedMlp,
    input_norm: RmsNorm,
    middle_norm: RmsNorm,
}

impl Decoder {
    pub fn build(
        builder: &Builder,
        config: &ModelConfig,
        decoder: &DecoderConfig,
    ) -> Result<Decoder, ModelError> {
        Ok(Decoder {
            embedding: builder.token_embedding("embed_tokens", config.pad_token_id)?,
            layers: (0..config.layers)
                .map(|layer| Layer::build(builder, config, decoder, layer))
                .collect::<Result<_, _>>()?,
            norm: builder.rms_norm("norm", config.norm_epsilon)?,
            rope: Rope::new(decoder),
        })
    }

    /// Hidden states after the last norm: `[batch, seq, hidden]`, or `[1, samples, hidden]` of the
    /// selected tokens.
    pub fn forward(&self, run: &Run) -> Tensor<3> {
        let mut hidden = run.embed(&self.embedding);
        let positions = run.input.positions.clone();
        let angles = self
            .rope
            .angles(positions, hidden.dtype(), &hidden.device());
        for (index, layer) in self.layers.iter().enumerate() {
            hidden = run.block(layer, index, self.layers.len(), hidden, &angles);
        }
        self.norm.forward(hidden)
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.embedding.visit(visitor);
        for layer in &mut self.layers {
            layer.visit(visitor);
        }
        self.norm.visit(visitor);
    }
}

impl Layer {
    fn build(
        builder: &Builder,
        config: &ModelConfig,
        decoder: &DecoderConfig,
        layer: usize,
    ) -> Result<Layer, ModelError> {
        let at = |name: &str| format!("layers.{layer}.{name}");
        let epsilon = config.norm_epsilon;
        let linear = |name: &str, bias| builder.linear(&at(name), bias);
        Ok(Layer {
            attention: Attention {
                query: linear("self_attn.q_proj", decoder.qkv_bias)?,
                key: linear("self_attn.k_proj", decoder.qkv_bias)?,
                value: linear("self_attn.v_proj", decoder.qkv_bias)?,
                output: linear("self_attn.o_proj", decoder.output_bias)?,
                query_key_norm: match decoder.query_key_norm {
                    true => Some((
                        builder.rms_norm(&at("self_attn.q_norm"), epsilon)?,
                        builder.rms_norm(&at("self_attn.k_norm"), epsilon)?,
                    )),
                    false => None,
                },
                heads: config.heads,
                kv_heads: decoder.kv_heads,
                head_dim: decoder.head_dim,
                options: AttentionOptions {
                    causal: true,
                    window: decoder.windows[layer],
                    scale: (decoder.head_dim as f32).powf(-0.5),
                },
            },
            mlp: GatedMlp {
                gate: linear("mlp.gate_proj", decoder.mlp_bias)?,
                up: linear("mlp.up_proj", decoder.mlp_bias)?,
                down: linear("mlp.down_proj", decoder.mlp_bias)?,
            },
            input_norm: builder.rms_norm(&at("input_layernorm"), epsilon)?,
            middle_norm: builder.rms_norm(&at("post_attention_layernorm"), epsilon)?,
        })
    }
}

impl Block for Layer {
    type Context = Angles;

    fn forward(&self, input: Tensor<3>, angles: &Angles, run: &Run) -> Tensor<3> {
        let normed = self.input_norm.forward(input.clone());
        let attended = self.attention.forward(normed, Some(angles), run);
        let hidden = run.select(input) + attended;
        let normed = self.middle_norm.forward(hidden.clone());
        hidden + self.mlp.forward(normed, run.mode)
    }

    fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.attention.visit(visitor);
        self.mlp.visit(visitor);
        self.input_norm.visit(visitor);
        self.middle_norm.visit(visitor);
    }
}
