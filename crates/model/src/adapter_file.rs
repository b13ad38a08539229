//! The files of an adapter folder: their names and keys, what `calor.json` holds, and tensors on the
//! host on their way in and out.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

use burn::tensor::{DType, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::adapter_config::AdapterConfig;
use crate::architecture::TaskClass;
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::fusion::FusionOptions;
use crate::head::{HeadOptions, Pooling, Problem};
use crate::lora::{BiasMode, LoraOptions};
use crate::parameter::{ParameterGroup, ParameterVisitor, peft_key};
use crate::weights::TensorFile;

pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";
pub(crate) const CONFIG: &str = "adapter_config.json";
pub(crate) const OWN_WEIGHTS: &str = "calor.safetensors";
pub(crate) const OWN_CONFIG: &str = "calor.json";
/// Version of `calor.json`.
pub(crate) const OWN_FORMAT: u32 = 1;
/// What PEFT stores with `bias = "all"` and nothing reads: the biases of a head before training, and
/// those of the trained one a second time, under the names of its wrapper.
const UNREAD: [&str; 2] = [".original_module.bias", ".modules_to_save.bias"];
/// Likewise of an encoder without a head: the pooler, which is not run.
const UNREAD_POOLER: &str = "base_model.model.pooler.dense.bias";
/// Keys of `adapter_model.safetensors` begin with this.
pub(crate) const PEFT_PREFIX: &str = "base_model.model.";

/// `calor.json`: what an adapter's head is, and what reads modality items.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct OwnConfig {
    pub format: u32,
    pub head: HeadOptions,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub head_hidden: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fusion: Option<FusionOptions>,
}

/// What is 0 is not written, so that a head without a hidden layer reads as it always did.
fn is_zero(units: &usize) -> bool {
    *units == 0
}

/// Whether a tensor is one that PEFT stores and nothing reads.
pub(crate) fn unread(lora: &LoraOptions, name: &str) -> bool {
    lora.bias == BiasMode::All
        && (UNREAD.iter().any(|end| name.ends_with(end)) || name == UNREAD_POOLER)
}

/// Keys of a module's pair, `A` first: those of an embedding where the file has them.
pub(crate) fn pair_names(file: &TensorFile, path: &str) -> [String; 2] {
    let names = |ends: [&str; 2]| ends.map(|end| peft_key(&format!("{path}.{end}")));
    let embedding = names(["lora_embedding_A", "lora_embedding_B"]);
    match file.entry(&embedding[0]) {
        Some(_) => embedding,
        None => names(["lora_A.weight", "lora_B.weight"]),
    }
}

/// What an adapter's model predicts.
pub(crate) fn head_of(
    dir: &Path,
    adapter: &AdapterConfig,
    weights: &TensorFile,
    checkpoint: &Checkpoint,
) -> Result<HeadOptions, ModelError> {
    match read_own(dir)? {
        Some(own) => Ok(own.head),
        None => stored_head(adapter, weights, checkpoint),
    }
}

/// How many logits the class's own head has that is stored with an adapter; 0 without one.
pub(crate) fn stored_labels(
    adapter: &AdapterConfig,
    weights: &TensorFile,
    checkpoint: &Checkpoint,
) -> Result<usize, ModelError> {
    stored_head(adapter, weights, checkpoint).map(|head| head.labels())
}

/// Whether an adapter has parts that make soft tokens of modality items.
pub(crate) fn has_soft_tokens(dir: &Path) -> Result<bool, ModelError> {
    Ok(read_own(dir)?.is_some_and(|own| own.fusion.is_some()))
}

/// The head of an adapter that has no `calor.json`.
fn stored_head(
    adapter: &AdapterConfig,
    weights: &TensorFile,
    checkpoint: &Checkpoint,
) -> Result<HeadOptions, ModelError> {
    match adapter.class {
        TaskClass::Backbone => Ok(HeadOptions::None),
        TaskClass::CausalLm => Ok(HeadOptions::CausalLm),
        TaskClass::TokenClassifier => Ok(HeadOptions::TokenClassifier {
            labels: head_rows(weights)?,
        }),
        TaskClass::SequenceClassifier => {
            let labels = head_rows(weights)?;
            Ok(HeadOptions::Classifier {
                labels,
                pooling: Pooling::default_for(checkpoint.config().family()),
                problem: match labels {
                    1 => Problem::Regression,
                    _ => Problem::Multiclass,
                },
            })
        }
    }
}

/// Rows of the stored head's last layer.
fn head_rows(weights: &TensorFile) -> Result<usize, ModelError> {
    let names = ["score", "classifier", "classifier.out_proj"];
    names
        .iter()
        .find_map(|name| weights.entry(&format!("{PEFT_PREFIX}{name}.weight")))
        .and_then(|entry| entry.shape.first().copied())
        .ok_or_else(|| ModelError::MissingTensor {
            path: weights.path().to_owned(),
            tensor: format!("{PEFT_PREFIX}(score|classifier).weight"),
            expected: Vec::new(),
        })
}

pub(crate) fn read_own(dir: &Path) -> Result<Option<OwnConfig>, ModelError> {
    let path = dir.join(OWN_CONFIG);
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(&path).map_err(ModelError::io(&path))?;
    let own: OwnConfig = serde_json::from_str(&text).map_err(|source| ModelError::Json {
        path: path.clone(),
        source,
    })?;
    if own.format != OWN_FORMAT {
        return Err(ModelError::Unsupported {
            path,
            key: "format".to_owned(),
            value: own.format.to_string(),
            supported: format!("this version reads {OWN_FORMAT}"),
        });
    }
    Ok(Some(own))
}

/// A tensor of f32 on the host.
#[derive(Debug)]
pub(crate) struct HostTensor {
    pub shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl HostTensor {
    pub fn new(shape: Vec<usize>, values: &[f32]) -> HostTensor {
        HostTensor {
            shape,
            bytes: values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        }
    }

    pub fn of<const D: usize>(tensor: Tensor<D>) -> HostTensor {
        let data = tensor.into_data_dtype(DType::F32);
        HostTensor {
            shape: data.shape().to_vec(),
            bytes: data.bytes().to_vec(),
        }
    }

    pub fn values(&self) -> Vec<f32> {
        self.bytes
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().expect("4 bytes")))
            .collect()
    }
}

#[derive(Default)]
pub(crate) struct Collect {
    pub tensors: BTreeMap<String, HostTensor>,
}

impl ParameterVisitor for Collect {
    fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
        self.insert(name, tensor.clone().inner());
    }
}

impl Collect {
    pub fn insert<const D: usize>(&mut self, name: &str, tensor: Tensor<D>) {
        self.tensors.insert(name.to_owned(), HostTensor::of(tensor));
    }
}

pub(crate) fn serialize(
    dir: &Path,
    tensors: Vec<(String, HostTensor)>,
) -> Result<Vec<u8>, ModelError> {
    let views: Vec<(&str, TensorView)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let view = TensorView::new(Dtype::F32, tensor.shape.clone(), &tensor.bytes)
                .expect("the bytes are those of the shape");
            (name.as_str(), view)
        })
        .collect();
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata)).map_err(|error| ModelError::Header {
        path: dir.join(WEIGHTS),
        message: error.to_string(),
    })
}

/// Writes under a temporary name in the same folder, then renames.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    let name = path
        .file_name()
        .expect("a file of an adapter folder")
        .to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let written = (|| {
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    })();
    if written.is_err() {
        // Best effort: the error that matters is the one above.
        let _ = std::fs::remove_file(&temporary);
    }
    written.map_err(ModelError::io(path))
}
