//! `calor check`: everything that can fail, before anything runs.

use std::path::{Path, PathBuf};

use calor_model::Restriction;
use calor_train::{CheckReport, RunOptions};

use crate::cache;
use crate::device::DeviceArgument;
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, Table, bytes, count, number, seconds};
use crate::progress::Progress;
use crate::train::RecipeArguments;

/// What to check.
#[derive(clap::Args)]
#[command(
    after_help = "Opens the cohort and the checkpoint, prepares the sequences (they are kept for the run) and tries the \
                  step that needs the most memory; a recipe that will not fit is refused before, with what would. \
                  Writes nothing but the cache."
)]
pub struct Arguments {
    #[command(flatten)]
    recipe: RecipeArguments,
    #[command(flatten)]
    device: DeviceArgument,
    /// Says what vLLM and mistral.rs would not load of the trained adapter; exit status 1 where that
    /// is anything
    #[arg(long)]
    portable: bool,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// Checks, and prints what the run would be.
pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    checked(
        &arguments.recipe,
        &arguments.device,
        arguments.portable,
        arguments.json,
    )
}

/// As the verb does, a recipe as it stands.
pub fn recipe(path: &Path, device: &DeviceArgument) -> Result<Exit, Failure> {
    checked(&RecipeArguments::of(path), device, false, false)
}

fn checked(
    recipe: &RecipeArguments,
    device: &DeviceArgument,
    portable: bool,
    json: bool,
) -> Result<Exit, Failure> {
    let device = device.spec()?;
    let (recipe, checkpoint) = recipe.load()?;
    // Nothing is written there: a check leaves no run folder behind.
    let out = PathBuf::from("runs").join(&recipe.name);
    let options = RunOptions {
        recipe,
        checkpoint,
        out,
        cache: cache::folder()?,
        device,
        resume: false,
    };
    let mut progress = Progress::new();
    let report = calor_train::check(&options, &mut progress);
    progress.finish();
    let report = report?;
    if json {
        output::print_json(&report)?;
    } else {
        let mut text = show(&report);
        if portable {
            text.push_str(&show_restrictions(&report.restrictions));
        }
        output::print(&text)?;
    }
    Ok(match portable && !report.restrictions.is_empty() {
        true => Exit::Failed,
        false => Exit::Done,
    })
}

/// A line for each thing that a program does not load, with what to do about it.
pub fn show_restrictions(restrictions: &[Restriction]) -> String {
    if restrictions.is_empty() {
        return "vLLM and mistral.rs load the adapter.\n".to_owned();
    }
    restrictions
        .iter()
        .map(|found| {
            format!(
                "{}: {}. To do: {}.\n",
                found.program, found.problem, found.fix
            )
        })
        .collect()
}

fn show(report: &CheckReport) -> String {
    let mut splits = Table::new(&[
        ("split", Align::Left),
        ("patients", Align::Right),
        ("samples", Align::Right),
        ("tokens", Align::Right),
        ("labels", Align::Left),
    ]);
    for (split, counts) in &report.splits {
        let labels: Vec<String> = counts
            .by_class
            .iter()
            .map(|(class, samples)| format!("{class} {}", count(*samples)))
            .collect();
        splits.row([
            split.clone(),
            count(counts.patients),
            count(counts.samples),
            count(counts.tokens),
            labels.join(", "),
        ]);
    }

    let sequences = &report.sequences;
    let size = &report.model;
    let trial = &report.trial;
    let mut table = Table::new(&[("", Align::Left), ("", Align::Left)]);
    table.row([
        "device".to_owned(),
        format!("{} ({})", report.device, report.device_description),
    ]);
    table.row([
        "model".to_owned(),
        format!(
            "{} parameters, frozen",
            count(size.base_parameters + size.embedding_parameters)
        ),
    ]);
    table.row([
        "trained".to_owned(),
        format!(
            "{} in the adapter on {} modules, {} in the head",
            count(size.adapter_parameters),
            count(report.adapted_modules as u64),
            count(size.head_parameters)
        ),
    ]);
    table.row([
        "optimizer".to_owned(),
        format!("{} of state", bytes(report.optimizer_bytes)),
    ]);
    let (encoders, projectors) = (size.encoder_parameters, size.projector_parameters);
    if encoders + projectors > 0 {
        table.row([
            "modalities".to_owned(),
            format!(
                "{} parameters in encoders and {} in projectors, trained; {} in towers, frozen",
                count(encoders),
                count(projectors),
                count(size.tower_parameters)
            ),
        ]);
    }
    table.row([
        "sequences".to_owned(),
        format!(
            "median {} tokens, 99% up to {}, longest {}",
            count(sequences.length_median),
            count(sequences.length_p99),
            count(sequences.length_max)
        ),
    ]);
    let lost = if sequences.truncated_samples == 0 {
        "nothing".to_owned()
    } else {
        format!(
            "{} tokens of {} patients ({} whole events)",
            count(sequences.dropped_tokens),
            count(sequences.truncated_patients),
            count(sequences.dropped_rows)
        )
    };
    table.row(["truncated".to_owned(), lost]);
    for (modality, counts) in &sequences.modalities {
        table.row([
            modality.clone(),
            format!(
                "{} items, missing for {} of {} samples",
                count(counts.items),
                count(counts.missing_samples),
                count(sequences.samples)
            ),
        ]);
    }
    table.row([
        "steps".to_owned(),
        format!(
            "{}, {} an epoch",
            count(report.total_steps),
            count(report.steps_per_epoch)
        ),
    ]);
    table.row([
        "largest step tried".to_owned(),
        format!(
            "{} × {} tokens in {}, loss {}, gradient norm {}",
            trial.rows,
            trial.seq,
            seconds(trial.elapsed_s),
            number(trial.loss),
            trial.grad_norm.map_or("beyond f16".to_owned(), number)
        ),
    ]);
    let predicted = &report.memory;
    let mut memory = Table::new(&[("memory at the peak", Align::Left), ("", Align::Right)]);
    for part in &predicted.components {
        memory.row([part.name.to_owned(), bytes(part.bytes)]);
    }
    memory.row(["predicted".to_owned(), bytes(predicted.peak_bytes)]);
    if let Some(available) = predicted.available_bytes.value() {
        memory.row(["there is".to_owned(), bytes(available as u64)]);
    }
    if predicted.recomputed_blocks > 0 {
        table.row([
            "recomputed".to_owned(),
            format!(
                "{} of {} blocks",
                predicted.recomputed_blocks, predicted.blocks
            ),
        ]);
    }
    for (name, quantity) in [
        ("memory", &trial.host_peak_bytes),
        ("device memory", &trial.device_peak_bytes),
    ] {
        if let Some(value) = quantity.value() {
            table.row([
                name.to_owned(),
                format!("{} at the peak", bytes(value as u64)),
            ]);
        }
    }
    let mut text = format!(
        "{}\n\n{}\n{}\n{}\n",
        report.name,
        splits.render(),
        table.render(),
        memory.render()
    );
    for warning in &report.warnings {
        text.push_str(&format!("warning: {warning}\n"));
    }
    text.push_str("The recipe can be trained.\n");
    text
}
