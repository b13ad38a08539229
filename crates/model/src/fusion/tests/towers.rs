//! Pretrained towers as encoders of streams.

use burn::tensor::{FloatDType, Tensor};

use super::*;
use crate::fusion::StreamDemand;
use crate::towers::{ItemShape, TowerConfig};
use crate::{Mode, loss};

fn lora() -> Option<LoraOptions> {
    Some(LoraOptions {
        r: 2,
        ..LoraOptions::default()
    })
}

/// A frozen vision tower and a Whisper encoder with an adapter.
fn options() -> FusionOptions {
    let stream = |name: &str, modality, encoder| StreamSpec {
        name: name.to_owned(),
        modality,
        encoder,
        tokens: 2,
        resampler: ResamplerOptions {
            width: 16,
            depth: 1,
            heads: 2,
        },
    };
    let vision = EncoderSpec::Vision {
        folder: fixture("towers_vit"),
        lora: None,
    };
    let whisper = EncoderSpec::Whisper {
        folder: fixture("towers_whisper"),
        lora: lora(),
    };
    FusionOptions {
        streams: vec![
            stream("xray", ModalityKind::Image, vision),
            stream("voice", ModalityKind::Speech, whisper),
        ],
        sites: 0,
        seed: 5,
    }
}

fn image_size() -> [usize; 2] {
    let config = TowerConfig::read(&fixture("towers_vit")).unwrap();
    config.image_size().unwrap()
}

fn mel_size() -> (usize, usize) {
    let config = TowerConfig::read(&fixture("towers_whisper")).unwrap();
    config.mel_size().unwrap()
}

fn build(options: FusionOptions) -> Result<Model, crate::ModelError> {
    let checkpoint = Checkpoint::open(&fixture("bert")).unwrap();
    let options = model_options(Pooling::Mean, Some(options));
    Model::load(&checkpoint, &options, &device())
}

/// Two samples, each with an image and a recording.
fn input() -> ModelInput {
    // Both streams have two tokens an item, as `IMAGE` and `VOICE` have; there are no sites.
    let place = |stream, number| match item(stream, Some(number)) {
        Part::Item(placement) => Part::Item(Placement {
            site: None,
            ..placement
        }),
        text => text,
    };
    let sample = |number| {
        vec![
            text(number as i32, 3),
            place(IMAGE, number),
            place(VOICE, number),
        ]
    };
    let mut input = separate(&[sample(0), sample(1)], 8);
    let soft = input.soft.as_mut().unwrap();
    for placement in &mut soft.placements {
        placement.stream = usize::from(placement.stream == VOICE);
    }
    let [height, width] = image_size();
    let (bins, frames) = mel_size();
    soft.streams = vec![
        Some(ItemTensors::Image(normal(
            "towers xray",
            [2, 3, height, width],
        ))),
        Some(ItemTensors::Mel(normal("towers voice", [2, bins, frames]))),
    ];
    input
}

fn loss_of(model: &Model) -> Tensor<1> {
    let logits = model.forward(&input(), Mode::Train { dropout_seed: 1 });
    loss::multiclass(logits, integers(vec![0, 2], [2]), None)
}

#[test]
fn only_the_adapter_of_a_tower_is_trained_and_saved() {
    let mut model = build(options()).unwrap();
    let names: Vec<String> = trained(&model)
        .0
        .into_iter()
        .map(|(name, ..)| name)
        .collect();
    assert!(
        !names
            .iter()
            .any(|name| name.starts_with("fusion.xray.encoder."))
    );
    let adapter = |name: &&String| name.starts_with("fusion.voice.encoder.");
    let adapter: Vec<&String> = names.iter().filter(adapter).collect();
    assert!(adapter.len() > 4);
    assert!(adapter.iter().all(|name| name.contains(".lora_")));
    let size = model.size();
    assert!(size.tower_parameters > 0);
    let plain = Checkpoint::open(&fixture("bert")).unwrap();
    let plain = Model::load(&plain, &model_options(Pooling::Mean, None), &device()).unwrap();
    assert_eq!(size.base_parameters, plain.size().base_parameters);
    assert_eq!(size.embedding_parameters, plain.size().embedding_parameters);

    move_all(&mut model);
    let folder = tempfile::tempdir().unwrap();
    model.save_adapter(folder.path(), "bert").unwrap();
    let checkpoint = Checkpoint::open(&fixture("bert")).unwrap();
    let dtype = FloatDType::F32;
    let read = Model::load_with_adapter(&checkpoint, folder.path(), dtype, &device()).unwrap();
    let logits = |model: &Model| values(model.forward(&input(), Mode::Infer));
    assert_eq!(logits(&read), logits(&model));
    assert_eq!(
        logits(&read.for_inference()),
        logits(&model.for_inference())
    );
    // A tower at another place is the same tower.
    let elsewhere = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        let stored = fixture("towers_whisper").join(file);
        std::fs::copy(stored, elsewhere.path().join(file)).unwrap();
    }
    let mut options = options();
    options.streams[1].encoder = EncoderSpec::Whisper {
        folder: elsewhere.path().to_owned(),
        lora: lora(),
    };
    let mut other = build(options).unwrap();
    assert_ne!(logits(&other), logits(&model));
    other.load_adapter(folder.path()).unwrap();
    assert_eq!(logits(&other), logits(&model));
}

