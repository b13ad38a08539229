//! What the Transformers classes call their modules: one table a model type.
//!
//! A table lists what the class registers, in its order. What a module is for, its [`Slot`], decides
//! its shape, and which norms there are decides how a layer adds up (see `block.rs`). A module that a
//! configuration switches off may stand in its type's table.

use crate::config::{ModelConfig, ModelType};
use Slot::*;

/// What a module of the backbone is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    /// The token embedding.
    Tokens,
    /// Learned positions.
    Positions,
    /// Token types.
    Types,
    EmbeddingNorm,
    /// From the embeddings' width to the hidden width.
    EmbeddingProjection,

    Query,
    Key,
    Value,
    /// The three in one.
    QueryKeyValue,
    AttentionOutput,
    QueryNorm,
    KeyNorm,
    /// Relative positions as keys, for queries of content.
    PositionKey,
    /// Relative positions as queries, for keys of content.
    PositionQuery,
    /// The branch of a feed-forward block that goes through the activation, where there are two.
    Gate,
    /// The other branch, or the only one.
    Up,
    /// Both in one, the activated one first.
    GateUp,
    Down,

    /// Norm of what attention reads.
    BeforeAttention,
    /// Norm of what attention gives, before it is added.
    OnAttention,
    /// Norm of the sum.
    AfterAttention,
    /// The same of the feed-forward block.
    BeforeMlp,
    OnMlp,
    AfterMlp,

    /// The table of relative positions that all layers read.
    Relative,
    RelativeNorm,
    /// Norm of the last layer's states.
    FinalNorm,
}

/// A decoder's output layer, in all classes.
pub(crate) const OUTPUT_LAYER: &str = "lm_head";

/// The names of one model type.
#[derive(Debug)]
pub(crate) struct Names {
    /// What stands before the backbone's names in the classes with a head.
    pub prefix: &'static str,
    pub embeddings: &'static [(Slot, &'static str)],
    /// What stands before a layer's number.
    pub layers: &'static str,
    pub layer: &'static [(Slot, &'static str)],
    pub end: &'static [(Slot, &'static str)],
    /// What checkpoints call a decoder's output layer.
    pub stored_output: &'static str,
    pub pooler: Option<PoolerNames>,
    /// The layers of the sequence classifier.
    pub classifier: &'static [&'static str],
    /// The one layer of the token classifier.
    pub token_classifier: &'static str,
    /// Beginnings of stored names that belong to other tasks' heads.
    pub other_heads: &'static [&'static str],
}

#[derive(Debug)]
pub(crate) struct PoolerNames {
    pub dense: &'static str,
    pub norm: Option<&'static str>,
    /// Whether it is part of the backbone's class.
    pub inside: bool,
    /// Whether the sequence classifier reads it.
    pub read: bool,
    /// Whether the token classifier does.
    pub read_by_tokens: bool,
}

impl Names {
    pub fn of(config: &ModelConfig) -> &'static Names {
        Names::of_type(config.model_type)
    }

    pub fn of_type(model_type: ModelType) -> &'static Names {
        match model_type {
            ModelType::Llama | ModelType::Mistral | ModelType::Qwen2 | ModelType::Qwen3 => &LLAMA,
            ModelType::Olmo2 => &OLMO2,
            ModelType::Phi3 => &PHI3,
            ModelType::Gemma2 | ModelType::Gemma3 => &GEMMA,
            ModelType::Gpt2 => &GPT2,
            ModelType::GptNeox => &GPT_NEOX,
            ModelType::Bert => &BERT,
            ModelType::Roberta => &ROBERTA,
            ModelType::Electra => &ELECTRA,
            ModelType::ModernBert => &MODERNBERT,
            ModelType::Deberta => &DEBERTA,
        }
    }
}

