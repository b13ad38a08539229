//! An adapter folded into its checkpoint: a plain one comes out, that needs no adapter.
//!
//! Tensor by tensor: what is in memory is one weight in f32, not the model. Each is computed in f32
//! (sums in f64) and stored in its own type again. What the fold cannot hold is refused or named.

mod files;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{DType, FloatDType};

use crate::adapter_config::AdapterConfig;
use crate::adapter_file::{self, OWN_CONFIG, OWN_WEIGHTS, WEIGHTS};
use crate::architecture::{self, Role, TaskClass};
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::head::HeadOptions;
use crate::lora::{LoraOptions, Pair, PairInit, Plan};
use crate::names::Slot;
use crate::parameter::peft_key;
use crate::pissa::add_product;
use crate::weights::TensorFile;

/// What a fold did.
#[derive(Debug, Clone)]
pub(crate) struct Folded {
    /// Tensors of the checkpoint that are other than before.
    pub changed: usize,
    /// All tensors that were written.
    pub tensors: usize,
    /// What the adapter's model predicts.
    pub head: HeadOptions,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// What becomes of one tensor of the checkpoint, by its name without class prefix.
enum Change {
    /// `W + s·B·A`, and for DoRA each row at its magnitude.
    Pair {
        a: String,
        b: String,
        pair: Pair,
        magnitude: Option<String>,
        /// The pair is that of the transposed weight: an embedding's, or a `Conv1D`'s.
        transposed: bool,
        /// A frozen weight that is stored with the adapter.
        base: Option<String>,
    },
    /// Another tensor in its place.
    Whole(String),
    /// Other rows.
    Rows(String, Vec<u32>),
}

/// Writes the checkpoint with the adapter folded in to the folder `out`, which is made. `dtype` is
/// that of all its weights; without one each keeps its own.
///
/// # Errors
/// An adapter of another checkpoint, one with soft tokens, which no plain checkpoint holds, and a
/// folder that cannot be written.
pub(crate) fn fold(
    checkpoint: &Checkpoint,
    adapter_dir: &Path,
    dtype: Option<FloatDType>,
    out: &Path,
) -> Result<Folded, ModelError> {
    if let Some(stored) = checkpoint.config().stored_quantization() {
        return Err(ModelError::options(format!(
            "{}: its weights are stored as {stored}, and a sum with them cannot be; merge into the \
             checkpoint it was quantised from",
            checkpoint.path().display()
        )));
    }
    let config = AdapterConfig::read(adapter_dir)?;
    let file = TensorFile::open(&adapter_dir.join(WEIGHTS))?;
    if adapter_file::has_soft_tokens(adapter_dir)? {
        return Err(ModelError::options(format!(
            "{}: what makes soft tokens of modality items ({OWN_WEIGHTS}) is no part of the \
             checkpoint, and no plain one can hold it; use the run as it is, with `calor predict`",
            adapter_dir.display()
        )));
    }
    let lora = config.lora.clone().unwrap_or_default();
    if lora.init != PairInit::Default {
        return Err(ModelError::options(format!(
            "{}: the pairs' start was not subtracted (PiSSA); convert the adapter with PEFT's \
             path_initial_model_for_weight_conversion",
            adapter_dir.display()
        )));
    }
    let head = adapter_file::head_of(adapter_dir, &config, &file, checkpoint)?;
    let mut fold = Fold {
        checkpoint,
        file,
        dtype: dtype.map(DType::from),
        changes: BTreeMap::new(),
        added: BTreeMap::new(),
        untied: false,
        class: config.class,
        notes: Vec::new(),
    };
    fold.plan(&config, &lora, head.labels())?;
    std::fs::create_dir_all(out).map_err(ModelError::io(out))?;
    let tensors = fold.write_weights(out)?;
    fold.write_config(out, head)?;
    files::copy_others(checkpoint.path(), out)?;
    if adapter_dir.join(OWN_WEIGHTS).exists() {
        for name in [OWN_CONFIG, OWN_WEIGHTS] {
            let from = adapter_dir.join(name);
            std::fs::copy(&from, out.join(name)).map_err(ModelError::io(&from))?;
        }
        fold.notes.push(format!(
            "the head reads the mean over a sample's tokens, which no Transformers class does: it is \
             in {OWN_WEIGHTS}, beside the checkpoint"
        ));
    }
    Ok(Folded {
        changed: fold.changes.len() + fold.added.len(),
        tensors,
        head,
        notes: fold.notes,
    })
}

struct Fold<'a> {
    checkpoint: &'a Checkpoint,
    /// The adapter's tensors.
    file: TensorFile,
    dtype: Option<DType>,
    changes: BTreeMap<String, Change>,
    /// Tensors that the checkpoint has not, by name: what they are made of.
    added: BTreeMap<String, Added>,
    /// Whether the output layer, which was the token embedding, is a tensor of its own now: only one
    /// of the two changed.
    untied: bool,
    class: TaskClass,
    notes: Vec<String>,
}

