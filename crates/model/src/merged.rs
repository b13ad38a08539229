//! A merged checkpoint from one adapter or several, compared afterwards with what it was made of.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use serde::Serialize;

use crate::adapter_config::AdapterConfig;
use crate::checkpoint::Checkpoint;
use crate::combine::{Combination, Weighted, combine};
use crate::error::ModelError;
use crate::head::{HeadOptions, Pooling};
use crate::merge::{Folded, fold};
use crate::model::{Model, ModelOptions};
use crate::run::{Mode, ModelInput, SampleSpan};

/// Tokens of the prompt that both sides read.
const PROMPT: usize = 32;

/// What a merge is made of.
#[derive(Debug, Clone)]
pub struct MergeOptions {
    /// One adapter, or several with what each counts.
    pub adapters: Vec<Weighted>,
    /// How several become one.
    pub method: Combination,
    /// The rank that [`Combination::Svd`] cuts to.
    pub rank: Option<usize>,
    /// Type of all weights that are written; each keeps its own without one.
    pub dtype: Option<FloatDType>,
    /// Writes the combined adapter instead of a checkpoint.
    pub adapter_only: bool,
}

/// What a merge did.
#[derive(Debug, Clone, Serialize)]
pub struct Merged {
    /// Tensors that are written, and how many of them are other than the checkpoint's; of an adapter
    /// none.
    pub tensors: Option<(usize, usize)>,
    /// How far the result is from checkpoint and adapter together; of several adapters' combination
    /// as an adapter there is nothing to compare.
    pub agreement: Option<Agreement>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// How far two models are apart on a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Agreement {
    /// `logits`, or `hidden states` where there is no head to compare.
    pub compared: &'static str,
    /// The largest absolute difference.
    pub largest_difference: f64,
    /// The largest magnitude of what was compared.
    pub largest_magnitude: f64,
    /// The share of it that a difference may be: what rounding to the stored type leaves.
    pub tolerance: f64,
}

impl Agreement {
    /// Whether the difference is within the tolerance; never where a number is not finite.
    pub fn within(&self) -> bool {
        self.largest_difference <= self.tolerance * self.largest_magnitude
    }
}

/// Merges into the folder `out`, which must not be there and appears whole or not at all.
///
/// # Errors
/// Those of reading and combining adapters, a folder that is there, and a result that computes
/// something else than checkpoint and adapter together.
pub fn merge(
    checkpoint: &Checkpoint,
    options: &MergeOptions,
    out: &Path,
    device: &Device,
) -> Result<Merged, ModelError> {
    if out.exists() {
        return Err(ModelError::options(format!(
            "{} is there already; choose another folder",
            out.display()
        )));
    }
    let partial = Partial::beside(out)?;
    let combined = partial.0.join("adapter");
    let one = match &options.adapters[..] {
        [one] if one.weight == 1.0 && options.rank.is_none() => Some(one.adapter.as_path()),
        _ => None,
    };
    if one.is_none() || options.adapter_only {
        combine(
            checkpoint,
            &options.adapters,
            options.method,
            options.rank,
            &combined,
        )?;
    }
    if options.adapter_only {
        rename(&combined, out)?;
        return Ok(Merged {
            tensors: None,
            agreement: None,
            notes: Vec::new(),
        });
    }
    let adapter = one.unwrap_or(&combined);
    let folder = partial.0.join("checkpoint");
    let folded = fold(checkpoint, adapter, options.dtype, &folder)?;
    let agreement = agreement(checkpoint, adapter, &folder, &folded, device)?;
    if !agreement.within() {
        return Err(ModelError::options(format!(
            "the merged checkpoint computes other {} than the checkpoint with its adapter: they are up \
             to {:.3e} apart, where the largest is {:.3e} and {:.0e} of it may be rounding; nothing was \
             written",
            agreement.compared,
            agreement.largest_difference,
            agreement.largest_magnitude,
            agreement.tolerance
        )));
    }
    rename(&folder, out)?;
    Ok(Merged {
        tensors: Some((folded.tensors, folded.changed)),
        agreement: Some(agreement),
        notes: folded.notes,
    })
}

/// A folder beside the result that goes with whatever is left in it.
struct Partial(PathBuf);