const LLAMA: Names = Names {
    prefix: "model.",
    embeddings: &[(Tokens, "embed_tokens")],
    layers: "layers",
    layer: &[
        (Query, "self_attn.q_proj"),
        (Key, "self_attn.k_proj"),
        (Value, "self_attn.v_proj"),
        (AttentionOutput, "self_attn.o_proj"),
        (QueryNorm, "self_attn.q_norm"),
        (KeyNorm, "self_attn.k_norm"),
        (Gate, "mlp.gate_proj"),
        (Up, "mlp.up_proj"),
        (Down, "mlp.down_proj"),
        (BeforeAttention, "input_layernorm"),
        (BeforeMlp, "post_attention_layernorm"),
    ],
    end: &[(FinalNorm, "norm")],
    stored_output: "lm_head",
    pooler: None,
    classifier: &["score"],
    token_classifier: "score",
    other_heads: &["score.", "qa_outputs."],
};

const OLMO2: Names = Names {
    layer: &[
        (Query, "self_attn.q_proj"),
        (Key, "self_attn.k_proj"),
        (Value, "self_attn.v_proj"),
        (AttentionOutput, "self_attn.o_proj"),
        (QueryNorm, "self_attn.q_norm"),
        (KeyNorm, "self_attn.k_norm"),
        (Gate, "mlp.gate_proj"),
        (Up, "mlp.up_proj"),
        (Down, "mlp.down_proj"),
        (OnAttention, "post_attention_layernorm"),
        (OnMlp, "post_feedforward_layernorm"),
    ],
    ..LLAMA
};

const PHI3: Names = Names {
    layer: &[
        (AttentionOutput, "self_attn.o_proj"),
        (QueryKeyValue, "self_attn.qkv_proj"),
        (GateUp, "mlp.gate_up_proj"),
        (Down, "mlp.down_proj"),
        (BeforeAttention, "input_layernorm"),
        (BeforeMlp, "post_attention_layernorm"),
    ],
    ..LLAMA
};

const GEMMA: Names = Names {
    layer: &[
        (Query, "self_attn.q_proj"),
        (Key, "self_attn.k_proj"),
        (Value, "self_attn.v_proj"),
        (AttentionOutput, "self_attn.o_proj"),
        (QueryNorm, "self_attn.q_norm"),
        (KeyNorm, "self_attn.k_norm"),
        (Gate, "mlp.gate_proj"),
        (Up, "mlp.up_proj"),
        (Down, "mlp.down_proj"),
        (BeforeAttention, "input_layernorm"),
        (OnAttention, "post_attention_layernorm"),
        (BeforeMlp, "pre_feedforward_layernorm"),
        (OnMlp, "post_feedforward_layernorm"),
    ],
    ..LLAMA
};

const GPT2: Names = Names {
    prefix: "transformer.",
    embeddings: &[(Tokens, "wte"), (Positions, "wpe")],
    layers: "h",
    layer: &[
        (BeforeAttention, "ln_1"),
        (QueryKeyValue, "attn.c_attn"),
        (AttentionOutput, "attn.c_proj"),
        (BeforeMlp, "ln_2"),
        (Up, "mlp.c_fc"),
        (Down, "mlp.c_proj"),
    ],
    end: &[(FinalNorm, "ln_f")],
    token_classifier: "classifier",
    other_heads: &[
        "score.",
        "qa_outputs.",
        "classifier.",
        "multiple_choice_head.",
    ],
    ..LLAMA
};

const GPT_NEOX: Names = Names {
    prefix: "gpt_neox.",
    embeddings: &[(Tokens, "embed_in")],
    layer: &[
        (BeforeAttention, "input_layernorm"),
        (BeforeMlp, "post_attention_layernorm"),
        (QueryKeyValue, "attention.query_key_value"),
        (AttentionOutput, "attention.dense"),
        (Up, "mlp.dense_h_to_4h"),
        (Down, "mlp.dense_4h_to_h"),
    ],
    end: &[(FinalNorm, "final_layer_norm")],
    token_classifier: "classifier",
    stored_output: "embed_out",
    other_heads: &["score.", "qa_outputs.", "classifier."],
    ..LLAMA
};

