//! Self-attention: projections, norms of queries and keys, rotation, the attention kernel.

use burn::tensor::{Bool, Int, Tensor};
use calor_kernels::reference::spread_heads;
use calor_kernels::{AttentionOptions, ScoreOptions};

use crate::linear::{Linear, forward_each};
use crate::norm::Norm;
use crate::parameter::Visit;
use crate::relative::{Disentangled, Relative};
use crate::rope::Angles;
use crate::run::{Mode, Run};

/// What padding sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Masking {
    /// Nothing: the states of padding mean nothing and nothing may read them.
    Segments,
    /// What Transformers lets it see, the tokens of its row: a loss over padding, or a classifier
    /// that reads a padded first token, depends on it. One segment a row.
    Transformers,
}

#[derive(Debug, Clone)]
pub(crate) struct Attention {
    pub projections: Projections,
    pub output: Linear,
    /// Before the rotation, over each head's `head_dim` (Qwen3, Gemma 3) or over all heads (OLMo 2).
    pub query_key_norm: Option<(Norm, Norm)>,
    /// Attention to relative positions beside that to content (DeBERTa).
    pub relative: Option<Disentangled>,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub options: AttentionOptions,
}

/// The layers that make queries, keys and values.
#[derive(Debug, Clone)]
pub(crate) enum Projections {
    /// Query, key, value.
    Split(Box<[Linear; 3]>),
    /// One layer for all three: `[query | key | value]`, or each head's three in turn.
    Fused { linear: Box<Linear>, by_head: bool },
}

/// What attention knows of the tokens' places.
#[derive(Debug, Clone, Default)]
pub(crate) struct Places {
    pub angles: Option<Angles>,
    pub relative: Option<Relative>,
}

impl Attention {
    /// input `[batch, seq, hidden]`; returns the same, or `[1, samples, hidden]` of the tokens that
    /// `run` selects: what follows attention is per token, so a last layer need not compute the
    /// others.
    pub fn forward(&self, input: Tensor<3>, places: &Places, run: &Run) -> Tensor<3> {
        let segments = run.input.segments.clone();
        let context = match run.cache {
            None => self.context(input, places, segments, run.masking, run.mode),
            Some(cache) => {
                let [batch, seq, _] = input.dims();
                let [query, key, value] = self.placed(input, places, run.mode);
                let context = cache.borrow_mut().attend(query, key, value, &self.options);
                context.reshape([batch, seq, self.heads * self.head_dim])
            }
        };
        self.output.forward(run.select(context), run.mode)
    }

    /// What every token gathers, before the output layer: `[batch, seq, heads · head_dim]`.
    ///
    /// `segments` is `[batch, seq]`, as the kernel reads it.
    pub fn context(
        &self,
        input: Tensor<3>,
        places: &Places,
        segments: Tensor<2, Int>,
        masking: Masking,
        mode: Mode,
    ) -> Tensor<3> {
        let [batch, seq, _] = input.dims();
        let [query, key, value] = self.placed(input, places, mode);
        let context = match (&self.relative, &places.relative, masking) {
            (Some(disentangled), Some(relative), _) => {
                let bias = disentangled.bias(&query, &key, relative, &self.projections, mode);
                let visible = visible(&segments, masking, &self.options);
                masked_attention(query, key, value, Some(bias), visible, &self.options)
            }
            (_, _, Masking::Segments) => {
                calor_kernels::attention(query, key, value, segments, &self.options)
            }
            (_, _, Masking::Transformers) => {
                let visible = visible(&segments, masking, &self.options);
                masked_attention(query, key, value, None, visible, &self.options)
            }
        };
        context.reshape([batch, seq, self.heads * self.head_dim])
    }

    /// Queries, keys and values, normalised and rotated where the model does that.
    fn placed(&self, input: Tensor<3>, places: &Places, mode: Mode) -> [Tensor<4>; 3] {
        let [mut query, mut key, value] = self.project(input, mode);
        if let Some((query_norm, key_norm)) = &self.query_key_norm {
            query = normed(query_norm, query);
            key = normed(key_norm, key);
        }
        if let Some(angles) = &places.angles {
            query = calor_kernels::rotary(query, angles.cos.clone(), angles.sin.clone());
            key = calor_kernels::rotary(key, angles.cos.clone(), angles.sin.clone());
        }
        [query, key, value]
    }

