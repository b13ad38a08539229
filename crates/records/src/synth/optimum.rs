//! The best that any model can do on a synthetic cohort, from the generating model itself.
//!
//! With factors that are independent, what a set of modalities does not show adds a known
//! distribution to the log-odds: that of the terms, and that of the interaction, given what is seen
//! of it. The best score of a patient is the probability of the label averaged over it. Distributions are kept on a lattice ([`super::density`]), so that
//! nothing here is sampled. The site counts as known throughout: it stands in every row.

use rayon::prelude::*;
use serde::Serialize;

use super::density::Density;
use super::model::{Chance, Draw, Latent, Model, SITES, Term, sigmoid};
use super::options::{Modalities, SynthModality};

/// Largest error of an AUROC below, from the width of the lattice (tested against draws).
pub(super) const AUROC_ERROR: f64 = 2e-4;

/// The highest AUROC in expectation, and what each modality is worth.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Optimum {
    /// For the recorded label, with every modality of every patient.
    pub everything: f64,
    /// With what is not missing.
    pub observed: f64,
    /// With the site alone.
    pub site_alone: f64,
    /// For the outcome itself, before bias and noise, with every modality of every patient.
    pub outcome: f64,
    /// In the order of [`SynthModality::ALL`].
    pub modalities: Vec<ModalityOptimum>,
    /// The same of what a model is given apart: everything that is written as text counts as one.
    pub sources: Vec<SourceOptimum>,
    /// For the recorded label with each set of modalities, as far as they are not missing. The
    /// Shapley values are over these.
    pub subsets: Vec<SubsetOptimum>,
    /// Largest numerical error of these numbers.
    pub error: f64,
}

/// What one modality is worth, as far as it is not missing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModalityOptimum {
    pub modality: SynthModality,
    /// AUROC with it alone.
    pub alone: f64,
    /// AUROC with all others.
    pub without: f64,
    /// Its Shapley value over the AUROC; all of them sum to `observed - site_alone`.
    pub shapley: f64,
}

/// What the modalities that a model is given together are worth, as [`ModalityOptimum`] says it of one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SourceOptimum {
    /// `text`, or the modality's name.
    pub source: String,
    pub modalities: Vec<SynthModality>,
    pub alone: f64,
    pub without: f64,
    /// Over the sources as players.
    pub shapley: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SubsetOptimum {
    pub modalities: Vec<SynthModality>,
    pub auroc: f64,
}

/// Patients with one score: how many of them, as shares, have the label and have it not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tally {
    pub score: f64,
    pub positive: f64,
    pub negative: f64,
}

/// Area under the ROC curve: the probability that a positive scores above a negative, ties
/// counted half (Mann and Whitney 1947; scikit-learn's `roc_auc_score`). `None` without either.
pub(super) fn auroc(tallies: &mut [Tally]) -> Option<f64> {
    tallies.sort_unstable_by(|a, b| a.score.total_cmp(&b.score));
    let (mut won, mut positives, mut negatives) = (0.0, 0.0, 0.0);
    for tied in tallies.chunk_by(|a, b| a.score == b.score) {
        let positive: f64 = tied.iter().map(|tally| tally.positive).sum();
        let negative: f64 = tied.iter().map(|tally| tally.negative).sum();
        won += positive * (negatives + negative / 2.0);
        positives += positive;
        negatives += negative;
    }
    (positives > 0.0 && negatives > 0.0).then(|| won / (positives * negatives))
}

/// Knows the model and scores patients by what is seen of them.
pub(super) struct Oracle<'a> {
    model: &'a Model,
    /// By set of modalities: the distribution of what they show of the log-odds, sex left out.
    seen: Vec<Seen>,
    /// By set of modalities: that of what they do not show, for each chance of the interaction.
    unseen: Vec<Vec<Unseen>>,
}

/// What is not seen of patients to whom the interaction has the same chance.
struct Unseen {
    chance: Chance,
    density: Density,
}

/// Patients of whom all that is seen are signs tie in their scores. The lattice would break those
/// ties, so that seen signs are kept exactly, and only the rest is on the lattice.
struct Seen {
    /// Each sum that the signs can have, and how likely it is.
    signs: Vec<(f64, f64)>,
    rest: Density,
}

impl Seen {
    fn of(terms: &[&Term]) -> Seen {
        let mut seen = Seen {
            signs: vec![(0.0, 1.0)],
            rest: Density::zero(),
        };
        for term in terms {
            if term.is_sign() {
                let both = |&(sum, share): &(f64, f64)| {
                    [-term.weight, term.weight].map(|value| (sum + value, share / 2.0))
                };
                seen.signs = seen.signs.iter().flat_map(both).collect();
            } else {
                seen.rest = seen.rest.plus(&term.density());
            }
        }
        seen
    }
}

