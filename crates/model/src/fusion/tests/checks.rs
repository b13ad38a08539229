//! What cannot work is said before anything runs.

use super::*;
use crate::fusion::StreamDemand;
use crate::{ModelConfig, ModelError};

fn config(base: &str) -> ModelConfig {
    ModelConfig::read(&fixture(base)).unwrap()
}

/// One item of each stream, with the features that the options say.
fn demand() -> Vec<StreamDemand> {
    [3, 2, 3, 7, 4]
        .map(|features| StreamDemand {
            items: 1,
            features: Some(features),
        })
        .to_vec()
}

#[test]
fn slots_are_counted_against_the_positions() {
    let options = options(0);
    assert_eq!(options.slots(&[1, 1, 1, 1, 1]), 2 + 3 + 1 + 2 + 2);
    let mut demand = demand();
    options.check(&config("bert"), &demand).unwrap();
    // 39 slots leave one position of 40 for text, 40 leave none.
    let rest = options.slots(&[0, 1, 1, 1, 1]);
    demand[IMAGE].items = (39 - rest) / 2;
    demand[LABS].items += (39 - rest) % 2;
    options.check(&config("bert"), &demand).unwrap();
    demand[LABS].items += 1;
    let error = options
        .check(&config("bert"), &demand)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("40 soft tokens") && error.contains("for 40 tokens"),
        "{error}"
    );
    // RoBERTa's first two positions are taken, a decoder has 128.
    demand[LABS].items -= 2;
    let error = options
        .check(&config("roberta"), &demand)
        .unwrap_err()
        .to_string();
    assert!(error.contains("for 38 tokens"), "{error}");
    options.check(&config("llama3"), &demand).unwrap();
}

#[test]
fn features_are_counted_against_the_options() {
    for (stream, name, what) in [
        (IMAGE, "xray", "channels"),
        (WAVE, "ecg", "leads"),
        (LABS, "labs", "variables"),
        (GENES, "genes", "features"),
        (VOICE, "voice", "mel bins"),
    ] {
        let mut demand = demand();
        demand[stream].features = Some(11);
        let error = options(0).check(&config("bert"), &demand).unwrap_err();
        assert!(
            matches!(&error, ModelError::Stream { stream, .. } if stream == name),
            "{error}"
        );
        let error = error.to_string();
        assert!(error.contains("11") && error.contains(what), "{error}");
        demand[stream].features = None;
        options(0).check(&config("bert"), &demand).unwrap();
    }
    let error = options(0)
        .check(&config("bert"), &demand()[1..])
        .unwrap_err();
    assert!(error.to_string().contains("4 streams"), "{error}");
}

