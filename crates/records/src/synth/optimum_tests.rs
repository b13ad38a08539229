use super::super::model::Interaction;
use super::super::options::SynthOptions;
use super::*;

fn tally(score: f64, positive: f64, negative: f64) -> Tally {
    Tally {
        score,
        positive,
        negative,
    }
}

/// AUROC of scores against labels that were drawn.
fn drawn_auroc(patients: impl Iterator<Item = (f64, bool)>) -> f64 {
    let mut tallies: Vec<Tally> = patients
        .map(|(score, label)| tally(score, f64::from(label), f64::from(!label)))
        .collect();
    auroc(&mut tallies).unwrap()
}

#[test]
fn auroc_counts_pairs_and_halves_ties() {
    // Positives 0.9, 0.6, 0.6; negatives 0.2, 0.6: of six pairs four are won and two tied.
    let mut tallies = [
        tally(0.9, 1.0, 0.0),
        tally(0.2, 0.0, 1.0),
        tally(0.6, 1.0, 0.0),
        tally(0.6, 0.0, 1.0),
        tally(0.6, 1.0, 0.0),
    ];
    assert!((auroc(&mut tallies).unwrap() - 5.0 / 6.0).abs() < 1e-12);
    assert!(auroc(&mut [tally(0.5, 1.0, 0.0)]).is_none());
}

/// Two signs with weights a and b: four kinds of patients, so that the AUROC is a sum of sixteen.
#[test]
fn two_signs_have_the_auroc_of_the_closed_form() {
    let options = SynthOptions {
        modalities: vec![SynthModality::Notes, SynthModality::Register],
        prevalence: 0.4,
        ..SynthOptions::default()
    };
    let (a, b) = (0.83, 0.57);
    let term = |weight, latent| Term { weight, latent };
    let model = Model::with_terms(
        &options,
        &[term(a, Latent::Breathlessness), term(b, Latent::Sex)],
        None,
    );
    let p = |first: f64, second: f64| sigmoid(model.intercept + a * first + b * second);
    let kinds: Vec<f64> = vec![p(-1.0, -1.0), p(-1.0, 1.0), p(1.0, -1.0), p(1.0, 1.0)];
    let prevalence = kinds.iter().sum::<f64>() / 4.0;
    assert!((prevalence - 0.4).abs() < 1e-4, "{prevalence}");

    let closed = |probabilities: &[f64]| {
        let mut won = 0.0;
        for (i, &positive) in probabilities.iter().enumerate() {
            for (j, &negative) in probabilities.iter().enumerate() {
                let half = if i == j {
                    0.5
                } else {
                    f64::from(positive > negative)
                };
                won += half * positive * (1.0 - negative);
            }
        }
        let positives: f64 = probabilities.iter().sum();
        won / positives / (probabilities.len() as f64 - positives)
    };
    let optimum = Oracle::new(&model).optimum();
    assert!((optimum.everything - closed(&kinds)).abs() < AUROC_ERROR);
    // Nothing is missing, and the label is the outcome.
    assert!((optimum.everything - optimum.observed).abs() < 1e-12);
    assert!((optimum.everything - optimum.outcome).abs() < 1e-12);
    assert!((optimum.site_alone - 0.5).abs() < 1e-12);
    // Alone, the other sign is averaged out.
    let by_notes = closed(&[(kinds[0] + kinds[1]) / 2.0, (kinds[2] + kinds[3]) / 2.0]);
    let by_sex = closed(&[(kinds[0] + kinds[2]) / 2.0, (kinds[1] + kinds[3]) / 2.0]);
    let of = |modality| {
        let mut all = optimum.modalities.iter();
        all.find(|one| one.modality == modality).unwrap()
    };
    let (register, notes) = (of(SynthModality::Register), of(SynthModality::Notes));
    assert!((notes.alone - by_notes).abs() < AUROC_ERROR);
    assert!((register.alone - by_sex).abs() < AUROC_ERROR);
    assert_eq!(register.without, notes.alone);
    // With two players: half of what it is alone, half of what it adds to the other.
    let expected = (notes.alone - 0.5 + optimum.everything - register.alone) / 2.0;
    assert!((notes.shapley - expected).abs() < 1e-12);
}

