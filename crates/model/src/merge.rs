//! An adapter folded into its checkpoint: a plain one comes out, that needs no adapter.
//!
//! Tensor by tensor: what is in memory is one weight in f32, not the model. Each is computed in f32
//! (sums in f64) and stored in its own type again. What the fold cannot hold is refused or named.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, FloatDType};
use half::{bf16, f16};
use serde_json::{Map, Value, json};

use crate::adapter::{self, OWN_CONFIG, OWN_WEIGHTS, WEIGHTS};
use crate::adapter_config::AdapterConfig;
use crate::architecture::TaskClass;
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::head::{CLASSIFIER_NAMES, HeadOptions, Problem};
use crate::keys::read_object;
use crate::lora::{LoraOptions, Pair, PairInit, Plan};
use crate::parameter::peft_key;
use crate::pissa::add_product;
use crate::weights::{TensorFile, float_name};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

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
        /// The embedding's pair is that of the transposed table.
        embedding: bool,
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
    let config = AdapterConfig::read(adapter_dir)?;
    let file = TensorFile::open(&adapter_dir.join(WEIGHTS))?;
    if adapter::has_soft_tokens(adapter_dir)? {
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
    let head = adapter::head_of(adapter_dir, &config, &file, checkpoint)?;
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
    copy_others(checkpoint.path(), out)?;
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

/// One tensor of the new checkpoint.
struct Entry {
    /// Its name there.
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    source: Source,
}

enum Source {
    /// A tensor of a file of the checkpoint, by the file's place, its name in it and the model's.
    Stored(usize, String, String),
    Added(String),
    /// Bytes of a type that weights do not have.
    Opaque(usize, String),
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
            let [a, b] = adapter::pair_names(&self.file, path);
            let name = |end: &str| peft_key(&format!("{path}.{end}"));
            let there = |name: String| self.file.entry(&name).is_some().then_some(name);
            let magnitude = there(name("lora_magnitude_vector"));
            let base = there(name("base_layer.weight"));
            used.extend([a.clone(), b.clone()]);
            used.extend(magnitude.clone().into_iter().chain(base.clone()));
            if lora.use_dora && magnitude.is_none() {
                return Err(self.missing(name("lora_magnitude_vector")));
            }
            self.changes.insert(
                Checkpoint::canonical_name(&format!("{path}.weight")),
                Change::Pair {
                    embedding: a.ends_with("lora_embedding_A"),
                    a,
                    b,
                    pair: *pair,
                    magnitude,
                    base,
                },
            );
        }
        for (key, _) in self.file.entries() {
            if used.contains(key) || adapter::unread(lora, key) {
                continue;
            }
            let path = key.strip_prefix(adapter::PEFT_PREFIX).unwrap_or(key);
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
        let (input, output) = ("embed_tokens.weight", "lm_head.weight");
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

    /// Writes every file of weights; returns the number of tensors.
    fn write_weights(&self, out: &Path) -> Result<usize, ModelError> {
        let stored = &self.checkpoint.stored;
        let unused: BTreeSet<&str> = self
            .checkpoint
            .unused_tensors()
            .iter()
            .map(String::as_str)
            .collect();
        let classifier = self.class == TaskClass::SequenceClassifier;
        let prefix = self.class.prefix(self.checkpoint.config().model_type());
        let mut map = Map::new();
        let (mut count, mut total) = (0, 0u64);
        let last = stored.files().len() - 1;
        for (place, file) in stored.files().iter().enumerate() {
            let mut entries = Vec::new();
            for (name, entry) in file.entries() {
                let canonical = Checkpoint::canonical_name(name);
                let tolerated = unused.contains(name);
                let change = self.changes.get(&canonical);
                // Heads of other tasks have no place in the class that the adapter is for.
                if classifier && tolerated && change.is_none() {
                    continue;
                }
                let new_name = match classifier {
                    true if is_head(&canonical) => canonical.clone(),
                    true => format!("{prefix}{canonical}"),
                    false => name.to_owned(),
                };
                // The checkpoint's own head may be of other labels.
                let replaced = match change {
                    Some(Change::Whole(key)) => self.file.entry(key),
                    _ => None,
                };
                let (dtype, source) = match entry.float() {
                    Some(dtype) => (
                        self.dtype.unwrap_or(dtype),
                        Source::Stored(place, name.to_owned(), canonical),
                    ),
                    None => (DType::U8, Source::Opaque(place, name.to_owned())),
                };
                entries.push(Entry {
                    name: new_name,
                    dtype,
                    shape: replaced.unwrap_or(entry).shape.clone(),
                    source,
                });
            }
            if place == last {
                for (name, added) in &self.added {
                    entries.push(self.added_entry(name, added)?);
                }
            }
            let file_name = file
                .path()
                .file_name()
                .expect("an opened file has a name")
                .to_string_lossy()
                .into_owned();
            total += self.write_file(&out.join(&file_name), &entries)?;
            count += entries.len();
            for entry in entries {
                map.insert(entry.name, json!(file_name));
            }
        }
        if stored.files().len() > 1 || !out.join(SINGLE).exists() {
            let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
            write_json(&out.join(INDEX), &index)?;
        }
        Ok(count)
    }

    fn added_entry(&self, name: &str, added: &Added) -> Result<Entry, ModelError> {
        let shape = match added {
            Added::Adapter(key) => self.file.entry(key).map(|entry| entry.shape.clone()),
            Added::Embedding => self
                .checkpoint
                .shape("embed_tokens.weight")
                .map(<[usize]>::to_vec),
        };
        let common = self.checkpoint.stored.common_dtype();
        Ok(Entry {
            name: name.to_owned(),
            dtype: self.dtype.unwrap_or(common),
            shape: shape.ok_or_else(|| self.missing(name.to_owned()))?,
            source: Source::Added(name.to_owned()),
        })
    }

    /// Writes a header, then one tensor after the other; returns the bytes of the tensors.
    fn write_file(&self, path: &Path, entries: &[Entry]) -> Result<u64, ModelError> {
        let mut order: Vec<&Entry> = entries.iter().collect();
        // As the format's own writer has it: wide types first, so that each tensor is aligned.
        order.sort_by(|a, b| {
            let width = |entry: &Entry| self.width(entry);
            width(b).cmp(&width(a)).then_with(|| a.name.cmp(&b.name))
        });
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
        let mut offset = 0u64;
        for entry in &order {
            let elements: usize = entry.shape.iter().product();
            let end = offset + (elements * self.width(entry)) as u64;
            header.insert(
                entry.name.clone(),
                json!({
                    "dtype": self.type_name(entry),
                    "shape": entry.shape,
                    "data_offsets": [offset, end],
                }),
            );
            offset = end;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let io = || ModelError::io(path);
        let mut file = BufWriter::new(File::create(path).map_err(io())?);
        file.write_all(&(header.len() as u64).to_le_bytes())
            .map_err(io())?;
        file.write_all(&header).map_err(io())?;
        for entry in order {
            let bytes = self.bytes(entry)?;
            file.write_all(&bytes).map_err(io())?;
        }
        let file = file
            .into_inner()
            .map_err(|error| io()(error.into_error()))?;
        file.sync_all().map_err(io())?;
        Ok(offset)
    }

    fn opaque<'a>(&'a self, entry: &'a Entry) -> Option<(&'a TensorFile, &'a str)> {
        match &entry.source {
            Source::Opaque(file, name) => Some((&self.checkpoint.stored.files()[*file], name)),
            _ => None,
        }
    }

    /// Bytes an element.
    fn width(&self, entry: &Entry) -> usize {
        match self.opaque(entry) {
            Some((file, name)) => {
                let elements: usize = entry.shape.iter().product();
                file.raw(name)
                    .map_or(0, |bytes| bytes.len() / elements.max(1))
            }
            None => entry.dtype.size(),
        }
    }

    fn type_name(&self, entry: &Entry) -> String {
        match self.opaque(entry) {
            Some((file, name)) => file.entry(name).expect("it was listed").dtype.clone(),
            None => float_name(entry.dtype).to_owned(),
        }
    }

    /// The new bytes of a tensor.
    fn bytes(&self, entry: &Entry) -> Result<Vec<u8>, ModelError> {
        let values = match &entry.source {
            Source::Opaque(file, name) => {
                return self.checkpoint.stored.files()[*file].raw(name);
            }
            Source::Added(name) => match (&self.added[name], self.changes.get(name)) {
                (Added::Adapter(key), _) => self.file.floats(key)?,
                (Added::Embedding, change) => {
                    let values = self.checkpoint.stored.floats("embed_tokens.weight")?;
                    match change {
                        Some(change) => self.changed(values, &entry.shape, change)?,
                        None => values,
                    }
                }
            },
            Source::Stored(file, stored, name) => {
                let file = &self.checkpoint.stored.files()[*file];
                let same_type = file.entry(stored).and_then(|e| e.float()) == Some(entry.dtype);
                match self.changes.get(name) {
                    None if same_type => return file.raw(stored),
                    None => file.floats(stored)?,
                    Some(change) => self.changed(file.floats(stored)?, &entry.shape, change)?,
                }
            }
        };
        Ok(encode(&values, entry.dtype))
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
                embedding,
                base,
            } => {
                let weight = match base {
                    Some(base) => self.file.floats(base)?,
                    None => weight,
                };
                let (mut a, mut b) = (self.file.floats(a)?, self.file.floats(b)?);
                if *embedding {
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

    fn write_config(&self, out: &Path, head: HeadOptions) -> Result<(), ModelError> {
        let mut config = read_object(&self.checkpoint.path().join("config.json"))?;
        if let Some(dtype) = self.dtype {
            let name = match dtype {
                DType::F16 => "float16",
                DType::BF16 => "bfloat16",
                _ => "float32",
            };
            config.remove("torch_dtype");
            config.insert("dtype".to_owned(), json!(name));
        }
        if self.untied {
            config.insert("tie_word_embeddings".to_owned(), json!(false));
        }
        if let HeadOptions::Classifier {
            labels, problem, ..
        } = head
            && self.class == TaskClass::SequenceClassifier
        {
            if let Some(class) = config
                .get("architectures")
                .and_then(|classes| classes.get(0)?.as_str())
            {
                let stem = class.split("For").next().unwrap_or(class);
                let stem = stem.strip_suffix("Model").unwrap_or(stem);
                let class = format!("{stem}ForSequenceClassification");
                config.insert("architectures".to_owned(), json!([class]));
            }
            let names = (0..labels).map(|label| (label, format!("LABEL_{label}")));
            let by_number: Map<String, Value> = names
                .clone()
                .map(|(label, name)| (label.to_string(), json!(name)))
                .collect();
            let by_name: Map<String, Value> =
                names.map(|(label, name)| (name, json!(label))).collect();
            config.insert("id2label".to_owned(), Value::Object(by_number));
            config.insert("label2id".to_owned(), Value::Object(by_name));
            let problem = match problem {
                Problem::Multiclass => "single_label_classification",
                Problem::Regression => "regression",
                // One logit a yes-or-no label, one of them or several.
                Problem::Binary | Problem::Multilabel => "multi_label_classification",
            };
            config.insert("problem_type".to_owned(), json!(problem));
        }
        write_json(&out.join("config.json"), &Value::Object(config))
    }

    fn missing(&self, tensor: String) -> ModelError {
        ModelError::MissingTensor {
            path: self.file.path().to_owned(),
            tensor,
            expected: Vec::new(),
        }
    }
}

/// Whether a tensor is that of a classification head.
fn is_head(name: &str) -> bool {
    CLASSIFIER_NAMES.iter().any(|head| {
        name.strip_prefix(head)
            .is_some_and(|rest| rest.starts_with('.'))
    })
}

/// `[rows, columns]` as `[columns, rows]`, where a row has `columns` values.
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| values[row * columns + column]))
        .collect()
}

fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F16 => values
            .iter()
            .flat_map(|value| f16::from_f32(*value).to_le_bytes())
            .collect(),
        DType::BF16 => values
            .iter()
            .flat_map(|value| bf16::from_f32(*value).to_le_bytes())
            .collect(),
        _ => values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
    }
}

/// The tokenizer's and other small files of a checkpoint.
fn copy_others(from: &Path, out: &Path) -> Result<(), ModelError> {
    let entries = std::fs::read_dir(from).map_err(ModelError::io(from))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    for file in files {
        let Some(name) = file.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        let text = [".json", ".txt", ".model", ".jinja"];
        let wanted = text.iter().any(|end| name.ends_with(end))
            && !["config.json", INDEX].contains(&name)
            && !name.ends_with(".index.json");
        if wanted && file.is_file() {
            std::fs::copy(&file, out.join(name)).map_err(ModelError::io(&file))?;
        }
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<(), ModelError> {
    let mut text = serde_json::to_string_pretty(value).map_err(|source| ModelError::Json {
        path: path.to_owned(),
        source,
    })?;
    text.push('\n');
    adapter::write(path, text.as_bytes())
}