#[test]
fn the_shape_of_an_item_is_checked() {
    let streams = options(0).streams;
    for (stream, shape) in [
        (IMAGE, vec![3, 8, 4]),
        (WAVE, vec![2, 1]),
        (LABS, vec![3]),
        (GENES, vec![7]),
        (VOICE, vec![4, 12]),
    ] {
        streams[stream].check_item(&shape).unwrap();
        let mut more = shape.clone();
        more[0] += 1;
        let error = streams[stream].check_item(&more).unwrap_err().to_string();
        assert!(error.contains(&format!("{} ", more[0])), "{error}");
        more.extend([1, 1, 1]);
        let error = streams[stream].check_item(&more).unwrap_err().to_string();
        assert!(error.contains("dimensions"), "{error}");
    }
    for (stream, shape, word) in [
        (IMAGE, vec![3, 8, 9], "8 × 9"),
        (IMAGE, vec![3, 0, 8], "0 × 8"),
        (WAVE, vec![2, 0], "no samples"),
    ] {
        let error = streams[stream].check_item(&shape).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn options_that_mean_nothing_are_refused() {
    type Change = fn(&mut FusionOptions);
    let changes: [(Change, &str); 19] = [
        (|o| o.streams.clear(), "without a stream"),
        (|o| o.streams[1].name = "xray".to_owned(), "two streams"),
        (|o| o.streams[1].name = "a.b".to_owned(), "letters"),
        (|o| o.streams[1].name.clear(), "letters"),
        (|o| o.streams[1].name = "shared".to_owned(), "`shared`"),
        (|o| o.streams[0].tokens = 0, "`tokens` is 0"),
        (|o| o.streams[0].tokens = 40, "`tokens` is 40"),
        (|o| o.streams[0].resampler.depth = 0, "depth"),
        (|o| o.streams[0].resampler.heads = 3, "heads"),
        (|o| o.streams[0].resampler.width = 0, "width"),
        (
            |o| o.streams[0].modality = ModalityKind::Omics,
            "does not read",
        ),
        (
            |o| {
                o.streams[0].encoder = EncoderSpec::Patches(PatchOptions {
                    width: 18,
                    heads: 2,
                    ..PatchOptions::default()
                })
            },
            "multiple of 4",
        ),
        (
            |o| {
                o.streams[1].encoder = EncoderSpec::Signal(SignalOptions {
                    patch_samples: 0,
                    ..SignalOptions::default()
                })
            },
            "patch_samples",
        ),
        (
            |o| o.streams[2].encoder = EncoderSpec::Series(SeriesOptions::default()),
            "variables",
        ),
        (
            |o| {
                o.streams[2].encoder = EncoderSpec::Series(SeriesOptions {
                    variables: 2,
                    time_scale_days: f64::NAN,
                    ..SeriesOptions::default()
                })
            },
            "time_scale_days",
        ),
        (
            |o| {
                o.streams[2].encoder = EncoderSpec::Windows(WindowsOptions {
                    variables: 3,
                    windows: 0,
                    ..WindowsOptions::default()
                })
            },
            "`encoder.windows` is 0",
        ),
        (
            |o| {
                o.streams[2].encoder = EncoderSpec::Windows(WindowsOptions {
                    variables: 3,
                    span_days: -1.0,
                    ..WindowsOptions::default()
                })
            },
            "span_days",
        ),
        (
            |o| {
                o.streams[2].encoder = EncoderSpec::Windows(WindowsOptions {
                    variables: 3,
                    dropout: 1.0,
                    ..WindowsOptions::default()
                })
            },
            "a share",
        ),
        (
            |o| {
                o.streams[3].encoder = EncoderSpec::Omics(OmicsEncoderOptions {
                    features: 3,
                    groups: vec![vec![0], vec![1, 3]],
                    ..OmicsEncoderOptions::default()
                })
            },
            "groups[1]",
        ),
    ];
    let checkpoint = Checkpoint::open(&fixture("bert")).unwrap();
    for (change, word) in changes {
        let mut options = options(0);
        change(&mut options);
        let error = options
            .check(&config("bert"), &demand())
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{word}: {error}");
        let options = model_options(Pooling::Mean, Some(options));
        let at_load = Model::load(&checkpoint, &options, &device())
            .unwrap_err()
            .to_string();
        assert_eq!(at_load, error);
    }
}

#[test]
fn options_are_read_as_recipes_write_them() {
    let written = r#"{
        "streams": [
            {"name": "labs", "modality": "series", "encoder": {"kind": "series", "variables": 5}},
            {"name": "ecg", "modality": "waveform", "tokens": 8,
             "encoder": {"kind": "signal", "leads": 12, "patch_samples": 25},
             "resampler": {"width": 64}},
            {"name": "xray", "modality": "image", "encoder": {"kind": "vision", "folder": "vit"}}
        ],
        "sites": 3
    }"#;
    let options: FusionOptions = serde_json::from_str(written).unwrap();
    assert_eq!(options.streams[0].tokens, 4);
    assert_eq!(
        options.streams[1].encoder,
        EncoderSpec::Signal(SignalOptions {
            leads: 12,
            patch_samples: 25,
            ..SignalOptions::default()
        })
    );
    assert_eq!(options.streams[1].resampler.heads, 4);
    let text = serde_json::to_string(&options).unwrap();
    assert_eq!(
        serde_json::from_str::<FusionOptions>(&text).unwrap(),
        options
    );
    for (known, unknown) in [
        ("\"leads\"", "\"lead\""),
        ("\"folder\": \"vit\"", "\"folder\": \"vit\", \"depth\": 1"),
        ("\"sites\"", "\"site\""),
    ] {
        let wrong = written.replace(known, unknown);
        let error = serde_json::from_str::<FusionOptions>(&wrong)
            .unwrap_err()
            .to_string();
        assert!(error.contains("unknown field"), "{error}");
    }
}

#[test]
fn a_batch_that_does_not_fit_is_refused() {
    let model = load("bert", Pooling::Mean);
    let good = pack(&[samples()], 52, 5);
    model.check_soft(&good).unwrap();
    type Change = fn(&mut SoftInput);
    let changes: [(Change, &str); 13] = [
        (|s| s.streams.truncate(3), "3 streams"),
        (|s| s.streams.swap(0, 1), "kind `patches`"),
        (|s| s.placements[0].stream = 5, "stream 5"),
        (|s| s.placements[0].item = Some(3), "item 3"),
        (|s| s.streams[0] = None, "the batch has 0"),
        (|s| s.placements[0].site = Some(2), "site 2"),
        (|s| s.placements[0].days_before = Some(f32::NAN), "finite"),
        (|s| s.placements[0].row = 1, "row 1"),
        (|s| s.placements[0].start = 51, "51..53"),
        (
            |s| s.placements[1].start = s.placements[0].start,
            "same tokens",
        ),
        (
            |s| s.streams[0] = Some(ItemTensors::Image(normal("x", [3, 3, 8, 6]))),
            "8 × 6",
        ),
        (
            |s| s.streams[4] = Some(ItemTensors::Mel(normal("x", [3, 5, 6]))),
            "5 mel bins",
        ),
        (
            |s| {
                let Some(ItemTensors::Dense { lengths, .. }) = &mut s.streams[1] else {
                    panic!("a dense signal");
                };
                lengths[0] = 11;
            },
            "lengths up to 11",
        ),
    ];
    for (change, word) in changes {
        let mut input = good.clone();
        change(input.soft.as_mut().unwrap());
        let error = model.check_soft(&input).unwrap_err().to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
    let checkpoint = Checkpoint::open(&fixture("bert")).unwrap();
    let plain = model_options(Pooling::Mean, None);
    let plain = Model::load(&checkpoint, &plain, &device()).unwrap();
    let error = plain.check_soft(&good).unwrap_err().to_string();
    assert!(error.contains("without a stream"), "{error}");
}
