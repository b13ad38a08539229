//! `calor bench kernels`: each operation by itself.

use calor_train::{BlockShape, KernelBenchOptions, KernelBenchReport, OperationTime, kernel_bench};
use clap::ValueEnum;

use super::Precision;
use crate::device::DeviceArgument;
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, Table, bytes, number};

/// Below the options.
pub const MORE: &str = "The floor of an operation is the time of its products at the rate of a large product, or of \
                        reading and writing each of its tensors once at the rate of a copy, whichever is more; both \
                        rates are measured first.\n\n\
                        An error is the norm of the difference over the norm of what the reference gives for the same \
                        inputs in the same type. In f32 expect 1e-7 to 1e-6: sums in another order. In bf16, which has 8 \
                        bits of fraction, expect 1e-3 to 1e-2: kernels round once where references round every step, so \
                        that more of the error is the reference's.\n\n\
                        Memory is what a GPU's allocator reserves for one forward and backward pass beside the inputs, in \
                        whole pages. On the CPU, cargo bench -p calor-kernels --bench memory counts it to the byte.";

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
    /// Runs the plain references as well: their time, the largest relative error of output and input
    /// gradients, and on a GPU the memory of both; attention and losses take far more of it there
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
    /// Gemma-2-2B, whose heads are of 256
    #[value(name = "gemma-2-2b")]
    Gemma2b,
}

impl Kernels {
    fn block(&self) -> BlockShape {
        let [hidden, intermediate, heads, kv_heads, head_dim, vocab] = match self.shape {
            Sizes::Smollm2135m => [576, 1536, 9, 3, 64, 49_152],
            Sizes::Llama1b => [2048, 8192, 32, 8, 64, 128_256],
            Sizes::Llama3b => [3072, 8192, 24, 8, 128, 128_256],
            Sizes::Llama8b => [4096, 14_336, 32, 8, 128, 128_256],
            Sizes::Gemma2b => [2304, 9216, 8, 4, 256, 256_000],
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

/// Times them and prints what they took.
pub fn run(arguments: &Kernels) -> Result<Exit, Failure> {
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
    let table = match arguments.reference {
        true => beside_references(&report),
        false => times(&report),
    };
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

/// What each operation takes, and the least that it could.
fn times(report: &KernelBenchReport) -> Table {
    let mut table = Table::new(&[
        ("operation", Align::Left),
        ("forward", Align::Right),
        ("with backward", Align::Right),
        ("floor", Align::Right),
        ("of the floor", Align::Right),
    ]);
    for operation in &report.operations {
        table.row([
            operation.name.as_str(),
            &milliseconds(operation.forward_s),
            &milliseconds(operation.both_s),
            &milliseconds(operation.floor_s),
            &times_the_floor(operation),
        ]);
    }
    table
}

/// The same beside the plain references: time, the largest error, memory.
fn beside_references(report: &KernelBenchReport) -> Table {
    let in_memory = |operation: &OperationTime| operation.peak_bytes.is_some();
    let mut heads = vec![
        ("operation", Align::Left),
        ("forward", Align::Right),
        ("with backward", Align::Right),
        ("of the floor", Align::Right),
        ("reference", Align::Right),
        ("largest error", Align::Right),
    ];
    if report.operations.iter().any(in_memory) {
        heads.extend([("memory", Align::Right), ("reference", Align::Right)]);
    }
    let mut table = Table::new(&heads);
    for operation in &report.operations {
        let worst = operation
            .errors
            .iter()
            .max_by(|one, other| one.relative.total_cmp(&other.relative));
        let error = worst.map(|worst| match worst.relative == 0.0 {
            true => "none".to_owned(),
            false => format!("{:.1e} ({})", worst.relative, worst.name),
        });
        let mut cells = vec![
            operation.name.clone(),
            milliseconds(operation.forward_s),
            milliseconds(operation.both_s),
            times_the_floor(operation),
            operation
                .reference_both_s
                .map_or_else(String::new, milliseconds),
            error.unwrap_or_default(),
        ];
        for peak in [operation.peak_bytes, operation.reference_peak_bytes] {
            cells.push(peak.map_or_else(String::new, bytes));
        }
        cells.truncate(heads.len());
        table.row(cells);
    }
    table
}

fn milliseconds(elapsed_s: f64) -> String {
    format!("{} ms", number(1e3 * elapsed_s))
}

fn times_the_floor(operation: &OperationTime) -> String {
    format!("{} ×", number(operation.both_s / operation.floor_s))
}
