use super::*;

fn biased() -> SynthOptions {
    SynthOptions {
        missing: [(Image, 0.3), (Register, 0.2)].into(),
        missing_by_site: 0.8,
        site_effect: 0.6,
        group_bias: 0.4,
        label_noise: 0.1,
        prevalence: 0.25,
        ..SynthOptions::default()
    }
}

fn draws(options: &SynthOptions, patients: i64) -> (Model, Vec<Draw>) {
    options.check().unwrap();
    let model = Model::new(options);
    let draws = (1..=patients).map(|subject| model.draw(subject)).collect();
    (model, draws)
}

/// Asserts that a count of a share is where chance puts it, within 4 standard errors.
fn assert_share(hits: usize, of: usize, expected: f64) {
    let share = hits as f64 / of as f64;
    let error = (expected * (1.0 - expected) / of as f64).sqrt().max(1e-9);
    assert!(
        (share - expected).abs() <= 4.0 * error,
        "{share} instead of {expected}, {of} draws"
    );
}

#[test]
fn factors_stand_in_the_order_of_their_names() {
    // The enumeration and the table are indexed by one another.
    assert_eq!(Latent::Pauses as usize + 1, FACTORS.len());
    assert_eq!(Latent::Side.factor().name, "side");
    assert_eq!(Latent::Switch.factor().name, "switch");
    assert_eq!(Latent::HeartRate.factor().name, "heart_rate");
    for modality in SynthModality::ALL {
        assert!(FACTORS.iter().any(|factor| factor.modality == modality));
    }
}

#[test]
fn factors_have_mean_zero_and_variance_one_and_are_unrelated() {
    let (_, draws) = draws(&SynthOptions::default(), 20_000);
    for (a, factor) in FACTORS.iter().enumerate() {
        for b in a..FACTORS.len() {
            let mean_product = draws
                .iter()
                .map(|draw| draw.values[a] * draw.values[b])
                .sum::<f64>()
                / 20_000.0;
            let expected = f64::from(a == b);
            assert!((mean_product - expected).abs() < 0.035, "{}", factor.name);
        }
        let mean = draws.iter().map(|draw| draw.values[a]).sum::<f64>() / 20_000.0;
        assert!(mean.abs() < 0.035, "{}", factor.name);
    }
}

#[test]
fn the_logit_is_the_stated_sum() {
    let (model, draws) = draws(&biased(), 50);
    for draw in &draws {
        let mut sum = model.intercept + 0.6 * SITE_SCORES[draw.site];
        for (latent, weight) in WEIGHTS {
            sum += weight * draw.value(latent);
        }
        if draw.value(Latent::Side) == 1.0 && draw.value(Latent::Switch) == 1.0 {
            sum += 1.6;
        }
        assert!((draw.logit - sum).abs() < 1e-12);
        assert!((draw.probability - 1.0 / (1.0 + (-sum).exp())).abs() < 1e-12);
    }
}

#[test]
fn outcomes_follow_the_probability() {
    let (_, draws) = draws(&SynthOptions::default(), 20_000);
    let outcomes = draws.iter().filter(|draw| draw.outcome).count();
    assert_share(outcomes, draws.len(), 0.3);
    for tenth in 0..10 {
        let bin: Vec<&Draw> = draws
            .iter()
            .filter(|draw| (draw.probability * 10.0) as usize == tenth)
            .collect();
        assert!(bin.len() > 300, "{tenth}: {}", bin.len());
        let mean = bin.iter().map(|draw| draw.probability).sum::<f64>() / bin.len() as f64;
        assert_share(
            bin.iter().filter(|draw| draw.outcome).count(),
            bin.len(),
            mean,
        );
    }
    // Without bias and noise what is recorded is the outcome.
    assert!(draws.iter().all(|draw| draw.outcome == draw.recorded));
}

#[test]
fn labels_follow_bias_and_noise() {
    let (model, draws) = draws(&biased(), 20_000);
    for sex in [-1.0, 1.0] {
        for tenth in 0..8 {
            let bin: Vec<f64> = draws
                .iter()
                .filter(|draw| draw.value(Latent::Sex) == sex)
                .filter(|draw| (draw.probability * 10.0) as usize == tenth)
                .map(|draw| model.recorded(draw.probability, sex))
                .collect();
            let recorded = draws
                .iter()
                .filter(|draw| draw.value(Latent::Sex) == sex)
                .filter(|draw| (draw.probability * 10.0) as usize == tenth)
                .filter(|draw| draw.recorded)
                .count();
            let mean = bin.iter().sum::<f64>() / bin.len() as f64;
            assert_share(recorded, bin.len(), mean);
        }
    }
    // Of women's outcomes, 40 % are overlooked, and a tenth of all labels is turned around.
    let of = |female: bool, outcome: bool| -> (usize, usize) {
        let group: Vec<&Draw> = draws
            .iter()
            .filter(|draw| draw.is_female() == female && draw.outcome == outcome)
            .collect();
        (
            group.iter().filter(|draw| draw.recorded).count(),
            group.len(),
        )
    };
    for ((female, outcome), expected) in [
        ((true, true), 0.6 * 0.9 + 0.4 * 0.1),
        ((false, true), 0.9),
        ((true, false), 0.1),
        ((false, false), 0.1),
    ] {
        let (recorded, patients) = of(female, outcome);
        assert_share(recorded, patients, expected);
    }
}

