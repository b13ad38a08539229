//! How large a model is.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::architecture::Role;
use crate::config::Family;
use crate::fusion;
use crate::head::Head;
use crate::model::Model;
use crate::parameter::{Parameter, ParameterGroup, ParameterKind, Visit};
use crate::weight::QuantizedParameter;

/// Numbers of parameters, for the arithmetic of FLOPs and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ModelSize {
    /// Weights of the backbone that every token is multiplied with: all but the embeddings, and
    /// the output layer of a language model although it may be the embedding.
    pub base_parameters: u64,
    /// Token, position and type embeddings.
    pub embedding_parameters: u64,
    /// `lora_A` and `lora_B`.
    pub adapter_parameters: u64,
    /// Trained in full: the head and `modules_to_save`.
    pub head_parameters: u64,
    /// Frozen weights of the pretrained towers that read modality items.
    pub tower_parameters: u64,
    /// Trained in the encoders of modality items, the towers' low-rank pairs included.
    pub encoder_parameters: u64,
    /// Resamplers, projectors, type, site and time embeddings, missing tokens.
    pub projector_parameters: u64,
    /// Width of the hidden states.
    pub hidden: u64,
    /// Width of the attention heads together.
    pub attention_width: u64,
    /// Number of layers.
    pub layers: u64,
    /// Bytes of all frozen weights as they are kept.
    pub frozen_bytes: u64,
    /// Whether a token sees only what comes before it.
    pub causal: bool,
}

impl Model {
    /// Numbers of parameters.
    pub fn size(&self) -> ModelSize {
        struct Count {
            size: ModelSize,
            embeddings: BTreeSet<String>,
        }
        impl Visit for Count {
            fn visit_quantized(&mut self, parameter: &mut QuantizedParameter) {
                let [output, input] = parameter.weight.dims();
                self.size.base_parameters += (output * input) as u64;
                self.size.frozen_bytes += parameter.weight.bytes() as u64;
            }

            fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
                let count = parameter.tensor.shape().num_elements() as u64;
                let embedding = self.embeddings.contains(&parameter.name);
                let size = &mut self.size;
                if parameter.kind == ParameterKind::Frozen {
                    size.frozen_bytes += count * parameter.tensor.dtype().size() as u64;
                }
                *match parameter.kind {
                    // A second copy of numbers that the frozen weight and the pair hold.
                    ParameterKind::Start => return,
                    ParameterKind::Adapter | ParameterKind::Own(ParameterGroup::Adapter) => {
                        &mut size.adapter_parameters
                    }
                    ParameterKind::Saved | ParameterKind::Own(ParameterGroup::Head) => {
                        &mut size.head_parameters
                    }
                    ParameterKind::Own(ParameterGroup::Encoder) => &mut size.encoder_parameters,
                    ParameterKind::Own(ParameterGroup::Projector) => &mut size.projector_parameters,
                    ParameterKind::Frozen if parameter.name.starts_with(fusion::PREFIX) => {
                        &mut size.tower_parameters
                    }
                    ParameterKind::Frozen if embedding => &mut size.embedding_parameters,
                    ParameterKind::Frozen => &mut size.base_parameters,
                } += count;
            }
        }
        let mut count = Count {
            size: ModelSize {
                base_parameters: 0,
                embedding_parameters: 0,
                adapter_parameters: 0,
                head_parameters: 0,
                tower_parameters: 0,
                encoder_parameters: 0,
                projector_parameters: 0,
                hidden: self.config.hidden as u64,
                attention_width: self.config.query_width() as u64,
                layers: self.config.layers() as u64,
                frozen_bytes: 0,
                causal: self.config.family() == Family::Decoder,
            },
            embeddings: self
                .class
                .modules(&self.config, self.options.head.labels())
                .into_iter()
                .filter(|module| module.role == Role::Embedding)
                .map(|module| format!("{}.weight", module.path))
                .collect(),
        };
        self.clone().visit(&mut count);
        if let Head::CausalLm { tied: true, .. } = self.head {
            count.size.base_parameters += (self.config.vocab * self.config.hidden) as u64;
        }
        count.size
    }
}
