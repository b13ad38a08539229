//! `report.html`: the report as one page that needs no script, no network and no other file.

use std::time::{Duration, UNIX_EPOCH};

use calor_evaluate::{Curves, Interval, Metrics, Score, higher_is_better, metric_names};
use calor_meter::{ActivityEnergy, ActivityThroughput, MeterReport, Quantity};
use calor_sequence::PrepareReport;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error};
use serde::Serialize;

use super::metrics::MetricsLine;
use super::plot::{Chart, Mark, Series, escape, smooth, thin};
use super::report::{Outcome, Report, SplitEvaluation};
use crate::TrainError;
use crate::recipe::{Metric, TaskKind};

const TEMPLATE: &str = include_str!("report.html");
/// Points of a curve that are drawn: more cannot be told apart at its width.
const DRAWN: usize = 400;

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

#[derive(Serialize)]
struct Split {
    title: String,
    subtitle: String,
    rows: Vec<MetricRow>,
    forest: bool,
    method: &'static str,
    charts: Vec<DrawnChart>,
}

#[derive(Serialize)]
struct MetricRow {
    title: String,
    estimate: String,
    interval: String,
    note: String,
    bar: Option<Bar>,
}

#[derive(Serialize)]
struct Bar {
    low: String,
    width: String,
    at: String,
}

#[derive(Serialize)]
struct DrawnChart {
    title: String,
    svg: String,
    legend: Vec<(String, String)>,
}

#[derive(Serialize)]
struct Training {
    subtitle: String,
    charts: Vec<DrawnChart>,
}

#[derive(Serialize)]
struct Phase {
    name: &'static str,
    seconds: String,
    percent: String,
    mean: String,
    colour: usize,
}

#[derive(Serialize)]
struct QuantityRow {
    name: &'static str,
    training: String,
    evaluation: String,
    status: &'static str,
    source: String,
}

#[derive(Serialize)]
struct DataRow {
    split: String,
    patients: String,
    samples: String,
    tokens: String,
    classes: String,
}

#[derive(Serialize)]
struct NamedValue {
    name: String,
    value: String,
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
    let trained = model.adapter_parameters + model.head_parameters;
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

fn split_view(name: &str, split: &SplitEvaluation) -> Split {
    let mut rows: Vec<MetricRow> = ordered(&split.metrics)
        .into_iter()
        .map(|(metric, score)| metric_row(title(metric), metric, score))
        .collect();
    for label in &split.labels {
        let scores = label.metrics.iter().flat_map(ordered);
        rows.extend(scores.map(|(metric, score)| {
            metric_row(format!("{}: {}", label.label, title(metric)), metric, score)
        }));
    }
    let forest = rows.iter().any(|row| row.bar.is_some());
    let mut charts = Vec::new();
    if !split.curves.is_empty() {
        charts.push(curve_chart(
            "Receiver operating characteristic",
            ["False positive rate", "True positive rate"],
            &split.curves,
            |curves| {
                curves
                    .roc
                    .iter()
                    .map(|point| [point.false_positive_rate, point.true_positive_rate])
                    .collect()
            },
            Some(vec![[0.0, 0.0], [1.0, 1.0]]),
        ));
        // A model that knows nothing has the prevalence as its precision.
        let chance = match split.metrics.classes.as_slice() {
            [only] => {
                let prevalence = only.positives as f64 / split.metrics.rows.max(1) as f64;
                Some(vec![[0.0, prevalence], [1.0, prevalence]])
            }
            _ => None,
        };
        charts.push(curve_chart(
            "Precision and recall",
            ["Recall", "Precision"],
            &split.curves,
            |curves| {
                curves
                    .precision_recall
                    .iter()
                    .map(|point| [point.recall, point.precision])
                    .collect()
            },
            chance,
        ));
        charts.push(calibration_chart(&split.curves));
    }
    if !split.scatter.is_empty() {
        let (low, high) = split
            .scatter
            .iter()
            .flatten()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                (low.min(*value), high.max(*value))
            });
        let series = vec![
            Series {
                name: "perfect".into(),
                points: vec![[low, low], [high, high]],
                mark: Mark::Reference,
                colour: 0,
            },
            Series {
                name: String::new(),
                points: split.scatter.clone(),
                mark: Mark::Scatter,
                colour: 1,
            },
        ];
        charts.push(drawn(
            "Predicted and observed",
            ["Predicted", "Observed"],
            series,
            None,
            None,
        ));
    }
    Split {
        title: format!("Results on {} patients", split_name(name)),
        subtitle: split_subtitle(split),
        rows,
        forest,
        method: "Percentile bootstrap over patients: a patient's prediction times stay together.",
        charts,
    }
}

