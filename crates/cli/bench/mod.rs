//! `calor bench`: throughput, energy and memory.

use std::path::PathBuf;

use calor_meter::EnergyOptions;
use calor_model::{LoraOptions, Quantization, Recompute, RecomputedBlocks};
use calor_train::recipe::Dtype;
use calor_train::{
    BenchTask, BlockShape, KernelBenchOptions, StepBenchOptions, StepBenchReport, kernel_bench,
    step_bench,
};
use clap::ValueEnum;

use crate::device::DeviceArgument;
use crate::failure::{Exit, Failure};
use crate::hub::{Hub, Purpose};
use crate::output::{self, Align, Table, bytes, number, seconds};

/// What to measure.
#[derive(clap::Subcommand)]
pub enum Verb {
    /// Repeats one LoRA step, the code of the training loop, on a batch from a file or of random
    /// tokens
    #[command(
        after_help = "benches/peer_torch.py runs the same steps with PyTorch and PEFT, and compares."
    )]
    Step(Step),
    /// Times each operation of a step by itself, and shows how far it is from what the device could do
    #[command(
        after_help = "The floor of an operation is the time of its products at the rate of a large product, or of \
                      reading and writing each of its tensors once at the rate of a copy, whichever is more; both \
                      rates are measured first."
    )]
    Kernels(Kernels),
}

/// The operations.
#[derive(clap::Args)]
pub struct Kernels {
    /// The model whose sizes are taken
    #[arg(long, value_enum, default_value_t = Sizes::Smollm2135m)]
    shape: Sizes,
    /// Rows
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
    /// Tokens of each of them
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..))]
    seq: u64,
    /// Rank of the adapter
    #[arg(long, value_name = "R", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..))]
    rank: u64,
    /// Type of the frozen weights and of the activations
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    dtype: Precision,
    /// Times the plain references as well, whose attention and losses take far more memory
    #[arg(long)]
    reference: bool,
    /// Operations whose name contains this
    #[arg(long, value_name = "NAME", default_value = "")]
    only: String,
    /// Seconds that each operation is repeated for
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    repeat_s: f64,
    #[command(flatten)]
    device: DeviceArgument,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Sizes {
    /// SmolLM2-135M
    #[value(name = "0.13b")]
    Smollm2135m,
    /// Llama-3.2-1B
    #[value(name = "1b")]
    Llama1b,
    /// Llama-3.2-3B
    #[value(name = "3b")]
    Llama3b,
    /// Llama-3.1-8B
    #[value(name = "8b")]
    Llama8b,
}

impl Kernels {
    fn block(&self) -> BlockShape {
        let [hidden, intermediate, heads, kv_heads, head_dim, vocab] = match self.shape {
            Sizes::Smollm2135m => [576, 1536, 9, 3, 64, 49_152],
            Sizes::Llama1b => [2048, 8192, 32, 8, 64, 128_256],
            Sizes::Llama3b => [3072, 8192, 24, 8, 128, 128_256],
            Sizes::Llama8b => [4096, 14_336, 32, 8, 128, 128_256],
        };
        BlockShape {
            batch: self.batch as usize,
            seq: self.seq as usize,
            hidden,
            intermediate,
            heads,
            kv_heads,
            head_dim,
            vocab,
            rank: self.rank as usize,
        }
    }
}

fn run_kernels(arguments: &Kernels) -> Result<Exit, Failure> {
    let report = kernel_bench(&KernelBenchOptions {
        shape: arguments.block(),
        device: arguments.device.spec()?,
        dtype: arguments.dtype.into(),
        with_reference: arguments.reference,
        only: arguments.only.clone(),
        repeat_s: arguments.repeat_s,
    })?;
    if arguments.json {
        output::print_json(&report)?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&[
        ("operation", Align::Left),
        ("forward", Align::Right),
        ("with backward", Align::Right),
        ("floor", Align::Right),
        ("of the floor", Align::Right),
        ("reference", Align::Right),
    ]);
    let milliseconds = |elapsed_s: f64| format!("{} ms", number(1e3 * elapsed_s));
    for operation in &report.operations {
        let reference = operation
            .reference_both_s
            .map_or_else(String::new, milliseconds);
        table.row([
            operation.name.as_str(),
            &milliseconds(operation.forward_s),
            &milliseconds(operation.both_s),
            &milliseconds(operation.floor_s),
            &format!("{} ×", number(operation.both_s / operation.floor_s)),
            &reference,
        ]);
    }
    output::print(&format!(
        "{} ({}), {:?}: products at {} TFLOP/s, copies at {} GB/s\n{}",
        report.device,
        report.device_description,
        report.dtype,
        number(report.peak_flops / 1e12),
        number(report.peak_bytes_per_s / 1e9),
        table.render()
    ))?;
    Ok(Exit::Done)
}

