//! What other programs ask of an adapter beyond what PEFT does.
//!
//! vLLM: `vllm/config/lora.py` (`MaxLoRARanks`), `vllm/lora/peft_helper.py` (`PEFTHelper`: DoRA and
//! `modules_to_save` refused, one scaling of `r` and `lora_alpha` for all modules) and
//! `vllm/lora/utils.py` (`parse_fine_tuned_lora_name`: no other tensors than pairs). mistral.rs:
//! `mistralrs-quant/src/lora/mod.rs` (`LoraConfig::validate_dynamic`) and `dynamic/loader.rs` beside it
//! (no pairs on embeddings and the output layer, no other tensors). Both as read in November 2026.

use std::path::Path;

use serde::Serialize;

use crate::adapter_config::AdapterConfig;
use crate::adapter_file::{self, WEIGHTS};
use crate::architecture::TaskClass;
use crate::checkpoint::Checkpoint;
use crate::config::Family;
use crate::error::ModelError;
use crate::lora::{BiasMode, LoraOptions, PairInit, Plan};
use crate::matching::TOKEN_EMBEDDINGS;
use crate::model::{Model, ModelOptions};
use crate::weights::TensorFile;

/// Ranks that vLLM's `max_lora_rank` can be set to; an adapter's may be any up to the largest.
const VLLM_LARGEST_RANK: usize = 512;

/// Something of an adapter that a program does not load.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Restriction {
    /// Which program: `vLLM` or `mistral.rs`.
    pub program: &'static str,
    /// What it does not load.
    pub problem: String,
    /// What to do about it.
    pub fix: String,
}

/// What vLLM and mistral.rs would refuse, or compute otherwise, of an adapter folder.
///
/// # Errors
/// A folder that is no adapter of the checkpoint.
pub fn restrictions(
    checkpoint: &Checkpoint,
    adapter_dir: &Path,
) -> Result<Vec<Restriction>, ModelError> {
    let config = AdapterConfig::read(adapter_dir)?;
    let file = TensorFile::open(&adapter_dir.join(WEIGHTS))?;
    let labels = adapter_file::stored_labels(&config, &file, checkpoint)?;
    let modules = config.class.modules(checkpoint.config(), labels);
    let plan = match &config.lora {
        Some(lora) => lora.plan(config.class, &modules)?,
        None => Plan::new(),
    };
    Ok(Subject {
        lora: config.lora.unwrap_or_default(),
        plan,
        class: config.class,
        family: checkpoint.config().family(),
        modules_to_save: config.modules_to_save,
        soft_tokens: adapter_file::has_soft_tokens(adapter_dir)?,
    }
    .restrictions())
}

impl Model {
    /// The same of the adapter that this model would save.
    pub fn restrictions(&self) -> Vec<Restriction> {
        let ModelOptions { lora, fusion, .. } = self.options();
        let (lora, plan) = match lora {
            Some(lora) => lora.saved(&self.plan),
            None => (LoraOptions::default(), Plan::new()),
        };
        Subject {
            lora,
            plan,
            class: self.class,
            family: self.config().family(),
            modules_to_save: self.modules_to_save.clone(),
            soft_tokens: fusion.is_some(),
        }
        .restrictions()
    }
}

struct Subject {
    lora: LoraOptions,
    plan: Plan,
    class: TaskClass,
    family: Family,
    modules_to_save: Vec<String>,
    soft_tokens: bool,
}

impl Subject {
    fn restrictions(&self) -> Vec<Restriction> {
        let mut found = Vec::new();
        let mut add = |programs: &[&'static str], problem: String, fix: &str| {
            for program in programs {
                found.push(Restriction {
                    program,
                    problem: problem.clone(),
                    fix: fix.to_owned(),
                });
            }
        };
        let both = ["vLLM", "mistral.rs"];
        if self.family == Family::Encoder {
            add(
                &both,
                "the checkpoint is an encoder, and adapters are loaded onto decoders only"
                    .to_owned(),
                "serve the checkpoint that `calor merge` makes",
            );
        }
        if self.plan.is_empty() {
            add(
                &both,
                "no module has a low-rank pair".to_owned(),
                "train with `adapter.kind = \"lora\"`",
            );
        }
        if self.soft_tokens {
            add(
                &both,
                "modality items become soft tokens, through parts that are in calor.safetensors"
                    .to_owned(),
                "use `calor predict`; nothing else reads them",
            );
        }
        if self.lora.use_dora {
            add(
                &both,
                "`use_dora`: magnitudes are not loaded".to_owned(),
                "merge the adapter into the checkpoint, or train with `adapter.use_dora = false`",
            );
        }
        if self.lora.bias != BiasMode::None {
            add(
                &both,
                format!(
                    "`bias` is `{}`: biases are not loaded",
                    self.lora.bias.name()
                ),
                "merge the adapter into the checkpoint, or train with `adapter.bias = \"none\"`",
            );
        }
        if !self.lora.trained_tokens.is_empty() {
            add(
                &both,
                "`trainable_token_indices`: trained tokens are not loaded".to_owned(),
                "merge the adapter into the checkpoint, or train without `adapter.trained_tokens`",
            );
        }
        if !self.modules_to_save.is_empty() {
            let what = match self.class {
                TaskClass::SequenceClassifier => "the classifier is one of them",
                _ => "they are not loaded",
            };
            add(
                &both,
                format!(
                    "`modules_to_save` is {}: {what}",
                    self.modules_to_save.join(", ")
                ),
                "merge the adapter into the checkpoint",
            );
        }
        if self.lora.init != PairInit::Default {
            add(
                &both,
                format!(
                    "`init_lora_weights` is `{}`: it needs other frozen weights",
                    self.lora.init
                ),
                "combine it with `calor merge --adapter-only`, or convert it with PEFT's \
                 path_initial_model_for_weight_conversion",
            );
        }
        let embeddings: Vec<&str> = self
            .plan
            .keys()
            .map(String::as_str)
            .filter(|path| TOKEN_EMBEDDINGS.iter().any(|name| path.ends_with(name)))
            .collect();
        for path in embeddings {
            add(
                &["mistral.rs"],
                format!("`{path}` has a pair, and those of embeddings are not loaded"),
                "merge the adapter into the checkpoint, or leave the embedding out of \
                 `adapter.targets`",
            );
        }
        if self.plan.contains_key("lm_head") {
            add(
                &["mistral.rs"],
                "`lm_head` has a pair, and that of the output layer is not loaded".to_owned(),
                "merge the adapter into the checkpoint, or leave `lm_head` out of `adapter.targets`",
            );
        }
        let largest = self.plan.values().map(|pair| pair.rank).max().unwrap_or(0);
        if largest > VLLM_LARGEST_RANK {
            add(
                &["vLLM"],
                format!(
                    "the largest rank is {largest}, and `max_lora_rank` goes to {VLLM_LARGEST_RANK}"
                ),
                "cut it with `calor merge --adapter-only --method svd --rank 512`",
            );
        }
        let uniform = self.lora.scaling(self.lora.alpha, self.lora.r);
        if let Some((path, pair)) = self.plan.iter().find(|(_, pair)| pair.scaling != uniform) {
            add(
                &["vLLM"],
                format!(
                    "`{path}` is scaled by {}, and vLLM reads no `rank_pattern` or `alpha_pattern`: it \
                     would scale all modules by {uniform}",
                    pair.scaling
                ),
                "write it with one scaling: `calor merge --adapter-only --method svd --rank R`",
            );
        }
        found
    }
}
