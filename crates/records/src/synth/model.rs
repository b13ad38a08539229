//! The generating model: latent factors, the log-odds they sum to, and a patient's draw.

use crate::patient::Split;
use crate::time::MICROSECONDS_PER_DAY;

use super::density::Density;
use super::options::{Modalities, SynthModality, SynthOptions};
use super::random::{Draws, Stream};

/// Days within which the outcome counts.
pub(super) const HORIZON_DAYS: f64 = 5.0 * 365.0;

pub(super) const SITES: [&str; 4] = ["north", "east", "south", "west"];

/// Where each site stands on the scale of site effects: mean 0, variance 1, equally far apart
/// ((−3, −1, 1, 3) / √5).
pub(super) const SITE_SCORES: [f64; 4] = [
    -1.341_640_786_499_874,
    -0.447_213_595_499_958,
    0.447_213_595_499_958,
    1.341_640_786_499_874,
];

/// 2020-01-01, in days since 1970-01-01.
const FIRST_PREDICTION_DAY: i64 = 18_262;

/// A latent factor of a patient, by its position in [`FACTORS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Latent {
    Age,
    Sex,
    Breathlessness,
    Swelling,
    Course,
    Creatinine,
    CrpTrend,
    Brightness,
    Side,
    HeartRate,
    Amplitude,
    Pathway,
    Switch,
    Pitch,
    Pauses,
}

/// Both have mean 0 and variance 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Distribution {
    /// −1 or 1, equally likely.
    Sign,
    /// Uniform on [−√3, √3].
    Uniform,
}

impl Distribution {
    pub(super) fn statement(self) -> &'static str {
        match self {
            Distribution::Sign => "-1 or 1, equally likely",
            Distribution::Uniform => "uniform from -sqrt 3 to sqrt 3",
        }
    }
}

pub(super) struct Factor {
    pub name: &'static str,
    pub modality: SynthModality,
    pub distribution: Distribution,
    /// How it shows, with f its value.
    pub signature: &'static str,
}

const fn factor(
    name: &'static str,
    modality: SynthModality,
    distribution: Distribution,
    signature: &'static str,
) -> Factor {
    Factor {
        name,
        modality,
        distribution,
        signature,
    }
}

use Distribution::{Sign, Uniform};
use SynthModality::{Image, Labs, Notes, Omics, Register, Speech, Waveform};

/// In the order of [`Latent`].
#[rustfmt::skip]
pub(super) const FACTORS: [Factor; 15] = [
    factor("age", Register, Uniform, "age at the prediction: 60 + 10 f years"),
    factor("sex", Register, Sign, "woman -1, man 1"),
    factor("breathlessness", Notes, Sign, "a phrase: breathless on exertion 1, breathes freely -1"),
    factor("swelling", Notes, Sign, "a phrase: swollen ankles 1, slim ankles -1"),
    factor("course", Notes, Sign, "a phrase: worse than before 1, better than before -1"),
    factor("creatinine", Labs, Uniform, "mean of six values: 80 + 12 (f + site shift) umol/L"),
    factor("crp_trend", Labs, Uniform, "C-reactive protein 20 + 8 f t mg/L, t from -1 (oldest of six values) to 1 (latest)"),
    factor("brightness", Image, Uniform, "peak of the blob: 100 + 45 f grey levels above the ground"),
    factor("side", Image, Sign, "blob in the left half -1, in the right half 1"),
    factor("heart_rate", Waveform, Uniform, "75 + 15 f beats a minute"),
    factor("amplitude", Waveform, Uniform, "height of the R wave: 1 + 0.35 f mV (the T wave is always 0.3 mV)"),
    factor("pathway", Omics, Uniform, "mean of the genes of pathway P03 is shifted by f"),
    factor("switch", Omics, Sign, "mean of the genes of pathway P07 is shifted by 0.8 f"),
    factor("pitch", Speech, Uniform, "fundamental frequency 220 * 2^(f / sqrt 3) Hz"),
    factor("pauses", Speech, Uniform, "share of silence: 0.4 + 0.13 f"),
];

