//! `config.json` of a hub checkpoint, read into what the parts of a model need.
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
    /// Causal attention: Llama and its relatives, GPT-2.
    Decoder,
    /// Attention in both directions: BERT and its relatives.
    Encoder,
}

/// The supported values of `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum ModelType {
    /// Llama 2 and 3, SmolLM2.
    #[serde(rename = "llama")]
    Llama,
    /// Mistral, with its sliding window.
    #[serde(rename = "mistral")]
    Mistral,
    /// Qwen2 and Qwen2.5.
    #[serde(rename = "qwen2")]
    Qwen2,
    /// Qwen3.
    #[serde(rename = "qwen3")]
    Qwen3,
    /// OLMo 2.
    #[serde(rename = "olmo2")]
    Olmo2,
    /// Phi-3, Phi-3.5 and Phi-4 (mini).
    #[serde(rename = "phi3")]
    Phi3,
    /// Gemma 2.
    #[serde(rename = "gemma2")]
    Gemma2,
    /// Gemma 3, text only.
    #[serde(rename = "gemma3_text")]
    Gemma3,
    /// GPT-2.
    #[serde(rename = "gpt2")]
    Gpt2,
    /// GPT-NeoX, Pythia.
    #[serde(rename = "gpt_neox")]
    GptNeox,
    /// BERT, MiniLM.
    #[serde(rename = "bert")]
    Bert,
    /// RoBERTa.
    #[serde(rename = "roberta")]
    Roberta,
    /// ELECTRA's discriminators and generators.
    #[serde(rename = "electra")]
    Electra,
    /// ModernBERT.
    #[serde(rename = "modernbert")]
    ModernBert,
    /// DeBERTa-v2 without its convolution, DeBERTa-v3.
    #[serde(rename = "deberta-v2")]
    Deberta,
}

impl ModelType {
    /// All of them, under the names that `config.json` has for them.
    pub(crate) const NAMES: [(&str, ModelType); 15] = [
        ("llama", ModelType::Llama),
        ("mistral", ModelType::Mistral),
        ("qwen2", ModelType::Qwen2),
        ("qwen3", ModelType::Qwen3),
        ("olmo2", ModelType::Olmo2),
        ("phi3", ModelType::Phi3),
        ("gemma2", ModelType::Gemma2),
        ("gemma3_text", ModelType::Gemma3),
        ("gpt2", ModelType::Gpt2),
        ("gpt_neox", ModelType::GptNeox),
        ("bert", ModelType::Bert),
        ("roberta", ModelType::Roberta),
        ("electra", ModelType::Electra),
        ("modernbert", ModelType::ModernBert),
        ("deberta-v2", ModelType::Deberta),
    ];
}

/// What `config.json` says about a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub(crate) path: PathBuf,
    pub(crate) model_type: ModelType,
    pub(crate) architectures: Vec<String>,
    pub(crate) vocab: usize,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) intermediate: usize,
    pub(crate) max_positions: usize,
    pub(crate) norm_epsilon: f64,
    pub(crate) initializer_range: f64,
    pub(crate) pad_token_id: Option<u32>,
    /// How the linear layers are stored, where not as floats.
    pub(crate) quantization: Option<Quantization>,
    pub(crate) design: Design,
}

