//! Low-rank adapters (Hu et al. 2021): what a recipe says about them, and what that means for each
//! module.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::architecture::{ModuleSpec, TaskClass};
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
}

/// Which modules get which pair.
pub(crate) type Plan = BTreeMap<String, Pair>;

impl LoraOptions {
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
            let divisor = if self.use_rslora {
                (rank as f64).sqrt()
            } else {
                rank as f64
            };
            let pair = Pair {
                rank,
                alpha,
                scaling: (alpha / divisor) as f32,
                dropout: self.dropout as f32,
                index: plan.len() as u64,
            };
            plan.insert(path.clone(), pair);
        }
        Ok(plan)
    }
}
