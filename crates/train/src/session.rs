//! What training, evaluation and prediction have in common: a checkpoint, a task and the
//! model made from both.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor};
use calor_meter::{FlopModel, Meter, PeakFlops, Precision};
use calor_model::{
    Checkpoint, Family, FrozenWeights, FusionOptions, HeadOptions, LoraOptions, Model, ModelConfig,
    ModelError, ModelOptions, Patterned, Patterns, Pooling, Problem, Quantization, Targets,
};
use calor_sequence::PatientTokenizer;

use crate::TrainError;
use crate::artifacts::report::{FileHash, Provenance};
use crate::data::{Data, TASK_FILE, TaskFile};
use crate::device::{DeviceSpec, describe, describe_with_products, synchronise};
use crate::files::{hash_file, read_json, write_folder, write_json};
use crate::recipe::{
    AdapterKind, AdapterSection, Dtype, ModelSection, PoolingChoice, QuantizationChoice, Recipe,
    TargetChoice, TaskKind, TokenChoice,
};
use crate::seed::derive;

/// How a run is started.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The recipe, resolved.
    pub recipe: Recipe,
    /// The checkpoint's folder, which `recipe.model.id` names.
    pub checkpoint: PathBuf,
    /// The run's folder.
    pub out: PathBuf,
    /// Where prepared sequences are kept between runs.
    pub cache: PathBuf,
    /// Where the run computes.
    pub device: DeviceSpec,
    /// Whether to go on with what the folder holds.
    pub resume: bool,
}

/// The head that a task needs.
pub(crate) fn head(
    kind: TaskKind,
    classes: usize,
    pooling: PoolingChoice,
    family: Family,
) -> HeadOptions {
    let (labels, problem) = match kind {
        TaskKind::Binary => (1, Problem::Binary),
        TaskKind::Multiclass => (classes, Problem::Multiclass),
        TaskKind::Multilabel => (classes, Problem::Multilabel),
        TaskKind::Regression => (1, Problem::Regression),
        TaskKind::Tokens => return HeadOptions::TokenClassifier { labels: classes },
        TaskKind::CausalLm => return HeadOptions::CausalLm,
    };
    let pooling = match (pooling, family) {
        (PoolingChoice::Auto, Family::Decoder) | (PoolingChoice::Last, _) => Pooling::Last,
        (PoolingChoice::Auto, Family::Encoder) | (PoolingChoice::Mean, _) => Pooling::Mean,
        (PoolingChoice::Cls, _) => Pooling::Cls,
    };
    HeadOptions::Classifier {
        labels,
        pooling,
        problem,
    }
}

/// As `config.json` spells it.
pub(crate) fn model_type_name(config: &ModelConfig) -> String {
    match serde_json::to_value(config.model_type()) {
        Ok(serde_json::Value::String(name)) => name,
        _ => format!("{:?}", config.model_type()),
    }
}

/// As recipes spell it.
pub(crate) fn pooling_name(head: &HeadOptions) -> &'static str {
    match head {
        HeadOptions::Classifier {
            pooling: Pooling::Last,
            ..
        } => "last",
        HeadOptions::Classifier {
            pooling: Pooling::Cls,
            ..
        } => "cls",
        HeadOptions::Classifier {
            pooling: Pooling::Mean,
            ..
        } => "mean",
        HeadOptions::None | HeadOptions::CausalLm | HeadOptions::TokenClassifier { .. } => "none",
    }
}

