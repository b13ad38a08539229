//! Low-rank adapters (Hu et al. 2021): what a recipe says about them, and what that means for each
//! module.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::architecture::{ModuleSpec, Role, TaskClass};
use crate::error::ModelError;
use crate::matching::{self, Patterned, Patterns};

/// What an adapter touches and how, with PEFT's names and defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraOptions {
    /// Rank of the low-rank pair.
    pub r: usize,
    /// The pair's output is scaled by `alpha / r`, or `alpha / √r` with `use_rslora`.
    pub alpha: f64,
    /// Probability with which an input of `lora_A` is dropped in training.
    pub dropout: f64,
    /// Which modules get a pair.
    pub targets: Targets,
    /// Modules that get none although `targets` matches them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude: Option<Patterns>,
    /// Other ranks for the modules that a pattern matches; the first match counts.
    pub rank_pattern: Patterned<usize>,
    /// Other alphas for the modules that a pattern matches; the first match counts.
    pub alpha_pattern: Patterned<f64>,
    /// Modules trained in full and saved beside the pairs. A classifier's own head is always.
    pub modules_to_save: Vec<String>,
    /// Scale by `alpha / √r` (Kalajdzievski 2023).
    pub use_rslora: bool,
    /// Only modules of these layers; needs `targets` to be a list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// What stands before a layer's number in its path; any name when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layers_pattern: Vec<String>,
    /// Which biases of the backbone are trained and saved with the pairs.
    #[serde(skip_serializing_if = "is_default")]
    pub bias: BiasMode,
    /// Splits each adapted weight into a trained magnitude a row and a direction (Liu et al. 2024).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub use_dora: bool,
    /// What the pairs start from.
    #[serde(skip_serializing_if = "is_default")]
    pub init: PairInit,
    /// Rows of the token embedding that are trained in full, PEFT's `trainable_token_indices`. An
    /// output layer that is the token embedding has them too.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trained_tokens: Vec<u32>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// PEFT's `bias`: which biases of the backbone are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BiasMode {
    /// None.
    #[default]
    None,
    /// Every bias of the model, of norms and of modules without a pair too.
    All,
    /// Those of the modules with a pair.
    LoraOnly,
}

impl BiasMode {
    /// As PEFT spells it.
    pub fn name(self) -> &'static str {
        match self {
            BiasMode::None => "none",
            BiasMode::All => "all",
            BiasMode::LoraOnly => "lora_only",
        }
    }
}

/// What low-rank pairs start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PairInit {
    /// `A` uniform, `B` zero: the model starts as it was pretrained.
    #[default]
    Default,
    /// The largest singular values of the weight and their vectors, which the frozen weight then
    /// lacks (PiSSA, Meng et al. 2024). The adapter is saved with twice the rank, for the weights as
    /// they were pretrained. Of half-precision weights the rest is rounded to their type: such a model
    /// starts a rounding away from the pretrained one, and its adapter is used as far from training.
    Pissa,
    /// As [`PairInit::Pissa`], by so many rounds of subspace iteration from a random start (Halko et
    /// al. 2011) instead of the whole decomposition.
    PissaIterations(usize),
}

impl fmt::Display for PairInit {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            PairInit::Default => formatter.write_str("default"),
            PairInit::Pissa => formatter.write_str("pissa"),
            PairInit::PissaIterations(rounds) => write!(formatter, "pissa_niter_{rounds}"),
        }
    }
}

impl std::str::FromStr for PairInit {
    type Err = String;

    fn from_str(text: &str) -> Result<PairInit, String> {
        match text {
            "default" => Ok(PairInit::Default),
            "pissa" => Ok(PairInit::Pissa),
            _ => text
                .strip_prefix("pissa_niter_")
                .and_then(|rounds| rounds.parse().ok())
                .map(PairInit::PissaIterations)
                .ok_or_else(|| {
                    format!(
                        "`{text}` is no way to start a pair: expected `default`, `pissa` or \
                         `pissa_niter_` and a number of rounds, `pissa_niter_16` say"
                    )
                }),
        }
    }
}

impl Serialize for PairInit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PairInit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

impl Default for LoraOptions {
    fn default() -> Self {
        LoraOptions {
            r: 8,
            alpha: 8.0,
            dropout: 0.0,
            targets: Targets::AllLinear,
            exclude: None,
            rank_pattern: Patterned::default(),
            alpha_pattern: Patterned::default(),
            modules_to_save: Vec::new(),
            use_rslora: false,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            bias: BiasMode::None,
            use_dora: false,
            init: PairInit::Default,
            trained_tokens: Vec::new(),
        }
    }
}

/// PEFT's `target_modules`.
#[derive(Debug, Clone, PartialEq)]
pub enum Targets {
    /// `"all-linear"`: every linear layer but the output layer.
    AllLinear,
    /// Whole paths, or ends of paths after a dot.
    List(Vec<String>),
    /// A regular expression that matches the whole path.
    Regex(String),
}

impl fmt::Display for Targets {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Targets::AllLinear => formatter.write_str("all-linear"),
            Targets::List(names) => formatter.write_str(&names.join(", ")),
            Targets::Regex(pattern) => formatter.write_str(pattern),
        }
    }
}

