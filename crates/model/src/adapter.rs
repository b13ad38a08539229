//! Adapter folders: `adapter_config.json` and `adapter_model.safetensors` as PEFT has them, and
//! `calor.json` and `calor.safetensors` for what PEFT has no place for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::path::Path;

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::adapter_config::AdapterConfig;
use crate::architecture::TaskClass;
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::fusion::FusionOptions;
use crate::head::{self, HeadOptions, Pooling, Problem};
use crate::lora::{LoraOptions, Plan};
use crate::model::{Model, ModelOptions};
use crate::parameter::{ParameterGroup, ParameterVisitor};
use crate::weights::TensorFile;

const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
const OWN_WEIGHTS: &str = "calor.safetensors";
const OWN_CONFIG: &str = "calor.json";
/// Version of `calor.json`.
const OWN_FORMAT: u32 = 1;
/// PEFT stores the frozen output layer beside a pair on it.
const OUTPUT_WEIGHT: &str = "base_model.model.lm_head.base_layer.weight";
/// Keys of `adapter_model.safetensors` begin with this.
const PEFT_PREFIX: &str = "base_model.model.";

/// `calor.json`: what an adapter's head is, and what reads modality items.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct OwnConfig {
    format: u32,
    head: HeadOptions,
    #[serde(default, skip_serializing_if = "is_zero")]
    head_hidden: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fusion: Option<FusionOptions>,
}

/// What is 0 is not written, so that a head without a hidden layer reads as it always did.
fn is_zero(units: &usize) -> bool {
    *units == 0
}

impl Model {
    /// A checkpoint with an adapter on it, as its folder describes it: one of ours, or PEFT's.
    ///
    /// A sequence classifier of PEFT's does not say what its logits mean: one logit is taken for
    /// regression and several for classes, as Transformers does.
    ///
    /// Pretrained towers of modality items are read from where `calor.json` says they were in
    /// training; where they have moved, use [`Model::load`] and [`Model::load_adapter`].
    ///
    /// # Errors
    /// A folder that does not fit the checkpoint: every missing, unused or misshapen tensor is
    /// named.
    pub fn load_with_adapter(
        checkpoint: &Checkpoint,
        adapter_dir: &Path,
        dtype: FloatDType,
        device: &Device,
    ) -> Result<Model, ModelError> {
        let adapter = AdapterConfig::read(adapter_dir)?;
        let weights = TensorFile::open(&adapter_dir.join(WEIGHTS))?;
        let (head, head_hidden, fusion) = match read_own(adapter_dir)? {
            Some(own) => (own.head, own.head_hidden, own.fusion),
            None => (stored_head(&adapter, &weights, checkpoint)?, 0, None),
        };
        let options = ModelOptions {
            lora: adapter.lora.clone(),
            head,
            head_hidden,
            fusion,
            seed: 0,
            dtype,
        };
        let config = checkpoint.config();
        let class = head.class(config)?;
        if class != adapter.class {
            return Err(ModelError::Config {
                path: adapter.path,
                message: format!(
                    "`task_type` is {}, but {OWN_CONFIG} beside it describes another head",
                    adapter.class.peft_task_type()
                ),
            });
        }
        let mut modules_to_save = adapter.modules_to_save.clone();
        let has_pooler = checkpoint.has("pooler.dense.weight");
        for name in head::always_saved(class, config.model_type, has_pooler) {
            if !modules_to_save.contains(&name) {
                modules_to_save.push(name);
            }
        }
        let plan = plan_of(&adapter, class, checkpoint, head.labels())?;
        let mut model = Model::build(checkpoint, &options, class, plan, modules_to_save, device)?;
        model.read_adapter(adapter_dir, &weights)?;
        Ok(model)
    }

