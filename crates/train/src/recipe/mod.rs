//! The recipe: everything that shapes a run, as complete TOML.
//!
//! A recipe is data. [`Recipe::load`] reads it, applies `--set` assignments, checks
//! every key and value, and names all that is wrong at once, with file and line.
//! [`Recipe::to_toml`] writes it back with every default spelled out.

mod edit;
mod elsewhere;
mod error;
mod extends;
mod kernels;
mod memory;
mod metric;
pub(crate) mod modality;
mod ordered_map;
mod parse;
mod schema;
mod section;
mod text;
mod validate;

use std::path::PathBuf;

use calor_meter::EnergyOptions;
use calor_model::{BiasMode, PairInit};
use calor_records::SynthOptions;
use calor_sequence::SequenceOptions;
use serde::{Deserialize, Serialize};

pub use crate::optimizer::{MuonScale, OptimizerKind};
pub use crate::schedule::{DecayShape, ScheduleKind};
pub use calor_sequence::LossOn;
pub use error::{Place, Problem, RecipeError};
pub use kernels::KernelChoice;
pub use memory::{RecomputeChoice, RecomputeName};
pub use metric::Metric;
pub use modality::{
    ImageSection, ModalitySection, OmicsGrouping, OmicsSection, SeriesSection, SpeechSection,
    WaveformSection,
};
pub use schema::json_schema;
pub use section::{Key, KeyKind};
pub use text::{ChatTemplateChoice, TextSection};

use section::section;

/// The number in `schema = …` that this version reads.
pub const SCHEMA: u32 = 1;

section! {
    /// A complete run.
    Recipe at "" {
        /// Version of the recipe's format: 1.
        schema: u32 = SCHEMA => Integer required;
        /// Another recipe, relative to this file, whose keys count where this one does not give them: table by table, key by key. That one cannot extend a third. In a run's `recipe.toml` all keys stand, and this one does not.
        #[serde(skip_serializing_if = "Option::is_none")]
        extends: Option<PathBuf> = None => Text;
        /// What the run is called: in the report and, unless `--out` is given, the run's folder.
        name: String = String::new() => Text required;
        /// The pretrained checkpoint.
        model: ModelSection = ModelSection::default() => Section;
        /// What is predicted.
        task: TaskSection = TaskSection::default() => Section;
        /// The patients.
        cohort: CohortSection = CohortSection::default() => Section;
        /// Files of text instead of patients.
        #[serde(skip_serializing_if = "TextSection::is_default")]
        text: TextSection = TextSection::default() => Section;
        /// How a patient becomes a sequence of tokens.
        sequence: SequenceOptions = SequenceOptions::default() => Section;
        /// What becomes soft tokens beside the text.
        modality: ModalitySection = ModalitySection::default() => Section;
        /// What is trained on top of the frozen checkpoint.
        adapter: AdapterSection = AdapterSection::default() => Section;
        /// The optimizer and the loop.
        train: TrainSection = TrainSection::default() => Section;
        /// Evaluation while and after training.
        evaluate: EvaluateSection = EvaluateSection::default() => Section;
        /// How energy is measured, and modelled where it cannot be.
        energy: EnergyOptions = EnergyOptions::default() => Section;
    }
}

section! {
    /// `[model]`: the pretrained checkpoint.
    ModelSection at "model." {
        /// A model id of the hub, or a folder with config.json, model.safetensors and tokenizer.json.
        id: String = String::new() => Text required;
        /// Branch, tag or commit of the hub repository. Without it, `main`.
        #[serde(skip_serializing_if = "Option::is_none")]
        revision: Option<String> = None => Text;
        /// Type of the frozen weights and of the activations: `f32`, `bf16` or `f16`. Adapter, head and optimizer are always f32.
        dtype: Dtype = Dtype::F32 => Text;
        /// Bits that the frozen weights of the backbone's linear layers are kept in: `none` (as `dtype`, or as a checkpoint of bitsandbytes has them), `int8` (8, a scale an output channel) or `nf4` (4.1, QLoRA). Embeddings and head keep `dtype`, and everything is computed in it.
        quantization: QuantizationChoice = QuantizationChoice::None => Text;
        /// Whether the scales of `nf4` are quantised too: 4.1 instead of 4.5 bits a weight.
        double_quantization: bool = true => Boolean;
    }
}

/// Bits that frozen weights are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantizationChoice {
    /// Those of their type, or of the checkpoint.
    None,
    /// 8.
    Int8,
    /// 4, normal-float.
    Nf4,
}