    /// Queries, keys and values of every head: `[batch, seq, heads, head_dim]`.
    fn project(&self, input: Tensor<3>, mode: Mode) -> [Tensor<4>; 3] {
        let [batch, seq, _] = input.dims();
        let split = |tensor: Tensor<3>, heads| -> Tensor<4> {
            tensor.reshape([batch, seq, heads, self.head_dim])
        };
        match &self.projections {
            Projections::Split(projections) => {
                let [query, key, value] = forward_each(projections, input, mode);
                [
                    split(query, self.heads),
                    split(key, self.kv_heads),
                    split(value, self.kv_heads),
                ]
            }
            Projections::Fused {
                linear,
                by_head: true,
            } => {
                let all = linear.forward(input, mode);
                let all = all.reshape([batch, seq, self.heads, 3 * self.head_dim]);
                [0, 1, 2].map(|part| all.clone().narrow(3, part * self.head_dim, self.head_dim))
            }
            Projections::Fused {
                linear,
                by_head: false,
            } => {
                let all = linear.forward(input, mode);
                let [queries, keys] =
                    [self.heads, self.kv_heads].map(|heads| heads * self.head_dim);
                [
                    split(all.clone().narrow(2, 0, queries), self.heads),
                    split(all.clone().narrow(2, queries, keys), self.kv_heads),
                    split(all.narrow(2, queries + keys, keys), self.kv_heads),
                ]
            }
        }
    }

    /// Projections first, norms last.
    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.projections.visit(visitor);
        if let Some(relative) = &mut self.relative {
            relative.visit(visitor);
        }
        self.output.visit(visitor);
        if let Some((query_norm, key_norm)) = &mut self.query_key_norm {
            query_norm.visit(visitor);
            key_norm.visit(visitor);
        }
    }
}

impl Projections {
    fn visit<V: Visit>(&mut self, visitor: &mut V) {
        match self {
            Projections::Split(projections) => {
                for projection in projections.iter_mut() {
                    projection.visit(visitor);
                }
            }
            Projections::Fused { linear, .. } => linear.visit(visitor),
        }
    }
}

/// Normalises heads, each for itself or all together, by the norm's width.
fn normed(norm: &Norm, states: Tensor<4>) -> Tensor<4> {
    let [batch, seq, heads, head_dim] = states.dims();
    if norm.width() == head_dim {
        return norm.forward(states);
    }
    norm.forward(states.reshape([batch, seq, heads * head_dim]))
        .reshape([batch, seq, heads, head_dim])
}

/// Which key a query sees, `[batch, 1, seq, seq]`. Under Transformers' masks a key is hidden where
/// `segments` is 0, a query never is.
fn visible(
    segments: &Tensor<2, Int>,
    masking: Masking,
    options: &AttentionOptions,
) -> Tensor<4, Bool> {
    let [batch, seq] = segments.dims();
    let keys = segments
        .clone()
        .reshape([batch, 1, 1, seq])
        .repeat_dim(2, seq);
    let mut visible = keys.clone().not_equal_elem(0);
    if masking == Masking::Segments {
        let queries = segments.clone().reshape([batch, 1, seq, 1]);
        visible = visible.bool_and(queries.repeat_dim(3, seq).equal(keys));
    }
    if !options.causal && options.window.is_none() {
        return visible;
    }
    let index = Tensor::<1, Int>::arange(0..seq as i64, &segments.device().inner());
    let distance = index.clone().reshape([1, 1, seq, 1]).repeat_dim(3, seq)
        - index.reshape([1, 1, 1, seq]).repeat_dim(2, seq);
    if options.causal {
        let past = distance.clone().greater_equal_elem(0);
        visible = visible.bool_and(past.repeat_dim(0, batch));
    }
    if let Some(window) = options.window {
        let near = distance.abs().lower_elem(window as i64);
        visible = visible.bool_and(near.repeat_dim(0, batch));
    }
    visible
}

/// Attention with its scores as a whole, for masks and for scores that the kernel does not know. `bias`
/// `[batch, heads, seq, seq]` is added to the products before they are scaled.
fn masked_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    bias: Option<Tensor<4>>,
    visible: Tensor<4, Bool>,
    options: &AttentionOptions,
) -> Tensor<4> {
    let heads = query.dims()[2];
    let key = spread_heads(key, heads).swap_dims(2, 3);
    let mut scores = calor_kernels::matmul(query.swap_dims(1, 2), key);
    if let Some(bias) = bias {
        scores = scores + bias;
    }
    let options = ScoreOptions {
        scale: options.scale,
        soft_cap: options.soft_cap,
    };
    let weights = calor_kernels::masked_softmax(scores, visible, &options);
    calor_kernels::matmul(weights, spread_heads(value, heads)).swap_dims(1, 2)
}
