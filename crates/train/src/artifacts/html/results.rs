//! The section of a split: its metrics with their intervals, its curves.

use calor_evaluate::{Curves, Interval, Metrics, Score, TaskKind, higher_is_better, metric_names};
use serde::Serialize;

use super::charts::{DrawnChart, drawn};
use super::format::{grouped, number, significant, split_name, title};
use crate::artifacts::plot::{Mark, Series, thin};
use crate::artifacts::report::SplitEvaluation;

/// Points of a curve that are drawn: more cannot be told apart at its width.
const DRAWN: usize = 400;

#[derive(Serialize)]
pub(super) struct Split {
    pub title: String,
    pub subtitle: String,
    pub rows: Vec<MetricRow>,
    pub forest: bool,
    pub method: &'static str,
    pub charts: Vec<DrawnChart>,
}

#[derive(Serialize)]
pub(super) struct MetricRow {
    pub title: String,
    pub estimate: String,
    pub interval: String,
    pub note: String,
    pub bar: Option<Bar>,
}

#[derive(Serialize)]
pub(super) struct Bar {
    pub low: String,
    pub width: String,
    pub at: String,
}

pub(super) fn split_view(name: &str, split: &SplitEvaluation) -> Split {
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
    for entity in &split.entities {
        rows.push(MetricRow {
            title: format!("{}: F1", entity.name),
            estimate: number(Some(entity.f1), 3),
            interval: String::new(),
            note: format!(
                "precision {:.3}, recall {:.3}, {} in the text, {} predicted",
                entity.precision,
                entity.recall,
                grouped(entity.support),
                grouped(entity.predicted)
            ),
            bar: None,
        });
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
        title: match per_token(&split.metrics) {
            true => format!("Results on {} texts", split_name(name)),
            false => format!("Results on {} patients", split_name(name)),
        },
        subtitle: split_subtitle(split),
        rows,
        forest,
        method: match per_token(&split.metrics) {
            true => "Percentile bootstrap over rows, or over patients where the texts are theirs.",
            false => {
                "Percentile bootstrap over patients: a patient's prediction times stay together."
            }
        },
        charts,
    }
}

/// Whether the rows are texts.
fn per_token(metrics: &Metrics) -> bool {
    matches!(metrics.task, TaskKind::Tokens | TaskKind::CausalLm)
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

/// The scores in the order of a table.
pub(super) fn ordered(metrics: &Metrics) -> Vec<(&'static str, &Score)> {
    metric_names(metrics.task)
        .iter()
        .filter_map(|name| Some((*name, metrics.score(name)?)))
        .collect()
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
    let mut text = match per_token(&split.metrics) {
        true => format!("{} rows", grouped(split.samples)),
        false => format!(
            "{} patients, {} prediction times",
            grouped(split.metrics.patients as u64),
            grouped(split.samples)
        ),
    };
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

pub(super) fn interval(score: &Score) -> Option<String> {
    let (low, high) = score.bounds()?;
    Some(format!("{low:.3} – {high:.3}"))
}

/// Place of a metric between 0 and 1 in percent of the width.
fn bar(metric: &str, score: &Score) -> Option<Bar> {
    let (at, (low, high)) = (score.value()?, score.bounds()?);
    if matches!(metric, "log_loss" | "rmse" | "r2" | "loss" | "perplexity") {
        return None;
    }
    let percent = |share: f64| format!("{:.1}", 100.0 * share.clamp(0.0, 1.0));
    Some(Bar {
        low: percent(low),
        width: percent(high - low),
        at: percent(at),
    })
}
