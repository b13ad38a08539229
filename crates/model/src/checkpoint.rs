//! A hub checkpoint: `config.json` with `model.safetensors` or a sharded index.
//!
//! Opening reads headers only. Every tensor's name, type, shape and length is checked against the
//! architecture before any weight is read.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::architecture::{self, ModuleSpec, Role};
use crate::bitsandbytes;
use crate::config::{Family, ModelConfig, ModelType};
use crate::error::ModelError;
use crate::names::{Names, OUTPUT_LAYER, Slot};
use crate::stored::Stored;

/// Prefixes that the classes of Transformers put before the backbone's tensors.
const PREFIXES: [&str; 7] = [
    "model.",
    "transformer.",
    "gpt_neox.",
    "bert.",
    "roberta.",
    "electra.",
    "deberta.",
];

/// An opened and checked checkpoint; no weight has been read yet.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    /// Under names without class prefix.
    pub(crate) stored: Stored,
    /// What the checkpoint's own names begin with.
    prefix: &'static str,
    unused: Vec<String>,
}

impl Checkpoint {
    /// Opens the folder `dir` and checks it in full.
    ///
    /// # Errors
    /// An unsupported `config.json`, missing files, a wrong header or truncated file, and a tensor
    /// that is missing, misshapen, of a type that weights do not have or used by nothing: each
    /// names the file and the tensor.
    pub fn open(dir: &Path) -> Result<Checkpoint, ModelError> {
        let config = ModelConfig::read(dir)?;
        let stored = Stored::open(dir, canonical)?;
        let prefix = stored.prefix(&PREFIXES);
        let mut checkpoint = Checkpoint {
            path: dir.to_owned(),
            config,
            stored,
            prefix,
            unused: Vec::new(),
        };
        checkpoint.unused = checkpoint.check()?;
        Ok(checkpoint)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What its `config.json` says.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Tensors that are there and that no model of this crate reads, such as BERT's pretraining
    /// heads; worth a line in a log.
    pub fn unused_tensors(&self) -> &[String] {
        &self.unused
    }

    /// Whether a tensor is there, under its name without class prefix.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.stored.has(name)
    }

    pub(crate) fn has_all<'a>(&self, modules: impl Iterator<Item = &'a ModuleSpec>) -> bool {
        let mut names = modules.flat_map(ModuleSpec::tensors);
        names.all(|(name, _)| self.has(&name))
    }

    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.stored.shape(name)
    }

    /// Whether the output layer is the token embedding. As Transformers does it: the configuration
    /// asks for it, or rather does not get it when the file holds another output layer.
    pub(crate) fn tied_embeddings(&self) -> Result<bool, ModelError> {
        if self.config.family() == Family::Encoder || !self.config.design.tied_embeddings {
            return Ok(false);
        }
        let embeddings = architecture::embeddings(&self.config);
        let weight = |module: &ModuleSpec| format!("{}.weight", module.path);
        let output = weight(&architecture::output_layer(&self.config));
        let same = self
            .stored
            .same(&output, &weight(embeddings.expect(Slot::Tokens)))?;
        Ok(same.unwrap_or(true))
    }

    /// The name of a tensor without the prefix of any class.
    pub(crate) fn canonical_name(name: &str) -> String {
        canonical(name)
    }

    pub(crate) fn missing(&self, name: &str, expected: Vec<usize>) -> ModelError {
        if let Some(tensor) = name.strip_prefix(OUTPUT_LAYER) {
            return ModelError::MissingTensor {
                path: self.path.clone(),
                tensor: format!("{}{tensor}", Names::of(&self.config).stored_output),
                expected,
            };
        }
        let outside = architecture::pooler(&self.config)
            .filter(|pooler| !pooler.inside)
            .is_some_and(|pooler| {
                pooler
                    .modules()
                    .any(|module| name.starts_with(&module.path))
            });
        let prefix = if outside { "" } else { self.prefix };
        ModelError::MissingTensor {
            path: self.path.clone(),
            tensor: format!("{prefix}{name}"),
            expected,
        }
    }

    /// Checks every expected tensor, then that nothing is left over; returns the tolerated rest.
    fn check(&self) -> Result<Vec<String>, ModelError> {
        let mut used = BTreeSet::new();
        for module in architecture::backbone(&self.config) {
            self.check_module(&module, true, &mut used)?;
        }
        match self.config.family() {
            Family::Encoder => {
                if let Some(pooler) = architecture::pooler(&self.config) {
                    for module in pooler.modules() {
                        self.check_module(module, false, &mut used)?;
                    }
                }
            }
            Family::Decoder => {
                let required = !self.config.design.tied_embeddings
                    && self
                        .config
                        .architectures
                        .iter()
                        .any(|class| class.ends_with("ForCausalLM"));
                let output_layer = architecture::output_layer(&self.config);
                if bitsandbytes::is_quantized(&self.stored, &output_layer.path) {
                    let weight = format!("{}.weight", output_layer.path);
                    let message = "is quantised; that is read of all linear layers but the output \
                                   layer, which bitsandbytes leaves alone unless it is told not to";
                    return Err(self.stored.wrong(&weight, message));
                }
                self.check_module(&output_layer, required, &mut used)?;
            }
        }
        self.stored.unused(&used, |name| self.tolerated(name))
    }

    fn check_module(
        &self,
        module: &ModuleSpec,
        required: bool,
        used: &mut BTreeSet<String>,
    ) -> Result<(), ModelError> {
        let present = module.tensors().any(|(name, _)| self.has(&name));
        let mut quantized = None;
        if let (Role::Linear, &[output, input]) = (module.role, module.shape.as_slice()) {
            quantized = bitsandbytes::check(&self.stored, &module.path, [output, input])?;
        }
        for (name, expected) in module.tensors() {
            if let Some(names) = &quantized
                && names.contains(&name)
            {
                continue;
            }
            if self.stored.check(&name, &expected)? {
                used.insert(name);
            } else if required || present {
                return Err(self.missing(&name, expected));
            }
        }
        used.extend(quantized.into_iter().flatten());
        Ok(())
    }

    /// Tensors that hub checkpoints carry and that say nothing a model needs: buffers that are
    /// computed, and heads of other tasks.
    fn tolerated(&self, name: &str) -> bool {
        let mut buffers = vec!["rotary_emb.inv_freq", ".position_ids", ".token_type_ids"];
        match self.config.model_type {
            // The causal mask, in older files.
            ModelType::Gpt2 => buffers.extend([".attn.bias", ".attn.masked_bias"]),
            ModelType::GptNeox => buffers.extend([".attention.bias", ".attention.masked_bias"]),
            _ => {}
        }
        let heads = Names::of(&self.config).other_heads;
        buffers.iter().any(|suffix| name.ends_with(suffix))
            || heads.iter().any(|head| name.starts_with(head))
    }
}

/// The name without class prefix, in today's spelling (BERT's first checkpoints say gamma, beta;
/// GPT-NeoX's call the output layer `embed_out`).
fn canonical(name: &str) -> String {
    let name = PREFIXES
        .into_iter()
        .find_map(|prefix| name.strip_prefix(prefix))
        .unwrap_or(name);
    if let Some(tensor) = name.strip_prefix("embed_out.") {
        return format!("{OUTPUT_LAYER}.{tensor}");
    }
    for (old, new) in [
        ("LayerNorm.gamma", "LayerNorm.weight"),
        ("LayerNorm.beta", "LayerNorm.bias"),
    ] {
        if let Some(stem) = name.strip_suffix(old) {
            return format!("{stem}{new}");
        }
    }
    name.to_owned()
}
