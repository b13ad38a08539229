//! The transformer that the encoders of ours share: blocks with the norm first (Xiong et al. 2020).

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use calor_kernels::AttentionOptions;

use super::new::{New, floats};
use crate::linear::Linear;
use crate::mlp::Mlp;
use crate::norm::LayerNorm;
use crate::parameter::Visit;
use crate::run::Mode;

/// Blocks of self-attention and feed-forward layer.
#[derive(Debug, Clone)]
pub(super) struct Transformer {
    blocks: Vec<Block>,
    heads: usize,
}

#[derive(Debug, Clone)]
struct Block {
    attention_norm: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    mlp_norm: LayerNorm,
    mlp: Mlp,
}

impl Transformer {
    pub fn new(new: &New, width: usize, depth: usize, heads: usize) -> Transformer {
        let blocks = (0..depth)
            .map(|block| Block::new(&new.at(&format!("blocks.{block}")), width))
            .collect();
        Transformer { blocks, heads }
    }

    /// tokens `[items, tokens, width]`, segments `[items, tokens]`: 1 for a token, 0 for padding,
    /// which nothing attends to; returns `[items, tokens, width]`
    pub fn forward(&self, tokens: Tensor<3>, segments: &Tensor<2, Int>, mode: Mode) -> Tensor<3> {
        self.blocks.iter().fold(tokens, |tokens, block| {
            block.forward(tokens, segments.clone(), self.heads, mode)
        })
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        for block in &mut self.blocks {
            block.attention_norm.visit(visitor);
            block.query.visit(visitor);
            block.key.visit(visitor);
            block.value.visit(visitor);
            block.output.visit(visitor);
            block.mlp_norm.visit(visitor);
            block.mlp.visit(visitor);
        }
    }
}

impl Block {
    fn new(new: &New, width: usize) -> Block {
        let linear = |name: &str| new.linear(name, width, width);
        Block {
            attention_norm: new.norm("attention_norm", width),
            query: linear("query"),
            key: linear("key"),
            value: linear("value"),
            output: linear("output"),
            mlp_norm: new.norm("mlp_norm", width),
            mlp: new.mlp("mlp", width),
        }
    }

    fn forward(
        &self,
        tokens: Tensor<3>,
        segments: Tensor<2, Int>,
        heads: usize,
        mode: Mode,
    ) -> Tensor<3> {
        let [items, count, width] = tokens.dims();
        let head_dim = width / heads;
        let normed = self.attention_norm.forward(tokens.clone());
        let split = |linear: &Linear| -> Tensor<4> {
            let projected = linear.forward(normed.clone(), mode);
            projected.reshape([items, count, heads, head_dim])
        };
        let options = AttentionOptions {
            causal: false,
            window: None,
            scale: (head_dim as f32).powf(-0.5),
            soft_cap: None,
        };
        let (query, key) = (split(&self.query), split(&self.key));
        let context = calor_kernels::attention(query, key, split(&self.value), segments, &options);
        let context = context.reshape([items, count, width]);
        let tokens = tokens + self.output.forward(context, mode);
        let normed = self.mlp_norm.forward(tokens.clone());
        tokens + self.mlp.forward(normed, mode)
    }
}

/// Segments of items with so many real tokens each, those first: `[items, tokens]`.
pub(super) fn segments(lengths: &[usize], tokens: usize, device: &Device) -> Tensor<2, Int> {
    let values: Vec<i32> = lengths
        .iter()
        .flat_map(|&length| (0..tokens).map(move |token| i32::from(token < length)))
        .collect();
    let device = device.clone().inner();
    let data = TensorData::new(values, [lengths.len(), tokens]);
    Tensor::from_data(data, (&device, DType::I32))
}

/// Sinusoidal positions (Vaswani et al. 2017): place `p` has `sin(p / 10000^(2i / width))` at `i`
/// and its cosine at `width / 2 + i`. They need no table, so that a signal may have any length.
/// Returns `[positions, width]`.
pub(super) fn sinusoids(positions: usize, width: usize, device: &Device) -> Tensor<2> {
    let half = width / 2;
    let mut values = vec![0f32; positions * width];
    for (position, row) in values.chunks_exact_mut(width).enumerate() {
        for index in 0..half {
            let period = 10_000f64.powf(2.0 * index as f64 / width as f64);
            let (sin, cos) = (position as f64 / period).sin_cos();
            row[index] = sin as f32;
            row[half + index] = cos as f32;
        }
    }
    floats(values, [positions, width], device)
}
