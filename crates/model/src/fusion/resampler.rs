//! The resampler: learned queries that attend to an encoder's output, so that every item becomes the
//! same number of tokens however long it is (Perceiver, Jaegle et al. 2021; Flamingo, Alayrac et
//! al. 2022).

use burn::tensor::activation::softmax;
use burn::tensor::{DType, Tensor};

use super::encoder::Encoded;
use super::new::New;
use super::options::ResamplerOptions;
use crate::linear::Linear;
use crate::mlp::Mlp;
use crate::norm::LayerNorm;
use crate::parameter::{Parameter, Visit};
use crate::run::Mode;

/// Standard deviation of new queries.
const QUERY_DEVIATION: f64 = 0.02;

#[derive(Debug, Clone)]
pub(super) struct Resampler {
    /// `[K, width]`
    queries: Parameter<2>,
    blocks: Vec<Block>,
    norm: LayerNorm,
    heads: usize,
}

/// Cross-attention and feed-forward layer, each behind its norm and beside a shortcut.
#[derive(Debug, Clone)]
struct Block {
    query_norm: LayerNorm,
    token_norm: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    mlp_norm: LayerNorm,
    mlp: Mlp,
}

impl Resampler {
    /// `input` is the encoder's width.
    pub fn new(new: &New, tokens: usize, input: usize, options: &ResamplerOptions) -> Resampler {
        let width = options.width;
        Resampler {
            queries: new.normal("queries", [tokens, width], QUERY_DEVIATION),
            blocks: (0..options.depth)
                .map(|block| Block::new(&new.at(&format!("blocks.{block}")), input, width))
                .collect(),
            norm: new.norm("norm", width),
            heads: options.heads,
        }
    }

    /// An encoder's output `[items, tokens, input]` → `[items, K, width]`, f32.
    ///
    /// An item without a single token gives what the queries say on their own.
    pub fn forward(&self, encoded: Encoded, mode: Mode) -> Tensor<3> {
        let tokens = encoded.tokens.cast(DType::F32);
        let items = tokens.dims()[0];
        let queries = self.queries.tensor.clone().unsqueeze::<3>();
        let queries = queries.repeat_dim(0, items);
        let resampled = self.blocks.iter().fold(queries, |queries, block| {
            let mask = encoded.mask.as_ref();
            block.forward(queries, tokens.clone(), mask, self.heads, mode)
        });
        self.norm.forward(resampled)
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        visitor.visit(&mut self.queries);
        for block in &mut self.blocks {
            block.visit(visitor);
        }
        self.norm.visit(visitor);
    }
}

impl Block {
    fn new(new: &New, input: usize, width: usize) -> Block {
        Block {
            query_norm: new.norm("query_norm", width),
            token_norm: new.norm("token_norm", input),
            query: new.linear("query", width, width),
            key: new.linear("key", input, width),
            value: new.linear("value", input, width),
            output: new.linear("output", width, width),
            mlp_norm: new.norm("mlp_norm", width),
            mlp: new.mlp("mlp", width),
        }
    }

    fn forward(
        &self,
        queries: Tensor<3>,
        tokens: Tensor<3>,
        mask: Option<&Tensor<2>>,
        heads: usize,
        mode: Mode,
    ) -> Tensor<3> {
        let split = |states: Tensor<3>| -> Tensor<4> {
            let [items, count, width] = states.dims();
            states
                .reshape([items, count, heads, width / heads])
                .swap_dims(1, 2)
        };
        let asking = self.query_norm.forward(queries.clone());
        let tokens = self.token_norm.forward(tokens);
        let query = split(self.query.forward(asking, mode));
        let key = split(self.key.forward(tokens.clone(), mode));
        let value = split(self.value.forward(tokens, mode));
        let attended = self.output.forward(attend(query, key, value, mask), mode);
        let queries = queries + attended;
        let normed = self.mlp_norm.forward(queries.clone());
        queries + self.mlp.forward(normed, mode)
    }

    fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.query_norm.visit(visitor);
        self.token_norm.visit(visitor);
        self.query.visit(visitor);
        self.key.visit(visitor);
        self.value.visit(visitor);
        self.output.visit(visitor);
        self.mlp_norm.visit(visitor);
        self.mlp.visit(visitor);
    }
}

/// `softmax(Q Kᵀ / √head_dim) V`, keys with mask 0 hidden; zeros where all of them are. Queries are
/// few, so the scores may exist.
///
/// query `[items, heads, K, head_dim]`, key, value `[items, heads, tokens, head_dim]`, mask
/// `[items, tokens]`; returns `[items, K, heads · head_dim]`.
fn attend(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    mask: Option<&Tensor<2>>,
) -> Tensor<3> {
    let [items, heads, count, head_dim] = query.dims();
    let tokens = key.dims()[2];
    let scores =
        calor_kernels::matmul(query, key.swap_dims(2, 3)).mul_scalar((head_dim as f32).powf(-0.5));
    let weights = match mask {
        None => softmax(scores, 3),
        Some(mask) => {
            let mask = mask.clone().reshape([items, 1, 1, tokens]);
            let hidden = mask.clone().sub_scalar(1.0).mul_scalar(1e30);
            softmax(scores + hidden, 3) * mask
        }
    };
    calor_kernels::matmul(weights, value)
        .swap_dims(1, 2)
        .reshape([items, count, heads * head_dim])
}
