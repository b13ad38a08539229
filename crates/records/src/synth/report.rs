//! What was written, and the generating model as `generating_model.json` has it.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use crate::patient::Split;

use super::model::{Draw, FACTORS, HORIZON_DAYS, Model, SITE_SCORES, SITES};
use super::optimum::{Optimum, Tally, auroc};
use super::options::{SynthModality, SynthOptions};

/// What was written, and what a model can at best make of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SynthReport {
    pub options: SynthOptions,
    /// Patients by split.
    pub splits: BTreeMap<Split, u64>,
    /// Rows under `data/`.
    pub rows: u64,
    /// Files of items, and their bytes.
    pub item_files: u64,
    pub item_bytes: u64,
    /// Shares of patients with the outcome, and with a positive label.
    pub outcome_share: f64,
    pub label_share: f64,
    /// Shares of patients without each modality.
    pub missing: BTreeMap<SynthModality, f64>,
    /// In expectation.
    pub optimum: Optimum,
    /// On the held-out patients of this cohort.
    pub held_out: HeldOutOptimum,
}

/// AUROC of the best scores against the labels of the held-out patients (of the first 500,000
/// patients): what chance made of the optimum. `None` where all labels are alike.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeldOutOptimum {
    pub patients: u64,
    /// With every modality of every patient.
    pub everything: Option<f64>,
    /// With what is not missing.
    pub observed: Option<f64>,
    pub modalities: Vec<HeldOutModality>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeldOutModality {
    pub modality: SynthModality,
    /// With it alone, as far as it is not missing.
    pub alone: Option<f64>,
}

/// Counts of one shard or of several.
#[derive(Clone, Debug, Default)]
pub(super) struct ShardTally {
    pub rows: u64,
    pub files: u64,
    pub bytes: u64,
    pub held_out: Vec<HeldOutScores>,
    patients: u64,
    splits: BTreeMap<Split, u64>,
    outcomes: u64,
    labels: u64,
    present: [u64; SynthModality::ALL.len()],
}

/// A held-out patient's label and best scores.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeldOutScores {
    pub recorded: bool,
    pub everything: f32,
    pub observed: f32,
    pub alone: [f32; SynthModality::ALL.len()],
}

impl ShardTally {
    pub(super) fn add(&mut self, draw: &Draw, rows: usize) {
        self.patients += 1;
        self.rows += rows as u64;
        *self.splits.entry(draw.split).or_default() += 1;
        self.outcomes += u64::from(draw.outcome);
        self.labels += u64::from(draw.recorded);
        for modality in draw.observed.iter() {
            self.present[modality as usize] += 1;
        }
    }

    pub(super) fn plus(mut self, other: ShardTally) -> ShardTally {
        self.rows += other.rows;
        self.files += other.files;
        self.bytes += other.bytes;
        self.held_out.extend(other.held_out);
        self.patients += other.patients;
        for (split, count) in other.splits {
            *self.splits.entry(split).or_default() += count;
        }
        self.outcomes += other.outcomes;
        self.labels += other.labels;
        for (sum, count) in self.present.iter_mut().zip(other.present) {
            *sum += count;
        }
        self
    }
}

impl SynthReport {
    pub(super) fn new(model: &Model, optimum: Optimum, tally: &ShardTally) -> SynthReport {
        let share = |count: u64| count as f64 / tally.patients.max(1) as f64;
        let held_out = |score: &dyn Fn(&HeldOutScores) -> f32| {
            let mut tallies: Vec<Tally> = tally
                .held_out
                .iter()
                .map(|scores| Tally {
                    score: f64::from(score(scores)),
                    positive: f64::from(scores.recorded),
                    negative: f64::from(!scores.recorded),
                })
                .collect();
            auroc(&mut tallies)
        };
        SynthReport {
            options: model.options.clone(),
            splits: tally.splits.clone(),
            rows: tally.rows,
            item_files: tally.files,
            item_bytes: tally.bytes,
            outcome_share: share(tally.outcomes),
            label_share: share(tally.labels),
            missing: model
                .kept
                .iter()
                .map(|modality| (modality, 1.0 - share(tally.present[modality as usize])))
                .collect(),
            optimum,
            held_out: HeldOutOptimum {
                patients: tally.held_out.len() as u64,
                everything: held_out(&|scores| scores.everything),
                observed: held_out(&|scores| scores.observed),
                modalities: model
                    .kept
                    .iter()
                    .map(|modality| HeldOutModality {
                        modality,
                        alone: held_out(&|scores| scores.alone[modality as usize]),
                    })
                    .collect(),
            },
        }
    }
}

/// The content of `generating_model.json`.
pub(super) fn description(model: &Model, report: &SynthReport) -> Value {
    let factors: Vec<Value> = FACTORS
        .iter()
        .filter(|factor| model.kept.contains(factor.modality))
        .map(|factor| {
            json!({
                "name": factor.name,
                "modality": factor.modality,
                "distribution": factor.distribution.statement(),
                "signature": factor.signature,
            })
        })
        .collect();
    let terms: Vec<Value> = model
        .terms
        .iter()
        .map(|term| json!({"weight": term.weight, "factor": term.latent.factor().name}))
        .collect();
    let interaction = model.interaction.map(|interaction| {
        json!({
            "weight": interaction.weight,
            "factors": interaction.latents.map(|latent| latent.factor().name),
        })
    });
    let sites: Vec<Value> = SITES
        .iter()
        .enumerate()
        .map(|(site, name)| {
            let missing: BTreeMap<SynthModality, f64> = model
                .kept
                .iter()
                .map(|modality| (modality, model.missing_probability(modality, site)))
                .collect();
            json!({
                "name": name,
                "share": 1.0 / SITES.len() as f64,
                "score": SITE_SCORES[site],
                "shift": model.site_shift(site),
                "missing": missing,
            })
        })
        .collect();
    json!({
        "schema": 1,
        "factors": factors,
        "logit": "intercept + shift of the site + sum over terms of weight * factor + weight of the \
                  interaction where all of its factors are 1",
        "intercept": model.intercept,
        "terms": terms,
        "interaction": interaction,
        "sites": sites,
        "outcome": format!("true with probability 1 / (1 + exp(-logit)), within {HORIZON_DAYS} days"),
        "label": "the outcome, of women overlooked with probability group_bias, then turned around \
                  with probability label_noise",
        "report": report,
    })
}