    /// Replaces everything trained by what an adapter folder holds.
    ///
    /// # Errors
    /// When the folder's adapter is another than the model's: other modules, ranks, scaling, head or
    /// streams of modality items; every missing, unused or misshapen tensor is named.
    pub fn load_adapter(&mut self, adapter_dir: &Path) -> Result<(), ModelError> {
        let adapter = AdapterConfig::read(adapter_dir)?;
        let differs = |message: String| ModelError::Config {
            path: adapter.path.clone(),
            message,
        };
        if adapter.class != self.class {
            return Err(differs(format!(
                "`task_type` is {}, the model's is {}",
                adapter.class.peft_task_type(),
                self.class.peft_task_type()
            )));
        }
        let modules = self
            .class
            .modules(self.config(), self.options.head.labels());
        let plan = match &adapter.lora {
            Some(lora) => lora.plan(self.class, &modules)?,
            None => Plan::new(),
        };
        for path in plan.keys().chain(self.plan.keys()) {
            let scaling = |plan: &Plan| plan.get(path).map(|pair| (pair.rank, pair.scaling));
            if scaling(&plan) != scaling(&self.plan) {
                return Err(differs(format!(
                    "rank and scaling of `{path}` are {:?}, the model's are {:?}",
                    scaling(&plan),
                    scaling(&self.plan)
                )));
            }
        }
        if let Some(own) = read_own(adapter_dir)? {
            if own.head != self.options.head {
                return Err(differs(format!(
                    "{OWN_CONFIG} beside it describes another head than the model's"
                )));
            }
            let same = match (&own.fusion, &self.options.fusion) {
                (Some(theirs), Some(ours)) => theirs.same_tensors(ours),
                (theirs, ours) => theirs == ours,
            };
            if !same {
                return Err(differs(format!(
                    "{OWN_CONFIG} beside it describes other streams of modality items than the \
                     model's"
                )));
            }
        }
        let weights = TensorFile::open(&adapter_dir.join(WEIGHTS))?;
        self.read_adapter(adapter_dir, &weights)
    }

    /// Writes everything trained to an adapter folder that PEFT loads; see the module's
    /// documentation for the files. Each file appears whole or not at all.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn save_adapter(
        &self,
        dir: &Path,
        base_model_name_or_path: &str,
    ) -> Result<(), ModelError> {
        let mut collected = Collect::default();
        self.clone().visit_trainable(&mut collected);
        let modules = self
            .class
            .modules(self.config(), self.options.head.labels());
        let config = AdapterConfig {
            lora: self.options.lora.clone(),
            base_model_name_or_path: Some(base_model_name_or_path.to_owned()),
            class: self.class,
            modules_to_save: self.modules_to_save.clone(),
            path: dir.join(CONFIG),
        };
        let config = config.write(&self.plan, &modules)?;
        if let Some(weight) = self.adapted_output_weight() {
            collected.insert(OUTPUT_WEIGHT, weight);
        }
        let (peft, own): (Vec<_>, Vec<_>) = collected
            .tensors
            .into_iter()
            .partition(|(name, _)| name.starts_with(PEFT_PREFIX));
        std::fs::create_dir_all(dir).map_err(ModelError::io(dir))?;
        write(&dir.join(WEIGHTS), &serialize(dir, peft)?)?;
        if self.options.head.labels() > 0 || self.options.fusion.is_some() {
            let config = OwnConfig {
                format: OWN_FORMAT,
                head: self.options.head,
                head_hidden: self.options.head_hidden,
                fusion: self.options.fusion.clone(),
            };
            let path = dir.join(OWN_CONFIG);
            let text =
                serde_json::to_string_pretty(&config).map_err(|source| ModelError::Json {
                    path: path.clone(),
                    source,
                })?;
            write(&path, text.as_bytes())?;
        }
        if !own.is_empty() {
            write(&dir.join(OWN_WEIGHTS), &serialize(dir, own)?)?;
        }
        // Last: a folder with a configuration is a complete one.
        write(&dir.join(CONFIG), config.as_bytes())
    }

    /// Checks every key of the folder, then takes the tensors.
    fn read_adapter(&mut self, dir: &Path, weights: &TensorFile) -> Result<(), ModelError> {
        let own = dir.join(OWN_WEIGHTS);
        let own = match own.exists() {
            true => Some(TensorFile::open(&own)?),
            false => None,
        };
        let mut expected = Collect::default();
        self.clone().visit_trainable(&mut expected);
        let output = self.adapted_output_weight();
        if let Some(weight) = output.clone()
            && weights.entry(OUTPUT_WEIGHT).is_some()
        {
            expected.insert(OUTPUT_WEIGHT, weight);
        }
        let mut used = BTreeSet::new();
        for (name, tensor) in &expected.tensors {
            let shape = tensor.shape.clone();
            let file = match name.starts_with(PEFT_PREFIX) {
                true => Some(weights),
                false => own.as_ref(),
            };
            let Some((file, entry)) = file.and_then(|file| Some((file, file.entry(name)?))) else {
                return Err(ModelError::MissingTensor {
                    path: dir.to_owned(),
                    tensor: name.clone(),
                    expected: shape,
                });
            };
            if entry.shape != shape {
                return Err(ModelError::Shape {
                    path: file.path().to_owned(),
                    tensor: name.clone(),
                    found: entry.shape.clone(),
                    expected: shape,
                });
            }
            used.insert(name.clone());
        }
        for file in [Some(weights), own.as_ref()].into_iter().flatten() {
            if let Some((name, _)) = file.entries().find(|(name, _)| !used.contains(*name)) {
                return Err(ModelError::UnusedTensor {
                    path: file.path().to_owned(),
                    tensor: name.to_owned(),
                });
            }
        }
        let mut values = BTreeMap::new();
        for name in used {
            let file = match name.starts_with(PEFT_PREFIX) {
                true => weights,
                false => own.as_ref().expect("its keys were found"),
            };
            let floats = file.floats(&name)?;
            values.insert(name, floats);
        }
        let device = self.device().clone();
        if let (Some(weight), Some(stored)) = (output, values.remove(OUTPUT_WEIGHT)) {
            let data = TensorData::new(stored, weight.shape());
            let stored = Tensor::<2>::from_data(data, (&device, DType::F32)).cast(weight.dtype());
            if stored.to_data() != weight.to_data() {
                self.set_output_weight(stored);
            }
        }
        self.visit_trainable(&mut Assign { values, device });
        Ok(())
    }
}

