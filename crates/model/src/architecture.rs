//! Which tensors and modules a model has, under the names Transformers gives them.
//!
//! Checkpoint names are kept without the prefix of the task's class (`model.`, `bert.`,
//! `roberta.`); module paths of adapters carry it, as PEFT writes them.

use crate::config::{Kind, ModelConfig, ModelType};

/// The Transformers class whose module tree an adapter's paths refer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TaskClass {
    /// `AutoModel`
    Backbone,
    /// `AutoModelForCausalLM`
    CausalLm,
    /// `AutoModelForSequenceClassification`
    SequenceClassifier,
    /// `AutoModelForTokenClassification`
    TokenClassifier,
}

/// What a module does with its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Linear,
    Convolution,
    Embedding,
    Norm,
}

/// A module with parameters of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ModuleSpec {
    /// Path without the class's prefix for backbone modules; as it is for heads.
    pub path: String,
    pub role: Role,
    /// Linear `[out, in]`, convolution `[out, in, …]`, embedding `[entries, width]`, norm `[width]`.
    pub shape: Vec<usize>,
    pub bias: bool,
}

impl ModuleSpec {
    pub fn linear(path: String, output: usize, input: usize, bias: bool) -> ModuleSpec {
        ModuleSpec {
            path,
            role: Role::Linear,
            shape: vec![output, input],
            bias,
        }
    }

    pub fn embedding(path: &str, entries: usize, width: usize) -> ModuleSpec {
        ModuleSpec {
            path: path.to_owned(),
            role: Role::Embedding,
            shape: vec![entries, width],
            bias: false,
        }
    }

    pub fn norm(path: String, width: usize, bias: bool) -> ModuleSpec {
        ModuleSpec {
            path,
            role: Role::Norm,
            shape: vec![width],
            bias,
        }
    }

    /// The module's tensors, by their full names, with their shapes.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>)> + use<> {
        let weight = (format!("{}.weight", self.path), self.shape.clone());
        let bias = self
            .bias
            .then(|| (format!("{}.bias", self.path), vec![self.shape[0]]));
        std::iter::once(weight).chain(bias)
    }
}

/// The modules every class of the model has, in the order Transformers registers them.
pub(crate) fn backbone(config: &ModelConfig) -> Vec<ModuleSpec> {
    let hidden = config.hidden;
    let wide = config.intermediate;
    let mut modules = Vec::new();
    match &config.kind {
        Kind::Decoder(decoder) => {
            let queries = config.query_width();
            let keys = decoder.kv_heads * decoder.head_dim;
            modules.push(ModuleSpec::embedding("embed_tokens", config.vocab, hidden));
            for layer in 0..config.layers {
                let at = |name: &str| format!("layers.{layer}.{name}");
                let mut linear = |name: &str, output, input, bias| {
                    modules.push(ModuleSpec::linear(at(name), output, input, bias));
                };
                linear("self_attn.q_proj", queries, hidden, decoder.qkv_bias);
                linear("self_attn.k_proj", keys, hidden, decoder.qkv_bias);
                linear("self_attn.v_proj", keys, hidden, decoder.qkv_bias);
                linear("self_attn.o_proj", hidden, queries, decoder.output_bias);
                if decoder.query_key_norm {
                    for name in ["self_attn.q_norm", "self_attn.k_norm"] {
                        modules.push(ModuleSpec::norm(at(name), decoder.head_dim, false));
                    }
                }
                let mut linear = |name: &str, output, input| {
                    let bias = decoder.mlp_bias;
                    modules.push(ModuleSpec::linear(at(name), output, input, bias));
                };
                linear("mlp.gate_proj", wide, hidden);
                linear("mlp.up_proj", wide, hidden);
                linear("mlp.down_proj", hidden, wide);
                for name in ["input_layernorm", "post_attention_layernorm"] {
                    modules.push(ModuleSpec::norm(at(name), hidden, false));
                }
            }
            modules.push(ModuleSpec::norm("norm".to_owned(), hidden, false));
        }
        Kind::Encoder(encoder) => {
            let mut embedding = |name: &str, entries| {
                modules.push(ModuleSpec::embedding(
                    &format!("embeddings.{name}"),
                    entries,
                    hidden,
                ));
            };
            embedding("word_embeddings", config.vocab);
            embedding("position_embeddings", config.max_positions);
            embedding("token_type_embeddings", encoder.token_types);
            modules.push(ModuleSpec::norm(
                "embeddings.LayerNorm".to_owned(),
                hidden,
                true,
            ));
            for layer in 0..config.layers {
                let at = |name: &str| format!("encoder.layer.{layer}.{name}");
                let linear =
                    |name: &str, output, input| ModuleSpec::linear(at(name), output, input, true);
                let norm = |name: &str| ModuleSpec::norm(at(name), hidden, true);
                modules.extend([
                    linear("attention.self.query", hidden, hidden),
                    linear("attention.self.key", hidden, hidden),
                    linear("attention.self.value", hidden, hidden),
                    linear("attention.output.dense", hidden, hidden),
                    norm("attention.output.LayerNorm"),
                    linear("intermediate.dense", wide, hidden),
                    linear("output.dense", hidden, wide),
                    norm("output.LayerNorm"),
                ]);
            }
        }
    }
    modules
}