/// The step.
#[derive(clap::Args)]
pub struct Step {
    /// Hub id or folder of a checkpoint
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// What is minimised
    #[arg(long, value_enum)]
    task: Task,
    /// Folder of a PEFT adapter to start from [default: one of rank --rank on all linear layers]
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Rank of the adapter where none is given; alpha is twice that
    #[arg(
        long,
        value_name = "R",
        default_value_t = 16,
        conflicts_with = "adapter"
    )]
    rank: usize,
    /// Safetensors file with `input_ids`, `labels` and, for padding, `attention_mask` [default:
    /// random tokens]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Rows of random tokens
    #[arg(long, value_name = "N", default_value_t = 8, conflicts_with = "data")]
    batch: usize,
    /// Tokens of each of them
    #[arg(long, value_name = "N", default_value_t = 128, conflicts_with = "data")]
    seq: usize,
    /// Steps that are timed
    #[arg(long, value_name = "N", default_value_t = 8)]
    steps: usize,
    /// Steps before them that are not
    #[arg(long, value_name = "N", default_value_t = 2)]
    warmup: usize,
    /// Learning rate, the same at every step
    #[arg(long, value_name = "X", default_value_t = 2e-4)]
    learning_rate: f64,
    /// Gradients are scaled down to this norm; 0 switches clipping off
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    max_grad_norm: f64,
    /// Type of the frozen weights and of the activations
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    dtype: Precision,
    /// Blocks that are run again in the backward pass to keep less in memory: none, all, or a number
    /// n for the first and every n-th after it
    #[arg(long, value_name = "BLOCKS", default_value = "none", value_parser = recomputed_blocks)]
    recompute: RecomputedBlocks,
    /// Keeps the inputs of those blocks in the host's memory
    #[arg(long)]
    offload: bool,
    /// Bits of the backbone's frozen linear layers
    #[arg(long, value_enum, default_value_t = Bits::None)]
    quantization: Bits,
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
enum Precision {
    F32,
    Bf16,
    F16,
}

impl From<Precision> for Dtype {
    fn from(precision: Precision) -> Dtype {
        match precision {
            Precision::F32 => Dtype::F32,
            Precision::Bf16 => Dtype::Bf16,
            Precision::F16 => Dtype::F16,
        }
    }
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
pub fn run(verb: &Verb) -> Result<Exit, Failure> {
    let step = match verb {
        Verb::Step(step) => step,
        Verb::Kernels(kernels) => return run_kernels(kernels),
    };
    for (name, value) in [
        ("--steps", step.steps),
        ("--batch", step.batch),
        ("--seq", step.seq),
        ("--rank", step.rank),
    ] {
        if value == 0 {
            return Err(Failure::usage(format!("{name} has to be at least 1")));
        }
    }
    let rank = step.rank;
    let options = StepBenchOptions {
        model: Hub::from_env().resolve(&step.model, None, Purpose::LanguageModel)?,
        task: match step.task {
            Task::CausalLm => BenchTask::CausalLm,
            Task::SequenceClassification => BenchTask::SequenceClassification,
        },
        adapter: step.adapter.clone(),
        lora: LoraOptions {
            r: rank,
            alpha: 2.0 * rank as f64,
            ..LoraOptions::default()
        },
        data: step.data.clone(),
        batch: step.batch,
        seq: step.seq,
        steps: step.steps,
        warmup: step.warmup,
        learning_rate: step.learning_rate,
        max_grad_norm: step.max_grad_norm,
        seed: 0,
        device: step.device.spec()?,
        dtype: step.dtype.into(),
        recompute: Recompute {
            blocks: step.recompute,
            offload: step.offload,
        },
        quantization: match step.quantization {
            Bits::None => None,
            Bits::Int8 => Some(Quantization::Int8),
            Bits::Nf4 => Some(Quantization::Nf4 { double: true }),
            Bits::Nf4Single => Some(Quantization::Nf4 { double: false }),
        },
        energy: EnergyOptions::default(),
    };
    let report = step_bench(&options)?;
    if step.json {
        output::print_json(&report)?;
    } else {
        output::print(&show(&report))?;
    }
    Ok(Exit::Done)
}

fn show(report: &StepBenchReport) -> String {
    let mut sorted = report.step_s.clone();
    sorted.sort_by(f64::total_cmp);
    let (shortest, longest) = (
        sorted.first().copied().unwrap_or(f64::NAN),
        sorted.last().copied().unwrap_or(f64::NAN),
    );
    let mut table = Table::new(&[("", Align::Left), ("", Align::Left)]);
    table.row([
        "batch".to_owned(),
        format!("{} × {} tokens", report.batch, report.seq),
    ]);
    table.row([
        "steps".to_owned(),
        format!(
            "{}, each {} to {}",
            report.step_s.len(),
            seconds(shortest),
            seconds(longest)
        ),
    ]);
    table.row([
        "throughput".to_owned(),
        format!(
            "{} tokens/s at the median step",
            number(report.tokens_per_s)
        ),
    ]);
    table.row(["frozen weights".to_owned(), bytes(report.frozen_bytes)]);
    let energy = match report.energy_j_per_token.value() {
        Some(joules) => format!(
            "{} J/token ({}: {})",
            number(joules),
            report.energy_j_per_token.status(),
            report.energy_j_per_token.source()
        ),
        None => format!("unavailable: {}", report.energy_j_per_token.source()),
    };
    table.row(["energy".to_owned(), energy]);
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
    format!(
        "{} on {} ({})\n\n{}",
        report.model,
        report.device,
        report.device_description,
        table.render()
    )
}