fn curve_chart(
    title: &str,
    labels: [&str; 2],
    curves: &[Curves],
    points: impl Fn(&Curves) -> Vec<[f64; 2]>,
    reference: Option<Vec<[f64; 2]>>,
) -> DrawnChart {
    let single = curves.len() == 1;
    let mut series = Vec::new();
    series.extend(reference.map(|points| Series {
        name: "chance".into(),
        points,
        mark: Mark::Reference,
        colour: 0,
    }));
    for (colour, curve) in curves.iter().enumerate() {
        let name = if single {
            "model".to_owned()
        } else {
            curve.name.clone()
        };
        series.push(Series {
            name,
            points: thin(&points(curve), DRAWN),
            mark: Mark::Line,
            colour,
        });
    }
    drawn(title, labels, series, Some([0.0, 1.0]), Some([0.0, 1.0]))
}

fn calibration_chart(curves: &[Curves]) -> DrawnChart {
    let single = curves.len() == 1;
    let mut series = vec![Series {
        name: "perfect".into(),
        points: vec![[0.0, 0.0], [1.0, 1.0]],
        mark: Mark::Reference,
        colour: 0,
    }];
    for (colour, curve) in curves.iter().enumerate() {
        let name = if single {
            "model, tenths of the patients by predicted probability".to_owned()
        } else {
            curve.name.clone()
        };
        let points = curve
            .calibration_by_quantile
            .iter()
            .map(|point| [point.mean_predicted, point.observed_rate])
            .collect();
        series.push(Series {
            name,
            points,
            mark: Mark::Dots,
            colour,
        });
    }
    drawn(
        "Calibration",
        ["Predicted probability", "Observed share"],
        series,
        Some([0.0, 1.0]),
        Some([0.0, 1.0]),
    )
}

fn training(report: &Report, metrics: &[MetricsLine]) -> Training {
    let mut losses = Vec::new();
    let mut rates = Vec::new();
    let mut norms = Vec::new();
    let mut evaluations = Vec::new();
    let mut tuning_loss = Vec::new();
    let watched = report
        .training
        .best
        .map_or(Metric::default_of(report.task.kind), |best| best.metric);
    for line in metrics {
        match line {
            MetricsLine::Step(line) => {
                losses.push([line.step as f64, line.loss]);
                rates.push([line.step as f64, line.learning_rate]);
                norms.push([line.step as f64, line.grad_norm]);
            }
            MetricsLine::Evaluation(line) => {
                let value = |name: &str| {
                    line.metrics
                        .get(name)
                        .copied()
                        .flatten()
                        .unwrap_or(f64::NAN)
                };
                evaluations.push([line.step as f64, value(watched.name())]);
                tuning_loss.push([line.step as f64, value("loss")]);
            }
        }
    }
    let span = (losses.len() as f64 / 25.0).clamp(1.0, 50.0);
    let loss = vec![
        Series {
            name: String::new(),
            points: thin(&losses, DRAWN),
            mark: Mark::Pale,
            colour: 0,
        },
        Series {
            name: "training (smoothed)".into(),
            points: thin(&smooth(&losses, span), DRAWN),
            mark: Mark::Line,
            colour: 0,
        },
        Series {
            name: "tuning".into(),
            points: tuning_loss,
            mark: Mark::Dots,
            colour: 1,
        },
    ];
    let mut charts = vec![drawn("Loss", ["Step", "Loss"], loss, None, None)];
    if !evaluations.is_empty() && watched != Metric::Loss {
        let series = vec![Series {
            name: String::new(),
            points: evaluations,
            mark: Mark::Dots,
            colour: 1,
        }];
        charts.push(drawn(
            &format!("{} on tuning patients", watched.title()),
            ["Step", watched.title()],
            series,
            None,
            None,
        ));
    }
    charts.push(drawn(
        "Learning rate",
        ["Step", "Learning rate"],
        vec![Series {
            name: String::new(),
            points: thin(&rates, DRAWN),
            mark: Mark::Line,
            colour: 2,
        }],
        None,
        None,
    ));
    let norm = vec![
        Series {
            name: String::new(),
            points: thin(&norms, DRAWN),
            mark: Mark::Pale,
            colour: 3,
        },
        Series {
            name: String::new(),
            points: thin(&smooth(&norms, span), DRAWN),
            mark: Mark::Line,
            colour: 3,
        },
    ];
    charts.push(drawn(
        "Gradient norm before clipping",
        ["Step", "Norm"],
        norm,
        None,
        None,
    ));
    let training = &report.training;
    let loss = training.final_loss.map_or(String::new(), |loss| {
        format!(" Mean training loss at the end: {}.", significant(loss))
    });
    Training {
        subtitle: format!(
            "{} optimizer steps, {} an epoch, {:.2} epochs.{loss}",
            grouped(training.steps),
            grouped(training.steps_per_epoch),
            training.epochs
        ),
        charts,
    }
}