/// Which pairs a stored adapter holds.
fn plan_of(
    adapter: &AdapterConfig,
    class: TaskClass,
    checkpoint: &Checkpoint,
    labels: usize,
) -> Result<Plan, ModelError> {
    let config = checkpoint.config();
    let modules = class.modules(config, labels);
    match &adapter.lora {
        None => Ok(Plan::new()),
        Some(lora) => LoraOptions {
            modules_to_save: adapter.modules_to_save.clone(),
            ..lora.clone()
        }
        .plan(class, &modules),
    }
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
            labels: stored_labels(weights)?,
        }),
        TaskClass::SequenceClassifier => {
            let labels = stored_labels(weights)?;
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
fn stored_labels(weights: &TensorFile) -> Result<usize, ModelError> {
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

fn read_own(dir: &Path) -> Result<Option<OwnConfig>, ModelError> {
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

/// A tensor on the host.
#[derive(Debug)]
struct HostTensor {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Collect {
    tensors: BTreeMap<String, HostTensor>,
}

impl ParameterVisitor for Collect {
    fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
        self.insert(name, tensor.clone().inner());
    }
}

impl Collect {
    fn insert<const D: usize>(&mut self, name: &str, tensor: Tensor<D>) {
        let data = tensor.into_data_dtype(DType::F32);
        self.tensors.insert(
            name.to_owned(),
            HostTensor {
                shape: data.shape().to_vec(),
                bytes: data.bytes().to_vec(),
            },
        );
    }
}

struct Assign {
    values: BTreeMap<String, Vec<f32>>,
    device: Device,
}

impl ParameterVisitor for Assign {
    fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
        let values = self.values.remove(name).expect("every key was checked");
        let data = TensorData::new(values, tensor.shape());
        *tensor = Tensor::<D>::from_data(data, (&self.device, DType::F32))
            .autodiff()
            .require_grad();
    }
}

fn serialize(dir: &Path, tensors: Vec<(String, HostTensor)>) -> Result<Vec<u8>, ModelError> {
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
fn write(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
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
