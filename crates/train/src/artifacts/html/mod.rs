//! `report.html`: the report as one page that needs no script, no network and no other file.

mod charts;
mod format;
mod results;
mod tables;
mod training;

use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error};
use serde::Serialize;

use self::format::{grouped, number, quantity, significant, split_name, title, utc};
use self::results::{Split, interval, ordered, split_view};
use self::tables::{DataRow, NamedValue, QuantityRow, data, provenance, quantities, sequences};
use self::training::{Phase, Training, earlier, phases, training};
use super::metrics::MetricsLine;
use super::plot::escape;
use super::report::{Outcome, Report, SplitEvaluation};
use crate::TrainError;
use crate::recipe::TaskKind;

const TEMPLATE: &str = include_str!("../report.html");

/// The page for a report, the lines of `metrics.jsonl` and the text of `recipe.toml`.
pub fn render(
    report: &Report,
    metrics: &[MetricsLine],
    recipe: &str,
) -> Result<String, TrainError> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_function("legend", legend);
    let failed = |error: Error| TrainError::Corrupt {
        path: "report.html".into(),
        problem: format!("the page's template fails: {error}"),
    };
    environment
        .add_template("report", TEMPLATE)
        .map_err(failed)?;
    let page = Page::new(report, metrics, recipe);
    environment
        .get_template("report")
        .and_then(|template| template.render(Value::from_serialize(&page)))
        .map_err(failed)
}

fn legend(chart: Value) -> Result<Value, Error> {
    let mut html = String::new();
    for entry in chart.get_attr("legend")?.try_iter()? {
        let (name, class) = (
            entry.get_item(&Value::from(0))?,
            entry.get_item(&Value::from(1))?,
        );
        html.push_str(&format!(
            "<span><i class=\"{}\"></i>{}</span>",
            escape(&class.to_string()),
            escape(&name.to_string())
        ));
    }
    if html.is_empty() {
        Ok(Value::from(""))
    } else {
        Ok(Value::from_safe_string(format!(
            "<div class=\"legend\">{html}</div>"
        )))
    }
}

#[derive(Serialize)]
struct Page<'a> {
    name: &'a str,
    subtitle: String,
    tiles: Vec<Tile>,
    splits: Vec<Split>,
    training: Training,
    phases: Vec<Phase>,
    earlier: String,
    quantities: Vec<QuantityRow>,
    notes: &'a [String],
    class_title: &'static str,
    data: Vec<DataRow>,
    sequences: Vec<NamedValue>,
    provenance: Vec<NamedValue>,
    recipe: &'a str,
    version: &'a str,
    written: String,
}

#[derive(Serialize)]
struct Tile {
    name: String,
    value: String,
    unit: &'static str,
    note: String,
}

impl<'a> Page<'a> {
    fn new(report: &'a Report, metrics: &[MetricsLine], recipe: &'a str) -> Page<'a> {
        let mut splits: Vec<(&String, &SplitEvaluation)> = report.evaluation.iter().collect();
        // Held-out patients first: they are what the report is read for.
        splits.sort_by_key(|(name, _)| (name.as_str() != "held_out", (*name).clone()));
        Page {
            name: &report.name,
            subtitle: subtitle(report),
            tiles: tiles(report, splits.first().copied()),
            splits: splits
                .iter()
                .map(|(name, split)| split_view(name, split))
                .collect(),
            training: training(report, metrics),
            phases: phases(&report.meter),
            earlier: earlier(report),
            quantities: quantities(&report.meter),
            notes: &report.meter.energy.notes,
            class_title: if report.task.kind == TaskKind::Regression {
                ""
            } else {
                "By class"
            },
            data: data(report),
            sequences: sequences(&report.data.sequences),
            provenance: provenance(report),
            recipe,
            version: &report.provenance.calor_version,
            written: utc(report.written_unix_s),
        }
    }
}

fn subtitle(report: &Report) -> String {
    let model = &report.model;
    let trained = model.adapter_parameters
        + model.head_parameters
        + model.encoder_parameters
        + model.projector_parameters;
    let all = trained + model.frozen_parameters;
    format!(
        "{} ({}) on {} · {} {} · {} of {} parameters trained ({:.2} %) · {}",
        model.id,
        model.model_type,
        report.provenance.device,
        report.task.kind.name(),
        report.task.labels.join(", "),
        grouped(trained),
        grouped(all),
        100.0 * trained as f64 / all.max(1) as f64,
        match report.outcome {
            Outcome::Finished => "all steps done",
            Outcome::StoppedEarly => "stopped early, the patience ran out",
        }
    )
}

fn tiles(report: &Report, first: Option<(&String, &SplitEvaluation)>) -> Vec<Tile> {
    let mut tiles = Vec::new();
    if let Some((name, split)) = first {
        for (metric, score) in ordered(&split.metrics).into_iter().take(2) {
            tiles.push(Tile {
                name: format!("{} ({})", title(metric), split_name(name)),
                value: number(score.value(), 3),
                unit: "",
                note: interval(score).map_or(String::new(), |interval| {
                    format!("95 % interval {interval}")
                }),
            });
        }
    }
    let speed = &report.meter.throughput.training.tokens_per_s;
    let energy = &report.meter.energy.training;
    tiles.push(Tile {
        name: "Training speed".into(),
        value: quantity(speed),
        unit: "tokens/s",
        note: "padding not counted".into(),
    });
    tiles.push(Tile {
        name: "Training energy".into(),
        value: quantity(&energy.gross_j_per_token),
        unit: "J/token",
        note: format!("gross, {}", energy.gross_j_per_token.status()),
    });
    let seconds = energy.elapsed_s + report.meter.energy.evaluation.elapsed_s;
    tiles.push(Tile {
        name: "Time".into(),
        value: significant(seconds),
        unit: "s",
        note: "training and evaluation".into(),
    });
    tiles.push(Tile {
        name: "Optimizer steps".into(),
        value: grouped(report.training.steps),
        unit: "",
        note: match &report.training.best {
            Some(best) => format!(
                "kept step {}: {} {} on tuning",
                grouped(best.step),
                best.metric.title(),
                number(Some(best.value), 3)
            ),
            None => "kept the last step".to_owned(),
        },
    });
    tiles
}
