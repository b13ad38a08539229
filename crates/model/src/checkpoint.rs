//! A hub checkpoint: `config.json` with `model.safetensors` or a sharded index.
//!
//! Opening reads headers only. Every tensor's name, type, shape and length is checked against the
//! architecture before any weight is read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor};
use serde_json::{Map, Value};

use crate::architecture::{self, ModuleSpec};
use crate::config::{Family, Kind, ModelConfig};
use crate::error::ModelError;
use crate::weights::TensorFile;

/// Prefixes that the classes of Transformers put before the backbone's tensors.
const PREFIXES: [&str; 3] = ["model.", "bert.", "roberta."];

/// An opened and checked checkpoint; no weight has been read yet.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    files: Vec<TensorFile>,
    /// Name without class prefix → file and the name in it.
    tensors: BTreeMap<String, (usize, String)>,
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
        let files = open_files(dir)?;
        let mut tensors = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for (name, _) in file.entries() {
                let previous = tensors.insert(canonical(name), (index, name.to_owned()));
                if let Some((_, previous)) = previous {
                    return Err(ModelError::Tensor {
                        path: file.path().to_owned(),
                        tensor: name.to_owned(),
                        message: format!("is stored twice, also as `{previous}`"),
                    });
                }
            }
        }
        let prefix = PREFIXES
            .into_iter()
            .find(|prefix| tensors.values().any(|(_, name)| name.starts_with(prefix)))
            .unwrap_or("");
        let mut checkpoint = Checkpoint {
            path: dir.to_owned(),
            config,
            files,
            tensors,
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
        self.tensors.contains_key(name)
    }

    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        let (file, stored) = self.tensors.get(name)?;
        self.files[*file]
            .entry(stored)
            .map(|entry| entry.shape.as_slice())
    }

    /// Reads a tensor, under its name without class prefix.
    pub(crate) fn tensor<const D: usize>(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor<D>, ModelError> {
        match self.tensors.get(name) {
            Some((file, stored)) => self.files[*file].tensor(stored, dtype, device),
            None => Err(self.missing(name, Vec::new())),
        }
    }

    /// Whether the output layer is the token embedding. As Transformers does it: the configuration
    /// asks for it, or rather does not get it when the file holds another output layer.
    pub(crate) fn tied_embeddings(&self) -> Result<bool, ModelError> {
        let Kind::Decoder(decoder) = &self.config.kind else {
            return Ok(false);
        };
        if !decoder.tied_embeddings {
            return Ok(false);
        }
        match (
            self.tensors.get("lm_head.weight"),
            self.tensors.get("embed_tokens.weight"),
        ) {
            (Some((head_file, head)), Some((embedding_file, embedding))) => {
                self.files[*head_file].same(head, &self.files[*embedding_file], embedding)
            }
            _ => Ok(true),
        }
    }

    /// The name of a tensor without the prefix of any class, as [`Checkpoint::tensor`] wants it.
    pub(crate) fn canonical_name(name: &str) -> String {
        canonical(name)
    }

    pub(crate) fn missing(&self, name: &str, expected: Vec<usize>) -> ModelError {
        let prefix = if name.starts_with("lm_head") {
            ""
        } else {
            self.prefix
        };
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
                self.check_module(&architecture::pooler(&self.config), false, &mut used)?;
            }
            Family::Decoder => {
                let tied = matches!(&self.config.kind, Kind::Decoder(d) if d.tied_embeddings);
                let required = !tied
                    && self
                        .config
                        .architectures
                        .iter()
                        .any(|class| class.ends_with("ForCausalLM"));
                self.check_module(&architecture::lm_head(&self.config), required, &mut used)?;
            }
        }
        let mut unused = Vec::new();
        for (name, (file, stored)) in &self.tensors {
            if used.contains(name) {
                continue;
            }
            if !self.tolerated(name) {
                return Err(ModelError::UnusedTensor {
                    path: self.files[*file].path().to_owned(),
                    tensor: stored.clone(),
                });
            }
            unused.push(stored.clone());
        }
        Ok(unused)
    }

    fn check_module(
        &self,
        module: &ModuleSpec,
        required: bool,
        used: &mut BTreeSet<String>,
    ) -> Result<(), ModelError> {
        let present = module.tensors().any(|(name, _)| self.has(&name));
        for (name, expected) in module.tensors() {
            let Some((file, stored)) = self.tensors.get(&name) else {
                if required || present {
                    return Err(self.missing(&name, expected));
                }
                continue;
            };
            let file = &self.files[*file];
            let entry = file.entry(stored).expect("listed from this file");
            if entry.shape != expected {
                return Err(ModelError::Shape {
                    path: file.path().to_owned(),
                    tensor: stored.clone(),
                    found: entry.shape.clone(),
                    expected,
                });
            }
            if entry.float().is_none() {
                return Err(ModelError::Tensor {
                    path: file.path().to_owned(),
                    tensor: stored.clone(),
                    message: format!("is {}; weights have to be F32, F16 or BF16", entry.dtype),
                });
            }
            used.insert(name);
        }
        Ok(())
    }

    /// Tensors that hub checkpoints carry and that say nothing a model needs: buffers that are
    /// computed, and heads of other tasks.
    fn tolerated(&self, name: &str) -> bool {
        let buffers = ["rotary_emb.inv_freq", ".position_ids", ".token_type_ids"];
        let heads: &[&str] = match self.config.family() {
            Family::Decoder => &["score.", "qa_outputs."],
            Family::Encoder => &["cls.", "lm_head.", "classifier.", "qa_outputs."],
        };
        buffers.iter().any(|suffix| name.ends_with(suffix))
            || heads.iter().any(|head| name.starts_with(head))
    }
}

/// The name without class prefix, in today's spelling (BERT's first checkpoints say gamma, beta).
fn canonical(name: &str) -> String {
    let name = PREFIXES
        .into_iter()
        .find_map(|prefix| name.strip_prefix(prefix))
        .unwrap_or(name);
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

fn open_files(dir: &Path) -> Result<Vec<TensorFile>, ModelError> {
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![TensorFile::open(&single)?]);
    }
    let index_path = dir.join("model.safetensors.index.json");
    if !index_path.exists() {
        return Err(ModelError::NoWeights {
            path: dir.to_owned(),
        });
    }
    let text = std::fs::read_to_string(&index_path).map_err(ModelError::io(&index_path))?;
    let index: Map<String, Value> =
        serde_json::from_str(&text).map_err(|source| ModelError::Json {
            path: index_path.clone(),
            source,
        })?;
    let wrong = |message: String| ModelError::Config {
        path: index_path.clone(),
        message,
    };
    let map = index
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| wrong("has no `weight_map` object".to_owned()))?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        let shard = shard
            .as_str()
            .filter(|shard| !shard.contains(['/', '\\']))
            .ok_or_else(|| wrong(format!("tensor `{tensor}` has no valid file name")))?;
        shards.entry(shard).or_default().push(tensor);
    }
    let mut files = Vec::with_capacity(shards.len());
    for (shard, tensors) in shards {
        let file = TensorFile::open(&dir.join(shard))?;
        if let Some(missing) = tensors.iter().find(|name| file.entry(name).is_none()) {
            return Err(ModelError::Tensor {
                path: file.path().to_owned(),
                tensor: (*missing).to_owned(),
                message: "is in the index but not in this file".to_owned(),
            });
        }
        files.push(file);
    }
    Ok(files)
}