/// A summand of the log-odds: weight times factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Term {
    pub weight: f64,
    pub latent: Latent,
}

impl Term {
    pub(super) fn modality(&self) -> SynthModality {
        self.latent.factor().modality
    }

    pub(super) fn value(&self, values: &[f64; FACTORS.len()]) -> f64 {
        self.weight * values[self.latent as usize]
    }

    /// Its distribution where the factor is not known.
    pub(super) fn density(&self) -> Density {
        if self.is_sign() {
            Density::sign(self.weight)
        } else {
            Density::uniform(self.weight * 3f64.sqrt())
        }
    }

    /// Whether it is its weight or minus its weight.
    pub(super) fn is_sign(&self) -> bool {
        self.latent.factor().distribution == Sign
    }
}

/// The summand that factors carry together: its weight where all of them are 1, else 0. They are
/// signs, and no term has them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Interaction {
    pub weight: f64,
    pub latents: [Latent; 2],
}

impl Interaction {
    /// The modalities that carry its factors.
    pub(super) fn modalities(&self) -> Modalities {
        Modalities::of(&self.latents.map(|latent| latent.factor().modality))
    }

    pub(super) fn value(&self, values: &[f64; FACTORS.len()]) -> f64 {
        self.weight * self.chance(values, self.modalities())
    }

    /// How likely it is that all factors are 1, to who knows those in `visible`.
    pub(super) fn chance(&self, values: &[f64; FACTORS.len()], visible: Modalities) -> f64 {
        let chance_of = |latent: Latent| match visible.contains(latent.factor().modality) {
            true => f64::from(values[latent as usize] > 0.0),
            false => 0.5,
        };
        self.latents.into_iter().map(chance_of).product()
    }

    /// The values that [`Interaction::chance`] can have, and how many patients have each.
    pub(super) fn chances(&self, visible: Modalities) -> Vec<Chance> {
        let seen = self
            .latents
            .iter()
            .filter(|latent| visible.contains(latent.factor().modality))
            .count();
        let all = 0.5f64.powi(self.latents.len() as i32);
        let possible = Chance {
            chance: all / 0.5f64.powi(seen as i32),
            share: 0.5f64.powi(seen as i32),
        };
        let ruled_out = Chance {
            chance: 0.0,
            share: 1.0 - possible.share,
        };
        match seen {
            0 => vec![possible],
            _ => vec![ruled_out, possible],
        }
    }

    /// Its distribution where it is there with this chance.
    pub(super) fn density(&self, chance: f64) -> Density {
        Density::sometimes(self.weight, chance)
    }
}

/// What patients of whom the same is seen know of an interaction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Chance {
    /// Probability that it is there.
    pub chance: f64,
    /// Of all patients.
    pub share: f64,
}

impl Latent {
    pub(super) fn factor(self) -> &'static Factor {
        &FACTORS[self as usize]
    }
}

/// The weights, in log-odds a standard deviation of the factor.
const WEIGHTS: [(Latent, f64); 13] = [
    (Latent::Age, 0.4),
    (Latent::Sex, 0.25),
    (Latent::Breathlessness, 0.8),
    (Latent::Swelling, 0.6),
    (Latent::Course, 0.4),
    (Latent::Creatinine, 0.65),
    (Latent::CrpTrend, 0.45),
    (Latent::Brightness, 1.15),
    (Latent::HeartRate, 0.55),
    (Latent::Amplitude, 0.4),
    (Latent::Pathway, 0.85),
    (Latent::Pitch, 0.25),
    (Latent::Pauses, 0.2),
];

/// The model with its options: all that a patient's draw depends on besides the subject.
pub(super) struct Model {
    pub(super) options: SynthOptions,
    pub(super) kept: Modalities,
    pub(super) terms: Vec<Term>,
    pub(super) interaction: Option<Interaction>,
    pub(super) intercept: f64,
}