fn drawn(
    title: &str,
    [x_label, y_label]: [&str; 2],
    series: Vec<Series>,
    x_range: Option<[f64; 2]>,
    y_range: Option<[f64; 2]>,
) -> DrawnChart {
    let chart = Chart {
        title: title.to_owned(),
        x_label: x_label.to_owned(),
        y_label: y_label.to_owned(),
        series,
        x_range,
        y_range,
        height: 330.0,
    };
    DrawnChart {
        title: title.to_owned(),
        svg: chart.svg(),
        legend: chart.legend(),
    }
}

fn phases(meter: &MeterReport) -> Vec<Phase> {
    let steps = meter.throughput.steps.steps;
    let mut parts: Vec<(&'static str, f64, String)> = meter
        .throughput
        .phases
        .iter()
        .map(|part| {
            let mean = part.mean_s.value().map_or(String::new(), |seconds| {
                format!("{} ms", significant(seconds * 1e3))
            });
            (part.phase.name(), part.total_s, mean)
        })
        .collect();
    if let Some(seconds) = meter.throughput.other_s.value() {
        let mean = if steps == 0 {
            String::new()
        } else {
            format!("{} ms", significant(seconds / steps as f64 * 1e3))
        };
        parts.push(("other", seconds, mean));
    }
    let whole: f64 = parts.iter().map(|(_, seconds, _)| seconds).sum();
    let percent = |seconds: f64| {
        if whole > 0.0 {
            100.0 * seconds / whole
        } else {
            0.0
        }
    };
    parts
        .into_iter()
        .enumerate()
        .map(|(colour, (name, seconds, mean))| Phase {
            name,
            seconds: significant(seconds),
            percent: format!("{:.1}", percent(seconds)),
            mean,
            colour: colour.min(5),
        })
        .collect()
}

fn earlier(report: &Report) -> String {
    match report.earlier_sessions.as_slice() {
        [] => String::new(),
        sessions => {
            let seconds: f64 = sessions
                .iter()
                .map(|session| {
                    session.meter.energy.training.elapsed_s
                        + session.meter.energy.evaluation.elapsed_s
                })
                .sum();
            format!(
                "The run was resumed: the table is of the last of {} processes. The earlier ones took {} s up to their last checkpoints; report.json holds what each measured.",
                sessions.len() + 1,
                significant(seconds)
            )
        }
    }
}

fn quantities(meter: &MeterReport) -> Vec<QuantityRow> {
    type Part = (
        &'static str,
        fn(&ActivityThroughput, &ActivityEnergy) -> Quantity,
    );
    let both: [Part; 12] = [
        ("Tokens a second", |speed, _| speed.tokens_per_s.clone()),
        ("Tokens a second with padding", |speed, _| {
            speed.padded_tokens_per_s.clone()
        }),
        ("Supervised labels a second", |speed, _| {
            speed.supervised_per_s.clone()
        }),
        ("Sequences a second", |speed, _| {
            speed.sequences_per_s.clone()
        }),
        ("Seconds", |speed, _| speed.elapsed_s.clone()),
        ("Joules, gross", |_, energy| energy.gross_j.clone()),
        ("Joules, net of the machine at rest", |_, energy| {
            energy.net_j.clone()
        }),
        ("Watts, mean", |_, energy| energy.mean_w.clone()),
        ("Joules a token, gross", |_, energy| {
            energy.gross_j_per_token.clone()
        }),
        ("Joules a token, net", |_, energy| {
            energy.net_j_per_token.clone()
        }),
        ("Joules a sequence, gross", |_, energy| {
            energy.gross_j_per_sequence.clone()
        }),
        ("Emissions, g CO₂e", |_, energy| {
            energy.emissions_g_co2e.clone()
        }),
    ];
    let (speed, energy) = (&meter.throughput, &meter.energy);
    let mut rows: Vec<QuantityRow> = both
        .iter()
        .map(|(name, of)| {
            row(
                name,
                &of(&speed.training, &energy.training),
                Some(&of(&speed.evaluation, &energy.evaluation)),
                1.0,
            )
        })
        .collect();
    rows.push(row(
        "Watts of the machine at rest",
        &energy.idle.watts,
        None,
        1.0,
    ));
    rows.push(row(
        "Model FLOPs utilisation, %",
        &meter.utilisation.mfu,
        None,
        100.0,
    ));
    rows.push(row(
        "Peak memory of the host, MiB",
        &meter.memory.host_peak_bytes,
        None,
        1.0 / 1_048_576.0,
    ));
    rows.push(row(
        "Peak memory of the device, MiB",
        &meter.memory.device_peak_bytes,
        None,
        1.0 / 1_048_576.0,
    ));
    rows
}

fn row(
    name: &'static str,
    training: &Quantity,
    evaluation: Option<&Quantity>,
    factor: f64,
) -> QuantityRow {
    let show = |quantity: &Quantity| {
        quantity
            .value()
            .map_or("–".to_owned(), |value| significant(value * factor))
    };
    QuantityRow {
        name,
        training: show(training),
        evaluation: evaluation.map_or(String::new(), show),
        status: training.status(),
        source: training.source().to_owned(),
    }
}

fn data(report: &Report) -> Vec<DataRow> {
    let order = ["train", "tuning", "held_out"];
    let mut splits: Vec<_> = report.data.splits.iter().collect();
    splits.sort_by_key(|(name, _)| {
        order
            .iter()
            .position(|known| known == name)
            .unwrap_or(order.len())
    });
    splits
        .into_iter()
        .map(|(name, counts)| DataRow {
            split: split_name(name).to_owned(),
            patients: grouped(counts.patients),
            samples: grouped(counts.samples),
            tokens: grouped(counts.tokens),
            classes: counts
                .by_class
                .iter()
                .map(|(class, count)| format!("{class}: {}", grouped(*count)))
                .collect::<Vec<_>>()
                .join(" · "),
        })
        .collect()
}

fn sequences(report: &PrepareReport) -> Vec<NamedValue> {
    let share = |part: u64, whole: u64| {
        format!(
            "{} ({:.1} %)",
            grouped(part),
            100.0 * part as f64 / whole.max(1) as f64
        )
    };
    [
        ("Labelled samples", grouped(report.samples)),
        ("Samples in no split", grouped(report.unassigned_samples)),
        (
            "Labelled, without data in the cohort",
            grouped(report.samples_without_data),
        ),
        ("Tokens", grouped(report.tokens)),
        (
            "Length: median, 90 %, 99 %, longest",
            format!(
                "{}, {}, {}, {}",
                grouped(report.length_median),
                grouped(report.length_p90),
                grouped(report.length_p99),
                grouped(report.length_max)
            ),
        ),
        (
            "Length if nothing had been dropped: longest",
            grouped(report.full_length_max),
        ),
        (
            "Patients that lost events to the length",
            share(report.truncated_patients, report.patients),
        ),
        (
            "Tokens dropped",
            share(report.dropped_tokens, report.tokens + report.dropped_tokens),
        ),
        ("Events dropped", share(report.dropped_rows, report.rows)),
        (
            "Codes with quantile words",
            grouped(report.codes_with_quantiles),
        ),
    ]
    .into_iter()
    .map(|(name, value)| NamedValue {
        name: name.to_owned(),
        value,
    })
    .collect()
}

fn provenance(report: &Report) -> Vec<NamedValue> {
    let source = &report.provenance;
    let mut rows: Vec<NamedValue> = [
        ("Calor", source.calor_version.clone()),
        (
            "Device",
            format!("{} ({})", source.device, source.device_description),
        ),
        ("Platform", source.platform.clone()),
        ("Seed", source.seed.to_string()),
        ("Recipe, SHA-256", source.recipe_sha256.clone()),
        ("Sequences, hash", source.data_hash.clone()),
        ("Cohort", report.data.cohort.clone()),
    ]
    .into_iter()
    .map(|(name, value)| NamedValue {
        name: name.to_owned(),
        value,
    })
    .collect();
    rows.extend(source.checkpoint_files.iter().map(|file| NamedValue {
        name: file.name.clone(),
        value: format!("{} ({} bytes)", file.sha256, grouped(file.bytes)),
    }));
    rows
}

fn split_name(name: &str) -> &str {
    match name {
        "held_out" => "held-out",
        "train" => "training",
        other => other,
    }
}

/// The scores in the order of a table.
fn ordered(metrics: &Metrics) -> Vec<(&'static str, &Score)> {
    metric_names(metrics.task)
        .iter()
        .filter_map(|name| Some((*name, metrics.score(name)?)))
        .collect()
}

/// A metric's name as people write it.
fn title(metric: &str) -> String {
    match Metric::ALL.into_iter().find(|known| known.name() == metric) {
        Some(known) => known.title().to_owned(),
        None => match metric {
            "auroc_micro" => "AUROC, micro".to_owned(),
            "auprc_micro" => "AUPRC, micro".to_owned(),
            "micro_f1" => "Micro F1".to_owned(),
            other => other.to_owned(),
        },
    }
}

fn metric_row(title: String, metric: &str, score: &Score) -> MetricRow {
    let better = match higher_is_better(metric) {
        Some(true) => "higher is better",
        Some(false) => "lower is better",
        None => "",
    };
    let note = match score {
        Score::Undefined { reason } => reason.clone(),
        Score::Defined {
            note: Some(note), ..
        } => format!("{better}; {note}"),
        Score::Defined {
            interval: Interval::Unavailable { reason },
            ..
        } => format!("{better}; no interval: {reason}"),
        Score::Defined { .. } => better.to_owned(),
    };
    MetricRow {
        title,
        estimate: number(score.value(), 3),
        interval: interval(score).unwrap_or_default(),
        note,
        bar: bar(metric, score),
    }
}

fn split_subtitle(split: &SplitEvaluation) -> String {
    let mut text = format!(
        "{} patients, {} prediction times",
        grouped(split.metrics.patients as u64),
        grouped(split.samples)
    );
    if split.samples_with_unknown_label > 0 {
        text.push_str(&format!(
            "; {} of them with an unknown label count in the rows of single labels only",
            grouped(split.samples_with_unknown_label)
        ));
    }
    if let Some(loss) = split.loss {
        text.push_str(&format!("; mean loss {}", significant(loss)));
    }
    text
}

fn interval(score: &Score) -> Option<String> {
    let (low, high) = score.bounds()?;
    Some(format!("{low:.3} – {high:.3}"))
}

/// Place of a metric between 0 and 1 in percent of the width.
fn bar(metric: &str, score: &Score) -> Option<Bar> {
    let (at, (low, high)) = (score.value()?, score.bounds()?);
    if matches!(metric, "log_loss" | "rmse" | "r2") {
        return None;
    }
    let percent = |share: f64| format!("{:.1}", 100.0 * share.clamp(0.0, 1.0));
    Some(Bar {
        low: percent(low),
        width: percent(high - low),
        at: percent(at),
    })
}

fn number(value: Option<f64>, decimals: usize) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.decimals$}"))
}

