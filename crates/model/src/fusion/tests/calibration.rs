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
        .calibrate([Ok::<_, ModelError>(soft.clone())])
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
        let wide = projector.wide(resampled, Mode::Infer)
            * projector.scale.tensor.clone().unsqueeze::<3>()
            + projector.shift.tensor.clone().unsqueeze::<3>();
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
    let none = std::iter::empty::<Result<SoftInput, ModelError>>();
    model.calibrate(none).unwrap();
    for stream in &model.fusion.as_ref().unwrap().streams {
        let scale = values(stream.projector.scale.tensor.clone());
        assert!(scale.iter().all(|&scale| scale == 1.0));
    }
}
