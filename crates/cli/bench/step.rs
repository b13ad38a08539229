//! `calor bench step`: one optimizer step again and again.

use std::path::{Path, PathBuf};

use calor_meter::{EnergyOptions, PeakFlops, Quantity};
use calor_model::{LoraOptions, Quantization, Recompute, RecomputedBlocks};
use calor_train::recipe::{Dtype, KernelChoice, Recipe};
use calor_train::{BenchTask, Spread, StepBenchOptions, StepBenchReport, step_bench};
use clap::ValueEnum;

use super::{Precision, profile};
use crate::device::DeviceArgument;
use crate::failure::{Exit, Failure};
use crate::hub::{Hub, Purpose};
use crate::output::{self, Align, Table, bytes, number, seconds};

/// Below the options.
pub const MORE: &str = "Of a recipe a step is one micro-batch: train.micro_batch rows of sequence.max_tokens random tokens. Neither \
                        its cohort nor its files of text have to be there, and encoders of other modalities are left out; \
                        what is measured is said with the result. The learning rate stays at its peak. Defaults above \
                        are those without a recipe.\n\n\
                        Windows are timed without any waiting but at the end of each step. Afterwards a few steps are taken \
                        apart: the device is waited for at the end of each phase, then before and after each operation, which \
                        takes longer than a plain step on a GPU. Kernel launches are counted in a step without such waiting.\n\n\
                        benches/peer_torch.py runs the same steps with PyTorch and PEFT, and compares.";