/// Type of the frozen weights and of the activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// 32-bit floating point.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

section! {
    /// `[task]`: what is predicted.
    TaskSection at "task." {
        /// `binary`, `multiclass`, `multilabel`, `regression`, `tokens` (the tag of each word) or `causal_lm` (the next token).
        kind: TaskKind = TaskKind::Binary => Text required;
        /// The label set: a folder under `labels/` of the cohort, or a path. For `multilabel` a list of them, one a label. None for `tokens`, `causal_lm` and rows of `[text]`, which carry their own.
        labels: LabelNames = LabelNames::One(String::new()) => TextOrList required;
        /// Weights of the classes in the loss: `none`, `balanced` (patients / (classes · patients of the class), from training patients), or a list with one weight a class. The weighted sum is still divided by the number of labels.
        class_weights: ClassWeights = ClassWeights::Named(ClassWeighting::None) => TextOrList;
        /// `causal_lm`: which tokens are learned: `response` (what the assistant says, or the note) or `all`.
        loss: LossOn = LossOn::Response => Text;
        /// `causal_lm` on a cohort: codes whose `text_value` is learned, each after what was known of the patient before it; an entry ending in `*` stands for every code that begins so.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        notes: Vec<String> = Vec::new() => List;
        /// Which position speaks for the patient: `last`, `cls` or `mean`; `auto` is `last` for decoders and `mean` for encoders.
        pooling: PoolingChoice = PoolingChoice::Auto => Text;
        /// Units of a hidden layer (GELU) between the pooled state and the logits, so that the head can weigh one modality by another; 0 for none. For `pooling = "mean"`: the heads of `last` and `cls` are those of Transformers.
        hidden: usize = 0 => Integer;
        /// Whether a new head starts from the classes' log-odds among training patients, so that the first steps need not learn them; without it all logits start near 0, as in Transformers. Heads without a bias (decoders') always do.
        start_from_prior: bool = true => Boolean;
    }
}

/// The kind of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// One yes-or-no label: a logit, binary cross-entropy.
    Binary,
    /// One of several classes: softmax cross-entropy.
    Multiclass,
    /// Several yes-or-no labels: a logit each, binary cross-entropy.
    Multilabel,
    /// A number: squared error.
    Regression,
    /// The tag of each word: softmax cross-entropy.
    Tokens,
    /// The next token: softmax cross-entropy over the vocabulary.
    CausalLm,
}

impl TaskKind {
    /// As recipes spell it.
    pub fn name(self) -> &'static str {
        match self {
            TaskKind::Binary => "binary",
            TaskKind::Multiclass => "multiclass",
            TaskKind::Multilabel => "multilabel",
            TaskKind::Regression => "regression",
            TaskKind::Tokens => "tokens",
            TaskKind::CausalLm => "causal_lm",
        }
    }

    /// Whether tokens have targets, and not whole samples.
    pub fn per_token(self) -> bool {
        matches!(self, TaskKind::Tokens | TaskKind::CausalLm)
    }
}

impl From<TaskKind> for calor_evaluate::TaskKind {
    fn from(kind: TaskKind) -> Self {
        match kind {
            TaskKind::Binary => calor_evaluate::TaskKind::Binary,
            TaskKind::Multiclass => calor_evaluate::TaskKind::Multiclass,
            TaskKind::Multilabel => calor_evaluate::TaskKind::Multilabel,
            TaskKind::Regression => calor_evaluate::TaskKind::Regression,
            TaskKind::Tokens => calor_evaluate::TaskKind::Tokens,
            TaskKind::CausalLm => calor_evaluate::TaskKind::CausalLm,
        }
    }
}

/// One label set, or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected the name of a label set or a list of names"
)]
pub enum LabelNames {
    /// `labels = "death_5y"`
    One(String),
    /// `labels = ["death_5y", "cvd_5y"]`
    Many(Vec<String>),
}

impl LabelNames {
    /// The names in the recipe's order; none where the recipe gives none.
    pub fn names(&self) -> Vec<&str> {
        match self {
            LabelNames::One(name) if name.is_empty() => Vec::new(),
            LabelNames::One(name) => vec![name.as_str()],
            LabelNames::Many(names) => names.iter().map(String::as_str).collect(),
        }
    }
}

/// How classes are weighted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected `none`, `balanced` or a list of numbers"
)]
pub enum ClassWeights {
    /// By name.
    Named(ClassWeighting),
    /// One weight a class, in the order of the classes.
    Values(Vec<f64>),
}

