//! How much memory a model needs, from its configuration alone: no weight is read.
//!
//! Counted are the tensors that the operations of a pass keep for the backward pass, and those that
//! exist beside them where most exist at once. `T` stands for positions, `rows · seq`.
//!
//! On the CPU, with the kernels of `calor-kernels`, a decoder's block keeps
//!
//! ```text
//! T · (input + normed input + query + key + value + context + middle + normed middle
//!      + gate + up + their product) + T · (heads + ranks of the pairs) in f32
//! ```
//!
//! an encoder's block one sum before each norm in place of the normed states, and one wide state
//! before its activation and one after; every other norm keeps its input as well. A block that is run
//! again keeps its input only. On a GPU the same is kept, but for heads wider than 256: their attention
//! is in plain operations there and keeps the scores, `heads · seq²` a row, as that of relative positions
//! does everywhere. Where NVIDIA's library multiplies, a quantised weight exists dequantised, in the type of
//! the activations, while it does.

mod count;

use burn::tensor::DType;
use calor_kernels::Quantization;
use serde::Serialize;

use crate::architecture::{self, ModuleSpec, Role, TaskClass};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::head::{self, HeadOptions, Pooling};
use crate::lora::BiasMode;
use crate::matching;
use crate::model::{ModelOptions, reachable};
use crate::names::Slot;
use crate::recompute::Recompute;
use count::Count;

/// Bytes of what is trained, and of statistics and sums.
const F32: u64 = 4;

/// Sizes of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PassShape {
    /// Rows.
    pub rows: usize,
    /// Tokens a row, padding included.
    pub seq: usize,
    /// Samples in them.
    pub samples: usize,
}

impl PassShape {
    fn positions(&self) -> u64 {
        (self.rows * self.seq) as u64
    }
}

/// Where a pass is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PassDevice {
    /// The host's processors.
    Host {
        /// Threads that compute.
        threads: usize,
        /// Whether bf16 is multiplied as it is stored, instead of in f32.
        multiplies_halves: bool,
    },
    /// A device with memory of its own.
    Device {
        /// Whether a quantised weight is dequantised to be multiplied, as for NVIDIA's library.
        dequantizes: bool,
    },
}

impl PassDevice {
    /// All processors of this host.
    pub fn host() -> PassDevice {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        PassDevice::Host {
            threads,
            multiplies_halves: calor_kernels::multiplies_halves(),
        }
    }
}

/// What a training step holds when it holds the most, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TrainingMemory {
    /// Frozen weights; on the host without tables that are looked up where the file is mapped.
    pub weights_bytes: u64,
    /// What is trained: adapter, head, `modules_to_save`; f32.
    pub trained_bytes: u64,
    /// Gradients summed over micro-batches. Those of the one at work come as its activations go.
    pub gradients_bytes: u64,
    /// Both moments of AdamW.
    pub moments_bytes: u64,
    /// What the forward pass keeps for the backward pass.
    pub activations_bytes: u64,
    /// What exists beside it at that moment: gradients of activations, a block that is run again,
    /// or the logits of a chunk.
    pub working_bytes: u64,
    /// Inputs of recomputed blocks that wait on the host.
    pub offloaded_bytes: u64,
}

impl TrainingMemory {
    /// On the device that computes.
    pub fn device_bytes(&self) -> u64 {
        self.weights_bytes
            + self.trained_bytes
            + self.gradients_bytes
            + self.moments_bytes
            + self.activations_bytes
            + self.working_bytes
    }
}

