//! Pretrained encoders of images and speech, from hub checkpoints: ViT, the vision towers of CLIP
//! and SigLIP, Whisper's encoder. Each gives what Transformers calls `last_hidden_state`.

mod blocks;
mod checkpoint;
mod config;
mod tensors;
mod vision;
mod whisper;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use burn::tensor::{DType, Device, FloatDType, Tensor};

use crate::architecture::TaskClass;
use crate::builder::Builder;
use crate::error::ModelError;
use crate::lora::{BiasMode, LoraOptions, PairInit, Plan};
use crate::norm::LayerNorm;
use crate::parameter::{Parameter, ParameterGroup, ParameterKind, Visit};
use crate::random;
use crate::run::Mode;

use blocks::Block;
use vision::VisionStem;
use whisper::WhisperStem;

pub use checkpoint::TowerCheckpoint;
pub use config::{ItemShape, TowerConfig, TowerType};

/// How a folder becomes a tower.
#[derive(Debug, Clone, PartialEq)]
pub struct TowerOptions {
    /// A low-rank adapter of the tower's own; frozen without one. Patterns refer to the paths of
    /// the class that is the tower alone (`ViTModel`, `CLIPVisionModel`, `SiglipVisionModel`,
    /// `WhisperEncoder`), such as `encoder.layers.0.self_attn.q_proj`. `modules_to_save` are
    /// trained in full.
    pub lora: Option<LoraOptions>,
    /// The frozen weights' type, and that of the activations. What is trained is always f32.
    pub dtype: FloatDType,
    /// Fixes the new weights, together with `name_prefix`.
    pub seed: u64,
    /// What stands before the names of the tower's tensors, its dot included.
    pub name_prefix: String,
}

impl Default for TowerOptions {
    fn default() -> Self {
        TowerOptions {
            lora: None,
            dtype: FloatDType::F32,
            seed: 0,
            name_prefix: String::new(),
        }
    }
}

/// What a tower reads.
#[derive(Debug, Clone)]
pub enum TowerInput {
    /// Normalised pixels, `[items, 3, height, width]`.
    Image(Tensor<4>),
    /// Log-mel spectrograms, `[items, mel bins, frames]`.
    Mel(Tensor<3>),
}

/// A pretrained encoder of images or speech. Cloning shares the tensors.
#[derive(Debug, Clone)]
pub struct Tower {
    config: Arc<TowerConfig>,
    plan: Arc<Plan>,
    dtype: DType,
    stem: Stem,
    blocks: Vec<Block>,
    /// After the last layer; CLIP's last hidden state has not passed any.
    norm: Option<LayerNorm>,
}

#[derive(Debug, Clone)]
enum Stem {
    Vision(Box<VisionStem>),
    Whisper(Box<WhisperStem>),
}

impl Tower {
    /// Opens and checks a folder without reading its weights; see [`TowerCheckpoint::open`].
    pub fn open(dir: &Path) -> Result<TowerCheckpoint, ModelError> {
        TowerCheckpoint::open(dir)
    }

    /// Reads the weights onto `device` and adds the adapter.
    ///
    /// What is trained becomes a leaf of the autodiff graph, in [`ParameterGroup::Encoder`]; the
    /// rest stays outside it.
    ///
    /// # Errors
    /// An adapter that matches nothing or something it cannot adapt, an unreadable file.
    pub fn build(
        checkpoint: &TowerCheckpoint,
        options: &TowerOptions,
        device: &Device,
    ) -> Result<Tower, ModelError> {
        let config = checkpoint.config();
        let device = device.clone().inner();
        // Two towers under one seed start from different adapters and drop different inputs.
        let own = random::hash(&options.name_prefix);
        let mut plan = Plan::new();
        let mut modules_to_save = Vec::new();
        if let Some(lora) = &options.lora {
            if lora.init != PairInit::Default || !lora.trained_tokens.is_empty() {
                return Err(ModelError::options(
                    "a tower's adapter takes neither `init` nor `trained_tokens`: both are built for \
                     the backbone",
                ));
            }
            plan = lora.plan(TaskClass::Backbone, &tensors::modules(config))?;
            for pair in plan.values_mut() {
                pair.index = random::mix(own, pair.index);
            }
            modules_to_save.clone_from(&lora.modules_to_save);
        }
        let builder = Builder {
            stored: &checkpoint.stored,
            prefix: "",
            // Nothing but the adapter is drawn.
            initializer_range: 0.0,
            plan,
            modules_to_save,
            bias: options
                .lora
                .as_ref()
                .map_or(BiasMode::None, |lora| lora.bias),
            trained_tokens: Vec::new(),
            dtype: DType::from(options.dtype),
            quantization: None,
            seed: random::mix(options.seed, own),
            starts: None,
            device: &device,
        };
        let stem = match config.tower_type {
            TowerType::Whisper => Stem::Whisper(Box::new(WhisperStem::build(&builder, config)?)),
            _ => Stem::Vision(Box::new(VisionStem::build(&builder, config)?)),
        };
        let blocks = (0..config.layers)
            .map(|layer| Block::build(&builder, config, layer))
            .collect::<Result<_, _>>()?;
        let norm = match config.tower_type.names().final_norm {
            Some(name) => Some(builder.layer_norm(name, config.norm_epsilon)?),
            None => None,
        };
        let mut tower = Tower {
            config: Arc::new(config.clone()),
            dtype: builder.dtype,
            plan: Arc::new(builder.plan),
            stem,
            blocks,
            norm,
        };
        tower.visit(&mut Adopt {
            prefix: &options.name_prefix,
        });
        Ok(tower)
    }