fn quantity(quantity: &Quantity) -> String {
    quantity.value().map_or("–".to_owned(), significant)
}

/// Three significant digits, thousands grouped.
fn significant(value: f64) -> String {
    let magnitude = value.abs();
    if !value.is_finite() {
        "–".to_owned()
    } else if magnitude >= 1000.0 {
        let whole = grouped(magnitude.round() as u64);
        if value < 0.0 {
            format!("−{whole}")
        } else {
            whole
        }
    } else if value == 0.0 {
        "0".to_owned()
    } else if magnitude < 1e-4 {
        format!("{value:.2e}")
    } else {
        let decimals = (2 - magnitude.log10().floor() as i32).max(0) as usize;
        format!("{value:.decimals$}")
    }
}

/// A whole number with thin spaces between thousands.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// A time as `2026-11-23 14:05`, by the civil calendar (Hinnant's days-to-date algorithm).
fn utc(unix_s: u64) -> String {
    let seconds = UNIX_EPOCH + Duration::from_secs(unix_s);
    let total = seconds
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let (days, rest) = (total / 86_400, total % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 {
        month_index + 3
    } else {
        month_index - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}",
        rest / 3600,
        rest % 3600 / 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_grouped() {
        assert_eq!(grouped(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(grouped(12), "12");
        assert_eq!(significant(1234.6), "1\u{202f}235");
        assert_eq!(significant(0.012_345), "0.0123");
        assert_eq!(significant(12.345), "12.3");
        assert_eq!(significant(-3.0), "-3.00");
        assert_eq!(significant(f64::NAN), "–");
        assert_eq!(significant(3.2e-6), "3.20e-6");
    }

    #[test]
    fn times_are_of_the_civil_calendar() {
        assert_eq!(utc(0), "1970-01-01 00:00");
        assert_eq!(utc(951_827_696), "2000-02-29 12:34");
        assert_eq!(utc(1_795_442_700), "2026-11-23 14:05");
    }
}