/// The sizes that memory follows from.
#[derive(Debug, Clone)]
pub struct MemoryModel {
    frozen_bytes: u64,
    /// Of these, tables of which some rows are looked up and that the host reads from the mapped
    /// file: what is not looked up is never in memory.
    mapped_tables_bytes: u64,
    trained_parameters: u64,
    blocks: Vec<Block>,
    hidden: u64,
    head_dim: u64,
    /// Rotated dimensions of a head, summed over the model's ropes.
    rotated: u64,
    vocab: u64,
    /// Widths of the embeddings and of what a trained layer makes of them (ELECTRA), together.
    projected: u64,
    /// Whether the last norm stands behind the blocks, as in decoders.
    norm_last: bool,
    output: Output,
    /// Of the frozen weights and the activations.
    dtype: DType,
    /// Whether the weights of the blocks are: they are dequantised a few rows at a time on the host,
    /// one weight at a time on a device.
    quantized: bool,
    dropout: bool,
    /// Whether pairs are DoRA's.
    dora: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Output {
    States,
    /// Logits of every token, chunk by chunk; whether the fused kernel does it.
    Vocabulary {
        fused: bool,
    },
    /// The last block needs one token a sample, or all of them.
    Pooled {
        every_token: bool,
    },
}

/// Widths of one block, in elements a position.
#[derive(Debug, Clone, Copy)]
struct Block {
    hidden: u64,
    query: u64,
    key: u64,
    intermediate: u64,
    heads: u64,
    gated: bool,
    norms_query: bool,
    norms: Norms,
    /// The feed-forward block reads what attention reads.
    parallel: bool,
    /// Queries, keys and values are parts of one product, and so are gate and up.
    fused: [bool; 2],
    /// Entries of the table of relative positions, whose attention is in plain operations.
    relative: Option<u64>,
    /// Ranks of the pairs together.
    ranks: u64,
    /// Inputs of the pairs together, and outputs.
    adapted_inputs: u64,
    adapted_outputs: u64,
    /// Whether anything in the block or before it is trained.
    tracked: bool,
    /// Whether anything before the block is trained.
    input_tracked: bool,
}

/// The norms of a block, each of which keeps its input.
#[derive(Debug, Clone, Copy)]
struct Norms {
    before_attention: bool,
    before_mlp: bool,
    /// On what attention and the feed-forward block add.
    on: [bool; 2],
    /// On the sums with it.
    after: [bool; 2],
}

impl MemoryModel {
    /// Reads the sizes of `checkpoint` under `options`, as [`Model::load`](crate::Model::load) would.
    ///
    /// Encoders of modality items are not in it.
    ///
    /// # Errors
    /// Options that do not fit the checkpoint.
    pub fn new(checkpoint: &Checkpoint, options: &ModelOptions) -> Result<MemoryModel, ModelError> {
        let config = checkpoint.config();
        let class = options.head.class(config)?;
        let modules = class.modules(config, options.head.labels());
        let mut saved = match &options.lora {
            Some(lora) => lora.modules_to_save.clone(),
            None => Vec::new(),
        };
        saved.extend(head::always_saved(class, checkpoint));
        let plan = match &options.lora {
            Some(lora) => {
                let mut lora = lora.clone();
                lora.modules_to_save.clone_from(&saved);
                lora.plan(class, &reachable(&modules, options))?
            }
            None => Default::default(),
        };
        let dtype = DType::from(options.dtype);
        let quantization = config.stored_quantization().or(options.quantization);
        let tied = checkpoint.tied_embeddings()?;
        let (mut frozen_bytes, mut mapped_tables_bytes) = (0, 0);
        let mut trained_parameters = own_head(config, options);
        let layers = config.layers();
        let mut ranks = vec![0u64; layers];
        let mut adapted_inputs = vec![0u64; layers];
        let mut adapted_outputs = vec![0u64; layers];
        let lora = options.lora.as_ref();
        let dora = lora.is_some_and(|lora| lora.use_dora);
        let biases = lora.map_or(BiasMode::None, |lora| lora.bias);
        let tokens = lora.map_or(0, |lora| lora.trained_tokens.len() as u64);
        trained_parameters += tokens * config.hidden as u64;
        let mut trained_in = vec![false; layers];
        let mut projected = 0;
        let mut trained_before = options.fusion.is_some() || tokens > 0;
        let final_norm = architecture::end(config)
            .get(Slot::FinalNorm)
            .map(|norm| norm.path.clone());
        for module in &modules {
            let trained = matching::saved(&saved, &module.path);
            let layer = layer_of(&module.path).filter(|&layer| layer < layers);
            let pair = plan.get(&module.path);
            // A tied output layer is the embedding, and an unused pooler is not built.
            let shared = module.path == "lm_head" && tied && !trained;
            let pooler = ["pooler.dense", "head.dense"]
                .iter()
                .any(|name| module.path.ends_with(name));
            let unused =
                pooler && pair.is_none() && !trained && class != TaskClass::SequenceClassifier;
            if trained {
                trained_parameters += elements(module);
            } else if !shared && !unused {
                let quantized =
                    quantization.filter(|_| module.is_linear() && (layer.is_some() || pooler));
                frozen_bytes += stored_bytes(module, dtype, quantized);
                let name = format!("{}.weight", Checkpoint::canonical_name(&module.path));
                let output = options.head == HeadOptions::CausalLm && tied;
                if module.role == Role::Embedding
                    && !output
                    && checkpoint.stored.dtype(&name) == Some(dtype)
                {
                    mapped_tables_bytes += stored_bytes(module, dtype, None);
                }
            }
            if let Some(pair) = pair {
                let [inputs, outputs] = match module.role {
                    Role::LinearTransposed => [module.shape[0], module.shape[1]],
                    _ => [module.shape[1..].iter().product(), module.shape[0]],
                }
                .map(|width| width as u64);
                trained_parameters += pair.rank as u64 * (inputs + outputs);
                if let Some(layer) = layer {
                    ranks[layer] += pair.rank as u64;
                    adapted_inputs[layer] += inputs;
                    adapted_outputs[layer] += outputs;
                }
                if dora {
                    trained_parameters += outputs;
                }
            }
            let trained_bias = module.bias
                && !trained
                && match biases {
                    BiasMode::None => false,
                    BiasMode::LoraOnly => pair.is_some(),
                    BiasMode::All => true,
                };
            if trained_bias {
                trained_parameters += match module.role {
                    Role::LinearTransposed => module.shape[1],
                    _ => module.shape[0],
                } as u64;
            }
            let trained = trained || trained_bias;
            match layer {
                Some(layer) => trained_in[layer] |= trained || pair.is_some(),
                None => {
                    let projects =
                        module.is_linear() && module.path.ends_with("embeddings_project");
                    let last = final_norm
                        .as_ref()
                        .is_some_and(|name| module.path.ends_with(name));
                    let behind = (module.is_linear() && !projects) || last;
                    trained_before |= (trained || pair.is_some()) && !behind;
                    if projects && (trained || pair.is_some()) {
                        projected = module.shape.iter().sum::<usize>() as u64;
                    }
                }
            }
        }
        let design = &config.design;
        let last = (layers > 0).then(|| architecture::layer(config, layers - 1));
        let has = |slot| last.as_ref().is_some_and(|layer| layer.get(slot).is_some());
        let gated = has(Slot::Gate) || has(Slot::GateUp);
        let norms = Norms {
            before_attention: has(Slot::BeforeAttention),
            before_mlp: has(Slot::BeforeMlp),
            on: [Slot::OnAttention, Slot::OnMlp].map(has),
            after: [Slot::AfterAttention, Slot::AfterMlp].map(has),
        };
        let norm_last = final_norm.is_some();
        let mut tracked = trained_before;
        let blocks = (0..layers)
            .map(|layer| {
                let input_tracked = tracked;
                tracked |= trained_in[layer];
                Block {
                    hidden: config.hidden as u64,
                    query: config.query_width() as u64,
                    key: (design.kv_heads * design.head_dim) as u64,
                    intermediate: config.intermediate as u64,
                    heads: config.heads as u64,
                    gated,
                    norms_query: design.query_key_norm.is_some(),
                    norms,
                    parallel: design.parallel,
                    fused: [Slot::QueryKeyValue, Slot::GateUp].map(has),
                    relative: design.relative.map(|relative| 2 * relative.span() as u64),
                    ranks: ranks[layer],
                    adapted_inputs: adapted_inputs[layer],
                    adapted_outputs: adapted_outputs[layer],
                    tracked,
                    input_tracked,
                }
            })
            .collect();
        Ok(MemoryModel {
            frozen_bytes,
            mapped_tables_bytes,
            trained_parameters,
            blocks,
            hidden: config.hidden as u64,
            head_dim: design.head_dim as u64,
            rotated: design.ropes.iter().map(|rope| rope.rotated as u64).sum(),
            vocab: config.vocab as u64,
            projected,
            norm_last,
            output: match options.head {
                HeadOptions::None => Output::States,
                HeadOptions::CausalLm => Output::Vocabulary {
                    fused: !plan.contains_key("lm_head"),
                },
                HeadOptions::TokenClassifier { .. } => Output::Pooled { every_token: true },
                HeadOptions::Classifier { pooling, .. } => Output::Pooled {
                    every_token: pooling == Pooling::Mean,
                },
            },
            dtype,
            quantized: quantization.is_some(),
            dropout: lora.is_some_and(|lora| lora.dropout > 0.0),
            dora,
        })
    }