/// Class weights by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClassWeighting {
    /// All classes weigh 1.
    None,
    /// Inverse to the class's frequency among training patients.
    Balanced,
}

/// Which position speaks for the patient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolingChoice {
    /// `last` for decoders, `mean` for encoders.
    Auto,
    /// The patient's last token.
    Last,
    /// The patient's first token.
    Cls,
    /// The mean over the patient's tokens.
    Mean,
}

section! {
    /// `[cohort]`: the patients.
    CohortSection at "cohort." {
        /// Folder of a cohort in the MEDS format, relative to where `calor` is started.
        path: PathBuf = PathBuf::new() => Text required;
        /// Makes a synthetic cohort there where there is none, with the options of `calor cohort synth`: `{ patients = 16000, seed = 0 }`.
        #[serde(skip_serializing_if = "Option::is_none")]
        synth: Option<SynthOptions> = None => Map;
    }
}

section! {
    /// `[adapter]`: what is trained on top of the frozen checkpoint.
    AdapterSection at "adapter." {
        /// `lora`, or `none` to train the head alone.
        kind: AdapterKind = AdapterKind::Lora => Text;
        /// Rank of the update.
        r: usize = 16 => Integer;
        /// Scale of the update: `alpha / r`, or `alpha / √r` with `use_rslora`.
        alpha: f64 = 32.0 => Number;
        /// Share of the adapter's input that is dropped in training.
        dropout: f64 = 0.05 => Number;
        /// Modules that are adapted, linear ones or the token embedding: `all-linear`, a regular expression over the whole module path, or a list of names or name endings.
        targets: TargetChoice = TargetChoice::One("all-linear".to_owned()) => TextOrList;
        /// Modules left out of `targets`: a regular expression or a list of names or name endings.
        exclude: TargetChoice = TargetChoice::Many(Vec::new()) => TextOrList;
        /// Other ranks for some modules, by pattern; the first that matches counts.
        #[serde(with = "ordered_map")]
        rank_pattern: Vec<(String, usize)> = Vec::new() => Map;
        /// Other alphas for some modules, by pattern; the first that matches counts.
        #[serde(with = "ordered_map")]
        alpha_pattern: Vec<(String, f64)> = Vec::new() => Map;
        /// Modules of the checkpoint that are trained in full and saved with the adapter. The task's head always is.
        modules_to_save: Vec<String> = Vec::new() => List;
        /// Rank-stabilised scaling: `alpha / √r`.
        use_rslora: bool = false => Boolean;
        /// Numbers of the layers that are adapted, from 0; all without it. For `targets` that are a list.
        #[serde(skip_serializing_if = "Option::is_none")]
        layers_to_transform: Option<Vec<usize>> = None => List;
        /// What stands before a layer's number in a module's path, `layers` or `encoder.layer` say; any name without it. For `layers_to_transform`.
        layers_pattern: Vec<String> = Vec::new() => List;
        /// Which biases of the checkpoint are trained and saved too: `none`, `all`, or `lora_only` for those of adapted modules.
        bias: BiasMode = BiasMode::None => Text;
        /// DoRA (Liu et al. 2024): adapts the direction of each weight's rows and trains their magnitudes.
        use_dora: bool = false => Boolean;
        /// What the update starts from: `default` (nothing), `pissa` (the largest singular vectors of the weights, which the frozen weights then lack; Meng et al. 2024) or `pissa_niter_K` (the same by K rounds of subspace iteration: faster, less exact). The adapter is saved with twice the rank, for the checkpoint as it is.
        init: PairInit = PairInit::Default => Text;
        /// Tokens whose embeddings are trained in full, by number or as the vocabulary spells them: `["[unused1]", 17]`.
        trained_tokens: Vec<TokenChoice> = Vec::new() => List;
    }
}

/// The kind of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterKind {
    /// No adapter: the head is trained on the frozen checkpoint.
    None,
    /// Low-rank adaptation (Hu et al. 2021).
    Lora,
}

/// A regular expression (or `all-linear`), or a list of names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a regular expression or a list of module names"
)]
pub enum TargetChoice {
    /// `all-linear` or a regular expression.
    One(String),
    /// Names or endings of names.
    Many(Vec<String>),
}

/// A token of the checkpoint's vocabulary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a token's number or its text")]
pub enum TokenChoice {
    /// Its number.
    Number(u32),
    /// Its text, as the vocabulary spells it.
    Text(String),
}

