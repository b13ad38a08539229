//! `calor parity`: how far a checkpoint's outputs and gradients are from a reference's.

use std::path::PathBuf;

use calor_model::parity::{Comparison, compare};
use serde::Serialize;

use crate::device::DeviceArgument;
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, Table, count};

/// What to compare with what.
#[derive(clap::Args)]
#[command(
    after_help = "scripts/export_reference.py writes reference files with Transformers and PEFT. Exit status 1 beyond \
                  the tolerance."
)]
pub struct Arguments {
    /// Folder with config.json and safetensors weights
    #[arg(value_name = "MODEL_DIR")]
    model: PathBuf,
    /// Folder of a PEFT adapter that is applied first, `modules_to_save` included
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Safetensors file with `input_ids` and `logits` or `last_hidden_state`, optionally
    /// `attention_mask`, `loss` and `grad.<tensor name>`
    #[arg(long, value_name = "FILE")]
    reference: PathBuf,
    /// Largest difference allowed, as a fraction of the reference's largest magnitude
    #[arg(long, value_name = "X", default_value_t = 1e-4)]
    tolerance: f64,
    #[command(flatten)]
    device: DeviceArgument,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Compared<'a> {
    within: bool,
    tolerance: f64,
    tensors: &'a [Comparison],
}

/// Compares, prints the differences, and says whether all are within the tolerance.
pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    if !(arguments.tolerance.is_finite() && arguments.tolerance > 0.0) {
        return Err(Failure::usage(format!(
            "--tolerance {} is not a number above 0",
            arguments.tolerance
        )));
    }
    let device = arguments.device.spec()?.open()?;
    let adapter = arguments.adapter.as_deref();
    let tensors = compare(
        &arguments.model,
        adapter,
        &arguments.reference,
        arguments.tolerance,
        &device,
    )?;
    let beyond = tensors.iter().filter(|tensor| !tensor.within).count();
    if arguments.json {
        let compared = Compared {
            within: beyond == 0,
            tolerance: arguments.tolerance,
            tensors: &tensors,
        };
        output::print_json(&compared)?;
    } else {
        output::print(&show(&tensors, arguments.tolerance, beyond))?;
    }
    Ok(if beyond == 0 {
        Exit::Done
    } else {
        Exit::Failed
    })
}

fn show(tensors: &[Comparison], tolerance: f64, beyond: usize) -> String {
    let mut table = Table::new(&[
        ("tensor", Align::Left),
        ("shape", Align::Left),
        ("compared", Align::Right),
        ("largest magnitude", Align::Right),
        ("largest difference", Align::Right),
        ("relative", Align::Right),
        ("", Align::Left),
    ]);
    for tensor in tensors {
        let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
        table.row([
            tensor.name.clone(),
            format!("[{}]", shape.join(", ")),
            count(tensor.compared as u64),
            format!("{:.4e}", tensor.reference_max),
            format!("{:.2e}", tensor.max_abs),
            format!("{:.2e}", tensor.max_rel),
            (if tensor.within { "within" } else { "beyond" }).to_owned(),
        ]);
    }
    let worst = tensors
        .iter()
        .max_by(|a, b| a.max_rel.total_cmp(&b.max_rel))
        .map_or_else(String::new, |worst| {
            format!(
                "Largest relative difference: {:.2e} ({}).\n",
                worst.max_rel, worst.name
            )
        });
    format!(
        "{}\n{worst}Within {tolerance:e} of the reference's largest magnitude: {} of {}.\n",
        table.render(),
        tensors.len() - beyond,
        tensors.len()
    )
}
