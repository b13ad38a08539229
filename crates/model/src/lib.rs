//! Pretrained transformers, low-rank adapters on them, heads and losses.
//!
//! A [`Checkpoint`] is opened and checked against its architecture before any weight is read, then
//! becomes a [`Model`] on a device: a frozen backbone of one of two families, decoders (Llama,
//! SmolLM2, Mistral, Qwen2, Qwen3, OLMo 2, Phi-3, Gemma 2 and 3, GPT-2, GPT-NeoX) and encoders (BERT,
//! MiniLM, RoBERTa, ELECTRA, ModernBERT, DeBERTa-v3), a LoRA adapter that works on activations (with
//! DoRA, PiSSA, pairs on the token embedding, trained tokens and biases), and a head. Images, signals,
//! series, feature vectors and speech join the tokens as soft tokens, through encoders of their own.
//! Frozen linear layers may be kept in 8 or 4 bits, quantised while they are read or as bitsandbytes
//! has stored them. Adapters are read and written as PEFT does, and [`merge`]d into their checkpoint or
//! with each other.
//! [`parity`] compares a model with stored results of Transformers.
//!
//! This crate knows no patients and no files but checkpoints, adapters and references. Hot
//! operations are `calor-kernels`'.

#![deny(unsafe_code)]

mod adapter;
mod adapter_config;
mod adapter_file;
mod affine;
mod architecture;
mod attention;
mod backbone;
mod bitsandbytes;
mod block;
mod builder;
mod cache;
mod checkpoint;
mod combine;
mod config;
mod config_file;
mod dora;
mod embedding;
mod embeddings;
mod error;
mod forward;
mod fusion;
mod head;
mod keys;
mod linear;
mod lora;
pub mod loss;
mod mapped;
mod matching;
mod memory;
mod merge;
mod merged;
mod mlp;
mod model;
mod names;
mod norm;
mod output_loss;
mod parameter;
pub mod parity;
mod parity_gradients;
mod pissa;
mod portable;
mod random;
mod recompute;
mod relative;
mod rope;
mod run;
mod singular;
mod size;
mod start;
mod stored;
mod tokens;
mod towers;
mod weight;
mod weights;

pub use adapter_config::AdapterConfig;
pub use cache::KeyValueCache;
pub use calor_kernels::Quantization;
pub use checkpoint::Checkpoint;
pub use combine::{Combination, Weighted};
pub use config::{Family, ModelConfig, ModelType};
pub use error::ModelError;
pub use fusion::{
    EncoderSpec, FusionOptions, ItemTensors, ModalityKind, OmicsEncoderOptions, PatchOptions,
    Placement, ResamplerOptions, SeriesOptions, SignalOptions, SoftInput, StreamDemand, StreamSpec,
    WindowsOptions,
};
pub use head::{HeadOptions, Pooling, Problem};
pub use lora::{BiasMode, LoraOptions, PairInit, Targets};
pub use matching::{Patterned, Patterns};
pub use memory::{MemoryModel, PassDevice, PassShape, TrainingMemory};
pub use merged::{Agreement, MergeOptions, Merged, merge};
pub use model::{FrozenWeights, Model, ModelOptions};
pub use parameter::{ParameterGroup, ParameterVisitor};
pub use portable::{Restriction, restrictions};
pub use recompute::{Recompute, RecomputedBlocks};
pub use run::{Mode, ModelInput, SampleSpan, shifted_targets};
pub use size::ModelSize;
pub use towers::{
    ItemShape, Tower, TowerCheckpoint, TowerConfig, TowerInput, TowerOptions, TowerType,
};
