//! The encoder family: BERT, MiniLM, RoBERTa.

use burn::tensor::Tensor;
use calor_kernels::AttentionOptions;

use crate::architecture;
use crate::attention::Attention;
use crate::builder::Builder;
use crate::config::{EncoderConfig, ModelConfig};
use crate::embedding::TokenEmbedding;
use crate::error::ModelError;
use crate::linear::Linear;
use crate::mlp::Mlp;
use crate::norm::LayerNorm;
use crate::parameter::{Parameter, Visit};
use crate::recompute::Block;
use crate::run::{Mode, Run};

#[derive(Debug, Clone)]
pub(crate) struct Encoder {
    pub words: TokenEmbedding,
    /// `[positions, hidden]`
    positions: Parameter<2>,
    /// `[types, hidden]`; every token is of type 0, a patient being one sequence.
    types: Parameter<2>,
    norm: LayerNorm,
    layers: Vec<Layer>,
    /// Only where something reads it: BERT's classifier, or an adapter made for `AutoModel`.
    pooler: Option<Linear>,
    position_offset: usize,
}

#[derive(Debug, Clone)]
struct Layer {
    attention: Attention,
    attention_norm: LayerNorm,
    mlp: Mlp,
    output_norm: LayerNorm,
}

impl Encoder {
    pub fn build(
        builder: &Builder,
        config: &ModelConfig,
        encoder: &EncoderConfig,
        with_pooler: bool,
    ) -> Result<Encoder, ModelError> {
        let embedding = |name: &str| builder.embedding(&format!("embeddings.{name}"));
        Ok(Encoder {
            words: builder.token_embedding("embeddings.word_embeddings", config.pad_token_id)?,
            positions: embedding("position_embeddings")?,
            types: embedding("token_type_embeddings")?,
            norm: builder.layer_norm("embeddings.LayerNorm", config.norm_epsilon)?,
            layers: (0..config.layers)
                .map(|layer| Layer::build(builder, config, encoder, layer))
                .collect::<Result<_, _>>()?,
            pooler: match with_pooler {
                true => Some(builder.linear_or_new(&architecture::pooler(config))?),
                false => None,
            },
            position_offset: encoder.position_offset,
        })
    }

    /// Hidden states of the last layer: `[batch, seq, hidden]`, or `[1, samples, hidden]` of the
    /// selected tokens.
    pub fn forward(&self, run: &Run) -> Tensor<3> {
        let words = run.embed(&self.words);
        let [batch, seq, hidden] = words.dims();
        let positions = run
            .input
            .positions
            .clone()
            .add_scalar(self.position_offset as i32)
            .reshape([batch * seq]);
        let positions = self.positions.matching(words.dtype()).select(0, positions);
        let first_type = self
            .types
            .matching(words.dtype())
            .narrow(0, 0, 1)
            .reshape([1, 1, hidden]);
        let sum = words + first_type + positions.reshape([batch, seq, hidden]);
        let mut states = self.norm.forward(sum);
        for (index, layer) in self.layers.iter().enumerate() {
            states = run.block(layer, index, self.layers.len(), states, &());
        }
        states
    }

    /// `tanh(W h + b)` of selected tokens, where the model has a pooler.
    pub fn pool(&self, tokens: Tensor<3>, mode: Mode) -> Tensor<3> {
        match &self.pooler {
            Some(pooler) => pooler.forward(tokens, mode).tanh(),
            None => tokens,
        }
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.words.visit(visitor);
        visitor.visit(&mut self.positions);
        visitor.visit(&mut self.types);
        self.norm.visit(visitor);
        for layer in &mut self.layers {
            layer.visit(visitor);
        }
        if let Some(pooler) = &mut self.pooler {
            pooler.visit(visitor);
        }
    }
}

impl Layer {
    fn build(
        builder: &Builder,
        config: &ModelConfig,
        encoder: &EncoderConfig,
        layer: usize,
    ) -> Result<Layer, ModelError> {
        let at = |name: &str| format!("encoder.layer.{layer}.{name}");
        let head_dim = config.hidden / config.heads;
        let linear = |name: &str| builder.linear(&at(name), true);
        let norm = |name: &str| builder.layer_norm(&at(name), config.norm_epsilon);
        Ok(Layer {
            attention: Attention {
                query: linear("attention.self.query")?,
                key: linear("attention.self.key")?,
                value: linear("attention.self.value")?,
                output: linear("attention.output.dense")?,
                query_key_norm: None,
                heads: config.heads,
                kv_heads: config.heads,
                head_dim,
                options: AttentionOptions {
                    causal: false,
                    window: None,
                    scale: (head_dim as f32).powf(-0.5),
                },
            },
            attention_norm: norm("attention.output.LayerNorm")?,
            mlp: Mlp {
                intermediate: linear("intermediate.dense")?,
                output: linear("output.dense")?,
                activation: encoder.activation,
            },
            output_norm: norm("output.LayerNorm")?,
        })
    }
}

impl Block for Layer {
    type Context = ();

    fn forward(&self, input: Tensor<3>, _: &(), run: &Run) -> Tensor<3> {
        let attended = self.attention.forward(input.clone(), None, run);
        let hidden = self.attention_norm.forward(run.select(input) + attended);
        let wide = self.mlp.forward(hidden.clone(), run.mode);
        self.output_norm.forward(hidden + wide)
    }

    fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.attention.visit(visitor);
        self.attention_norm.visit(visitor);
        self.mlp.visit(visitor);
        self.output_norm.visit(visitor);
    }
}
