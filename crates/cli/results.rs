//! A run's result as a person reads it.

use std::path::Path;

use calor_evaluate::{Ablation, Interval, Metrics, Score, TaskKind, metric_names};
use calor_meter::{MeterReport, Quantity};
use calor_train::Comparison;
use calor_train::artifacts::report::{Outcome, Report, SplitEvaluation};
use calor_train::recipe::Metric;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::{Error as ValueError, StrDeserializer};

use crate::output::{Align, Table, bytes, count, number, seconds};

/// The whole of a run: metrics by split, what it cost, where its files are.
pub fn show_run(run: &Path, report: &Report) -> String {
    let mut text = format!(
        "{}: {} from {}\n",
        report.name,
        match report.task.labels.is_empty() {
            true => report.task.kind.name().to_owned(),
            false => report.task.labels.join(", "),
        },
        report.model.id
    );
    for (split, evaluation) in &report.evaluation {
        text.push_str(&show_split(split, evaluation));
    }
    text.push('\n');

    let training = &report.meter.throughput.training;
    let energy = &report.meter.energy.training;
    let mut table = Table::new(&[("", Align::Left), ("", Align::Left)]);
    let ended = match report.outcome {
        Outcome::Finished => "",
        Outcome::StoppedEarly => ", stopped early",
    };
    let time = training
        .elapsed_s
        .value()
        .map_or_else(String::new, |value| format!(" in {}", seconds(value)));
    table.row([
        "training".to_owned(),
        format!(
            "{} steps, {} epochs{time}{ended}",
            count(report.training.steps),
            number(report.training.epochs)
        ),
    ]);
    if !report.earlier_sessions.is_empty() {
        table.row([
            "".to_owned(),
            format!(
                "time and energy of the last of {} sessions",
                report.earlier_sessions.len() + 1
            ),
        ]);
    }
    table.row([
        "throughput".to_owned(),
        format!(
            "{} ({} with padding)",
            shown(&training.tokens_per_s, "tokens/s"),
            shown(&training.padded_tokens_per_s, "")
        ),
    ]);
    table.row([
        "energy".to_owned(),
        format!(
            "{}, {}",
            shown(&energy.gross_j_per_token, "J/token"),
            shown(&energy.gross_j, "J in all")
        ),
    ]);
    table.row(["".to_owned(), source_of(&energy.gross_j)]);
    if let Some(grams) = energy.emissions_g_co2e.value() {
        table.row(["emissions".to_owned(), format!("{} gCO₂e", number(grams))]);
    }
    let memory = &report.meter.memory;
    for (name, quantity) in [
        ("memory", &memory.host_peak_bytes),
        ("device memory", &memory.device_peak_bytes),
    ] {
        if let Some(value) = quantity.value() {
            table.row([
                name.to_owned(),
                format!("{} at the peak", bytes(value as u64)),
            ]);
        }
    }
    table.row([
        "trained on".to_owned(),
        format!(
            "{} ({})",
            report.provenance.device, report.provenance.device_description
        ),
    ]);
    for (name, file) in [
        ("report", "report.html"),
        ("adapter", "adapter"),
        ("TensorBoard", "tensorboard"),
    ] {
        table.row([name.to_owned(), run.join(file).display().to_string()]);
    }
    text.push_str(&table.render());
    text
}

/// What scoring patients took.
pub fn cost_of_evaluation(meter: &MeterReport) -> String {
    let throughput = &meter.throughput.evaluation;
    let energy = &meter.energy.evaluation;
    let mut table = Table::new(&[("", Align::Left), ("", Align::Left)]);
    table.row([
        "time".to_owned(),
        throughput
            .elapsed_s
            .value()
            .map_or_else(String::new, seconds),
    ]);
    table.row([
        "throughput".to_owned(),
        shown(&throughput.tokens_per_s, "tokens/s"),
    ]);
    table.row([
        "energy".to_owned(),
        shown(&energy.gross_j_per_token, "J/token"),
    ]);
    table.row(["".to_owned(), source_of(&energy.gross_j)]);
    table.render()
}

/// The metrics of one split.
pub fn show_split(split: &str, evaluation: &SplitEvaluation) -> String {
    let metrics = &evaluation.metrics;
    let samples = if metrics.rows == metrics.patients {
        String::new()
    } else {
        format!(" at {} prediction times", count(metrics.rows as u64))
    };
    let per_token = matches!(metrics.task, TaskKind::Tokens | TaskKind::CausalLm);
    let title = match split {
        "held_out" if per_token => "held-out texts, never seen in training".to_owned(),
        other if per_token => format!("texts of the split `{other}`"),
        "held_out" => "held-out patients, never seen in training".to_owned(),
        other => format!("patients of the split `{other}`"),
    };
    let shown = match per_token {
        true => metrics.rows,
        false => metrics.patients,
    };
    let samples = if per_token { "" } else { &samples };
    let mut text = format!(
        "\n{} {title}{samples}\n{}",
        count(shown as u64),
        metrics_table(metrics).render()
    );
    if !evaluation.entities.is_empty() {
        let mut table = Table::new(&[
            ("entity", Align::Left),
            ("F1", Align::Right),
            ("precision", Align::Right),
            ("recall", Align::Right),
            ("in the text", Align::Right),
        ]);
        for entity in &evaluation.entities {
            table.row([
                entity.name.clone(),
                format!("{:.3}", entity.f1),
                format!("{:.3}", entity.precision),
                format!("{:.3}", entity.recall),
                count(entity.support),
            ]);
        }
        text.push_str(&format!("\n{}", table.render()));
    }
    for label in &evaluation.labels {
        if let Some(metrics) = &label.metrics {
            text.push_str(&format!(
                "\n{}, {} patients\n{}",
                label.label,
                count(metrics.patients as u64),
                metrics_table(metrics).render()
            ));
        }
    }
    text
}