impl Model {
    /// `options` must have been checked.
    pub(super) fn new(options: &SynthOptions) -> Model {
        let terms = WEIGHTS.map(|(latent, weight)| Term { weight, latent });
        let interaction = Interaction {
            weight: options.interaction,
            latents: [Latent::Side, Latent::Switch],
        };
        Model::with_terms(options, &terms, Some(interaction))
    }

    /// With other terms. What is not made has none.
    pub(super) fn with_terms(
        options: &SynthOptions,
        terms: &[Term],
        interaction: Option<Interaction>,
    ) -> Model {
        let kept = Modalities::of(&options.modalities);
        let mut model = Model {
            options: options.clone(),
            kept,
            terms: terms
                .iter()
                .copied()
                .filter(|term| kept.contains(term.modality()))
                .collect(),
            interaction: interaction
                .filter(|interaction| interaction.modalities().without(kept) == Modalities::NONE),
            intercept: 0.0,
        };
        model.intercept = model.intercept_for_prevalence();
        model
    }

    /// The patient's draw: a hash of the seed and the subject alone.
    pub(super) fn draw(&self, subject_id: i64) -> Draw {
        let stream = |stream| Draws::of(self.options.seed, subject_id, stream);
        let mut latent = stream(Stream::Latent);
        let site = latent.below(SITES.len());
        let values = std::array::from_fn(|position| match FACTORS[position].distribution {
            Sign => latent.sign(),
            Uniform => latent.uniform(-1.0, 1.0) * 3f64.sqrt(),
        });

        let mut missing = stream(Stream::Missing);
        let mut observed = Modalities::NONE;
        for modality in SynthModality::ALL {
            let here = missing.unit() >= self.missing_probability(modality, site);
            if here && self.kept.contains(modality) {
                observed = observed.with(modality);
            }
        }

        let logit = self.offset(site)
            + self
                .terms
                .iter()
                .map(|term| term.value(&values))
                .sum::<f64>()
            + self
                .interaction
                .map_or(0.0, |interaction| interaction.value(&values));
        let probability = sigmoid(logit);

        let mut draws = stream(Stream::Outcome);
        let chance = draws.unit();
        let outcome = chance < probability;
        // The hazard is constant, so that the outcome falls within the horizon with `probability`.
        let hazard = softplus(logit) / HORIZON_DAYS;
        let time_days = -(-chance).ln_1p() / hazard;
        let end_days = HORIZON_DAYS * (1.0 + draws.unit());
        let overlooked = draws.unit() < self.options.group_bias && female(&values);
        let turned = draws.unit() < self.options.label_noise;
        let invented_days = HORIZON_DAYS * (1.0 - draws.unit());
        let recorded = (outcome && !overlooked) != turned;
        let (duration_days, event) = match (recorded, outcome) {
            (true, true) => (time_days, true),
            (true, false) => (invented_days, true),
            (false, true) => (end_days, false),
            (false, false) => (time_days.min(end_days), time_days <= end_days),
        };

        // At noon of some day of 2020.
        let day = FIRST_PREDICTION_DAY + stream(Stream::Times).below(365) as i64;
        Draw {
            subject_id,
            site,
            values,
            observed,
            split: self.split(subject_id),
            prediction_time_us: day * MICROSECONDS_PER_DAY + MICROSECONDS_PER_DAY / 2,
            logit,
            probability,
            outcome,
            recorded,
            duration_days,
            event,
        }
    }

    /// 70 % train, 15 % tune, 15 % are held out.
    pub(super) fn split(&self, subject_id: i64) -> Split {
        match Draws::of(self.options.seed, subject_id, Stream::Split).unit() {
            share if share < 0.7 => Split::Train,
            share if share < 0.85 => Split::Tuning,
            _ => Split::HeldOut,
        }
    }