/// The step.
#[derive(clap::Args)]
pub struct Step {
    /// The recipe whose model, adapter and optimizer are taken; what is given beside it counts instead
    #[arg(value_name = "RECIPE")]
    recipe: Option<PathBuf>,
    /// Sets a key of the recipe, for example `--set adapter.r=8`; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Hub id or folder of a checkpoint
    #[arg(long, value_name = "MODEL", required_unless_present = "recipe")]
    model: Option<String>,
    /// What is minimised [default: what the recipe's task has]
    #[arg(
        long,
        value_enum,
        required_unless_present = "recipe",
        conflicts_with = "recipe"
    )]
    task: Option<Task>,
    /// Folder of a PEFT adapter to start from [default: the recipe's, or one of rank --rank on all
    /// linear layers]
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Rank of the adapter where none is given; alpha is twice that [default: 16]
    #[arg(long, value_name = "R", conflicts_with = "adapter")]
    rank: Option<usize>,
    /// Safetensors file with `input_ids`, `labels` and, for padding, `attention_mask` [default:
    /// random tokens]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Puts the file's rows one behind the other, without their padding, as far as they fit into its
    /// row length: as training does
    #[arg(long, requires = "data")]
    pack: bool,
    /// Rows of random tokens [default: 8]
    #[arg(long, value_name = "N", conflicts_with = "data")]
    batch: Option<usize>,
    /// Tokens of each of them [default: 128]
    #[arg(long, value_name = "N", conflicts_with = "data")]
    seq: Option<usize>,
    /// Windows, each timed and metered by itself
    #[arg(long, value_name = "N", default_value_t = 3)]
    windows: usize,
    /// Steps of a window
    #[arg(long, value_name = "N", default_value_t = 8)]
    steps: usize,
    /// Steps before them that are not timed
    #[arg(long, value_name = "N", default_value_t = 2)]
    warmup: usize,
    /// Steps after them that are taken apart, by phase and by operation; 0 for none
    #[arg(long, value_name = "N", default_value_t = 1)]
    profiled_steps: usize,
    /// Learning rate, the same at every step [default: 0.0002]
    #[arg(long, value_name = "X")]
    learning_rate: Option<f64>,
    /// Gradients are scaled down to this norm; 0 switches clipping off [default: 1]
    #[arg(long, value_name = "X")]
    max_grad_norm: Option<f64>,
    /// Type of the frozen weights and of the activations [default: f32]
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// Blocks that are run again in the backward pass to keep less in memory: none, all, or a number
    /// n for the first and every n-th after it [default: none]
    #[arg(long, value_name = "BLOCKS", value_parser = recomputed_blocks)]
    recompute: Option<RecomputedBlocks>,
    /// Keeps the inputs of those blocks in the host's memory
    #[arg(long)]
    offload: bool,
    /// What operations are computed with [default: fused]
    #[arg(long, value_enum)]
    kernels: Option<Kernels>,
    /// Bits of the backbone's frozen linear layers [default: none]
    #[arg(long, value_enum)]
    quantization: Option<Bits>,
    #[command(flatten)]
    device: DeviceArgument,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Task {
    /// Mean next-token cross-entropy
    CausalLm,
    /// Mean cross-entropy of two classes, a label a row
    SequenceClassification,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kernels {
    /// Kernels, where the device has them
    Fused,
    /// Each in plain tensor operations, to measure what the kernels gain: slower, and far more memory
    Reference,
}

fn recomputed_blocks(text: &str) -> Result<RecomputedBlocks, String> {
    match text {
        "none" => Ok(RecomputedBlocks::None),
        "all" => Ok(RecomputedBlocks::All),
        number => match number.parse() {
            Ok(step @ 1..) => Ok(RecomputedBlocks::Every(step)),
            _ => Err("is none of `none`, `all` and the whole numbers from 1".to_owned()),
        },
    }
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Bits {
    /// Those of their type, or of the checkpoint
    None,
    /// 8, a scale an output channel
    Int8,
    /// 4, with scales in 8 bits
    Nf4,
    /// 4, with scales in 32 bits
    Nf4Single,
}

/// Runs the steps and prints what they took.
pub fn run(step: &Step) -> Result<Exit, Failure> {
    step.check()?;
    let options = match &step.recipe {
        Some(path) => step.of_recipe(path)?,
        None => step.of_flags()?,
    };
    let report = step_bench(&StepBenchOptions {
        adapter: step.adapter.clone(),
        data: step.data.clone(),
        pack: step.pack,
        windows: step.windows,
        steps: step.steps,
        warmup: step.warmup,
        profiled_steps: step.profiled_steps,
        ..options
    })?;
    if step.json {
        output::print_json(&report)?;
    } else {
        output::print(&show(&report))?;
    }
    Ok(Exit::Done)
}

impl Step {
    fn check(&self) -> Result<(), Failure> {
        for (name, value) in [
            ("--windows", Some(self.windows)),
            ("--steps", Some(self.steps)),
            ("--batch", self.batch),
            ("--seq", self.seq),
            ("--rank", self.rank),
        ] {
            if value == Some(0) {
                return Err(Failure::usage(format!("{name} has to be at least 1")));
            }
        }
        if self.recipe.is_none() && !self.set.is_empty() {
            return Err(Failure::usage(
                "--set is for keys of a recipe, and none is given".to_owned(),
            ));
        }
        Ok(())
    }

    /// The recipe with what is given beside it.
    fn of_recipe(&self, path: &Path) -> Result<StepBenchOptions, Failure> {
        let recipe = Recipe::load(path, &[&self.set[..], &self.assignments()].concat())?;
        let revision = recipe.model.revision.as_deref();
        let hub = Hub::from_env();
        let checkpoint = hub.resolve(&recipe.model.id, revision, Purpose::LanguageModel)?;
        let device = self.device.spec()?;
        Ok(StepBenchOptions::of_recipe(recipe, checkpoint, device))
    }

    /// The flags as a recipe would have them.
    fn assignments(&self) -> Vec<String> {
        let mut set = Vec::new();
        let mut give = |key: &str, value: Option<String>| {
            set.extend(value.map(|value| format!("{key}={value}")));
        };
        let text = |number: Option<usize>| number.map(|number| number.to_string());
        give("model.id", self.model.clone());
        give("train.micro_batch", text(self.batch));
        give("sequence.max_tokens", text(self.seq));
        give("adapter.r", text(self.rank));
        give("adapter.alpha", text(self.rank.map(|rank| 2 * rank)));
        give(
            "train.learning_rate",
            self.learning_rate.map(|rate| format!("{rate:?}")),
        );
        give(
            "train.max_grad_norm",
            self.max_grad_norm.map(|norm| format!("{norm:?}")),
        );
        let dtype = self.dtype.map(|dtype| match dtype {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        });
        give("model.dtype", dtype.map(str::to_owned));
        let recompute = self.recompute.map(|blocks| match blocks {
            RecomputedBlocks::None => "none".to_owned(),
            RecomputedBlocks::Every(step) => step.to_string(),
            RecomputedBlocks::All | RecomputedBlocks::First(_) => "all".to_owned(),
        });
        give("train.recompute", recompute);
        give("train.offload", self.offload.then(|| "true".to_owned()));
        let kernels = self.kernels.map(|kernels| match kernels {
            Kernels::Fused => "fused",
            Kernels::Reference => "reference",
        });
        give("train.kernels", kernels.map(str::to_owned));
        if let Some(bits) = self.quantization {
            let (name, double) = match bits {
                Bits::None => ("none", true),
                Bits::Int8 => ("int8", true),
                Bits::Nf4 => ("nf4", true),
                Bits::Nf4Single => ("nf4", false),
            };
            give("model.quantization", Some(name.to_owned()));
            give("model.double_quantization", Some(double.to_string()));
        }
        set
    }

    /// A LoRA on all linear layers of a checkpoint.
    fn of_flags(&self) -> Result<StepBenchOptions, Failure> {
        let model = self.model.as_deref().unwrap_or_default();
        let rank = self.rank.unwrap_or(16);
        Ok(StepBenchOptions {
            model: Hub::from_env().resolve(model, None, Purpose::LanguageModel)?,
            task: match self.task {
                Some(Task::SequenceClassification) => BenchTask::SequenceClassification,
                Some(Task::CausalLm) | None => BenchTask::CausalLm,
            },
            adapter: None,
            lora: LoraOptions {
                r: rank,
                alpha: 2.0 * rank as f64,
                ..LoraOptions::default()
            },
            data: None,
            pack: false,
            batch: self.batch.unwrap_or(8),
            seq: self.seq.unwrap_or(128),
            windows: self.windows,
            steps: self.steps,
            warmup: self.warmup,
            profiled_steps: self.profiled_steps,
            large_products: true,
            learning_rate: self.learning_rate.unwrap_or(2e-4),
            max_grad_norm: self.max_grad_norm.unwrap_or(1.0),
            seed: 0,
            device: self.device.spec()?,
            dtype: self.dtype.map_or(Dtype::F32, Dtype::from),
            recompute: Recompute {
                blocks: self.recompute.unwrap_or_default(),
                offload: self.offload,
            },
            quantization: match self.quantization {
                None | Some(Bits::None) => None,
                Some(Bits::Int8) => Some(Quantization::Int8),
                Some(Bits::Nf4) => Some(Quantization::Nf4 { double: true }),
                Some(Bits::Nf4Single) => Some(Quantization::Nf4 { double: false }),
            },
            kernels: match self.kernels {
                None | Some(Kernels::Fused) => KernelChoice::Fused,
                Some(Kernels::Reference) => KernelChoice::Reference,
            },
            energy: EnergyOptions::default(),
            recipe: None,
        })
    }
}

fn show(report: &StepBenchReport) -> String {
    let mut text = format!(
        "{} on {} ({})\n",
        report.model, report.device, report.device_description
    );
    if let Some(recipe) = &report.recipe {
        text.push_str(&format!("as the recipe {recipe} has it\n"));
    }
    for note in &report.notes {
        text.push_str(&format!("  {note}\n"));
    }
    text.push('\n');
    text.push_str(&summary(report).render());
    text.push('\n');
    text.push_str(&windows(report).render());
    if let Some(profile) = &report.profile {
        text.push_str(&profile::show(profile));
    }
    text
}

fn summary(report: &StepBenchReport) -> Table {
    let mut table = Table::new(&[("", Align::Left), ("", Align::Left)]);
    let dtype = serde_json::to_value(report.dtype).unwrap_or_default();
    table.row([
        "batch".to_owned(),
        format!(
            "{} × {} tokens, {}",
            report.batch,
            report.seq,
            dtype.as_str().unwrap_or_default()
        ),
    ]);
    let of_steps = report.step_s.iter().copied();
    table.row([
        "steps".to_owned(),
        format!(
            "{} in {} windows, each {} to {}",
            report.step_s.len(),
            report.windows.len(),
            seconds(of_steps.clone().fold(f64::INFINITY, f64::min)),
            seconds(of_steps.fold(0.0, f64::max))
        ),
    ]);
    table.row([
        "throughput".to_owned(),
        format!(
            "{} tokens/s at the median window ({}), {} at the median step",
            number(report.window_tokens_per_s.median),
            range(&report.window_tokens_per_s),
            number(report.tokens_per_s)
        ),
    ]);
    table.row(["frozen weights".to_owned(), bytes(report.frozen_bytes)]);
    let energy = match &report.window_energy_j_per_token {
        Some(joules) => format!(
            "{} J/token at the median window ({}) ({}: {})",
            number(joules.median),
            range(joules),
            report.energy_j_per_token.status(),
            report.energy_j_per_token.source()
        ),
        None => format!("unavailable: {}", report.energy_j_per_token.source()),
    };
    table.row(["energy".to_owned(), energy]);
    let share = |quantity: &Quantity| match quantity.value() {
        Some(share) => format!("{:.1} %", 100.0 * share),
        None => format!("unavailable: {}", quantity.source()),
    };
    table.row([
        "MFU".to_owned(),
        format!("{} of a {}", share(&report.mfu), report.peak.describe()),
    ]);
    if report.hfu.value() != report.mfu.value() {
        table.row([
            "HFU".to_owned(),
            format!("{}, with what is recomputed", share(&report.hfu)),
        ]);
    }
    if matches!(report.peak, PeakFlops::Stated { .. }) {
        let measured = &report.fastest_product;
        let of_it = report.peak.flops_per_s() / measured.flops_per_s();
        let found = report.mfu.map("", |share| share * of_it);
        table.row([
            String::new(),
            format!("{} of a {}", share(&found), measured.describe()),
        ]);
    }
    for (name, quantity) in [
        ("memory", &report.peak_memory_bytes),
        ("device memory", &report.device_peak_bytes),
    ] {
        if let Some(value) = quantity.value() {
            table.row([
                name.to_owned(),
                format!("{} at the peak", bytes(value as u64)),
            ]);
        }
    }
    let beside = match report.device_peak_bytes.value() {
        Some(_) => "on the device",
        None => "beside the program",
    };
    table.row([
        "predicted".to_owned(),
        format!("{} {beside}", bytes(report.predicted_peak_bytes)),
    ]);
    let ends = |losses: &[f64]| match losses {
        [first, .., last] => format!("{} at first, {} at last", number(*first), number(*last)),
        [only] => number(*only),
        [] => String::new(),
    };
    table.row(["loss".to_owned(), ends(&report.losses)]);
    table
}

fn range(spread: &Spread) -> String {
    format!("{} to {}", number(spread.least), number(spread.most))
}

fn windows(report: &StepBenchReport) -> Table {
    let mut table = Table::new(&[
        ("window", Align::Left),
        ("time", Align::Right),
        ("tokens/s", Align::Right),
        ("J/token", Align::Right),
    ]);
    for (index, window) in report.windows.iter().enumerate() {
        let joules = window.energy_j_per_token.value();
        table.row([
            (index + 1).to_string(),
            seconds(window.elapsed_s),
            number(window.tokens_per_s),
            joules.map_or_else(|| "unavailable".to_owned(), number),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        step: Step,
    }

    fn step(line: &str) -> Result<Step, clap::Error> {
        let words = std::iter::once("step").chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.step)
    }

    #[test]
    fn flags_beside_a_recipe_are_its_keys() {
        let given = step(
            "r.toml --set train.seed=3 --model m --batch 4 --seq 64 --rank 8 --learning-rate 1e-4 \
             --max-grad-norm 0 --dtype bf16 --recompute 2 --kernels reference --quantization nf4_single",
        );
        assert_eq!(
            given.unwrap().assignments(),
            [
                "model.id=m",
                "train.micro_batch=4",
                "sequence.max_tokens=64",
                "adapter.r=8",
                "adapter.alpha=16",
                "train.learning_rate=0.0001",
                "train.max_grad_norm=0.0",
                "model.dtype=bf16",
                "train.recompute=2",
                "train.kernels=reference",
                "model.quantization=nf4",
                "model.double_quantization=false",
            ]
        );
        assert!(step("r.toml").unwrap().assignments().is_empty());
    }

    #[test]
    fn either_a_recipe_or_a_model_and_a_task() {
        assert!(step("--model m --task causal_lm").is_ok());
        assert!(step("--model m").is_err() && step("--task causal_lm").is_err());
        assert!(step("r.toml --task causal_lm").is_err());
        let checked = |line| step(line).unwrap().check();
        assert!(checked("r.toml --set train.seed=1").is_ok());
        assert!(checked("--model m --task causal_lm --set train.seed=1").is_err());
        assert!(checked("--model m --task causal_lm --windows 0").is_err());
        assert!(step("r.toml --data d --batch 1").is_err());
        assert!(step("r.toml --pack").is_err());
    }
}