impl Unseen {
    fn of(model: &Model, visible: Modalities, terms: &Density) -> Vec<Unseen> {
        let Some(interaction) = &model.interaction else {
            let chance = Chance {
                chance: 0.0,
                share: 1.0,
            };
            return vec![Unseen {
                chance,
                density: terms.clone(),
            }];
        };
        let with = |chance: Chance| Unseen {
            chance,
            density: terms.plus(&interaction.density(chance.chance)),
        };
        let chances = interaction.chances(visible);
        chances.into_iter().map(with).collect()
    }
}

impl<'a> Oracle<'a> {
    pub(super) fn new(model: &'a Model) -> Oracle<'a> {
        let sets = Modalities::of(&SynthModality::ALL).subsets();
        let (seen, unseen) = sets
            .map(|set| {
                let (seen, unseen): (Vec<&Term>, Vec<&Term>) = model
                    .terms_without_sex()
                    .partition(|term| set.contains(term.modality()));
                let terms = unseen
                    .iter()
                    .fold(Density::zero(), |sum, term| sum.plus(&term.density()));
                (Seen::of(&seen), Unseen::of(model, set, &terms))
            })
            .unzip();
        Oracle {
            model,
            seen,
            unseen,
        }
    }

    /// The probability that the label of this patient is positive, given what `visible` shows and
    /// the site.
    pub(super) fn probability(&self, draw: &Draw, visible: Modalities) -> f64 {
        let seen: f64 = self
            .model
            .terms_without_sex()
            .filter(|term| visible.contains(term.modality()))
            .map(|term| term.value(&draw.values))
            .sum();
        let chance = self
            .model
            .interaction
            .map_or(0.0, |interaction| interaction.chance(&draw.values, visible));
        // The chances are powers of two and 0, so that they can be compared.
        let mean_over_unseen = |score: &dyn Fn(f64) -> f64| -> f64 {
            self.unseen[visible.index()]
                .iter()
                .filter(|unseen| unseen.chance.chance == chance)
                .map(|unseen| unseen.density.mean_of(score))
                .sum()
        };
        let known = self.model.offset(draw.site) + seen;
        let with_sex = |sex: f64| {
            let known = known + self.model.sex_weight() * sex;
            let outcome = mean_over_unseen(&|unseen| sigmoid(known + unseen));
            self.model.recorded(outcome, sex)
        };
        if visible.contains(SynthModality::Register) {
            with_sex(draw.value(Latent::Sex))
        } else {
            (with_sex(-1.0) + with_sex(1.0)) / 2.0
        }
    }

    /// The optimum in expectation.
    pub(super) fn optimum(&self) -> Optimum {
        let kept = self.model.kept;
        let curves = self.curves();
        let sets: Vec<Modalities> = kept.subsets().collect();
        let values: Vec<f64> = sets
            .par_iter()
            .map(|&set| self.auroc_with(set, &curves))
            .collect();
        let mut by_index = vec![f64::NAN; Modalities::SETS];
        for (set, value) in sets.iter().zip(&values) {
            by_index[set.index()] = *value;
        }
        let of = |set: Modalities| by_index[set.index()];

        let mut everyone: Vec<Tally> = (0..SITES.len())
            .flat_map(|site| tallies(&curves[kept.index()][self.curve_of(site)], 1.0))
            .collect();
        let modalities = kept
            .iter()
            .map(|modality| {
                let own = Modalities::NONE.with(modality);
                ModalityOptimum {
                    modality,
                    alone: of(own),
                    without: of(kept.without(own)),
                    shapley: shapley(kept, modality, of),
                }
            })
            .collect();
        let sources = sources(kept);
        // The first modality of each source plays for all of it.
        let players = Modalities::of(
            &sources
                .iter()
                .map(|source| source.player)
                .collect::<Vec<_>>(),
        );
        let played = |set: Modalities| {
            let chosen = sources.iter().filter(|source| set.contains(source.player));
            of(chosen.fold(Modalities::NONE, |all, source| all.or(source.modalities)))
        };
        let sources = sources
            .iter()
            .map(|source| SourceOptimum {
                source: source.name.to_owned(),
                modalities: source.modalities.iter().collect(),
                alone: of(source.modalities),
                without: of(kept.without(source.modalities)),
                shapley: shapley(players, source.player, played),
            })
            .collect();
        Optimum {
            everything: auroc(&mut everyone).unwrap_or(0.5),
            observed: of(kept),
            site_alone: of(Modalities::NONE),
            outcome: self.outcome_auroc(),
            modalities,
            sources,
            subsets: sets
                .iter()
                .zip(values)
                .map(|(set, auroc)| SubsetOptimum {
                    modalities: set.iter().collect(),
                    auroc,
                })
                .collect(),
            error: AUROC_ERROR,
        }
    }

    /// AUROC when only `allowed` may be used, and of it what is not missing.
    fn auroc_with(&self, allowed: Modalities, curves: &[Vec<Curve>]) -> f64 {
        // What is seen of how many, at each curve.
        let mut weights = vec![[0.0; SITES.len()]; Modalities::SETS];
        for site in 0..SITES.len() {
            for pattern in self.model.kept.subsets() {
                let weight = self.model.pattern_probability(pattern, site);
                weights[pattern.and(allowed).index()][self.curve_of(site)] += weight;
            }
        }
        let mut all: Vec<Tally> = Vec::new();
        for (curves, weights) in curves.iter().zip(&weights) {
            for (curve, &weight) in curves
                .iter()
                .zip(weights)
                .filter(|(_, weight)| **weight > 0.0)
            {
                all.extend(tallies(curve, weight));
            }
        }
        // Every set has positives and negatives: the prevalence lies between 0 and 1.
        auroc(&mut all).unwrap_or(0.5)
    }

    /// AUROC for the outcome before bias and noise, with everything.
    fn outcome_auroc(&self) -> f64 {
        let mut all = Vec::new();
        for site in 0..SITES.len() {
            for sex in [-1.0, 1.0] {
                all.extend(
                    self.outcome_curve(self.model.kept, site, sex)
                        .flat_map(|curve| tallies(&curve, 1.0).collect::<Vec<_>>()),
                );
            }
        }
        auroc(&mut all).unwrap_or(0.5)
    }

    /// Which curve of a set of modalities is a site's: they are all one where sites do not differ.
    fn curve_of(&self, site: usize) -> usize {
        if self.model.options.site_effect == 0.0 {
            0
        } else {
            site
        }
    }

    /// By set of modalities and site: how likely each score is.
    fn curves(&self) -> Vec<Vec<Curve>> {
        let sites = self.curve_of(SITES.len() - 1) + 1;
        (0..Modalities::SETS)
            .into_par_iter()
            .map(|index| {
                let Some(set) = self.model.kept.subsets().find(|set| set.index() == index) else {
                    return Vec::new();
                };
                (0..sites).map(|site| self.curve(set, site)).collect()
            })
            .collect()
    }

    /// Of the outcome before bias and noise, among patients of one sex; a curve for each state of what
    /// is seen of signs and of the interaction.
    fn outcome_curve(
        &self,
        visible: Modalities,
        site: usize,
        sex: f64,
    ) -> impl Iterator<Item = Curve> {
        let known = self.model.offset(site) + self.model.sex_weight() * sex;
        let seen = &self.seen[visible.index()];
        self.unseen[visible.index()].iter().flat_map(move |unseen| {
            seen.signs.iter().map(move |&(signs, share)| {
                let means = seen
                    .rest
                    .means_of_sum(&unseen.density, |value| sigmoid(known + signs + value));
                let share = share * unseen.chance.share;
                let scaled = means.into_iter();
                scaled
                    .map(|(mass, probability)| (share * mass, probability))
                    .collect()
            })
        })
    }

    fn curve(&self, visible: Modalities, site: usize) -> Curve {
        let with_sex = |sex: f64| -> Curve {
            self.outcome_curve(visible, site, sex)
                .flatten()
                .map(|(mass, probability)| (mass, self.model.recorded(probability, sex)))
                .collect()
        };
        let (women, men) = (with_sex(-1.0), with_sex(1.0));
        if visible.contains(SynthModality::Register) {
            let halved = women.into_iter().chain(men);
            return halved.map(|(mass, score)| (mass / 2.0, score)).collect();
        }
        women
            .into_iter()
            .zip(men)
            .map(|((mass, women), (_, men))| (mass, (women + men) / 2.0))
            .collect()
    }
}

/// Shares of patients and their probability of a positive label (or of the outcome), which is the
/// best score.
type Curve = Vec<(f64, f64)>;

fn tallies(curve: &[(f64, f64)], weight: f64) -> impl Iterator<Item = Tally> + '_ {
    curve.iter().map(move |&(mass, probability)| Tally {
        score: probability,
        positive: weight * mass * probability,
        negative: weight * mass * (1.0 - probability),
    })
}