#[test]
fn gradients_reach_the_adapter_and_not_the_tower() {
    let mut model = build(options()).unwrap();
    move_all(&mut model);
    for (name, gradient) in gradients::of(&model, &loss_of(&model)) {
        if let Some(name) = name.strip_prefix("fusion.") {
            // Nothing is missing here, and nothing has a site.
            if name.ends_with(".missing") {
                assert!(gradient.is_none(), "{name}");
                continue;
            }
            let gradient = gradient.unwrap_or_else(|| panic!("{name} has a gradient"));
            let some = gradient.iter().any(|&number| number != 0.0);
            assert!(some || gradients::cancels(name), "{name}");
        }
    }
    // Dropout of the tower's adapter depends on the pass, and on nothing else.
    let mut options = options();
    let EncoderSpec::Whisper {
        lora: Some(lora), ..
    } = &mut options.streams[1].encoder
    else {
        panic!("a tower with an adapter");
    };
    lora.dropout = 0.5;
    let mut model = build(options).unwrap();
    move_all(&mut model);
    let logits = |mode| values(model.forward(&input(), mode));
    let train = |dropout_seed| logits(Mode::Train { dropout_seed });
    assert_eq!(train(1), train(1));
    assert_ne!(train(1), train(2));
    assert_ne!(train(1), logits(Mode::Infer));
}

#[test]
fn a_tower_that_reads_something_else_is_refused() {
    let mut options = options();
    options.streams[0].encoder = EncoderSpec::Vision {
        folder: fixture("towers_whisper"),
        lora: None,
    };
    let error = build(options).unwrap_err().to_string();
    assert!(
        error.contains("`xray`") && error.contains("reads speech"),
        "{error}"
    );

    let options = self::options();
    let config = crate::ModelConfig::read(&fixture("bert")).unwrap();
    let [height, width] = image_size();
    let (bins, frames) = mel_size();
    for (stream, shape, good) in [
        (0, vec![3, height, width], true),
        (0, vec![3, height + 1, width], false),
        (0, vec![1, height, width], false),
        (1, vec![bins, frames], true),
        (1, vec![bins + 1, frames], false),
        (1, vec![bins, frames + 1], false),
    ] {
        let spec = &options.streams[stream];
        let checked = spec.check_item(&shape);
        let named = format!("`{}`", spec.name);
        match checked {
            Ok(()) => assert!(good, "{named} {shape:?}"),
            Err(error) => assert!(!good && error.to_string().contains(&named), "{error}"),
        }
    }
    let demand = |channels, bins| {
        [channels, bins].map(|features| StreamDemand {
            items: 1,
            features: Some(features),
        })
    };
    options.check(&config, &demand(3, bins)).unwrap();
    for wrong in [demand(1, bins), demand(3, bins + 1)] {
        options.check(&config, &wrong).unwrap_err();
    }
    let model = build(options).unwrap();
    let mut wrong = input();
    let soft = wrong.soft.as_mut().unwrap();
    soft.streams[0] = Some(ItemTensors::Image(normal("x", [2, 3, height + 1, width])));
    let error = model.check_soft(&wrong).unwrap_err().to_string();
    let shape = ItemShape::Image {
        channels: 3,
        height: height + 1,
        width,
    };
    let expected = TowerConfig::read(&fixture("towers_vit")).unwrap();
    assert_eq!(error, expected.token_count(shape).unwrap_err().to_string());
}
