//! Self-attention of both families: projections, rotation, the attention kernel.

use burn::tensor::activation::softmax;
use burn::tensor::{Int, Tensor};
use calor_kernels::AttentionOptions;
use calor_kernels::reference::spread_heads;

use crate::linear::Linear;
use crate::norm::RmsNorm;
use crate::parameter::Visit;
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
    pub query: Linear,
    pub key: Linear,
    pub value: Linear,
    pub output: Linear,
    /// Over each head's `head_dim`, before the rotation (Qwen3).
    pub query_key_norm: Option<(RmsNorm, RmsNorm)>,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub options: AttentionOptions,
}

impl Attention {
    /// input `[batch, seq, hidden]`; returns the same, or `[1, samples, hidden]` of the tokens that
    /// `run` selects: what follows attention is per token, so a last layer need not compute the
    /// others.
    pub fn forward(&self, input: Tensor<3>, angles: Option<&Angles>, run: &Run) -> Tensor<3> {
        let segments = run.input.segments.clone();
        let context = match run.cache {
            None => self.context(input, angles, segments, run.masking, run.mode),
            Some(cache) => {
                let [batch, seq, _] = input.dims();
                let (query, key, value) = self.project(input, angles, run.mode);
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
        angles: Option<&Angles>,
        segments: Tensor<2, Int>,
        masking: Masking,
        mode: Mode,
    ) -> Tensor<3> {
        let [batch, seq, _] = input.dims();
        let (query, key, value) = self.project(input, angles, mode);
        let context = match masking {
            Masking::Segments => {
                calor_kernels::attention(query, key, value, segments, &self.options)
            }
            Masking::Transformers => padded_attention(query, key, value, segments, &self.options),
        };
        context.reshape([batch, seq, self.heads * self.head_dim])
    }

    /// Queries `[batch, seq, heads, head_dim]`, keys and values `[batch, seq, kv_heads, head_dim]`,
    /// rotated where the model rotates.
    fn project(
        &self,
        input: Tensor<3>,
        angles: Option<&Angles>,
        mode: Mode,
    ) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        let [batch, seq, _] = input.dims();
        let split = |tensor: Tensor<3>, heads| -> Tensor<4> {
            tensor.reshape([batch, seq, heads, self.head_dim])
        };
        let mut query = split(self.query.forward(input.clone(), mode), self.heads);
        let mut key = split(self.key.forward(input.clone(), mode), self.kv_heads);
        let value = split(self.value.forward(input, mode), self.kv_heads);
        if let Some((query_norm, key_norm)) = &self.query_key_norm {
            query = query_norm.forward(query);
            key = key_norm.forward(key);
        }
        if let Some(angles) = angles {
            query = calor_kernels::rotary(query, angles.cos.clone(), angles.sin.clone());
            key = calor_kernels::rotary(key, angles.cos.clone(), angles.sin.clone());
        }
        (query, key, value)
    }

    /// In the order of the Transformers class, norms last.
    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.query.visit(visitor);
        self.key.visit(visitor);
        self.value.visit(visitor);
        self.output.visit(visitor);
        if let Some((query_norm, key_norm)) = &mut self.query_key_norm {
            query_norm.visit(visitor);
            key_norm.visit(visitor);
        }
    }
}

/// Attention under Transformers' masks, in plain tensor operations: a key is hidden where
/// `segments` is 0, a query never is; one that sees nothing gets zeros, as from PyTorch's
/// `scaled_dot_product_attention`.
fn padded_attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    segments: Tensor<2, Int>,
    options: &AttentionOptions,
) -> Tensor<4> {
    let [batch, seq, heads, _] = query.dims();
    let mut visible = segments
        .not_equal_elem(0)
        .reshape([batch, 1, 1, seq])
        .repeat_dim(2, seq);
    let index = Tensor::<1, Int>::arange(0..seq as i64, &query.device().inner());
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
    let nothing = visible.clone().any_dim(3).bool_not();
    let scores = query
        .swap_dims(1, 2)
        .matmul(spread_heads(key, heads).swap_dims(2, 3))
        .mul_scalar(options.scale)
        .mask_fill(visible.bool_not().repeat_dim(1, heads), -1e30);
    softmax(scores, 3)
        .mask_fill(nothing.repeat_dim(1, heads).repeat_dim(3, seq), 0.0)
        .matmul(spread_heads(value, heads))
        .swap_dims(1, 2)
}