#[test]
fn prevalence_and_missing_shares_are_as_asked_at_each_site() {
    let (model, draws) = draws(&biased(), 20_000);
    let outcomes = draws.iter().filter(|draw| draw.outcome).count();
    assert_share(outcomes, draws.len(), 0.25);
    for site in 0..SITES.len() {
        let here: Vec<&Draw> = draws.iter().filter(|draw| draw.site == site).collect();
        assert_share(here.len(), draws.len(), 0.25);
        for modality in SynthModality::ALL {
            let missing = here
                .iter()
                .filter(|draw| !draw.observed.contains(modality))
                .count();
            assert_share(
                missing,
                here.len(),
                model.missing_probability(modality, site),
            );
        }
        let patterns: f64 = model
            .kept
            .subsets()
            .map(|pattern| model.pattern_probability(pattern, site))
            .sum();
        assert!((patterns - 1.0).abs() < 1e-12);
    }
    assert!((model.missing_probability(Image, 0) - 0.3 * 0.2).abs() < 1e-12);
    assert!((model.missing_probability(Image, 3) - 0.3 * 1.8).abs() < 1e-12);
    assert_eq!(model.missing_probability(Labs, 3), 0.0);
    // Later sites have the outcome more often.
    let share = |site: usize| {
        let here = draws.iter().filter(|draw| draw.site == site);
        here.clone().filter(|draw| draw.outcome).count() as f64 / here.count() as f64
    };
    assert!(share(3) > share(0) + 0.1);
}

#[test]
fn the_survival_time_says_what_the_label_says() {
    for options in [SynthOptions::default(), biased()] {
        let (_, draws) = draws(&options, 5_000);
        for draw in &draws {
            let within = draw.event && draw.duration_days <= HORIZON_DAYS;
            assert_eq!(draw.recorded, within);
            assert!(draw.duration_days > 0.0 && draw.duration_days < 2.0 * HORIZON_DAYS);
            assert!(draw.event || draw.duration_days >= HORIZON_DAYS);
        }
        assert!(draws.iter().any(|draw| draw.event && !draw.recorded));
    }
}

#[test]
fn a_modality_that_is_not_made_has_no_part_in_the_risk() {
    let options = SynthOptions {
        modalities: vec![Image, Notes],
        ..SynthOptions::default()
    };
    let (model, draws) = draws(&options, 5_000);
    // The interaction needs omics.
    assert_eq!(model.terms.len(), 4);
    assert_eq!(model.interaction, None);
    let outcomes = draws.iter().filter(|draw| draw.outcome).count();
    assert_share(outcomes, draws.len(), 0.3);
    // The factors themselves are the same as in the whole cohort.
    let whole = Model::new(&SynthOptions::default()).draw(17);
    assert_eq!(draws[16].values, whole.values);
    assert_eq!(draws[16].observed, model.kept);
}

#[test]
fn the_chance_of_the_interaction_is_what_is_seen_of_it() {
    let (model, draws) = draws(&SynthOptions::default(), 20_000);
    let interaction = model.interaction.unwrap();
    let there = |draw: &Draw| draw.value(Latent::Side) > 0.0 && draw.value(Latent::Switch) > 0.0;
    for (visible, states) in [
        (vec![Notes], 1),
        (vec![Image], 2),
        (vec![Omics, Labs], 2),
        (vec![Image, Omics], 2),
    ] {
        let visible = Modalities::of(&visible);
        let chances = interaction.chances(visible);
        assert_eq!(chances.len(), states);
        for Chance { chance, share } in chances {
            let such: Vec<&Draw> = draws
                .iter()
                .filter(|draw| interaction.chance(&draw.values, visible) == chance)
                .collect();
            assert_share(such.len(), draws.len(), share);
            let hits = such.iter().filter(|draw| there(draw)).count();
            assert_share(hits, such.len(), chance);
        }
    }
}
