//! One transformer layer of any architecture: attention and a feed-forward block, with norms where its
//! table of names has them.

use burn::tensor::Tensor;
use calor_kernels::AttentionOptions;

use crate::architecture::{self, Parts};
use crate::attention::{Attention, Places, Projections};
use crate::builder::Builder;
use crate::config::{Family, ModelConfig};
use crate::error::ModelError;
use crate::linear::Linear;
use crate::mlp::{FeedForward, GateUp, GatedMlp, Mlp};
use crate::names::Slot;
use crate::norm::Norm;
use crate::parameter::Visit;
use crate::recompute::Block;
use crate::relative::Disentangled;
use crate::run::Run;

/// `h = after(x + on(attention(before(x))))`, then the same with the feed-forward block on `h`. Most
/// architectures have two of the six norms: those before (Llama, GPT-2, ModernBERT), those on what is
/// added (OLMo 2), those after (BERT); Gemma has those before and on.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    attention: Attention,
    before_attention: Option<Norm>,
    on_attention: Option<Norm>,
    after_attention: Option<Norm>,
    mlp: FeedForward,
    before_mlp: Option<Norm>,
    on_mlp: Option<Norm>,
    after_mlp: Option<Norm>,
    /// The feed-forward block reads `x` as attention does, not `h` (GPT-NeoX).
    parallel: bool,
}

impl Layer {
    pub fn build(
        builder: &Builder,
        config: &ModelConfig,
        layer: usize,
    ) -> Result<Layer, ModelError> {
        let parts = architecture::layer(config, layer);
        let norm = |slot| builder.norm_of(&parts, slot, config);
        Ok(Layer {
            attention: attention(builder, config, &parts, layer)?,
            before_attention: norm(Slot::BeforeAttention)?,
            on_attention: norm(Slot::OnAttention)?,
            after_attention: norm(Slot::AfterAttention)?,
            mlp: feed_forward(builder, config, &parts)?,
            before_mlp: norm(Slot::BeforeMlp)?,
            on_mlp: norm(Slot::OnMlp)?,
            after_mlp: norm(Slot::AfterMlp)?,
            parallel: config.design.parallel,
        })
    }
}

impl Block for Layer {
    type Context = Places;

    fn forward(&self, input: Tensor<3>, places: &Places, run: &Run) -> Tensor<3> {
        let (input, normed) = beside(&self.before_attention, input);
        let attended = self.attention.forward(normed, places, run);
        let attended = through(&self.on_attention, attended);
        let input = run.select(input);
        let (hidden, read) = match (&self.after_attention, &self.before_mlp) {
            (after, before) if self.parallel => {
                let read = through(before, input.clone());
                (through(after, input + attended), read)
            }
            (None, Some(before)) => before.of_residual(input, Some(attended)),
            (after, before) => beside(before, through_sum(after, input, attended)),
        };
        let wide = through(&self.on_mlp, self.mlp.forward(read, run.mode));
        through_sum(&self.after_mlp, hidden, wide)
    }

    fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.attention.visit(visitor);
        self.mlp.visit(visitor);
        let norms = [
            &mut self.before_attention,
            &mut self.on_attention,
            &mut self.after_attention,
            &mut self.before_mlp,
            &mut self.on_mlp,
            &mut self.after_mlp,
        ];
        for norm in norms.into_iter().flatten() {
            norm.visit(visitor);
        }
    }
}

/// The states, and what comes through the norm.
fn beside(norm: &Option<Norm>, states: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
    match norm {
        Some(norm) => norm.of_residual(states, None),
        None => (states.clone(), states),
    }
}

/// What comes of the sum.
fn through_sum(norm: &Option<Norm>, states: Tensor<3>, update: Tensor<3>) -> Tensor<3> {
    match norm {
        Some(norm) => norm.of_residual(states, Some(update)).1,
        None => states + update,
    }
}

fn through(norm: &Option<Norm>, states: Tensor<3>) -> Tensor<3> {
    match norm {
        Some(norm) => norm.forward(states),
        None => states,
    }
}

fn attention(
    builder: &Builder,
    config: &ModelConfig,
    parts: &Parts,
    layer: usize,
) -> Result<Attention, ModelError> {
    let design = &config.design;
    let linear = |slot| builder.linear_of(parts.expect(slot));
    let optional = |slot| -> Result<Option<Linear>, ModelError> {
        parts
            .get(slot)
            .map(|spec| builder.linear_of(spec))
            .transpose()
    };
    let norm = |slot| builder.norm_of(parts, slot, config);
    Ok(Attention {
        projections: match optional(Slot::QueryKeyValue)? {
            Some(linear) => Projections::Fused {
                linear: Box::new(linear),
                by_head: design.fused_by_head,
            },
            None => Projections::Split(Box::new([
                linear(Slot::Query)?,
                linear(Slot::Key)?,
                linear(Slot::Value)?,
            ])),
        },
        output: linear(Slot::AttentionOutput)?,
        query_key_norm: norm(Slot::QueryNorm)?.zip(norm(Slot::KeyNorm)?),
        relative: match design.relative {
            Some(config) => Some(Disentangled {
                config,
                position_key: optional(Slot::PositionKey)?,
                position_query: optional(Slot::PositionQuery)?,
            }),
            None => None,
        },
        heads: config.heads,
        kv_heads: design.kv_heads,
        head_dim: design.head_dim,
        options: AttentionOptions {
            causal: design.family == Family::Decoder,
            window: design.layers[layer].window,
            scale: design.layers[layer].scale,
            soft_cap: design.attention_soft_cap,
        },
    })
}

fn feed_forward(
    builder: &Builder,
    config: &ModelConfig,
    parts: &Parts,
) -> Result<FeedForward, ModelError> {
    let activation = config.design.activation;
    let linear = |slot| builder.linear_of(parts.expect(slot));
    let input = match (parts.get(Slot::GateUp), parts.get(Slot::Gate)) {
        (Some(both), _) => GateUp::Fused(Box::new(builder.linear_of(both)?)),
        (None, Some(gate)) => {
            GateUp::Split(Box::new([builder.linear_of(gate)?, linear(Slot::Up)?]))
        }
        (None, None) => {
            return Ok(FeedForward::Plain(Box::new(Mlp {
                intermediate: linear(Slot::Up)?,
                output: linear(Slot::Down)?,
                activation,
            })));
        }
    };
    Ok(FeedForward::Gated(Box::new(GatedMlp {
        input,
        down: linear(Slot::Down)?,
        activation,
    })))
}