/// One uniform factor: the double integral by Simpson's rule, on a grid of its own.
#[test]
fn a_uniform_factor_has_the_auroc_of_the_integral() {
    let options = SynthOptions {
        modalities: vec![SynthModality::Image],
        ..SynthOptions::default()
    };
    let weight = 1.3;
    let model = Model::with_terms(
        &options,
        &[Term {
            weight,
            latent: Latent::Brightness,
        }],
        None,
    );
    let intervals = 2_000;
    let (half, step) = (weight * 3f64.sqrt(), 2.0 * weight * 3f64.sqrt() / 2_000.0);
    let p = |at: usize| sigmoid(model.intercept - half + at as f64 * step);
    // The negatives below each point by the trapezoid rule, then the positives over them.
    let (mut won, mut positives, mut below) = (0.0, 0.0, 0.0);
    let mut negatives = vec![0.0];
    for at in 1..=intervals {
        below += step * (2.0 - p(at - 1) - p(at)) / 2.0;
        negatives.push(below);
    }
    for (at, negatives) in negatives.iter().enumerate() {
        let simpson = match at {
            0 => 1.0,
            at if at == intervals => 1.0,
            at if at % 2 == 1 => 4.0,
            _ => 2.0,
        };
        won += simpson * step / 3.0 * p(at) * negatives;
        positives += simpson * step / 3.0 * p(at);
    }
    let expected = won / positives / below;
    let found = Oracle::new(&model).optimum().everything;
    assert!((found - expected).abs() < AUROC_ERROR, "{found} {expected}");
}

/// The default cohort and one with everything that complicates it, against 200,000 draws.
#[test]
fn the_optimum_is_what_its_scores_reach_on_draws() {
    let complicated = SynthOptions {
        missing: [
            (SynthModality::Image, 0.3),
            (SynthModality::Register, 0.4),
            (SynthModality::Notes, 0.2),
        ]
        .into(),
        missing_by_site: 0.7,
        site_effect: 0.5,
        group_bias: 0.5,
        label_noise: 0.08,
        prevalence: 0.35,
        ..SynthOptions::default()
    };
    for options in [SynthOptions::default(), complicated] {
        let model = Model::new(&options);
        let oracle = Oracle::new(&model);
        let optimum = oracle.optimum();
        let draws: Vec<Draw> = (1..=60_000)
            .into_par_iter()
            .map(|id| model.draw(id))
            .collect();
        let reached = |visible: &(dyn Fn(&Draw) -> Modalities + Sync)| {
            let scores: Vec<(f64, bool)> = draws
                .par_iter()
                .map(|draw| (oracle.probability(draw, visible(draw)), draw.recorded))
                .collect();
            drawn_auroc(scores.into_iter())
        };
        let near = |found: f64, expected: f64| {
            // The standard error of an AUROC of 60,000 draws is about 0.002.
            assert!((found - expected).abs() < 0.008, "{found} {expected}");
        };
        near(reached(&|_| model.kept), optimum.everything);
        near(reached(&|draw| draw.observed), optimum.observed);
        let outcomes = draws.iter().map(|draw| (draw.probability, draw.outcome));
        near(drawn_auroc(outcomes), optimum.outcome);
        for modality in [SynthModality::Image, SynthModality::Register] {
            let own = Modalities::NONE.with(modality);
            let alone = optimum
                .modalities
                .iter()
                .find(|one| one.modality == modality)
                .unwrap();
            near(reached(&|draw| draw.observed.and(own)), alone.alone);
            near(reached(&|draw| draw.observed.without(own)), alone.without);
        }
        // What is given is the mean of the label among those of a like score.
        let mut scores: Vec<(f64, bool)> = draws
            .iter()
            .map(|draw| (oracle.probability(draw, draw.observed), draw.recorded))
            .collect();
        scores.sort_by(|a, b| a.0.total_cmp(&b.0));
        for bin in scores.chunks(6_000) {
            let stated = bin.iter().map(|(score, _)| score).sum::<f64>() / 6_000.0;
            let share = bin.iter().filter(|(_, label)| *label).count() as f64 / 6_000.0;
            assert!((stated - share).abs() < 0.026, "{stated} {share}");
        }
        let sum: f64 = optimum.modalities.iter().map(|one| one.shapley).sum();
        assert!((sum - (optimum.observed - optimum.site_alone)).abs() < 1e-9);
    }
}