/// What the parts of a model are. An architecture is a choice among these and a table of names
/// (`architecture.rs`); the order of norms and residuals follows from the norms that the table has.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Design {
    pub family: Family,
    /// Width of the token embedding; where it is not the hidden width, a linear layer follows.
    pub embedding_width: usize,
    /// Multiplies token embeddings, but not what is put in their places.
    pub embedding_scale: Option<f64>,
    /// Whether the padding token's embedding has no gradient.
    pub padding_row: bool,
    /// A table of learned positions, and what is added to a token's place in its segment to find
    /// its row: RoBERTa's start after `padding_idx`.
    pub learned_positions: Option<usize>,
    /// Entries of the token-type table; 0 for none.
    pub token_types: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// One layer for queries, keys and values holds each head's three in turn (GPT-NeoX).
    pub fused_by_head: bool,
    pub query_key_norm: Option<NormSpan>,
    /// Bounds attention scores: `cap · tanh(score / cap)`.
    pub attention_soft_cap: Option<f32>,
    /// Bounds the logits of the output layer in the same way.
    pub logit_soft_cap: Option<f32>,
    pub norm: NormKind,
    /// Attention and feed-forward block read the same states, and both are added to them.
    pub parallel: bool,
    /// Linear layers of the backbone are stored as `[in, out]` (Transformers' `Conv1D`).
    pub transposed: bool,
    pub activation: Activation,
    /// One entry a layer.
    pub layers: Vec<LayerDesign>,
    pub ropes: Vec<RopeConfig>,
    pub relative: Option<RelativeConfig>,
    pub tied_embeddings: bool,
    pub classifier: ClassifierDesign,
}

/// What may differ between layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LayerDesign {
    /// How many tokens attention reaches back (encoders: to each side), the token itself included.
    pub window: Option<usize>,
    /// Which of the ropes turns queries and keys.
    pub rope: Option<usize>,
    /// Multiplies attention scores.
    pub scale: f32,
}

/// What queries and keys are normalised over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NormSpan {
    /// Each head's `head_dim`.
    Head,
    /// All heads together.
    Width,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NormKind {
    Rms,
    /// RMS norm that multiplies by `1 + weight` (Gemma).
    RmsOffset,
    Layer {
        bias: bool,
    },
}

/// What lies between an encoder's states and the last layer of its Transformers classifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ClassifierDesign {
    pub activation: Activation,
    /// Whether that layer has a bias.
    pub bias: bool,
    /// The mean over a sample's tokens is read, not its first token.
    pub mean: bool,
}

/// Rotary positions of some layers.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RopeConfig {
    pub theta: f64,
    pub scaling: RopeScaling,
    /// How many of a head's dimensions are turned, an even number.
    pub rotated: usize,
}

/// How rotary frequencies are stretched for contexts longer than the pretrained one.
#[derive(Debug, Clone, PartialEq)]
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
    /// LongRoPE (Ding et al. 2024): every frequency divided by a factor of its own, another one
    /// for sequences longer than `original_positions`.
    Long {
        short_factors: Vec<f32>,
        long_factors: Vec<f32>,
        original_positions: usize,
        /// Multiplies cosines and sines.
        attention_factor: f32,
    },
}

/// Disentangled attention (He et al. 2021).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RelativeConfig {
    /// Buckets on each side; distances beyond half of them share buckets logarithmically. `None`:
    /// one bucket a distance.
    pub buckets: Option<usize>,
    /// The largest distance told apart.
    pub max_distance: usize,
    pub content_to_position: bool,
    pub position_to_content: bool,
    /// Positions go through the content's own query and key layers.
    pub shared: bool,
    /// The table of positions is normalised.
    pub norm: bool,
}

impl RelativeConfig {
    /// Rows of the table on each side of distance 0.
    pub fn span(&self) -> usize {
        self.buckets.unwrap_or(self.max_distance)
    }
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
    /// `x · sigmoid(x)`.
    Silu,
    Tanh,
}

impl ModelConfig {
    /// Reads `config.json` of a checkpoint folder.
    pub fn read(dir: &Path) -> Result<ModelConfig, ModelError> {
        let path = dir.join("config.json");
        Keys::new(&path, &read_object(&path)?).model()
    }

    /// Which family the model belongs to.
    pub fn family(&self) -> Family {
        self.design.family
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
        self.design.layers.len()
    }

    /// The longest sequence the model was made for: the size of its position table, or the
    /// pretrained context of models without one.
    pub fn max_positions(&self) -> usize {
        self.position_limit().unwrap_or(self.max_positions)
    }

    /// The longest sequence the model can take; `None` where positions are computed, not looked up.
    pub fn position_limit(&self) -> Option<usize> {
        let offset = self.design.learned_positions?;
        Some(self.max_positions.saturating_sub(offset))
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
        self.heads * self.design.head_dim
    }
}
