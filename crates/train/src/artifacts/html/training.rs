//! The sections about training: losses and rates over the steps, time by phase.

use calor_meter::MeterReport;
use serde::Serialize;

use super::charts::{DrawnChart, drawn};
use super::format::{grouped, significant};
use crate::artifacts::metrics::MetricsLine;
use crate::artifacts::plot::{Mark, Series, smooth, thin};
use crate::artifacts::report::Report;
use crate::recipe::Metric;

/// Points of a curve that are drawn: more cannot be told apart at its width.
const DRAWN: usize = 400;

#[derive(Serialize)]
pub(super) struct Training {
    pub subtitle: String,
    pub charts: Vec<DrawnChart>,
}

#[derive(Serialize)]
pub(super) struct Phase {
    pub name: &'static str,
    pub seconds: String,
    pub percent: String,
    pub mean: String,
    pub colour: usize,
}

pub(super) fn training(report: &Report, metrics: &[MetricsLine]) -> Training {
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
                norms.extend(line.grad_norm.map(|norm| [line.step as f64, norm]));
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

pub(super) fn phases(meter: &MeterReport) -> Vec<Phase> {
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

pub(super) fn earlier(report: &Report) -> String {
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
