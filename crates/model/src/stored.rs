//! The tensors of a checkpoint folder, in one file or in shards, under the names the model gives
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor};
use serde_json::Value;

use crate::error::ModelError;
use crate::keys::read_object;
use crate::weights::TensorFile;

/// Opened files of weights: headers are checked, no tensor has been read.
#[derive(Debug)]
pub(crate) struct Stored {
    path: PathBuf,
    files: Vec<TensorFile>,
    /// The model's name → file, and the name in it.
    tensors: BTreeMap<String, (usize, String)>,
}

impl Stored {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    /// `rename` turns a stored name into the model's.
    ///
    /// # Errors
    /// Missing files, a wrong header or index, and two stored tensors for one name of the model.
    pub fn open(dir: &Path, rename: impl Fn(&str) -> String) -> Result<Stored, ModelError> {
        let files = open_files(dir)?;
        let mut tensors = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for (stored, _) in file.entries() {
                let previous = tensors.insert(rename(stored), (index, stored.to_owned()));
                if let Some((_, previous)) = previous {
                    return Err(ModelError::Tensor {
                        path: file.path().to_owned(),
                        tensor: stored.to_owned(),
                        message: format!("is stored twice, also as `{previous}`"),
                    });
                }
            }
        }
        Ok(Stored {
            path: dir.to_owned(),
            files,
            tensors,
        })
    }

    /// The first of `prefixes` that a stored name begins with, or nothing.
    pub fn prefix(&self, prefixes: &[&'static str]) -> &'static str {
        prefixes
            .iter()
            .copied()
            .find(|prefix| {
                let mut stored = self.tensors.values().map(|(_, stored)| stored);
                stored.any(|stored| stored.starts_with(prefix))
            })
            .unwrap_or("")
    }

    /// The stored names of the tensors that are not `used`.
    ///
    /// # Errors
    /// One of them is not `tolerated`, by its name in the model.
    pub fn unused(
        &self,
        used: &BTreeSet<String>,
        tolerated: impl Fn(&str) -> bool,
    ) -> Result<Vec<String>, ModelError> {
        let mut unused = Vec::new();
        for (name, (file, stored)) in &self.tensors {
            if used.contains(name) {
                continue;
            }
            if !tolerated(name) {
                return Err(ModelError::UnusedTensor {
                    path: self.files[*file].path().to_owned(),
                    tensor: stored.clone(),
                });
            }
            unused.push(stored.clone());
        }
        Ok(unused)
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        let (file, stored) = self.tensors.get(name)?;
        self.files[*file]
            .entry(stored)
            .map(|entry| entry.shape.as_slice())
    }

    /// The type a tensor is stored in, if it is one that weights have.
    pub fn dtype(&self, name: &str) -> Option<DType> {
        let (file, stored) = self.tensors.get(name)?;
        self.files[*file].entry(stored)?.float()
    }

    /// Whether a tensor is there.
    ///
    /// # Errors
    /// It is, but with another shape, or not in a type that weights have.
    pub fn check(&self, name: &str, expected: &[usize]) -> Result<bool, ModelError> {
        let Some((file, stored)) = self.tensors.get(name) else {
            return Ok(false);
        };
        let file = &self.files[*file];
        let entry = file.entry(stored).expect("listed from this file");
        if entry.shape != expected {
            return Err(ModelError::Shape {
                path: file.path().to_owned(),
                tensor: stored.clone(),
                found: entry.shape.clone(),
                expected: expected.to_vec(),
            });
        }
        if entry.float().is_none() {
            return Err(ModelError::Tensor {
                path: file.path().to_owned(),
                tensor: stored.clone(),
                message: format!("is {}; weights have to be F32, F16 or BF16", entry.dtype),
            });
        }
        Ok(true)
    }

    /// Checks that a tensor is there with this type, as the header spells it, and shape.
    ///
    /// # Errors
    /// It is not.
    pub fn expect(&self, name: &str, dtype: &str, shape: &[usize]) -> Result<(), ModelError> {
        let (file, stored) = self.find(name, shape)?;
        let entry = file.entry(stored).expect("listed from this file");
        if entry.dtype != dtype || entry.shape != shape {
            return Err(self.wrong(
                name,
                format!(
                    "is {} {:?}, {dtype} {shape:?} is expected",
                    entry.dtype, entry.shape
                ),
            ));
        }
        Ok(())
    }

    /// Bytes of a tensor in its file.
    pub fn byte_length(&self, name: &str) -> Result<usize, ModelError> {
        let (file, stored) = self.find(name, &[])?;
        Ok(file.entry(stored).map_or(0, |entry| entry.byte_length()))
    }

    /// A tensor's bytes, whatever its type.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        let (file, stored) = self.find(name, &[])?;
        file.raw(stored)
    }

    /// What is wrong with a tensor, under its name in its file.
    pub fn wrong(&self, name: &str, message: impl Into<String>) -> ModelError {
        let (path, stored) = match self.tensors.get(name) {
            Some((file, stored)) => (self.files[*file].path(), stored.as_str()),
            None => (self.path.as_path(), name),
        };
        ModelError::Tensor {
            path: path.to_owned(),
            tensor: stored.to_owned(),
            message: message.into(),
        }
    }

    fn find(&self, name: &str, expected: &[usize]) -> Result<(&TensorFile, &str), ModelError> {
        match self.tensors.get(name) {
            Some((file, stored)) => Ok((&self.files[*file], stored)),
            None => Err(ModelError::MissingTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
                expected: expected.to_vec(),
            }),
        }
    }

    /// Whether two tensors are equal; `None` where one is missing.
    pub fn same(&self, name: &str, other: &str) -> Result<Option<bool>, ModelError> {
        match (self.tensors.get(name), self.tensors.get(other)) {
            (Some((file, stored)), Some((other_file, other))) => self.files[*file]
                .same(stored, &self.files[*other_file], other)
                .map(Some),
            _ => Ok(None),
        }
    }

    /// The files of weights, in the order of their names.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// A tensor's values in f32.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        match self.tensors.get(name) {
            Some((file, stored)) => self.files[*file].floats(stored),
            None => Err(ModelError::MissingTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
                expected: Vec::new(),
            }),
        }
    }

    /// The type with the fewest bits that weights are stored in.
    pub fn narrowest_dtype(&self) -> DType {
        let types = self.float_types();
        let narrow = [DType::BF16, DType::F16];
        narrow
            .into_iter()
            .find(|dtype| types.contains_key(&format!("{dtype:?}")))
            .unwrap_or(DType::F32)
    }

    /// The type that most weights are stored in.
    pub fn common_dtype(&self) -> DType {
        self.float_types()
            .into_values()
            .max_by_key(|(count, _)| *count)
            .map_or(DType::F32, |(_, dtype)| dtype)
    }

    /// How many weights there are of each type, by its name.
    fn float_types(&self) -> BTreeMap<String, (usize, DType)> {
        let mut types = BTreeMap::new();
        for file in &self.files {
            for dtype in file.entries().filter_map(|(_, entry)| entry.float()) {
                types.entry(format!("{dtype:?}")).or_insert((0, dtype)).0 += 1;
            }
        }
        types
    }

    /// Reads a tensor.
    pub fn tensor<const D: usize>(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor<D>, ModelError> {
        let (file, stored) = self.find(name, &[])?;
        file.tensor(stored, dtype, device)
    }
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
    let index = read_object(&index_path)?;
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