/// The adapter that a recipe asks for, without the tokens it trains: whoever names them by their text
/// needs the tokenizer.
pub fn lora_options(adapter: &AdapterSection) -> Option<LoraOptions> {
    if adapter.kind == AdapterKind::None {
        return None;
    }
    let targets = match &adapter.targets {
        TargetChoice::One(name) if name.eq_ignore_ascii_case("all-linear") => Targets::AllLinear,
        TargetChoice::One(pattern) => Targets::Regex(pattern.clone()),
        TargetChoice::Many(names) => Targets::List(names.clone()),
    };
    let exclude = match &adapter.exclude {
        TargetChoice::Many(names) if names.is_empty() => None,
        TargetChoice::Many(names) => Some(Patterns::List(names.clone())),
        TargetChoice::One(pattern) => Some(Patterns::Regex(pattern.clone())),
    };
    Some(LoraOptions {
        r: adapter.r,
        alpha: adapter.alpha,
        dropout: adapter.dropout,
        targets,
        exclude,
        rank_pattern: Patterned(adapter.rank_pattern.clone()),
        alpha_pattern: Patterned(adapter.alpha_pattern.clone()),
        modules_to_save: adapter.modules_to_save.clone(),
        use_rslora: adapter.use_rslora,
        layers_to_transform: adapter.layers_to_transform.clone(),
        layers_pattern: adapter.layers_pattern.clone(),
        bias: adapter.bias,
        use_dora: adapter.use_dora,
        init: adapter.init,
        trained_tokens: Vec::new(),
    })
}

/// The tokens whose embeddings a recipe trains, by the tokenizer of the checkpoint.
fn trained_tokens(adapter: &AdapterSection, checkpoint: &Path) -> Result<Vec<u32>, TrainError> {
    let named = |token: &TokenChoice| matches!(token, TokenChoice::Text(_));
    let tokenizer = match adapter.trained_tokens.iter().any(named) {
        true => Some(PatientTokenizer::open(checkpoint)?),
        false => None,
    };
    let number = |token: &TokenChoice| match (token, &tokenizer) {
        (TokenChoice::Text(text), Some(tokenizer)) => tokenizer.token(text).ok_or_else(|| {
            TrainError::Model(ModelError::Options {
                message: format!(
                    "`adapter.trained_tokens` names `{text}`, which is no token of {}: write it \
                         as it stands in the vocabulary, or give its number",
                    tokenizer.path().display()
                ),
            })
        }),
        (TokenChoice::Number(number), _) => Ok(*number),
        (TokenChoice::Text(_), None) => unreachable!("the tokenizer was opened for it"),
    };
    adapter.trained_tokens.iter().map(number).collect()
}

pub(crate) fn float_dtype(dtype: Dtype) -> FloatDType {
    match dtype {
        Dtype::F32 => FloatDType::F32,
        Dtype::Bf16 => FloatDType::BF16,
        Dtype::F16 => FloatDType::F16,
    }
}

/// How the recipe has the frozen weights kept.
pub fn frozen_weights(model: &ModelSection) -> FrozenWeights {
    FrozenWeights {
        dtype: float_dtype(model.dtype),
        quantization: match model.quantization {
            QuantizationChoice::None => None,
            QuantizationChoice::Int8 => Some(Quantization::Int8),
            QuantizationChoice::Nf4 => Some(Quantization::Nf4 {
                double: model.double_quantization,
            }),
        },
    }
}

/// As recipes spell it.
pub(crate) fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "f32",
        Dtype::Bf16 => "bf16",
        Dtype::F16 => "f16",
    }
}

/// What the recipe makes of a checkpoint.
pub(crate) fn model_options(
    recipe: &Recipe,
    checkpoint: &Checkpoint,
    classes: usize,
    fusion: Option<FusionOptions>,
) -> Result<ModelOptions, TrainError> {
    let mut lora = lora_options(&recipe.adapter);
    if let Some(lora) = &mut lora {
        lora.trained_tokens = trained_tokens(&recipe.adapter, checkpoint.path())?;
    }
    let frozen = frozen_weights(&recipe.model);
    Ok(ModelOptions {
        lora,
        head: head(
            recipe.task.kind,
            classes,
            recipe.task.pooling,
            checkpoint.config().family(),
        ),
        head_hidden: recipe.task.hidden,
        fusion,
        seed: derive(recipe.train.seed, "new weights", &[]),
        dtype: frozen.dtype,
        quantization: frozen.quantization,
    })
}