section! {
    /// `[train]`: the optimizer and the loop.
    TrainSection at "train." {
        /// Seed of everything that is drawn: the order of patients, the adapter, the head, dropout.
        seed: u64 = 0 => Integer;
        /// Patients an optimizer step.
        global_batch: usize = 32 => Integer;
        /// Rows computed at once. Smaller needs less memory and gives the same result: gradients are summed over the step.
        micro_batch: usize = 8 => Integer;
        /// Times every training patient is seen.
        epochs: u64 = 3 => Integer;
        /// Stops after so many optimizer steps, however many epochs are given.
        #[serde(skip_serializing_if = "Option::is_none")]
        max_steps: Option<u64> = None => Integer;
        /// Peak learning rate of the adapter.
        learning_rate: f64 = 2e-4 => Number;
        /// LoRA+ (Hayou et al. 2024): how many times faster `lora_B` (and trained biases and DoRA's magnitudes) learns than `lora_A`, 16 say. Without it, all at `learning_rate`.
        #[serde(skip_serializing_if = "Option::is_none")]
        lora_plus_ratio: Option<f64> = None => Number;
        /// Peak learning rate of a pair on the token embedding under LoRA+; PEFT's default.
        lora_plus_embedding_learning_rate: f64 = 1e-6 => Number;
        /// Peak learning rate of the head. Without it, `learning_rate`.
        #[serde(skip_serializing_if = "Option::is_none")]
        head_learning_rate: Option<f64> = None => Number;
        /// Peak learning rate of modality encoders, towers' adapters included. Without it, the head's.
        #[serde(skip_serializing_if = "Option::is_none")]
        encoder_learning_rate: Option<f64> = None => Number;
        /// Peak learning rate of resamplers, projectors and the embeddings of soft tokens. Without it, the head's.
        #[serde(skip_serializing_if = "Option::is_none")]
        projector_learning_rate: Option<f64> = None => Number;
        /// Learning rate and weight decay of some tensors: `[[train.groups]]` with `pattern`, a regular expression that is searched for in tensor names, `learning_rate` and `weight_decay`, one or both. The first group that matches counts.
        groups: Vec<GroupSection> = Vec::new() => List;
        /// `adamw`, `adamw_8bit` (moments in eight bits, as in bitsandbytes; tensors below 4,096 elements keep f32), `schedule_free_adamw` (its average takes the place of a schedule: `train.schedule.kind = "constant"`), `muon` (low-rank factors by Muon, the rest by AdamW) or `sgd`.
        optimizer: OptimizerKind = OptimizerKind::AdamW => Text;
        /// Weight decay: decoupled, but for `sgd`, where it is added to the gradient.
        weight_decay: f64 = 0.01 => Number;
        /// Whether tensors of one dimension (biases, norms, single embeddings) are decayed as well.
        decay_vectors: bool = true => Boolean;
        /// Decay of the momentum of `sgd` (without it, 0.9) and of `muon`'s factors (without it, 0.95).
        #[serde(skip_serializing_if = "Option::is_none")]
        momentum: Option<f64> = None => Number;
        /// Nesterov's momentum. Without it, `false` for `sgd` and `true` for `muon`.
        #[serde(skip_serializing_if = "Option::is_none")]
        nesterov: Option<bool> = None => Boolean;
        /// What `muon` scales its updates with: `match_rms_adamw`, so that AdamW's learning rates are right, or `original`.
        muon_scale: MuonScale = MuonScale::MatchRmsAdamw => Text;
        /// Iterations of `muon`'s orthogonalisation.
        newton_schulz_steps: usize = 5 => Integer;
        /// Decay of an exponential moving average of all trained tensors, which is evaluated and saved in their place; 0.999 for runs of some thousand steps. Without it there is no average.
        #[serde(skip_serializing_if = "Option::is_none")]
        ema_decay: Option<f64> = None => Number;
        /// AdamW's decay of the mean of the gradients; how near `schedule_free_adamw` takes gradients to its average.
        beta_1: f64 = 0.9 => Number;
        /// AdamW's decay of the mean of the squared gradients.
        beta_2: f64 = 0.999 => Number;
        /// AdamW's guard against division by zero.
        epsilon: f64 = 1e-8 => Number;
        /// The learning rate over the steps.
        schedule: ScheduleSection = ScheduleSection::default() => Section;
        /// Gradients are scaled down to this norm over all parameters together; 0 switches clipping off.
        max_grad_norm: f64 = 1.0 => Number;
        /// Blocks of the backbone that keep nothing but their input for the backward pass, which runs them a second time: `none`, `all`, a number n (the first and every n-th after it), or `auto` (as many as the memory there is asks for). The result is the same, to the bit on the CPU; a step with `all` takes about a third longer.
        recompute: RecomputeChoice = RecomputeChoice::Named(RecomputeName::None) => TextOrInteger;
        /// Whether the inputs of recomputed blocks wait in the host's memory instead of the device's. On the CPU they are there anyway.
        offload: bool = false => Boolean;
        /// What operations are computed with: `fused` (kernels, where the device has them) or `reference` (each in plain tensor operations). The second is for measuring what the first gains: the result is the same but for rounding, it takes longer, and far more memory than is predicted.
        kernels: KernelChoice = KernelChoice::Fused => Text;
        /// Tries the longest batch, an evaluation and a checkpoint before the first step, so that what cannot work fails at once. It changes nothing in the result.
        preflight: bool = true => Boolean;
        /// A checkpoint to resume from is written every so many steps. Without it, as often as is evaluated.
        #[serde(skip_serializing_if = "Option::is_none")]
        checkpoint_every_steps: Option<u64> = None => Integer;
        /// How many of them are kept.
        keep_checkpoints: usize = 2 => Integer;
    }
}