#[test]
fn the_lattice_costs_nothing_that_draws_could_show() {
    // Drawn probabilities, each counted as so much of a positive and of a negative: no lattice, and
    // a standard error near 0.0003 over 400,000 draws.
    let mut differences = Vec::new();
    for seed in 0..4 {
        let options = SynthOptions {
            seed,
            ..SynthOptions::default()
        };
        let model = Model::new(&options);
        let optimum = Oracle::new(&model).optimum();
        let mut tallies: Vec<Tally> = (0..100_000)
            .into_par_iter()
            .map(|id| {
                let probability = model.draw(id).probability;
                tally(probability, probability, 1.0 - probability)
            })
            .collect();
        differences.push(auroc(&mut tallies).unwrap() - optimum.everything);
    }
    let mean = differences.iter().sum::<f64>() / 4.0;
    assert!(mean.abs() < 1e-3, "{differences:?}");
}

#[test]
fn an_interaction_is_worth_more_to_both_than_to_either() {
    let options = SynthOptions::default();
    let with = Oracle::new(&Model::new(&options)).optimum();
    let without = Oracle::new(&Model::new(&SynthOptions {
        interaction: 0.0,
        ..options
    }))
    .optimum();
    assert!(with.everything > without.everything);
    let gain = |optimum: &Optimum, pair: [SynthModality; 2]| {
        let of = |wanted: &[SynthModality]| {
            let mut subsets = optimum.subsets.iter();
            subsets
                .find(|subset| subset.modalities == wanted)
                .unwrap()
                .auroc
        };
        of(&pair) - of(&pair[..1]).max(of(&pair[1..]))
    };
    let pair = [SynthModality::Image, SynthModality::Omics];
    assert!(gain(&with, pair) > gain(&without, pair) + 0.01);
}

/// An interaction and nothing else: four kinds of patients, of whom a quarter has it.
#[test]
fn an_interaction_has_the_auroc_of_the_closed_form() {
    let options = SynthOptions {
        modalities: vec![SynthModality::Image, SynthModality::Omics],
        prevalence: 0.4,
        ..SynthOptions::default()
    };
    let interaction = Interaction {
        weight: 1.7,
        latents: [Latent::Side, Latent::Switch],
    };
    let model = Model::with_terms(&options, &[], Some(interaction));
    let (base, raised) = (sigmoid(model.intercept), sigmoid(model.intercept + 1.7));
    let prevalence = 0.75 * base + 0.25 * raised;
    assert!((prevalence - 0.4).abs() < 1e-4, "{prevalence}");
    // Among positives and negatives, the share that the score puts high.
    let of_two = |share: f64, low: f64, high: f64| {
        let positives = share * high / (share * high + (1.0 - share) * low);
        let negatives = share * (1.0 - high) / (1.0 - (share * high + (1.0 - share) * low));
        0.5 + (positives - negatives) / 2.0
    };
    let optimum = Oracle::new(&model).optimum();
    let near = |found: f64, expected: f64| {
        assert!((found - expected).abs() < AUROC_ERROR, "{found} {expected}");
    };
    near(optimum.everything, of_two(0.25, base, raised));
    near(optimum.outcome, of_two(0.25, base, raised));
    // Who sees one sign alone knows of half of the patients that they do not have it.
    for modality in &optimum.modalities {
        near(modality.alone, of_two(0.5, base, (base + raised) / 2.0));
    }
}

#[test]
fn sources_play_the_same_game_as_their_modalities() {
    let optimum = Oracle::new(&Model::new(&SynthOptions::default())).optimum();
    let names: Vec<&str> = optimum
        .sources
        .iter()
        .map(|one| one.source.as_str())
        .collect();
    assert_eq!(names, ["text", "image", "waveform", "omics", "speech"]);
    let sum: f64 = optimum.sources.iter().map(|one| one.shapley).sum();
    assert!((sum - (optimum.observed - optimum.site_alone)).abs() < 1e-12);
    let auroc = |modalities: &[SynthModality]| {
        let mut subsets = optimum.subsets.iter();
        subsets
            .find(|subset| subset.modalities == modalities)
            .unwrap()
            .auroc
    };
    use SynthModality::{Image, Labs, Notes, Omics, Register, Speech, Waveform};
    assert_eq!(optimum.sources[0].alone, auroc(&[Register, Notes, Labs]));
    assert_eq!(
        optimum.sources[0].without,
        auroc(&[Image, Waveform, Omics, Speech])
    );

    // With two sources: half of what one is alone, half of what it adds to the other.
    let two = SynthOptions {
        modalities: vec![Register, Notes, Image],
        ..SynthOptions::default()
    };
    let optimum = Oracle::new(&Model::new(&two)).optimum();
    let [text, image] = &optimum.sources[..] else {
        panic!("two sources");
    };
    let expected = (text.alone - optimum.site_alone + optimum.observed - image.alone) / 2.0;
    assert!((text.shapley - expected).abs() < 1e-12);
}
