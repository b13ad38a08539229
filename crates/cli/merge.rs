//! `calor merge`: a plain checkpoint with an adapter folded in, or several adapters as one.

use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use calor_model::{
    AdapterConfig, Checkpoint, Combination, MergeOptions, Merged, Restriction, Weighted, merge,
    restrictions,
};
use calor_train::run_recipe;
use clap::ValueEnum;
use serde::Serialize;

use crate::check::show_restrictions;
use crate::device::DeviceArgument;
use crate::failure::{Exit, Failure};
use crate::hub::{Hub, Purpose};
use crate::output::{self, count};

/// What to merge, and into what.
#[derive(clap::Args)]
#[command(
    after_help = "Tensor by tensor, computed in f32 and stored in the checkpoint's own types. Afterwards the logits of \
                  the result and of checkpoint and adapter are compared on a fixed prompt: exit status 1, and nothing \
                  is written, where they differ by more than rounding."
)]
pub struct Arguments {
    /// Folders of runs, or of adapters in PEFT's format
    #[arg(value_name = "RUN|ADAPTER", required = true)]
    adapters: Vec<PathBuf>,
    /// Folder that is made
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Checkpoint: a hub id or a folder [default: the one that the first run or adapter names]
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// What each adapter counts, for example `0.5,0.5` [default: 1 each]
    #[arg(
        long,
        value_name = "W,…",
        value_delimiter = ',',
        allow_negative_numbers = true
    )]
    weights: Vec<f64>,
    /// How several adapters become one
    #[arg(long, value_enum, default_value_t = Method::Cat)]
    method: Method,
    /// Rank of the combination, for `--method svd` [default: all ranks together]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    rank: Option<u32>,
    /// Type of the weights that are written [default: each keeps its own]
    #[arg(long, value_enum, value_name = "TYPE", conflicts_with = "adapter_only")]
    dtype: Option<Dtype>,
    /// Writes the combined adapter instead of a checkpoint
    #[arg(long)]
    adapter_only: bool,
    /// Says what vLLM and mistral.rs would not load of the combined adapter; exit status 1 where that
    /// is anything
    #[arg(long, requires = "adapter_only")]
    portable: bool,
    #[command(flatten)]
    device: DeviceArgument,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// How several adapters become one.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    /// Side by side: exactly the weighted sum, of the sum of the ranks
    Cat,
    /// The sum, cut to --rank by its singular values
    Svd,
    /// PEFT's `linear`: weighted sums of the pairs' halves, an approximation of one rank
    Linear,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
    F16,
}

#[derive(Serialize)]
struct Report<'a> {
    out: &'a Path,
    #[serde(flatten)]
    merged: &'a Merged,
    restrictions: Option<&'a [Restriction]>,
}

/// Merges, and prints how far the result is from what it was made of.
pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let device = arguments.device.spec()?.open()?;
    if arguments.rank.is_some() && arguments.method != Method::Svd {
        return Err(Failure::usage("--rank is given without --method svd"));
    }
    let weights = match arguments.weights.len() {
        0 => vec![1.0; arguments.adapters.len()],
        length if length == arguments.adapters.len() => arguments.weights.clone(),
        length => {
            return Err(Failure::usage(format!(
                "--weights has {length} numbers, and there are {} adapters",
                arguments.adapters.len()
            )));
        }
    };
    if let Some(weight) = weights.iter().find(|weight| !weight.is_finite()) {
        return Err(Failure::usage(format!("--weights: {weight} is no number")));
    }
    let adapters: Vec<PathBuf> = arguments
        .adapters
        .iter()
        .map(|folder| match folder.join("recipe.toml").exists() {
            true => folder.join("adapter"),
            false => folder.clone(),
        })
        .collect();
    let checkpoint = Checkpoint::open(&base(arguments, &adapters[0])?)?;
    let options = MergeOptions {
        adapters: adapters
            .into_iter()
            .zip(weights)
            .map(|(adapter, weight)| Weighted { adapter, weight })
            .collect(),
        method: match arguments.method {
            Method::Cat => Combination::Concatenate,
            Method::Svd => Combination::Svd,
            Method::Linear => Combination::Linear,
        },
        rank: arguments.rank.map(|rank| rank as usize),
        dtype: arguments.dtype.map(|dtype| match dtype {
            Dtype::F32 => FloatDType::F32,
            Dtype::Bf16 => FloatDType::BF16,
            Dtype::F16 => FloatDType::F16,
        }),
        adapter_only: arguments.adapter_only,
    };
    let merged = merge(&checkpoint, &options, &arguments.out, &device)?;
    let found = match arguments.portable {
        true => Some(restrictions(&checkpoint, &arguments.out)?),
        false => None,
    };
    if arguments.json {
        output::print_json(&Report {
            out: &arguments.out,
            merged: &merged,
            restrictions: found.as_deref(),
        })?;
    } else {
        let mut text = show(&arguments.out, &merged);
        if let Some(found) = &found {
            text.push_str(&show_restrictions(found));
        }
        output::print(&text)?;
    }
    Ok(match found.is_some_and(|found| !found.is_empty()) {
        true => Exit::Failed,
        false => Exit::Done,
    })
}

/// The folder of the checkpoint that was named, or that the first run or adapter names.
fn base(arguments: &Arguments, adapter: &Path) -> Result<PathBuf, Failure> {
    let first = &arguments.adapters[0];
    let (name, revision) = match &arguments.base {
        Some(name) => (name.clone(), None),
        None if first.join("recipe.toml").exists() => {
            let model = run_recipe(first)?.model;
            (model.id, model.revision)
        }
        None => {
            let name = AdapterConfig::read(adapter)?.base_model_name_or_path;
            let name = name.filter(|name| !name.is_empty()).ok_or_else(|| {
                Failure::usage(format!(
                    "{} does not say which checkpoint it is for",
                    adapter.display()
                ))
                .hint("name it with --base")
            })?;
            (name, None)
        }
    };
    Hub::from_env().resolve(&name, revision.as_deref(), Purpose::LanguageModel)
}

fn show(out: &Path, merged: &Merged) -> String {
    let mut text = match merged.tensors {
        Some((tensors, changed)) => format!(
            "{}: {} tensors, {} of them changed.\n",
            out.display(),
            count(tensors as u64),
            count(changed as u64)
        ),
        None => format!("{}: an adapter.\n", out.display()),
    };
    if let Some(agreement) = &merged.agreement {
        text.push_str(&format!(
            "Largest difference of {} from the checkpoint with its adapter: {:.2e}, where the largest \
             is {:.2e}.\n",
            agreement.compared, agreement.largest_difference, agreement.largest_magnitude
        ));
    }
    for note in &merged.notes {
        text.push_str(&format!("note: {note}.\n"));
    }
    text
}
