//! Writes the files of a checkpoint with an adapter folded in: weights tensor by tensor, the
//! configuration, and what goes along unchanged.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use burn::tensor::DType;
use half::{bf16, f16};
use serde_json::{Map, Value, json};

use super::{Added, Change, Fold};
use crate::adapter_file;
use crate::architecture::TaskClass;
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::head::{CLASSIFIER_NAMES, HeadOptions, Problem};
use crate::keys::read_object;
use crate::weights::{TensorFile, float_name};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

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
    /// Writes every file of weights; returns the number of tensors.
    pub(super) fn write_weights(&self, out: &Path) -> Result<usize, ModelError> {
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
                let other_head = tolerated || canonical == "lm_head.weight";
                if classifier && other_head && change.is_none() {
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

    pub(super) fn write_config(&self, out: &Path, head: HeadOptions) -> Result<(), ModelError> {
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
}

/// Whether a tensor is that of a classification head.
fn is_head(name: &str) -> bool {
    CLASSIFIER_NAMES.iter().any(|head| {
        name.strip_prefix(head)
            .is_some_and(|rest| rest.starts_with('.'))
    })
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
pub(super) fn copy_others(from: &Path, out: &Path) -> Result<(), ModelError> {
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
    adapter_file::write(path, text.as_bytes())
}