/// The encoder's pooler: `tanh(W · first token + b)`, which BERT's classifier reads.
pub(crate) fn pooler(config: &ModelConfig) -> ModuleSpec {
    ModuleSpec::linear(
        "pooler.dense".to_owned(),
        config.hidden,
        config.hidden,
        true,
    )
}

/// The decoder's output layer.
pub(crate) fn lm_head(config: &ModelConfig) -> ModuleSpec {
    ModuleSpec::linear("lm_head".to_owned(), config.vocab, config.hidden, false)
}

/// The classification head of the model's sequence-classifier class.
pub(crate) fn classifier(config: &ModelConfig, labels: usize) -> Vec<ModuleSpec> {
    let hidden = config.hidden;
    match config.model_type {
        ModelType::Bert => vec![ModuleSpec::linear(
            "classifier".to_owned(),
            labels,
            hidden,
            true,
        )],
        ModelType::Roberta => vec![
            ModuleSpec::linear("classifier.dense".to_owned(), hidden, hidden, true),
            ModuleSpec::linear("classifier.out_proj".to_owned(), labels, hidden, true),
        ],
        _ => vec![ModuleSpec::linear(
            "score".to_owned(),
            labels,
            hidden,
            false,
        )],
    }
}

/// The head of the model's token-classifier class: one linear layer with a bias.
pub(crate) fn token_classifier(config: &ModelConfig, labels: usize) -> ModuleSpec {
    let name = match config.model_type {
        ModelType::Bert | ModelType::Roberta => "classifier",
        _ => "score",
    };
    ModuleSpec::linear(name.to_owned(), labels, config.hidden, true)
}

impl TaskClass {
    /// What stands before the backbone's names in this class: `model.`, `bert.`, nothing, …
    pub fn prefix(self, model_type: ModelType) -> &'static str {
        match (self, model_type) {
            (TaskClass::Backbone, _) => "",
            (_, ModelType::Bert) => "bert.",
            (_, ModelType::Roberta) => "roberta.",
            _ => "model.",
        }
    }

    /// Every module of the class under its full path, in registration order.
    pub fn modules(self, config: &ModelConfig, labels: usize) -> Vec<ModuleSpec> {
        let prefix = self.prefix(config.model_type);
        let mut modules = backbone(config);
        // RoBERTa's classifier has its own dense layer and does without the pooler.
        let pooled = matches!(
            (self, config.model_type),
            (TaskClass::Backbone, ModelType::Bert | ModelType::Roberta)
                | (TaskClass::SequenceClassifier, ModelType::Bert)
        );
        if pooled {
            modules.push(pooler(config));
        }
        for module in &mut modules {
            module.path.insert_str(0, prefix);
        }
        match self {
            TaskClass::Backbone => {}
            TaskClass::CausalLm => modules.push(lm_head(config)),
            TaskClass::SequenceClassifier => modules.extend(classifier(config, labels)),
            TaskClass::TokenClassifier => modules.push(token_classifier(config, labels)),
        }
        modules
    }

    /// PEFT's `task_type`.
    pub fn peft_task_type(self) -> &'static str {
        match self {
            TaskClass::Backbone => "FEATURE_EXTRACTION",
            TaskClass::CausalLm => "CAUSAL_LM",
            TaskClass::SequenceClassifier => "SEQ_CLS",
            TaskClass::TokenClassifier => "TOKEN_CLS",
        }
    }
}