    /// Numbers that are trained.
    pub fn trained_parameters(&self) -> u64 {
        self.trained_parameters
    }

    /// Bytes of the frozen weights.
    pub fn frozen_bytes(&self) -> u64 {
        self.frozen_bytes
    }

    /// Number of blocks.
    pub fn layers(&self) -> usize {
        self.blocks.len()
    }

    /// What a training step on `shape` holds when it holds the most.
    pub fn training(
        &self,
        shape: PassShape,
        recompute: Recompute,
        device: PassDevice,
    ) -> TrainingMemory {
        let count = Count {
            model: self,
            shape,
            device,
        };
        let positions = shape.positions();
        let state = positions * self.hidden * self.element();
        let again = |index: usize| self.blocks[index].tracked && recompute.blocks.contains(index);
        let kept: Vec<u64> = (0..self.blocks.len())
            .map(|index| match again(index) {
                true if recompute.offload => 0,
                true => state,
                false => count.kept(index),
            })
            .collect();
        let blocks: u64 = kept.iter().sum::<u64>() + count.tables();

        // The moment with the most: the loss, or the backward pass of one of the blocks, when the
        // last norm is done with.
        let mut most = (blocks + count.last_norm(), count.loss());
        let mut live = blocks;
        for index in (0..self.blocks.len())
            .rev()
            .filter(|&i| self.blocks[i].tracked)
        {
            let mut working = count.backward(index);
            if again(index) {
                // The block's tensors beside its input; one that waited on the host comes back.
                working += count.kept(index).saturating_sub(state);
                working += if recompute.offload { state } else { 0 };
            }
            if live + working > most.0 + most.1 {
                most = (live, working);
            }
            live -= kept[index];
        }
        let offloaded = (0..self.blocks.len()).filter(|&index| again(index)).count() as u64;
        let trained_bytes = self.trained_parameters * F32;
        TrainingMemory {
            weights_bytes: match device {
                PassDevice::Host { .. } => self.frozen_bytes - self.mapped_tables_bytes,
                PassDevice::Device { .. } => self.frozen_bytes,
            },
            trained_bytes,
            gradients_bytes: trained_bytes,
            moments_bytes: 2 * trained_bytes,
            activations_bytes: most.0,
            working_bytes: most.1,
            offloaded_bytes: match recompute.offload {
                true => offloaded * state,
                false => 0,
            },
        }
    }