const BERT: Names = Names {
    prefix: "bert.",
    embeddings: &[
        (Tokens, "embeddings.word_embeddings"),
        (Positions, "embeddings.position_embeddings"),
        (Types, "embeddings.token_type_embeddings"),
        (EmbeddingNorm, "embeddings.LayerNorm"),
    ],
    layers: "encoder.layer",
    layer: &[
        (Query, "attention.self.query"),
        (Key, "attention.self.key"),
        (Value, "attention.self.value"),
        (AttentionOutput, "attention.output.dense"),
        (AfterAttention, "attention.output.LayerNorm"),
        (Up, "intermediate.dense"),
        (Down, "output.dense"),
        (AfterMlp, "output.LayerNorm"),
    ],
    end: &[],
    stored_output: "",
    pooler: Some(PoolerNames {
        dense: "pooler.dense",
        norm: None,
        inside: true,
        read: true,
        read_by_tokens: false,
    }),
    classifier: &["classifier"],
    token_classifier: "classifier",
    other_heads: &["cls.", "lm_head.", "classifier.", "qa_outputs."],
};

const ROBERTA: Names = Names {
    prefix: "roberta.",
    // RoBERTa's classifier has its own dense layer and does without the pooler.
    pooler: Some(PoolerNames {
        dense: "pooler.dense",
        norm: None,
        inside: true,
        read: false,
        read_by_tokens: false,
    }),
    classifier: &["classifier.dense", "classifier.out_proj"],
    ..BERT
};

const ELECTRA: Names = Names {
    prefix: "electra.",
    embeddings: &[
        (Tokens, "embeddings.word_embeddings"),
        (Positions, "embeddings.position_embeddings"),
        (Types, "embeddings.token_type_embeddings"),
        (EmbeddingNorm, "embeddings.LayerNorm"),
        (EmbeddingProjection, "embeddings_project"),
    ],
    pooler: None,
    classifier: &["classifier.dense", "classifier.out_proj"],
    other_heads: &[
        "discriminator_predictions.",
        "generator_predictions.",
        "generator_lm_head.",
        "classifier.",
        "qa_outputs.",
    ],
    ..BERT
};

const MODERNBERT: Names = Names {
    prefix: "model.",
    embeddings: &[
        (Tokens, "embeddings.tok_embeddings"),
        (EmbeddingNorm, "embeddings.norm"),
    ],
    layers: "layers",
    layer: &[
        (BeforeAttention, "attn_norm"),
        (QueryKeyValue, "attn.Wqkv"),
        (AttentionOutput, "attn.Wo"),
        (BeforeMlp, "mlp_norm"),
        (GateUp, "mlp.Wi"),
        (Down, "mlp.Wo"),
    ],
    end: &[(FinalNorm, "final_norm")],
    stored_output: "",
    pooler: Some(PoolerNames {
        dense: "head.dense",
        norm: Some("head.norm"),
        inside: false,
        read: true,
        read_by_tokens: true,
    }),
    classifier: &["classifier"],
    token_classifier: "classifier",
    other_heads: &["decoder.", "classifier.", "qa_outputs."],
};

const DEBERTA: Names = Names {
    prefix: "deberta.",
    layer: &[
        (Query, "attention.self.query_proj"),
        (Key, "attention.self.key_proj"),
        (Value, "attention.self.value_proj"),
        (PositionKey, "attention.self.pos_key_proj"),
        (PositionQuery, "attention.self.pos_query_proj"),
        (AttentionOutput, "attention.output.dense"),
        (AfterAttention, "attention.output.LayerNorm"),
        (Up, "intermediate.dense"),
        (Down, "output.dense"),
        (AfterMlp, "output.LayerNorm"),
    ],
    end: &[
        (Relative, "encoder.rel_embeddings"),
        (RelativeNorm, "encoder.LayerNorm"),
    ],
    pooler: Some(PoolerNames {
        dense: "pooler.dense",
        norm: None,
        inside: false,
        read: true,
        read_by_tokens: false,
    }),
    other_heads: &[
        "cls.",
        "lm_predictions.",
        "mask_predictions.",
        "classifier.",
        "qa_outputs.",
        // Stored by DeBERTa-v3 and read by none of its classes.
        "embeddings.position_embeddings.",
    ],
    ..BERT
};
