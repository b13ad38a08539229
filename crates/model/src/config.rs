//! `config.json` of a hub checkpoint, read into what the two model families need.
//!
//! A key that changes what the model computes and that is not built is an error, never ignored.

use std::path::{Path, PathBuf};

use calor_kernels::Quantization;
use serde::Serialize;

use crate::error::ModelError;
use crate::keys::{Keys, read_object};

/// Which of the two model families a checkpoint belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Causal attention, rotary positions, RMS norm before each block (Llama and its relatives).
    Decoder,
    /// Attention in both directions, learned positions, layer norm after each block (BERT).
    Encoder,
}

/// The supported values of `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelType {
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// Mistral, with its sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3.
    Qwen3,
    /// BERT, MiniLM.
    Bert,
    /// RoBERTa.
    Roberta,
}

/// What `config.json` says about a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub(crate) path: PathBuf,
    pub(crate) model_type: ModelType,
    pub(crate) architectures: Vec<String>,
    pub(crate) vocab: usize,
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) intermediate: usize,
    pub(crate) max_positions: usize,
    pub(crate) norm_epsilon: f64,
    pub(crate) initializer_range: f64,
    pub(crate) pad_token_id: Option<u32>,
    /// How the linear layers are stored, where not as floats.
    pub(crate) quantization: Option<Quantization>,
    pub(crate) kind: Kind,
}

/// The part of the configuration that belongs to one family.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    Decoder(DecoderConfig),
    Encoder(EncoderConfig),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DecoderConfig {
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// One entry a layer: how many tokens its attention reaches back, itself included.
    pub windows: Vec<Option<usize>>,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    pub query_key_norm: bool,
    pub tied_embeddings: bool,
}

/// How rotary frequencies are stretched for contexts longer than the pretrained one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_frequency_factor: f64,
        high_frequency_factor: f64,
        original_positions: f64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct EncoderConfig {
    pub token_types: usize,
    pub activation: Activation,
    /// Added to a token's position in its segment: RoBERTa's positions start after `padding_idx`.
    pub position_offset: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `x · Φ(x)`, exact.
    Gelu,
    /// The tanh approximation.
    GeluTanh,
    /// `x · sigmoid(1.702 x)`.
    QuickGelu,
    Relu,
}

impl ModelConfig {
    /// Reads `config.json` of a checkpoint folder.
    pub fn read(dir: &Path) -> Result<ModelConfig, ModelError> {
        let path = dir.join("config.json");
        Keys::new(&path, &read_object(&path)?).model()
    }

    /// Which family the model belongs to.
    pub fn family(&self) -> Family {
        match self.kind {
            Kind::Decoder(_) => Family::Decoder,
            Kind::Encoder(_) => Family::Encoder,
        }
    }

    /// The checkpoint's `model_type`.
    pub fn model_type(&self) -> ModelType {
        self.model_type
    }

    /// Number of entries of the token embedding.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }

    /// Width of the hidden states.
    pub fn hidden_size(&self) -> usize {
        self.hidden
    }

    /// Number of transformer layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// The longest sequence the model takes: a hard limit for encoders (their position table), the
    /// pretrained context for decoders.
    pub fn max_positions(&self) -> usize {
        match &self.kind {
            Kind::Decoder(_) => self.max_positions,
            Kind::Encoder(encoder) => self.max_positions.saturating_sub(encoder.position_offset),
        }
    }

    /// The padding token, where the configuration names one.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.pad_token_id
    }

    /// How the checkpoint's linear layers are stored, where not as floats.
    pub fn stored_quantization(&self) -> Option<Quantization> {
        self.quantization
    }

    pub(crate) fn query_width(&self) -> usize {
        match &self.kind {
            Kind::Decoder(decoder) => self.heads * decoder.head_dim,
            Kind::Encoder(_) => self.hidden,
        }
    }
}
