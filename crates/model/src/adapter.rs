//! Adapter folders: `adapter_config.json` and `adapter_model.safetensors` as PEFT has them, and
//! `calor.json` and `calor.safetensors` for what PEFT has no place for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::adapter_config::AdapterConfig;
use crate::adapter_file::{
    CONFIG, Collect, OWN_CONFIG, OWN_FORMAT, OWN_WEIGHTS, OwnConfig, PEFT_PREFIX, WEIGHTS, head_of,
    read_own, serialize, unread, write,
};
use crate::architecture::TaskClass;
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::head;
use crate::lora::{LoraOptions, Plan};
use crate::model::{FrozenWeights, Model, ModelOptions};
use crate::parameter::{ParameterGroup, ParameterVisitor, peft_key};
use crate::pissa::Starts;
use crate::weights::TensorFile;

/// PEFT stores the frozen output layer beside a pair on it.
const OUTPUT_WEIGHT: &str = "base_model.model.lm_head.base_layer.weight";
/// The same beside a pair on a decoder's token embedding. Of encoders' PEFT does not store it.
const EMBEDDING_NAME: &str = "embed_tokens";

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
        frozen: impl Into<FrozenWeights>,
        device: &Device,
    ) -> Result<Model, ModelError> {
        let frozen = frozen.into();
        let adapter = AdapterConfig::read(adapter_dir)?;
        let weights = TensorFile::open(&adapter_dir.join(WEIGHTS))?;
        let head = head_of(adapter_dir, &adapter, &weights, checkpoint)?;
        let (head_hidden, fusion) = match read_own(adapter_dir)? {
            Some(own) => (own.head_hidden, own.fusion),
            None => (0, None),
        };
        let options = ModelOptions {
            lora: adapter.lora.clone(),
            head,
            head_hidden,
            fusion,
            seed: 0,
            dtype: frozen.dtype,
            quantization: frozen.quantization,
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
        for name in head::always_saved(class, checkpoint) {
            if !modules_to_save.contains(&name) {
                modules_to_save.push(name);
            }
        }
        let plan = plan_of(&adapter, class, checkpoint, head.labels())?;
        let mut model = Model::build(
            checkpoint,
            &options,
            class,
            plan,
            modules_to_save,
            None,
            device,
        )?;
        // One of PEFT's that was not converted holds the pairs alone, for weights without them.
        model.read_adapter(adapter_dir, &weights, &Starts::default())?;
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
        let (_, ours) = self.saved_lora();
        for path in plan.keys().chain(ours.keys()) {
            let scaling = |plan: &Plan| plan.get(path).map(|pair| (pair.rank, pair.scaling));
            if scaling(&plan) != scaling(&ours) {
                return Err(differs(format!(
                    "rank and scaling of `{path}` are {:?}, the model's are {:?}",
                    scaling(&plan),
                    scaling(&ours)
                )));
            }
        }
        let tokens = |lora: &Option<LoraOptions>| {
            lora.as_ref()
                .map_or_else(Vec::new, |lora| lora.trained_tokens.clone())
        };
        if tokens(&adapter.lora) != tokens(&self.options.lora) {
            return Err(differs(
                "`trainable_token_indices` are other tokens than the model's".to_owned(),
            ));
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
        let starts = Starts::of(self);
        self.read_adapter(adapter_dir, &weights, &starts)
    }

    /// What the adapter is saved as; see [`LoraOptions::saved`].
    fn saved_lora(&self) -> (Option<LoraOptions>, Plan) {
        match &self.options.lora {
            Some(lora) => {
                let (lora, plan) = lora.saved(&self.plan);
                (Some(lora), plan)
            }
            None => (None, Plan::new()),
        }
    }

    /// Writes everything trained to an adapter folder that PEFT loads; see the module's
    /// documentation for the files. Each file appears whole or not at all.
    ///
    /// Pairs that started from singular vectors are written with twice their rank, for the weights
    /// as they were pretrained.
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
        Starts::of(self).join(&mut collected);
        let modules = self
            .class
            .modules(self.config(), self.options.head.labels());
        let (lora, plan) = self.saved_lora();
        let config = AdapterConfig {
            lora,
            base_model_name_or_path: Some(base_model_name_or_path.to_owned()),
            class: self.class,
            modules_to_save: self.modules_to_save.clone(),
            path: dir.join(CONFIG),
        };
        let config = config.write(&plan, &modules)?;
        if let Some(weight) = self.adapted_output_weight() {
            collected.insert(OUTPUT_WEIGHT, weight);
        }
        if let Some((name, weight)) = self.adapted_embedding() {
            collected.insert(&name, weight);
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

    /// The frozen weight of a token embedding with a pair, where PEFT stores it, and its key.
    fn adapted_embedding(&self) -> Option<(String, Tensor<2>)> {
        let embedding = self.token_embedding();
        let stem = embedding.weight.name.strip_suffix(".weight")?;
        (embedding.pair.is_some() && stem.ends_with(EMBEDDING_NAME)).then(|| {
            let name = peft_key(&format!("{stem}.base_layer.weight"));
            (name, embedding.weight.tensor.clone().inner())
        })
    }

    /// Checks every key of the folder, then takes the tensors.
    fn read_adapter(
        &mut self,
        dir: &Path,
        weights: &TensorFile,
        starts: &Starts,
    ) -> Result<(), ModelError> {
        let own = dir.join(OWN_WEIGHTS);
        let own = match own.exists() {
            true => Some(TensorFile::open(&own)?),
            false => None,
        };
        let mut expected = Collect::default();
        self.clone().visit_trainable(&mut expected);
        starts.join(&mut expected);
        let output = self.adapted_output_weight();
        if let Some(weight) = output.clone()
            && weights.entry(OUTPUT_WEIGHT).is_some()
        {
            expected.insert(OUTPUT_WEIGHT, weight);
        }
        let embedding = self
            .adapted_embedding()
            .filter(|(name, _)| weights.entry(name).is_some());
        if let Some((name, weight)) = embedding.clone() {
            expected.insert(&name, weight);
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
            let lora = self.options.lora.as_ref();
            let unread = |name: &str| lora.is_some_and(|lora| unread(lora, name));
            if let Some((name, _)) = file
                .entries()
                .find(|(name, _)| !used.contains(*name) && !unread(name))
            {
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
            let floats = starts.split(file, &name, file.floats(&name)?)?;
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
        if let Some((name, weight)) = embedding
            && let Some(stored) = values.remove(&name)
        {
            let data = TensorData::new(stored, weight.shape());
            let stored = Tensor::<2>::from_data(data, (&device, DType::F32)).cast(weight.dtype());
            self.token_embedding_mut().weight.tensor = stored;
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
