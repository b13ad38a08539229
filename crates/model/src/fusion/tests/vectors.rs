//! Windows of a series, and features that are dropped in training.

use super::*;
use crate::fusion::encoder::Encoder;
use crate::fusion::new::New;

const VARIABLES: usize = 3;

fn windows(dropout: f64) -> EncoderSpec {
    EncoderSpec::Windows(WindowsOptions {
        variables: VARIABLES,
        windows: 2,
        dropout,
        width: 12,
        depth: 1,
        heads: 2,
        ..WindowsOptions::default()
    })
}

fn encode(spec: &EncoderSpec, items: &ItemTensors, mode: crate::Mode) -> Vec<f32> {
    let device = device();
    let new = New {
        seed: 3,
        device: &device,
        group: ParameterGroup::Encoder,
        path: "labs".to_owned(),
    };
    let mut stream = options(0).streams.remove(LABS);
    stream.encoder = spec.clone();
    let encoder = Encoder::new(&new, &stream, burn::tensor::FloatDType::F32).unwrap();
    values(encoder.forward(items, mode).tokens)
}

fn statistics(width: usize) -> ItemTensors {
    ItemTensors::Windows {
        values: normal("windows", [2, width]),
        present: floats(vec![1.0; 2 * width], [2, width]),
    }
}

#[test]
fn windows_are_read_as_one_group_of_features_a_variable() {
    let width = VARIABLES * 2 * WindowsOptions::STATISTICS;
    let items = statistics(width);
    let encoded = encode(&windows(0.0), &items, crate::Mode::Infer);
    assert_eq!(encoded.len(), 2 * VARIABLES * 12);
    let ItemTensors::Windows { values, present } = items else {
        unreachable!();
    };
    let per_variable = 2 * WindowsOptions::STATISTICS;
    let vector = EncoderSpec::Omics(OmicsEncoderOptions {
        features: width,
        chunk: per_variable,
        width: 12,
        depth: 1,
        heads: 2,
        ..OmicsEncoderOptions::default()
    });
    let items = ItemTensors::Omics { values, present };
    assert_eq!(encoded, encode(&vector, &items, crate::Mode::Infer));
}

#[test]
fn windows_of_another_width_are_refused() {
    let mut stream = options(0).streams.remove(LABS);
    stream.encoder = windows(0.0);
    let fusion = FusionOptions {
        streams: vec![stream],
        ..options(0)
    };
    let soft = |width| SoftInput {
        streams: vec![Some(statistics(width))],
        placements: Vec::new(),
    };
    let width = VARIABLES * 2 * WindowsOptions::STATISTICS;
    soft(width).check_items(&fusion).unwrap();
    let error = soft(width + 1)
        .check_items(&fusion)
        .unwrap_err()
        .to_string();
    assert!(error.contains("reads 36"), "{error}");
}

#[test]
fn dropped_features_count_as_missing_in_training_alone() {
    let width = VARIABLES * 2 * WindowsOptions::STATISTICS;
    let items = statistics(width);
    let train = |seed| crate::Mode::Train { dropout_seed: seed };
    let whole = encode(&windows(0.0), &items, crate::Mode::Infer);
    assert_eq!(whole, encode(&windows(0.3), &items, crate::Mode::Infer));
    assert_eq!(whole, encode(&windows(0.0), &items, train(1)));
    let dropped = encode(&windows(0.3), &items, train(1));
    assert_ne!(whole, dropped);
    assert_eq!(dropped, encode(&windows(0.3), &items, train(1)));
    assert_ne!(dropped, encode(&windows(0.3), &items, train(2)));

    // With nearly all of them dropped, what is left is nearly an item without features.
    let ItemTensors::Windows { values: kept, .. } = items.clone() else {
        unreachable!();
    };
    let empty = ItemTensors::Windows {
        values: kept.zeros_like(),
        present: kept.zeros_like(),
    };
    let empty = encode(&windows(0.0), &empty, crate::Mode::Infer);
    let distance =
        |other: &[f32]| -> f32 { other.iter().zip(&empty).map(|(a, b)| (a - b).powi(2)).sum() };
    let nearly = encode(&windows(0.97), &items, train(1));
    assert!(distance(&nearly) < 0.5 * distance(&dropped));
}
