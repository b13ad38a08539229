//! From tokens to the first layer's input.

use burn::tensor::Tensor;

use crate::architecture;
use crate::builder::Builder;
use crate::config::ModelConfig;
use crate::embedding::TokenEmbedding;
use crate::error::ModelError;
use crate::linear::Linear;
use crate::names::Slot;
use crate::norm::Norm;
use crate::parameter::{Parameter, Visit};
use crate::run::Run;

/// Token embeddings and whatever is added to them.
#[derive(Debug, Clone)]
pub(crate) struct Embeddings {
    pub tokens: TokenEmbedding,
    /// Multiplies them (Gemma).
    pub scale: Option<f64>,
    /// `[positions, width]`, and the row of position 0.
    positions: Option<(Parameter<2>, usize)>,
    /// `[types, width]`; every token is of type 0, a patient being one sequence.
    types: Option<Parameter<2>>,
    norm: Option<Norm>,
    /// From `width` to `hidden` (ELECTRA).
    projection: Option<Linear>,
}

impl Embeddings {
    pub fn build(builder: &Builder, config: &ModelConfig) -> Result<Embeddings, ModelError> {
        let parts = architecture::embeddings(config);
        let design = &config.design;
        let table = |slot| match parts.get(slot) {
            Some(spec) => builder.embedding(&spec.path).map(Some),
            None => Ok(None),
        };
        Ok(Embeddings {
            tokens: builder.token_embedding(
                &parts.expect(Slot::Tokens).path,
                config.pad_token_id.filter(|_| design.padding_row),
            )?,
            scale: design.embedding_scale,
            positions: table(Slot::Positions)?.zip(design.learned_positions),
            types: table(Slot::Types)?,
            norm: builder.norm_of(&parts, Slot::EmbeddingNorm, config)?,
            projection: match parts.get(Slot::EmbeddingProjection) {
                Some(spec) => Some(builder.linear_of(spec)?),
                None => None,
            },
        })
    }

    /// `[batch, seq, hidden]`
    pub fn forward(&self, run: &Run) -> Tensor<3> {
        let mut states = run.embed(&self.tokens, self.scale);
        let [batch, seq, width] = states.dims();
        let dtype = states.dtype();
        if let Some(types) = &self.types {
            let first = types.matching(dtype).narrow(0, 0, 1);
            states = states + first.reshape([1, 1, width]);
        }
        if let Some((table, offset)) = &self.positions {
            let positions = run.input.positions.clone();
            let rows = positions.add_scalar(*offset as i32).reshape([batch * seq]);
            let positions = table.matching(dtype).select(0, rows);
            states = states + positions.reshape([batch, seq, width]);
        }
        if let Some(norm) = &self.norm {
            states = norm.forward(states);
        }
        match &self.projection {
            Some(projection) => projection.forward(states, run.mode),
            None => states,
        }
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.tokens.visit(visitor);
        if let Some((positions, _)) = &mut self.positions {
            visitor.visit(positions);
        }
        if let Some(types) = &mut self.types {
            visitor.visit(types);
        }
        if let Some(norm) = &mut self.norm {
            norm.visit(visitor);
        }
        if let Some(projection) = &mut self.projection {
            projection.visit(visitor);
        }
    }
}
