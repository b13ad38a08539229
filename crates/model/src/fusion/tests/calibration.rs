use super::*;
use crate::error::ModelError;
use crate::run::Mode;

#[test]
fn the_last_layers_read_centred_numbers_and_training_still_starts_from_the_mean() {
    let mut model = load("bert", Pooling::Mean);
    let rows = [samples()[..2].to_vec(), samples()[2..].to_vec()];
    let soft = pack(&rows, 32, 119).soft.unwrap();
    let start = values(model.soft_tokens(&soft, Mode::Infer).unwrap().unwrap());
    model
        .calibrate(|| [Ok::<_, ModelError>(soft.clone())])
        .unwrap();
    let calibrated = values(model.soft_tokens(&soft, Mode::Infer).unwrap().unwrap());
    assert_eq!(calibrated, start);

    let fusion = model.fusion.as_ref().unwrap();
    let mut checked = 0;
    for (stream, items) in fusion.streams.iter().zip(&soft.streams) {
        let Some(items) = items else { continue };
        let encoded = stream.encoder.forward(items, Mode::Infer);
        let resampled = stream.resampler.forward(encoded, Mode::Infer);
        let projector = &stream.projector;
        let wide = projector
            .inside
            .forward(projector.wide(resampled, Mode::Infer));
        if wide.dims()[0] < 2 {
            continue;
        }
        let mean = values(wide.clone().mean_dim(0));
        assert!(mean.iter().all(|mean| mean.abs() < 1e-3), "{mean:?}");
        let deviation = values(wide.powi_scalar(2).mean_dim(0).sqrt());
        assert!(deviation.iter().all(|deviation| *deviation < 1.001));
        assert!(deviation.iter().any(|deviation| *deviation > 0.999));
        checked += 1;
    }
    assert!(checked > 1, "several streams have several items");
}

#[test]
fn without_items_nothing_is_changed() {
    let mut model = load("llama3", Pooling::Last);
    let before = trained(&model);
    model
        .calibrate(std::iter::empty::<Result<SoftInput, ModelError>>)
        .unwrap();
    assert!(trained(&model).0 == before.0);
}

#[test]
fn a_head_over_the_mean_reads_standardised_states_and_others_are_left_alone() {
    for (base, pooling) in MODELS {
        let mut model = load(base, pooling);
        let input = pack(&[samples()[..2].to_vec(), samples()[2..].to_vec()], 32, 119);
        let before = trained(&model);
        let once = || [Ok::<_, ModelError>(input.clone())];
        model.calibrate_head(once()).unwrap();
        let changed = trained(&model).0 != before.0;
        assert_eq!(changed, pooling == Pooling::Mean, "{base}");
        // Again: from the states, not from what was made of them.
        let after = trained(&model);
        model.calibrate_head(once()).unwrap();
        assert!(trained(&model).0 == after.0);
    }
}

#[test]
fn a_new_head_starts_from_these_logits() {
    let mut model = load("bert", Pooling::Mean);
    let input = pack(&[samples()], 52, 119);
    let before = values(model.forward(&input, Mode::Infer));
    model.start_from(&[0.5, -1.0, 0.25]);
    let after = values(model.forward(&input, Mode::Infer));
    for (sample, (after, before)) in after.chunks(3).zip(before.chunks(3)).enumerate() {
        for (label, shift) in [0.5, -1.0, 0.25].into_iter().enumerate() {
            let found = after[label] - before[label];
            assert!((found - shift).abs() < 1e-5, "{sample} {label}: {found}");
        }
    }
}
