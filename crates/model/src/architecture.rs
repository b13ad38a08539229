//! Which tensors and modules a model has, under the names Transformers gives them.
//!
//! Checkpoint names are kept without the prefix of the task's class (`model.`, `bert.`, …); module
//! paths of adapters carry it, as PEFT writes them. The tables of names are in `names.rs`.

use crate::config::{ModelConfig, ModelType, NormKind, NormSpan};
use crate::names::{Names, OUTPUT_LAYER, Slot};

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
    /// A linear layer whose weight is stored as `[in, out]`: Transformers' `Conv1D`.
    LinearTransposed,
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
    /// Linear `[out, in]`, transposed linear `[in, out]`, convolution `[out, in, …]`, embedding
    /// `[entries, width]`, norm `[width]`.
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

    /// Whether a low-rank pair can stand beside its weight.
    pub fn is_linear(&self) -> bool {
        matches!(self.role, Role::Linear | Role::LinearTransposed)
    }

    /// The module's tensors, by their full names, with their shapes.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>)> + use<> {
        let output = match self.role {
            Role::LinearTransposed => self.shape[1],
            _ => self.shape[0],
        };
        let weight = (format!("{}.weight", self.path), self.shape.clone());
        let bias = self
            .bias
            .then(|| (format!("{}.bias", self.path), vec![output]));
        std::iter::once(weight).chain(bias)
    }
}

/// Modules of one part of the model, by what they are for, in the order Transformers registers them.
#[derive(Debug)]
pub(crate) struct Parts(Vec<(Slot, ModuleSpec)>);

impl Parts {
    /// The module of a slot, where the model has one.
    pub fn get(&self, slot: Slot) -> Option<&ModuleSpec> {
        self.0
            .iter()
            .find_map(|(other, module)| (*other == slot).then_some(module))
    }

    /// The module of a slot that every model has.
    pub fn expect(&self, slot: Slot) -> &ModuleSpec {
        self.get(slot)
            .unwrap_or_else(|| panic!("no table of names lacks {slot:?}"))
    }

    fn of(config: &ModelConfig, table: &[(Slot, &str)], prefix: &str, layer: usize) -> Parts {
        Parts(
            table
                .iter()
                .filter(|(slot, _)| present(*slot, config, layer))
                .map(|&(slot, name)| (slot, module(slot, format!("{prefix}{name}"), config)))
                .collect(),
        )
    }
}

/// What turns tokens into the first layer's input.
pub(crate) fn embeddings(config: &ModelConfig) -> Parts {
    Parts::of(config, Names::of(config).embeddings, "", 0)
}

/// One layer.
pub(crate) fn layer(config: &ModelConfig, layer: usize) -> Parts {
    let names = Names::of(config);
    let prefix = format!("{}.{layer}.", names.layers);
    Parts::of(config, names.layer, &prefix, layer)
}

/// What stands behind or beside the layers.
pub(crate) fn end(config: &ModelConfig) -> Parts {
    Parts::of(config, Names::of(config).end, "", 0)
}

/// The modules every class of the model has, in the order Transformers registers them.
pub(crate) fn backbone(config: &ModelConfig) -> Vec<ModuleSpec> {
    let layers = (0..config.layers()).map(|index| layer(config, index));
    std::iter::once(embeddings(config))
        .chain(layers)
        .chain(std::iter::once(end(config)))
        .flat_map(|parts| parts.0)
        .map(|(_, module)| module)
        .collect()
}

/// Whether the configuration has a module that the table of its type lists.
fn present(slot: Slot, config: &ModelConfig, layer: usize) -> bool {
    let design = &config.design;
    let relative = design.relative.as_ref();
    match slot {
        Slot::Positions => design.learned_positions.is_some(),
        Slot::Types => design.token_types > 0,
        Slot::EmbeddingProjection => design.embedding_width != config.hidden,
        Slot::QueryNorm | Slot::KeyNorm => design.query_key_norm.is_some(),
        // ModernBERT's first layer reads the norm of the embeddings.
        Slot::BeforeAttention => config.model_type != ModelType::ModernBert || layer > 0,
        Slot::PositionKey => relative.is_some_and(|r| r.content_to_position && !r.shared),
        Slot::PositionQuery => relative.is_some_and(|r| r.position_to_content && !r.shared),
        Slot::RelativeNorm => relative.is_some_and(|r| r.norm),
        _ => true,
    }
}