/// Opens the device of a run and sees whether it computes in the recipe's type.
pub(crate) fn open_device(spec: DeviceSpec, dtype: Dtype) -> Result<Device, TrainError> {
    let device = spec.open()?;
    if !device.supports_dtype(DType::from(float_dtype(dtype))) {
        return Err(TrainError::Device {
            device: spec.to_string(),
            problem: format!(
                "does not compute in {}; set `model.dtype` to \"f32\"",
                dtype_name(dtype)
            ),
        });
    }
    Ok(device)
}

/// Tells the meter the most memory that the device's allocator has held.
pub(crate) fn record_device_memory(meter: &mut Meter, spec: DeviceSpec, device: &Device) {
    if spec.is_asynchronous()
        && let Some(usage) = device.memory_pool_usage()
    {
        meter.record_device_peak(
            usage.bytes_reserved,
            "bytes that the allocator has reserved",
        );
    }
}

/// What does not fit between the sequences and the checkpoint, in words.
pub(crate) fn misfit(recipe: &Recipe, checkpoint: &Checkpoint, data: &Data) -> Option<String> {
    let config = checkpoint.config();
    if let Some(limit) = config.position_limit()
        && recipe.sequence.max_tokens > limit
    {
        return Some(format!(
            "`sequence.max_tokens` is {}, and the checkpoint has positions for {limit}; lower it",
            recipe.sequence.max_tokens
        ));
    }
    if data.vocab_size > config.vocab_size() {
        return Some(format!(
            "the tokenizer has {} tokens, and the checkpoint embeds {}; tokenizer.json and model.safetensors are of different checkpoints",
            data.vocab_size,
            config.vocab_size()
        ));
    }
    None
}

/// Writes the adapter as PEFT does, and `task.json` beside it, as a whole.
pub(crate) fn save_adapter(
    model: &Model,
    task: &TaskFile,
    base: &str,
    folder: &Path,
) -> Result<(), TrainError> {
    write_folder(folder, |folder| fill_adapter(model, task, base, folder))
}

/// As [`save_adapter`], into a folder that becomes visible later.
pub(crate) fn fill_adapter(
    model: &Model,
    task: &TaskFile,
    base: &str,
    folder: &Path,
) -> Result<(), TrainError> {
    model.save_adapter(folder, base)?;
    write_json(&folder.join(TASK_FILE), task)
}

/// Reads `task.json` of an adapter.
pub(crate) fn read_task(adapter: &Path) -> Result<TaskFile, TrainError> {
    let path = adapter.join(TASK_FILE);
    let task: TaskFile = read_json(&path)?;
    if task.format != crate::data::TASK_FORMAT {
        return Err(TrainError::Corrupt {
            path,
            problem: format!(
                "has format {}, and this version reads {}",
                task.format,
                crate::data::TASK_FORMAT
            ),
        });
    }
    Ok(task)
}

/// Tells the meter what a token costs and what the device could do.
pub(crate) fn describe_work(
    meter: &mut Meter,
    model: &Model,
    spec: DeviceSpec,
    dtype: Dtype,
) -> Result<(), TrainError> {
    describe_model(meter, model, spec);
    meter.set_peak(peak_flops(model.device(), spec, dtype, &QUICK_PRODUCT)?);
    Ok(())
}

/// Tells the meter what a token costs.
pub(crate) fn describe_model(meter: &mut Meter, model: &Model, spec: DeviceSpec) {
    let size = model.size();
    meter.set_flop_model(FlopModel {
        base_parameters: size.base_parameters,
        adapter_parameters: size.adapter_parameters + size.head_parameters,
        layers: size.layers,
        attention_width: size.attention_width,
        causal: size.causal,
        window: None,
        base_trained: false,
        recomputed_share: model.recomputed_share(),
    });
    if size.encoder_parameters + size.tower_parameters > 0 {
        meter.note("MFU counts the operations of the backbone alone: those of modality encoders and towers come on top.");
    }
    if spec.is_asynchronous() {
        meter.note("The device works while the host goes on: the time of a phase is until the host went on, and the wait for the device counts as backward.");
    }
}