    /// The last hidden state as Transformers gives it, `[items, tokens, width]`, in the tower's
    /// type: of ViT, SigLIP and Whisper after the final layer norm, of CLIP before
    /// `post_layernorm`, which only its pooled output passes.
    ///
    /// # Panics
    /// When [`TowerConfig::token_count`] refuses the input's shape.
    pub fn forward(&self, input: TowerInput, mode: Mode) -> Tensor<3> {
        if let Err(error) = self.config.token_count(input.shape()) {
            panic!("{error}");
        }
        let mut states = match (&self.stem, input) {
            (Stem::Vision(stem), TowerInput::Image(pixels)) => {
                stem.forward(pixels.cast(self.dtype), mode)
            }
            (Stem::Whisper(stem), TowerInput::Mel(mel)) => stem.forward(mel.cast(self.dtype), mode),
            _ => unreachable!("the shape was checked above"),
        };
        let [items, tokens, _] = states.dims();
        // Every item is one segment: its tokens see each other and nothing else.
        let segments = Tensor::ones([items, tokens], &states.device().inner());
        for block in &self.blocks {
            states = block.forward(states, &segments, mode);
        }
        match &self.norm {
            Some(norm) => norm.forward(states),
            None => states,
        }
    }

    /// What the folder's `config.json` says.
    pub fn config(&self) -> &TowerConfig {
        &self.config
    }

    /// Width of the hidden states.
    pub fn width(&self) -> usize {
        self.config.width
    }

    /// How many hidden states an item of this shape gives; see [`TowerConfig::token_count`].
    pub fn token_count(&self, item: ItemShape) -> Result<usize, ModelError> {
        self.config.token_count(item)
    }

    /// The modules that carry a low-rank pair, by their paths in the tower's class.
    pub fn lora_modules(&self) -> Vec<String> {
        self.plan.keys().cloned().collect()
    }

    /// Goes through every tensor, always in the same order: stem, layers, final norm.
    pub(crate) fn visit<V: Visit>(&mut self, visitor: &mut V) {
        match &mut self.stem {
            Stem::Vision(stem) => stem.visit(visitor),
            Stem::Whisper(stem) => stem.visit(visitor),
        }
        for block in &mut self.blocks {
            block.visit(visitor);
        }
        if let Some(norm) = &mut self.norm {
            norm.visit(visitor);
        }
    }
}

impl TowerInput {
    /// The shape of one item.
    pub fn shape(&self) -> ItemShape {
        match self {
            TowerInput::Image(pixels) => {
                let [_, channels, height, width] = pixels.dims();
                ItemShape::Image {
                    channels,
                    height,
                    width,
                }
            }
            TowerInput::Mel(mel) => {
                let [_, bins, frames] = mel.dims();
                ItemShape::Mel { bins, frames }
            }
        }
    }
}

/// Makes the tower a part of a larger model: its tensors get its prefix, and what is trained is the
/// model's own, since PEFT has no place for it.
struct Adopt<'a> {
    prefix: &'a str,
}

impl Visit for Adopt<'_> {
    fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
        parameter.name.insert_str(0, self.prefix);
        if parameter.kind != ParameterKind::Frozen {
            parameter.kind = ParameterKind::Own(ParameterGroup::Encoder);
        }
    }
}