/// A module's role and shape follow from what it is for.
fn module(slot: Slot, path: String, config: &ModelConfig) -> ModuleSpec {
    let design = &config.design;
    let (hidden, wide, narrow) = (config.hidden, config.intermediate, design.embedding_width);
    let queries = config.query_width();
    let keys = design.kv_heads * design.head_dim;
    let linear = |path, output, input, bias| {
        let mut module = ModuleSpec::linear(path, output, input, bias);
        if design.transposed {
            module.role = Role::LinearTransposed;
            module.shape.reverse();
        }
        module
    };
    let norm = |path, width| {
        let bias = design.norm == NormKind::Layer { bias: true };
        ModuleSpec::norm(path, width, bias)
    };
    let span = |width| match design.query_key_norm {
        Some(NormSpan::Head) => design.head_dim,
        _ => width,
    };
    match slot {
        Slot::Tokens => ModuleSpec::embedding(&path, config.vocab, narrow),
        Slot::Positions => ModuleSpec::embedding(&path, config.max_positions, narrow),
        Slot::Types => ModuleSpec::embedding(&path, design.token_types, narrow),
        Slot::EmbeddingNorm => norm(path, narrow),
        Slot::EmbeddingProjection => linear(path, hidden, narrow, true),
        Slot::Query => linear(path, queries, hidden, design.qkv_bias),
        Slot::Key | Slot::Value => linear(path, keys, hidden, design.qkv_bias),
        Slot::QueryKeyValue => linear(path, queries + 2 * keys, hidden, design.qkv_bias),
        Slot::AttentionOutput => linear(path, hidden, queries, design.output_bias),
        Slot::QueryNorm => norm(path, span(queries)),
        Slot::KeyNorm => norm(path, span(keys)),
        Slot::PositionKey | Slot::PositionQuery => linear(path, queries, hidden, true),
        Slot::Gate | Slot::Up => linear(path, wide, hidden, design.mlp_bias),
        Slot::GateUp => linear(path, 2 * wide, hidden, design.mlp_bias),
        Slot::Down => linear(path, hidden, wide, design.mlp_bias),
        Slot::BeforeAttention
        | Slot::OnAttention
        | Slot::AfterAttention
        | Slot::BeforeMlp
        | Slot::OnMlp
        | Slot::AfterMlp
        | Slot::RelativeNorm
        | Slot::FinalNorm => norm(path, hidden),
        Slot::Relative => {
            let span = design.relative.as_ref().map_or(0, |r| r.span());
            ModuleSpec::embedding(&path, 2 * span, hidden)
        }
    }
}

/// What an encoder's classifier puts between the pooled state and its last layer.
#[derive(Debug)]
pub(crate) struct PoolerSpec {
    pub dense: ModuleSpec,
    pub norm: Option<ModuleSpec>,
    /// Whether it is part of the backbone's class and stands under its prefix.
    pub inside: bool,
    /// Whether the sequence classifier reads it, and whether the token classifier does.
    read: bool,
    read_by_tokens: bool,
}

impl PoolerSpec {
    /// Whether the class's head reads what it gives.
    pub fn read_by(&self, class: TaskClass) -> bool {
        match class {
            TaskClass::Backbone | TaskClass::CausalLm => false,
            TaskClass::SequenceClassifier => self.read,
            TaskClass::TokenClassifier => self.read_by_tokens,
        }
    }

    pub fn modules(&self) -> impl Iterator<Item = &ModuleSpec> {
        std::iter::once(&self.dense).chain(&self.norm)
    }

    /// What stands before its paths in the classes with a head.
    pub fn prefix(&self, config: &ModelConfig, class: TaskClass) -> &'static str {
        match self.inside {
            true => class.prefix(config.model_type),
            false => "",
        }
    }
}

/// The encoder's pooler, where its classes have one: `tanh(W · first token + b)` of BERT, DeBERTa's
/// `ContextPooler`, ModernBERT's prediction head.
pub(crate) fn pooler(config: &ModelConfig) -> Option<PoolerSpec> {
    let names = Names::of(config).pooler.as_ref()?;
    let hidden = config.hidden;
    // ModernBERT's configuration says it, the others always have one.
    let bias = names.norm.is_none() || config.design.classifier.bias;
    Some(PoolerSpec {
        dense: ModuleSpec::linear(names.dense.to_owned(), hidden, hidden, bias),
        norm: names.norm.map(|name| {
            let bias = config.design.norm == NormKind::Layer { bias: true };
            ModuleSpec::norm(name.to_owned(), hidden, bias)
        }),
        inside: names.inside,
        read: names.read,
        read_by_tokens: names.read_by_tokens,
    })
}

/// The decoder's output layer.
pub(crate) fn output_layer(config: &ModelConfig) -> ModuleSpec {
    ModuleSpec::linear(OUTPUT_LAYER.to_owned(), config.vocab, config.hidden, false)
}

/// The classification head of the model's sequence-classifier class, its last layer last.
pub(crate) fn classifier(config: &ModelConfig, labels: usize) -> Vec<ModuleSpec> {
    let hidden = config.hidden;
    let names = Names::of(config).classifier;
    let bias = names != ["score"];
    names
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let last = index + 1 == names.len();
            let output = if last { labels } else { hidden };
            ModuleSpec::linear((*name).to_owned(), output, hidden, bias)
        })
        .collect()
}

/// The head of the model's token-classifier class: one linear layer with a bias.
pub(crate) fn token_classifier(config: &ModelConfig, labels: usize) -> ModuleSpec {
    let name = Names::of(config).token_classifier;
    ModuleSpec::linear(name.to_owned(), labels, config.hidden, true)
}

impl TaskClass {
    /// What stands before the backbone's names in this class: `model.`, `bert.`, nothing, …
    pub fn prefix(self, model_type: ModelType) -> &'static str {
        match self {
            TaskClass::Backbone => "",
            _ => Names::of_type(model_type).prefix,
        }
    }

    /// Every module of the class under its full path, in registration order.
    pub fn modules(self, config: &ModelConfig, labels: usize) -> Vec<ModuleSpec> {
        let prefix = self.prefix(config.model_type);
        let mut modules = backbone(config);
        for module in &mut modules {
            module.path.insert_str(0, prefix);
        }
        if let Some(pooler) = pooler(config) {
            let there = match self {
                TaskClass::Backbone => pooler.inside,
                _ => pooler.read_by(self),
            };
            let prefix = pooler.prefix(config, self);
            modules.extend(
                pooler
                    .modules()
                    .filter(|_| there)
                    .cloned()
                    .map(|mut module| {
                        module.path.insert_str(0, prefix);
                        module
                    }),
            );
        }
        match self {
            TaskClass::Backbone => {}
            TaskClass::CausalLm => modules.push(output_layer(config)),
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