    /// What the log-odds start from at a site.
    pub(super) fn offset(&self, site: usize) -> f64 {
        self.intercept + self.site_shift(site)
    }

    /// Of the log-odds, and of creatinine in standard deviations.
    pub(super) fn site_shift(&self, site: usize) -> f64 {
        self.options.site_effect * SITE_SCORES[site]
    }

    pub(super) fn missing_probability(&self, modality: SynthModality, site: usize) -> f64 {
        let tilt = self.options.missing_by_site * SITE_SCORES[site] / SITE_SCORES[3];
        self.options.missing_share(modality) * (1.0 + tilt)
    }

    /// How likely a patient of the site has these modalities and no others.
    pub(super) fn pattern_probability(&self, pattern: Modalities, site: usize) -> f64 {
        self.kept
            .iter()
            .map(|modality| {
                let missing = self.missing_probability(modality, site);
                if pattern.contains(modality) {
                    1.0 - missing
                } else {
                    missing
                }
            })
            .product()
    }

    /// Probability that the outcome is recorded, where it comes with `probability`.
    pub(super) fn recorded(&self, probability: f64, sex: f64) -> f64 {
        let noise = self.options.label_noise;
        let overlooked = if sex < 0.0 {
            self.options.group_bias
        } else {
            0.0
        };
        noise + (1.0 - 2.0 * noise) * (1.0 - overlooked) * probability
    }

    /// Weight of the sex, which is kept apart from the other terms since the bias depends on it.
    pub(super) fn sex_weight(&self) -> f64 {
        self.terms
            .iter()
            .find(|term| is_sex(term))
            .map_or(0.0, |term| term.weight)
    }

    /// All terms but the sex.
    pub(super) fn terms_without_sex(&self) -> impl Iterator<Item = &Term> {
        self.terms.iter().filter(|term| !is_sex(term))
    }

    /// By bisection over the exact distribution of the log-odds.
    fn intercept_for_prevalence(&self) -> f64 {
        let sum = self
            .terms
            .iter()
            .fold(Density::zero(), |sum, term| sum.plus(&term.density()));
        let sum = match &self.interaction {
            Some(interaction) => {
                let chance = interaction.chances(Modalities::NONE)[0].chance;
                sum.plus(&interaction.density(chance))
            }
            None => sum,
        };
        let prevalence = |intercept: f64| {
            let sites = (0..SITES.len()).map(|site| {
                sum.mean_of(|value| sigmoid(intercept + self.site_shift(site) + value))
            });
            sites.sum::<f64>() / SITES.len() as f64
        };
        let (mut low, mut high) = (-40.0, 40.0);
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if prevalence(middle) < self.options.prevalence {
                low = middle;
            } else {
                high = middle;
            }
        }
        (low + high) / 2.0
    }
}

/// A patient as drawn, before anything is written.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Draw {
    pub subject_id: i64,
    /// Position in [`SITES`].
    pub site: usize,
    /// In the order of [`FACTORS`]; also of modalities that are missing or not made.
    pub values: [f64; FACTORS.len()],
    /// What is there.
    pub observed: Modalities,
    pub split: Split,
    pub prediction_time_us: i64,
    pub logit: f64,
    /// Of the outcome, given everything.
    pub probability: f64,
    pub outcome: bool,
    /// The label: the outcome after bias and noise.
    pub recorded: bool,
    /// From the prediction to the recorded event or the end of observation.
    pub duration_days: f64,
    pub event: bool,
}

impl Draw {
    pub(super) fn value(&self, latent: Latent) -> f64 {
        self.values[latent as usize]
    }

    pub(super) fn is_female(&self) -> bool {
        female(&self.values)
    }
}

fn female(values: &[f64; FACTORS.len()]) -> bool {
    values[Latent::Sex as usize] < 0.0
}

fn is_sex(term: &Term) -> bool {
    term.latent == Latent::Sex
}

pub(super) fn sigmoid(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

/// −ln(1 − sigmoid(x)), without cancellation.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
