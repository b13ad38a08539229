//! The transformer: embeddings, layers, the last norm, and an encoder's pooler.

use burn::tensor::Tensor;

use crate::architecture::{self, PoolerSpec};
use crate::attention::Places;
use crate::block::Layer;
use crate::builder::Builder;
use crate::config::{Activation, LayerDesign, ModelConfig};
use crate::embedding::TokenEmbedding;
use crate::embeddings::Embeddings;
use crate::error::ModelError;
use crate::linear::Linear;
use crate::names::Slot;
use crate::norm::Norm;
use crate::parameter::Visit;
use crate::recompute::Block;
use crate::relative::{Relative, RelativeTable};
use crate::rope::{Angles, Rope};
use crate::run::{Mode, Run};

#[derive(Debug, Clone)]
pub(crate) struct Backbone {
    embeddings: Embeddings,
    layers: Vec<Layer>,
    designs: Vec<LayerDesign>,
    ropes: Vec<Rope>,
    relative: Option<RelativeTable>,
    norm: Option<Norm>,
    /// Only where something reads it: the Transformers classifier, or an adapter made for
    /// `AutoModel`.
    pooler: Option<Pooler>,
}

/// `norm(activation(W h + b))` of a pooled state.
#[derive(Debug, Clone)]
struct Pooler {
    dense: Linear,
    activation: Activation,
    norm: Option<Norm>,
}

impl Backbone {
    /// `pooler` comes with the prefix of its paths.
    pub fn build(
        builder: &Builder,
        config: &ModelConfig,
        pooler: Option<(PoolerSpec, &str)>,
    ) -> Result<Backbone, ModelError> {
        let design = &config.design;
        let end = architecture::end(config);
        Ok(Backbone {
            embeddings: Embeddings::build(builder, config)?,
            layers: (0..config.layers())
                .map(|layer| Layer::build(builder, config, layer))
                .collect::<Result<_, _>>()?,
            designs: design.layers.clone(),
            ropes: design.ropes.iter().map(Rope::new).collect(),
            relative: match design.relative {
                Some(relative) => Some(RelativeTable {
                    weight: builder.embedding(&end.expect(Slot::Relative).path)?,
                    norm: builder.norm_of(&end, Slot::RelativeNorm, config)?,
                    config: relative,
                    heads: config.heads,
                }),
                None => None,
            },
            norm: builder.norm_of(&end, Slot::FinalNorm, config)?,
            pooler: match pooler {
                Some((spec, prefix)) => Some(Pooler {
                    dense: builder.linear_or_new(&spec.dense, prefix)?,
                    activation: design.classifier.activation,
                    norm: match &spec.norm {
                        Some(norm) => Some(builder.norm_or_new(norm, prefix, config)?),
                        None => None,
                    },
                }),
                None => None,
            },
        })
    }

    /// The token embedding, with what the adapter adds to it.
    pub fn embedding(&self) -> &TokenEmbedding {
        &self.embeddings.tokens
    }

    pub fn embedding_mut(&mut self) -> &mut TokenEmbedding {
        &mut self.embeddings.tokens
    }

    /// What the token embedding is multiplied with.
    pub fn embedding_scale(&self) -> f64 {
        self.embeddings.scale.unwrap_or(1.0)
    }

    /// Hidden states after the last norm: `[batch, seq, hidden]`, or `[1, samples, hidden]` of the
    /// selected tokens.
    pub fn forward(&self, run: &Run) -> Tensor<3> {
        let mut hidden = self.embeddings.forward(run);
        let [batch, seq, _] = hidden.dims();
        let (dtype, device) = (hidden.dtype(), hidden.device());
        let angles: Vec<Angles> = self
            .ropes
            .iter()
            .map(|rope| {
                let positions = run.input.positions.clone();
                rope.angles(positions, run.input.segments.clone(), dtype, &device)
            })
            .collect();
        let relative = self
            .relative
            .as_ref()
            .map(|table| table.of(batch, seq, dtype));
        // What is run again takes all but its input and parameters for constants.
        let constant = !relative.as_ref().is_some_and(Relative::is_tracked);
        let run = Run {
            recompute: run.recompute.filter(|_| constant),
            ..*run
        };
        for (index, (layer, design)) in self.layers.iter().zip(&self.designs).enumerate() {
            let places = Places {
                angles: design.rope.map(|rope| angles[rope].clone()),
                relative: relative.clone(),
            };
            hidden = run.block(layer, index, self.layers.len(), hidden, &places);
        }
        match &self.norm {
            Some(norm) => norm.forward(hidden),
            None => hidden,
        }
    }

    /// What the pooler makes of pooled states `[1, samples, hidden]`; without one, the same.
    pub fn pool(&self, states: Tensor<3>, mode: Mode) -> Tensor<3> {
        let Some(pooler) = &self.pooler else {
            return states;
        };
        let states = pooler.activation.apply(pooler.dense.forward(states, mode));
        match &pooler.norm {
            Some(norm) => norm.forward(states),
            None => states,
        }
    }

    /// In the order of the parts' building.
    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.embeddings.visit(visitor);
        for layer in &mut self.layers {
            layer.visit(visitor);
        }
        if let Some(relative) = &mut self.relative {
            relative.visit(visitor);
        }
        if let Some(norm) = &mut self.norm {
            norm.visit(visitor);
        }
        if let Some(pooler) = &mut self.pooler {
            pooler.dense.visit(visitor);
            if let Some(norm) = &mut pooler.norm {
                norm.visit(visitor);
            }
        }
    }
}