/// What each source of a fused model is worth.
pub fn show_ablation(ablation: &Ablation) -> String {
    let metric = title_of(&ablation.metric);
    let mut table = Table::new(&[
        ("source", Align::Left),
        ("alone", Align::Left),
        ("all over it alone", Align::Left),
        ("withheld", Align::Left),
        ("lost without it", Align::Left),
        ("Shapley value", Align::Left),
    ]);
    for source in &ablation.sources {
        table.row([
            source.name.clone(),
            plain(&source.alone),
            signed(&source.all_minus_alone),
            plain(&source.without),
            signed(&source.all_minus_without),
            signed(&source.shapley),
        ]);
    }
    format!(
        "{metric} on {} patients, {:.0}% intervals from {} paired resamples\n\
         all sources {}, none {}\n\n{}",
        count(ablation.patients as u64),
        100.0 * ablation.bootstrap.level,
        count(ablation.bootstrap.resamples as u64),
        plain(&ablation.all),
        plain(&ablation.none),
        table.render()
    )
}

/// Two runs side by side.
pub fn show_comparison(run: &Path, other: &Path, found: &Comparison) -> String {
    let mut table = Table::new(&[("run", Align::Left), (title_of(&found.metric), Align::Left)]);
    table.row([run.display().to_string(), plain(&found.run)]);
    table.row([other.display().to_string(), plain(&found.other)]);
    table.row(["difference".to_owned(), signed(&found.difference)]);
    format!(
        "{} patients, {:.0}% intervals from {} paired resamples\n\n{}",
        count(found.patients as u64),
        100.0 * found.level,
        count(found.resamples as u64),
        table.render()
    )
}

/// A score with its interval.
fn plain(score: &Score) -> String {
    match (score.value(), score.bounds()) {
        (Some(value), Some((low, high))) => format!("{value:.3} ({low:.3} to {high:.3})"),
        (Some(value), None) => format!("{value:.3}"),
        (None, _) => "–".to_owned(),
    }
}

/// The same of a difference.
fn signed(score: &Score) -> String {
    match (score.value(), score.bounds()) {
        (Some(value), Some((low, high))) => format!("{value:+.3} ({low:+.3} to {high:+.3})"),
        (Some(value), None) => format!("{value:+.3}"),
        (None, _) => "–".to_owned(),
    }
}

fn metrics_table(metrics: &Metrics) -> Table {
    let level = |interval: &Interval| match interval {
        Interval::Percentile { level, .. } => Some(*level),
        Interval::Unavailable { .. } => None,
    };
    let levels = metrics.scores.values().find_map(|score| match score {
        Score::Defined { interval, .. } => level(interval),
        Score::Undefined { .. } => None,
    });
    let head = levels.map_or_else(
        || "interval".to_owned(),
        |level| format!("{:.0}% interval", 100.0 * level),
    );
    let mut table = Table::new(&[
        ("metric", Align::Left),
        ("value", Align::Right),
        (&head, Align::Left),
    ]);
    for name in metric_names(metrics.task) {
        let Some(score) = metrics.score(name) else {
            continue;
        };
        let digits = |number: f64| match *name {
            "rmse" | "log_loss" | "loss" | "perplexity" => crate::output::number(number),
            _ => format!("{number:.3}"),
        };
        let title = title_of(name);
        match score {
            Score::Defined {
                value, interval, ..
            } => {
                let interval = match interval {
                    Interval::Percentile { low, high, .. } => {
                        format!("{} to {}", digits(*low), digits(*high))
                    }
                    Interval::Unavailable { reason } => reason.clone(),
                };
                table.row([title.to_owned(), digits(*value), interval]);
            }
            Score::Undefined { reason } => {
                table.row([title.to_owned(), "–".to_owned(), reason.clone()]);
            }
        }
    }
    table
}

/// A metric's name as people write it.
fn title_of(name: &str) -> &str {
    let deserializer: StrDeserializer<'_, ValueError> = name.into_deserializer();
    match Metric::deserialize(deserializer) {
        Ok(metric) => metric.title(),
        Err(_) => name,
    }
}

/// A quantity with its unit, or that there is none.
fn shown(quantity: &Quantity, unit: &str) -> String {
    match quantity.value() {
        Some(value) if unit.is_empty() => number(value),
        Some(value) => format!("{} {unit}", number(value)),
        None if unit.is_empty() => "unavailable".to_owned(),
        None => format!("{unit}: unavailable"),
    }
}

/// Where a number comes from, in brackets.
fn source_of(quantity: &Quantity) -> String {
    let source = quantity.source();
    // The model calls itself one; so does the status.
    format!(
        "({}: {})",
        quantity.status(),
        source.strip_prefix("model: ").unwrap_or(source)
    )
}