impl Partial {
    fn beside(out: &Path) -> Result<Partial, ModelError> {
        let name = out
            .file_name()
            .ok_or_else(|| ModelError::options(format!("{} names no folder", out.display())))?;
        let name = format!(".{}.{}.partial", name.to_string_lossy(), std::process::id());
        let folder = out.with_file_name(name);
        std::fs::create_dir_all(&folder).map_err(ModelError::io(&folder))?;
        Ok(Partial(folder))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Best effort: what is left is hidden and of no use.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), ModelError> {
    std::fs::rename(from, to).map_err(ModelError::io(to))
}

/// Runs both on one prompt, one after the other, so that never both are in memory.
fn agreement(
    checkpoint: &Checkpoint,
    adapter: &Path,
    merged: &Path,
    folded: &Folded,
    device: &Device,
) -> Result<Agreement, ModelError> {
    let head = match folded.head {
        // No Transformers class reads the mean: the states below the head are what can be compared.
        HeadOptions::Classifier {
            pooling: Pooling::Mean,
            ..
        } => HeadOptions::None,
        head => head,
    };
    let tokens = AdapterConfig::read(adapter)?
        .lora
        .map_or_else(Vec::new, |lora| lora.trained_tokens);
    let input = prompt(checkpoint, &tokens, device);
    let outputs = |model: Model| -> Vec<f32> {
        let data = match head {
            HeadOptions::None => model.hidden(&input, Mode::Infer).into_data(),
            HeadOptions::CausalLm => model.logits(&input, Mode::Infer).into_data(),
            HeadOptions::Classifier { .. } => model.forward(&input, Mode::Infer).into_data(),
            HeadOptions::TokenClassifier { .. } => {
                let tokens = input.input_ids.shape().num_elements() as i64;
                let places = Tensor::arange(0..tokens, device);
                model.token_logits(&input, places, Mode::Infer).into_data()
            }
        };
        data.try_to_vec().expect("the model computes in f32")
    };
    let expected = {
        let dtype = FloatDType::F32;
        let model = Model::load_with_adapter(checkpoint, adapter, dtype, device)?;
        outputs(model.for_inference())
    };
    let merged = Checkpoint::open(merged)?;
    let found = {
        let options = ModelOptions {
            head,
            ..ModelOptions::default()
        };
        outputs(Model::load(&merged, &options, device)?.for_inference())
    };
    let mut largest_difference = 0f64;
    for (found, expected) in found.iter().zip(&expected) {
        let difference = f64::from((found - expected).abs());
        // `max` drops NaN, which must not pass for agreement.
        if difference.is_nan() || largest_difference.is_nan() {
            largest_difference = f64::NAN;
        } else {
            largest_difference = largest_difference.max(difference);
        }
    }
    let largest_magnitude = expected
        .iter()
        .fold(0f64, |largest, value| largest.max(f64::from(value.abs())));
    Ok(Agreement {
        compared: match head {
            HeadOptions::None => "hidden states",
            _ => "logits",
        },
        largest_difference,
        largest_magnitude,
        tolerance: match merged.stored.narrowest_dtype() {
            burn::tensor::DType::BF16 => 5e-2,
            burn::tensor::DType::F16 => 1e-2,
            _ => 1e-4,
        },
    })
}

/// One row of tokens from all over the vocabulary, the trained ones first.
fn prompt(checkpoint: &Checkpoint, tokens: &[u32], device: &Device) -> ModelInput {
    let config = checkpoint.config();
    let length = PROMPT.min(config.max_positions().max(1));
    let vocab = config.vocab_size();
    let ids: Vec<i32> = tokens
        .iter()
        .map(|token| *token as i32)
        .chain((0..).map(|place| ((place * 7919 + 5) % vocab) as i32))
        .take(length)
        .collect();
    let row = |values: Vec<i32>| {
        Tensor::<2, Int>::from_data(TensorData::new(values, [1, length]), device)
    };
    ModelInput {
        input_ids: row(ids),
        positions: row((0..length as i32).collect()),
        segments: row(vec![1; length]),
        samples: vec![SampleSpan {
            row: 0,
            start: 0,
            length,
        }],
        soft: None,
    }
}
