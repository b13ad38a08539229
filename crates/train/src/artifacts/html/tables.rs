//! The tables: what was measured, the patients, where the run came from.

use calor_meter::{ActivityEnergy, ActivityThroughput, MeterReport, Quantity};
use calor_sequence::PrepareReport;
use serde::Serialize;

use super::format::{grouped, significant, split_name};
use crate::artifacts::report::Report;

#[derive(Serialize)]
pub(super) struct QuantityRow {
    pub name: &'static str,
    pub training: String,
    pub evaluation: String,
    pub status: &'static str,
    pub source: String,
}

#[derive(Serialize)]
pub(super) struct DataRow {
    pub split: String,
    pub patients: String,
    pub samples: String,
    pub tokens: String,
    pub classes: String,
}

#[derive(Serialize)]
pub(super) struct NamedValue {
    pub name: String,
    pub value: String,
}

pub(super) fn quantities(meter: &MeterReport) -> Vec<QuantityRow> {
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

pub(super) fn data(report: &Report) -> Vec<DataRow> {
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

pub(super) fn sequences(report: &PrepareReport) -> Vec<NamedValue> {
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
    .chain(modalities(report))
    .collect()
}

/// A number and its share of a whole.
fn share(part: u64, whole: u64) -> String {
    format!(
        "{} ({:.1} %)",
        grouped(part),
        100.0 * part as f64 / whole.max(1) as f64
    )
}

/// Items of each modality, and how many patients have none.
fn modalities(report: &PrepareReport) -> Vec<NamedValue> {
    let mut rows: Vec<NamedValue> = report
        .modalities
        .iter()
        .map(|(modality, counts)| NamedValue {
            name: format!("Items: {modality}"),
            value: format!(
                "{}; missing for {}",
                grouped(counts.items),
                share(counts.missing_samples, report.samples)
            ),
        })
        .collect();
    if report.dropped_items > 0 {
        rows.push(NamedValue {
            name: "Items beyond `max_items`, left out".to_owned(),
            value: grouped(report.dropped_items),
        });
    }
    rows
}

pub(super) fn provenance(report: &Report) -> Vec<NamedValue> {
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