    fn element(&self) -> u64 {
        self.dtype.size() as u64
    }
}

/// Bytes of a frozen module's tensors: the one place that knows how they are stored.
fn stored_bytes(module: &ModuleSpec, dtype: DType, quantization: Option<Quantization>) -> u64 {
    match (quantization, module.shape.as_slice()) {
        (Some(quantization), &[output, input]) => {
            let bias = if module.bias {
                output * dtype.size()
            } else {
                0
            };
            (quantization.bytes([output, input]) + bias) as u64
        }
        _ => elements(module) * dtype.size() as u64,
    }
}

fn elements(module: &ModuleSpec) -> u64 {
    let tensors = module.tensors();
    let counts = tensors.map(|(_, shape)| shape.iter().product::<usize>() as u64);
    counts.sum()
}

/// The head over the mean, which no class of Transformers has.
fn own_head(config: &ModelConfig, options: &ModelOptions) -> u64 {
    let HeadOptions::Classifier {
        labels,
        pooling: Pooling::Mean,
        ..
    } = options.head
    else {
        return 0;
    };
    let (hidden, labels) = (config.hidden as u64, labels as u64);
    let standardised = 2 * hidden;
    standardised
        + match options.head_hidden as u64 {
            0 => labels * (hidden + 1),
            units => units * (hidden + 1) + labels * (units + 1),
        }
}

/// The layer that a module's path names: the number after `layers.`, `layer.` or, of GPT-2, `h.`.
fn layer_of(path: &str) -> Option<usize> {
    let mut parts = path.split('.');
    parts.find(|part| matches!(*part, "layers" | "layer" | "h"))?;
    parts.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_found_in_paths() {
        assert_eq!(layer_of("model.layers.11.mlp.up_proj"), Some(11));
        assert_eq!(layer_of("bert.encoder.layer.0.output.dense"), Some(0));
        assert_eq!(layer_of("transformer.h.3.attn.c_attn"), Some(3));
        assert_eq!(layer_of("model.norm"), None);
    }
}