section! {
    /// `train.schedule`: the learning rate over the steps.
    ScheduleSection at "train.schedule." {
        /// `constant`, `linear`, `cosine`, or `wsd` (warm-up, stable, decay).
        kind: ScheduleKind = ScheduleKind::Cosine => Text;
        /// Steps of the warm-up.
        #[serde(skip_serializing_if = "Option::is_none")]
        warmup_steps: Option<u64> = None => Integer;
        /// Steps of the warm-up as a share of all steps, rounded up. Not together with `warmup_steps`.
        #[serde(skip_serializing_if = "Option::is_none")]
        warmup_fraction: Option<f64> = None => Number;
        /// Steps of the decay at the end of `wsd`.
        #[serde(skip_serializing_if = "Option::is_none")]
        decay_steps: Option<u64> = None => Integer;
        /// Steps of `wsd`'s decay as a share of all steps, rounded up; 0.2 where neither is given. Not together with `decay_steps`.
        #[serde(skip_serializing_if = "Option::is_none")]
        decay_fraction: Option<f64> = None => Number;
        /// How `wsd` decays: `linear`, `cosine` or `one_minus_sqrt`.
        decay_shape: DecayShape = DecayShape::OneMinusSqrt => Text;
        /// What is left of the learning rate at the end, as a share of its peak.
        minimum_factor: f64 = 0.0 => Number;
    }
}

/// One of `[[train.groups]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupSection {
    /// A regular expression that is searched for in tensor names.
    pub pattern: String,
    /// Peak learning rate. Without it, what the tensor has without the group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Weight decay. Without it, what the tensor has without the group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

section! {
    /// `[evaluate]`: evaluation while and after training.
    EvaluateSection at "evaluate." {
        /// The `tuning` patients are evaluated every so many steps, and at the end.
        every_steps: u64 = 100 => Integer;
        /// Which metric decides on the best model: `auroc`, `auprc`, `brier`, `ece`, `log_loss`, `accuracy`, `macro_f1`, `rmse`, `r2`, `f1`, `precision`, `recall`, `perplexity` or `loss`. Without it, `auroc` (binary, multilabel), `log_loss` (multiclass), `rmse` (regression), `f1` (tokens) or `loss` (causal_lm).
        #[serde(skip_serializing_if = "Option::is_none")]
        metric: Option<Metric> = None => Text;
        /// Training stops after so many evaluations in a row without a better value; 0 never stops early.
        patience: u64 = 5 => Integer;
        /// Rows computed at once. Without it, `train.micro_batch`.
        #[serde(skip_serializing_if = "Option::is_none")]
        micro_batch: Option<usize> = None => Integer;
        /// Resamples of patients behind each confidence interval.
        resamples: usize = 1000 => Integer;
    }
}

/// Every key of a recipe, sections after the keys above them, in the order of the format.
pub fn keys() -> Vec<Key> {
    [
        Recipe::KEYS,
        ModelSection::KEYS,
        TaskSection::KEYS,
        CohortSection::KEYS,
        TextSection::KEYS,
        elsewhere::SEQUENCE,
        &modality::keys()[..],
        AdapterSection::KEYS,
        TrainSection::KEYS,
        ScheduleSection::KEYS,
        EvaluateSection::KEYS,
        elsewhere::ENERGY,
    ]
    .concat()
}