/// What a model is given apart, with the modality that plays for it.
struct Source {
    name: &'static str,
    modalities: Modalities,
    player: SynthModality,
}

/// Text first; then each modality that has files, in their order.
fn sources(kept: Modalities) -> Vec<Source> {
    let text = kept.iter().filter(|one| one.item().is_none());
    let text = Modalities::of(&text.collect::<Vec<_>>());
    let written = text.iter().next().map(|player| Source {
        name: "text",
        modalities: text,
        player,
    });
    let items = kept.without(text);
    let apart = items.iter().map(|player| Source {
        name: player.name(),
        modalities: Modalities::of(&[player]),
        player,
    });
    written.into_iter().chain(apart).collect()
}

/// The mean of what `modality` adds to `value` over all orders in which the modalities of `all` can
/// be added (Shapley 1953).
fn shapley(all: Modalities, modality: SynthModality, value: impl Fn(Modalities) -> f64) -> f64 {
    let factorial = |n: usize| (1..=n).map(|factor| factor as f64).product::<f64>();
    let others = all.without(Modalities::NONE.with(modality));
    others
        .subsets()
        .map(|set| {
            let orders = factorial(set.len()) * factorial(others.len() - set.len());
            orders / factorial(all.len()) * (value(set.with(modality)) - value(set))
        })
        .sum()
}

#[cfg(test)]
#[path = "optimum_tests.rs"]
mod tests;