/// What a tensor that the checkpoint has not is made of.
enum Added {
    /// A tensor of the adapter.
    Adapter(String),
    /// The token embedding as it was, for an output layer that no longer is the token embedding.
    Embedding,
}

impl Fold<'_> {
    /// Decides what becomes of every tensor, and that every tensor of the adapter goes somewhere.
    fn plan(
        &mut self,
        config: &AdapterConfig,
        lora: &LoraOptions,
        labels: usize,
    ) -> Result<(), ModelError> {
        let modules = self.class.modules(self.checkpoint.config(), labels);
        let plan = match &config.lora {
            Some(lora) => lora.plan(self.class, &modules)?,
            None => Plan::new(),
        };
        let mut used = BTreeSet::new();
        for (path, pair) in &plan {
            let [a, b] = adapter_file::pair_names(&self.file, path);
            let name = |end: &str| peft_key(&format!("{path}.{end}"));
            let there = |name: String| self.file.entry(&name).is_some().then_some(name);
            let magnitude = there(name("lora_magnitude_vector"));
            let base = there(name("base_layer.weight"));
            used.extend([a.clone(), b.clone()]);
            used.extend(magnitude.clone().into_iter().chain(base.clone()));
            let conv1d = modules
                .iter()
                .any(|module| module.path == *path && module.role == Role::LinearTransposed);
            let transposed = conv1d || a.ends_with("lora_embedding_A");
            if conv1d && magnitude.is_some() {
                return Err(ModelError::Target {
                    module: path.clone(),
                    message: "is a `Conv1D` with a magnitude (DoRA); merging it is not built"
                        .to_owned(),
                });
            }
            if lora.use_dora && magnitude.is_none() {
                return Err(self.missing(name("lora_magnitude_vector")));
            }
            self.changes.insert(
                Checkpoint::canonical_name(&format!("{path}.weight")),
                Change::Pair {
                    transposed,
                    a,
                    b,
                    pair: *pair,
                    magnitude,
                    base,
                },
            );
        }
        for (key, _) in self.file.entries() {
            if used.contains(key) || adapter_file::unread(lora, key) {
                continue;
            }
            let path = key.strip_prefix(adapter_file::PEFT_PREFIX).unwrap_or(key);
            if let Some(stem) = path.strip_suffix(".token_adapter.trainable_tokens_delta") {
                let name = Checkpoint::canonical_name(&format!("{stem}.weight"));
                let rows = Change::Rows(key.to_owned(), lora.trained_tokens.clone());
                self.changes.insert(name, rows);
                continue;
            }
            let path = path.replace(".base_layer.bias", ".bias");
            let known = modules
                .iter()
                .any(|module| module.tensors().any(|(name, _)| name == path));
            if !known {
                return Err(ModelError::UnusedTensor {
                    path: self.file.path().to_owned(),
                    tensor: key.to_owned(),
                });
            }
            let name = Checkpoint::canonical_name(&path);
            if self.checkpoint.has(&name) {
                self.changes.insert(name, Change::Whole(key.to_owned()));
            } else {
                self.added.insert(path, Added::Adapter(key.to_owned()));
            }
        }
        self.untie()
    }

    /// An output layer that is the token embedding stays it where both change alike.
    fn untie(&mut self) -> Result<(), ModelError> {
        if self.class != TaskClass::CausalLm || !self.checkpoint.tied_embeddings()? {
            return Ok(());
        }
        let embeddings = architecture::embeddings(self.checkpoint.config());
        let input = &format!("{}.weight", embeddings.expect(Slot::Tokens).path);
        let output = "lm_head.weight";
        let rows = match self.changes.get(input) {
            Some(Change::Rows(key, tokens)) => Some((key.clone(), tokens.clone())),
            _ => None,
        };
        let stored = self.checkpoint.has(output);
        if let Some((key, tokens)) = rows {
            // Trained tokens are the output layer's too.
            if stored {
                self.changes
                    .insert(output.to_owned(), Change::Rows(key, tokens));
            }
            return Ok(());
        }
        let output_changes = self.changes.contains_key(output) || self.added.contains_key(output);
        if !self.changes.contains_key(input) && !output_changes {
            return Ok(());
        }
        self.untied = true;
        self.notes.push(
            "the output layer was the token embedding and only one of them changed: it is a tensor of \
             its own now, `tie_word_embeddings` is false"
                .to_owned(),
        );
        if !stored && !self.added.contains_key(output) {
            self.added.insert(output.to_owned(), Added::Embedding);
        }
        Ok(())
    }

    fn changed(
        &self,
        weight: Vec<f32>,
        shape: &[usize],
        change: &Change,
    ) -> Result<Vec<f32>, ModelError> {
        match change {
            Change::Whole(key) => self.file.floats(key),
            Change::Rows(key, tokens) => {
                let mut weight = weight;
                let rows = self.file.floats(key)?;
                let width = shape[1];
                for (token, row) in tokens.iter().zip(rows.chunks_exact(width)) {
                    let start = *token as usize * width;
                    weight[start..start + width].copy_from_slice(row);
                }
                Ok(weight)
            }
            Change::Pair {
                a,
                b,
                pair,
                magnitude,
                transposed: of_transposed,
                base,
            } => {
                let weight = match base {
                    Some(base) => self.file.floats(base)?,
                    None => weight,
                };
                let (mut a, mut b) = (self.file.floats(a)?, self.file.floats(b)?);
                if *of_transposed {
                    // (B·A)ᵀ = Aᵀ·Bᵀ
                    (a, b) = (
                        transposed(&b, pair.rank),
                        transposed(&a, a.len() / pair.rank),
                    );
                }
                let mut sum = add_product(weight, &a, &b, pair.rank, f64::from(pair.scaling));
                if let Some(magnitude) = magnitude {
                    let magnitudes = self.file.floats(magnitude)?;
                    for (row, magnitude) in sum.chunks_exact_mut(shape[1]).zip(magnitudes) {
                        let squares: f64 = row.iter().map(|v| f64::from(*v).powi(2)).sum();
                        let factor = f64::from(magnitude) / squares.sqrt();
                        for value in row {
                            *value = (f64::from(*value) * factor) as f32;
                        }
                    }
                }
                Ok(sum)
            }
        }
    }

    fn missing(&self, tensor: String) -> ModelError {
        ModelError::MissingTensor {
            path: self.file.path().to_owned(),
            tensor,
            expected: Vec::new(),
        }
    }
}

/// `[rows, columns]` as `[columns, rows]`, where a row has `columns` values.
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| values[row * columns + column]))
        .collect()
}