impl Serialize for Targets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Targets::AllLinear => serializer.serialize_str("all-linear"),
            Targets::List(names) => names.serialize(serializer),
            Targets::Regex(pattern) => serializer.serialize_str(pattern),
        }
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Patterns::deserialize(deserializer)
            .map_err(|_| D::Error::custom("expected \"all-linear\", a list of names or a regex"))?
        {
            Patterns::Regex(text) if text.eq_ignore_ascii_case("all-linear") => {
                Ok(Targets::AllLinear)
            }
            Patterns::Regex(text) => Ok(Targets::Regex(text)),
            Patterns::List(names) => Ok(Targets::List(names)),
        }
    }
}

/// The low-rank pair of one module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Pair {
    pub rank: usize,
    pub alpha: f64,
    pub scaling: f32,
    pub dropout: f32,
    /// Place among all pairs; tells their dropout masks apart.
    pub index: u64,
    pub dora: bool,
    pub init: PairInit,
}

/// Which modules get which pair.
pub(crate) type Plan = BTreeMap<String, Pair>;

impl LoraOptions {
    /// `alpha / rank`, or `alpha / √rank`.
    pub(crate) fn scaling(&self, alpha: f64, rank: usize) -> f32 {
        let divisor = match self.use_rslora {
            true => (rank as f64).sqrt(),
            false => rank as f64,
        };
        (alpha / divisor) as f32
    }

    /// What an adapter is saved as: of one that starts from singular vectors, twice the rank at the
    /// same scaling, so that it holds its end and, subtracted, its start; PEFT converts likewise.
    pub(crate) fn saved(&self, plan: &Plan) -> (LoraOptions, Plan) {
        if self.init == PairInit::Default {
            return (self.clone(), plan.clone());
        }
        let factor = match self.use_rslora {
            true => std::f64::consts::SQRT_2,
            false => 2.0,
        };
        let mut options = LoraOptions {
            r: 2 * self.r,
            alpha: factor * self.alpha,
            init: PairInit::Default,
            ..self.clone()
        };
        for (_, rank) in &mut options.rank_pattern.0 {
            *rank *= 2;
        }
        for (_, alpha) in &mut options.alpha_pattern.0 {
            *alpha *= factor;
        }
        let mut plan = plan.clone();
        for pair in plan.values_mut() {
            pair.rank *= 2;
            pair.alpha *= factor;
            pair.scaling = options.scaling(pair.alpha, pair.rank);
            pair.init = PairInit::Default;
        }
        (options, plan)
    }

    /// Checks the numbers and resolves every module's pair.
    pub(crate) fn plan(
        &self,
        class: TaskClass,
        modules: &[ModuleSpec],
    ) -> Result<Plan, ModelError> {
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(ModelError::options(format!(
                "adapter.dropout is {}; it has to be at least 0 and below 1",
                self.dropout
            )));
        }
        if self.layers_to_transform.is_some() && !matches!(self.targets, Targets::List(_)) {
            return Err(ModelError::options(
                "adapter.layers_to_transform needs adapter.targets to be a list of names",
            ));
        }
        let mut plan = Plan::new();
        for module in matching::targeted(self, class, modules)? {
            let path = &module.path;
            if matching::saved(&self.modules_to_save, path) {
                return Err(ModelError::Target {
                    module: path.clone(),
                    message: "is both a target and, by the end of its path, in `modules_to_save`; \
                              exclude it or write the module to save with its dot"
                        .to_owned(),
                });
            }
            if self.init != PairInit::Default && path == "lm_head" {
                return Err(ModelError::Target {
                    module: path.clone(),
                    message: "is the output layer, whose weight is saved with its pair; one that \
                              starts from singular vectors is not built: leave it out of `targets`"
                        .to_owned(),
                });
            }
            let embedding = module.role == Role::Embedding;
            if embedding && (self.use_dora || self.init != PairInit::Default) {
                return Err(ModelError::Target {
                    module: path.clone(),
                    message:
                        "is an embedding; DoRA and PiSSA are built for linear layers: leave it \
                              out of `targets`, or train some of its tokens with `trained_tokens`"
                            .to_owned(),
                });
            }
            if embedding && !self.trained_tokens.is_empty() {
                return Err(ModelError::Target {
                    module: path.clone(),
                    message: "has a pair and `trained_tokens` of its own; choose one of the two"
                        .to_owned(),
                });
            }
            let rank = self.rank_pattern.resolve(path)?.unwrap_or(self.r);
            let alpha = self.alpha_pattern.resolve(path)?.unwrap_or(self.alpha);
            if rank == 0 {
                return Err(ModelError::options(format!(
                    "the adapter's rank for `{path}` is 0; it has to be at least 1"
                )));
            }
            if !alpha.is_finite() {
                return Err(ModelError::options(format!(
                    "the adapter's alpha for `{path}` is {alpha}"
                )));
            }
            if self.init != PairInit::Default && alpha <= 0.0 {
                return Err(ModelError::options(format!(
                    "the adapter's alpha for `{path}` is {alpha}; a pair that starts from singular \
                     values needs one above 0"
                )));
            }
            if self.init != PairInit::Default && rank > module.shape[0].min(module.shape[1]) {
                return Err(ModelError::options(format!(
                    "the adapter's rank for `{path}` is {rank}, and its weight has {} singular \
                     values to start from; lower `adapter.r`",
                    module.shape[0].min(module.shape[1])
                )));
            }
            let pair = Pair {
                rank,
                alpha,
                scaling: self.scaling(alpha, rank),
                dropout: self.dropout as f32,
                index: plan.len() as u64,
                dora: self.use_dora,
                init: self.init,
            };
            plan.insert(path.clone(), pair);
        }
        Ok(plan)
    }
}