/// What the device could do at most: what its data sheet states, or else the fastest of products with
/// these sides.
pub(crate) fn peak_flops(
    device: &Device,
    spec: DeviceSpec,
    dtype: Dtype,
    sides: &[usize],
) -> Result<PeakFlops, TrainError> {
    let precision = match dtype {
        Dtype::F32 => Precision::F32,
        Dtype::Bf16 | Dtype::F16 => Precision::Half,
    };
    let stated = match spec.is_asynchronous() {
        true => PeakFlops::of_gpu(&describe(device), precision),
        false => None,
    };
    match stated {
        Some(peak) => Ok(peak),
        None => fastest_product(device, dtype, sides),
    }
}

/// Sides of products that a run's start can wait for.
pub(crate) const QUICK_PRODUCT: [usize; 1] = [1024];
/// Sides of products that show what a device can do, up to where a product takes long enough.
pub(crate) const LARGE_PRODUCTS: [usize; 4] = [1024, 2048, 4096, 8192];

/// The fastest of a few products of square matrices, ever larger ones until one of them takes a
/// twentieth of a second.
pub(crate) fn fastest_product(
    device: &Device,
    dtype: Dtype,
    sides: &[usize],
) -> Result<PeakFlops, TrainError> {
    const LONG_S: f64 = 0.05;
    let (mut fastest, mut fastest_side) = (0.0, 0);
    for &side in sides {
        let matrix = || {
            Tensor::<2>::random([side, side], Distribution::Uniform(-1.0, 1.0), device)
                .cast(DType::from(float_dtype(dtype)))
        };
        let (left, right) = (matrix(), matrix());
        let mut best_s = f64::INFINITY;
        for _ in 0..4 {
            synchronise(device, "measuring the peak")?;
            let started = std::time::Instant::now();
            let product = calor_kernels::matmul(left.clone(), right.clone());
            synchronise(device, "measuring the peak")?;
            best_s = best_s.min(started.elapsed().as_secs_f64());
            drop(product);
        }
        let flops_per_s = 2.0 * (side as f64).powi(3) / best_s.max(1e-9);
        if flops_per_s > fastest {
            (fastest, fastest_side) = (flops_per_s, side);
        }
        if best_s > LONG_S {
            break;
        }
    }
    Ok(PeakFlops::Measured {
        flops_per_s: fastest,
        source: format!(
            "fastest of four {fastest_side}×{fastest_side}×{fastest_side} products in {}",
            dtype_name(dtype)
        ),
    })
}

/// Hashes a checkpoint's files while the run goes on.
pub(crate) struct Hashing(Option<JoinHandle<Result<Vec<FileHash>, TrainError>>>);

impl Hashing {
    pub fn start(folder: &Path) -> Hashing {
        let folder = folder.to_owned();
        Hashing(Some(std::thread::spawn(move || {
            let mut names: Vec<String> = std::fs::read_dir(&folder)
                .map_err(TrainError::io("list", &folder))?
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .filter(|name| name.ends_with(".safetensors") || name.ends_with(".json"))
                .collect();
            names.sort();
            names
                .into_iter()
                .map(|name| {
                    hash_file(&folder.join(&name)).map(|(sha256, bytes)| FileHash {
                        name,
                        bytes,
                        sha256,
                    })
                })
                .collect()
        })))
    }

    pub fn finish(mut self) -> Result<Vec<FileHash>, TrainError> {
        match self.0.take().map(JoinHandle::join) {
            Some(Ok(files)) => files,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(Vec::new()),
        }
    }
}

/// What a report says about where a run came from.
pub(crate) fn provenance(
    recipe: &Recipe,
    recipe_sha256: &str,
    data_hash: &str,
    spec: DeviceSpec,
    device: &Device,
    checkpoint_files: Vec<FileHash>,
) -> Provenance {
    Provenance {
        calor_version: env!("CARGO_PKG_VERSION").to_owned(),
        device: spec.to_string(),
        device_description: describe_with_products(device),
        seed: recipe.train.seed,
        recipe_sha256: recipe_sha256.to_owned(),
        data_hash: data_hash.to_owned(),
        checkpoint_files,
        platform: format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
    }
}
