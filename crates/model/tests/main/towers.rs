//! Folders of pretrained encoders: under every name hub files give the tensors, sharded, in half
//! precision, and broken in every way a download or a conversion breaks them.

use std::path::Path;

use crate::common::copy::Copy;
use crate::common::{device, fixture, largest_difference, values};
use ::half::f16;
use burn::tensor::{DType, FloatDType, Tensor, TensorData};
use calor_model::{
    ItemShape, LoraOptions, Mode, ModelError, Targets, Tower, TowerInput, TowerOptions, TowerType,
};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::json;

/// The folder, what stands before the tower's tensors in it, and the type.
const TOWERS: [(&str, &str, TowerType); 4] = [
    ("towers_vit", "vit.", TowerType::Vit),
    ("towers_clip", "vision_model.", TowerType::Clip),
    ("towers_siglip", "vision_model.", TowerType::Siglip),
    ("towers_whisper", "model.encoder.", TowerType::Whisper),
];

fn input(name: &str) -> TowerInput {
    let bytes = std::fs::read(fixture(name).join("reference.safetensors")).unwrap();
    let reference = SafeTensors::deserialize(&bytes).unwrap();
    let view = reference.tensor("input").unwrap();
    let floats: &[[u8; 4]] = view.data().as_chunks().0;
    let floats: Vec<f32> = floats
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect();
    let data = TensorData::new(floats, view.shape().to_vec());
    match view.shape().len() {
        4 => TowerInput::Image(Tensor::from_data(data, &device())),
        _ => TowerInput::Mel(Tensor::from_data(data, &device())),
    }
}

fn build(dir: &Path, dtype: FloatDType) -> Tower {
    let options = TowerOptions {
        dtype,
        ..TowerOptions::default()
    };
    Tower::build(&Tower::open(dir).unwrap(), &options, &device()).unwrap()
}

/// The last hidden state of the fixture's input.
fn hidden(dir: &Path, name: &str) -> Vec<f32> {
    values(build(dir, FloatDType::F32).forward(input(name), Mode::Infer))
}

#[test]
fn the_other_parts_of_a_model_are_left_alone() {
    for (name, prefix, tower_type) in TOWERS {
        let checkpoint = Tower::open(&fixture(name)).unwrap();
        assert_eq!(checkpoint.config().tower_type(), tower_type);
        let unused = checkpoint.unused_tensors();
        let inside = unused.iter().filter(|tensor| tensor.starts_with(prefix));
        // CLIP's last norm, and SigLIP's pooling head.
        let pools = match tower_type {
            TowerType::Clip => 2,
            TowerType::Siglip => 11,
            _ => 0,
        };
        assert_eq!(inside.count(), pools, "{name}");
        assert!(unused.len() > pools, "{name}");
    }
}

#[test]
fn names_are_read_under_every_prefix_hub_files_have() {
    for (name, prefix, tower_type) in TOWERS {
        let expected = hidden(&fixture(name), name);
        let bare = |copy: &mut Copy| {
            copy.tensors
                .retain(|tensor| tensor.name.starts_with(prefix));
            for tensor in &mut copy.tensors {
                tensor.name = tensor.name[prefix.len()..].to_owned();
            }
        };
        let mut copy = Copy::of(name);
        bare(&mut copy);
        // The tower's own configuration, as its own class saves it.
        if let Some(vision) = copy.config.get("vision_config").cloned() {
            copy.config = vision;
        }
        assert_eq!(hidden(copy.write(), name), expected, "{name} alone");
        if tower_type == TowerType::Whisper {
            // `WhisperModel`, and today's spelling of ViT below.
            for tensor in &mut copy.tensors {
                tensor.name = format!("encoder.{}", tensor.name);
            }
            copy.add("decoder.layer_norm.weight", Dtype::F32, &[24]);
            assert_eq!(hidden(copy.write(), name), expected);
        }
        if tower_type == TowerType::Vit {
            for tensor in &mut copy.tensors {
                tensor.name = tensor
                    .name
                    .replace("encoder.layer.", "layers.")
                    .replace("attention.attention.query", "attention.q_proj")
                    .replace("attention.attention.key", "attention.k_proj")
                    .replace("attention.attention.value", "attention.v_proj")
                    .replace("attention.output.dense", "attention.o_proj")
                    .replace("intermediate.dense", "mlp.fc1")
                    .replace("output.dense", "mlp.fc2");
            }
            assert!(
                copy.tensors
                    .iter()
                    .any(|tensor| tensor.name == "layers.0.mlp.fc2.bias")
            );
            assert_eq!(hidden(copy.write(), name), expected);
        }
    }
}

#[test]
fn shards_give_what_one_file_gives() {
    let name = "towers_clip";
    let copy = Copy::of(name);
    let dir = copy.dir.path();
    std::fs::write(dir.join("config.json"), copy.config.to_string()).unwrap();
    let mut map = serde_json::Map::new();
    for (index, tensor) in copy.tensors.iter().enumerate() {
        let shard = format!("part-{}.safetensors", index % 2);
        map.insert(tensor.name.clone(), json!(shard));
    }
    for part in 0..2 {
        copy.write_file(&format!("part-{part}.safetensors"), |index| {
            index % 2 == part
        });
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(hidden(dir, name), hidden(&fixture(name), name));
}

#[test]
fn half_precision_is_read_and_computed() {
    for (name, ..) in TOWERS {
        let mut half = Copy::of(name);
        let mut full = Copy::of(name);
        for (half, full) in half.tensors.iter_mut().zip(&mut full.tensors) {
            let floats: &[[u8; 4]] = full.bytes.as_chunks().0;
            let rounded: Vec<f16> = floats
                .iter()
                .map(|bytes| f16::from_f32(f32::from_le_bytes(*bytes)))
                .collect();
            half.bytes = rounded
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect();
            half.dtype = Dtype::F16;
            full.bytes = rounded
                .iter()
                .flat_map(|value| value.to_f32().to_le_bytes())
                .collect();
        }
        let expected = hidden(full.write(), name);
        assert_eq!(hidden(half.write(), name), expected);
        assert_ne!(expected, hidden(&fixture(name), name));

        for dtype in [FloatDType::BF16, FloatDType::F16] {
            let states = build(&fixture(name), dtype).forward(input(name), Mode::Infer);
            assert_eq!(states.dtype(), DType::from(dtype));
            let states = values(states.cast(DType::F32));
            let difference = largest_difference(&states, &hidden(&fixture(name), name));
            assert!(
                difference > 0.0 && difference < 0.15,
                "{name} {dtype:?}: {difference}"
            );
        }
    }
}

#[test]
fn a_missing_extra_or_misshapen_tensor_is_named() {
    for (base, prefix, tower_type) in TOWERS {
        let checkpoint = Tower::open(&fixture(base)).unwrap();
        let unused = checkpoint.unused_tensors();
        let names: Vec<String> = Copy::of(base)
            .tensors
            .iter()
            .map(|tensor| tensor.name.clone())
            .filter(|name| !unused.contains(name))
            .collect();
        assert!(names.len() > 30, "{base}");
        for name in names {
            let mut copy = Copy::of(base);
            copy.tensors.retain(|tensor| tensor.name != name);
            match Tower::open(copy.write()).unwrap_err() {
                ModelError::MissingTensor {
                    tensor, expected, ..
                } => {
                    assert_eq!(tensor, name);
                    assert!(!expected.is_empty());
                }
                other => panic!("{base} without {name}: {other}"),
            }
            let mut copy = Copy::of(base);
            copy.tensor(&name).shape.push(1);
            match Tower::open(copy.write()).unwrap_err() {
                ModelError::Shape { tensor, found, .. } => {
                    assert_eq!(tensor, name);
                    assert_eq!(found.last(), Some(&1));
                }
                other => panic!("{base} with another {name}: {other}"),
            }
        }
        let mut copy = Copy::of(base);
        let extra = match tower_type {
            TowerType::Vit => format!("{prefix}encoder.layer.7.output.dense.weight"),
            TowerType::Whisper => format!("{prefix}layers.7.fc1.weight"),
            _ => format!("{prefix}encoder.layers.7.mlp.fc1.weight"),
        };
        copy.add(&extra, Dtype::F32, &[2, 2]);
        let error = Tower::open(copy.write()).unwrap_err();
        assert!(
            matches!(&error, ModelError::UnusedTensor { tensor, .. } if *tensor == extra),
            "{error}"
        );
    }
}

#[test]
fn other_defects_are_told_before_a_weight_is_read() {
    let mut copy = Copy::of("towers_vit");
    let name = "vit.embeddings.position_embeddings";
    copy.tensor(name).dtype = Dtype::I32;
    let error = Tower::open(copy.write()).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("is I32"), "{error}");

    // Position embeddings of another image size.
    let mut copy = Copy::of("towers_clip");
    copy.config["vision_config"]["image_size"] = json!(20);
    let error = Tower::open(copy.write()).unwrap_err().to_string();
    let name = "vision_model.embeddings.position_embedding.weight";
    assert!(
        error.contains(name) && error.contains("[26, 24]"),
        "{error}"
    );

    let copy = Copy::of("towers_whisper");
    let path = copy.write().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let error = Tower::open(copy.dir.path()).unwrap_err().to_string();
    assert!(error.contains("truncated"), "{error}");

    std::fs::remove_file(&path).unwrap();
    let error = Tower::open(copy.dir.path()).unwrap_err();
    assert!(matches!(error, ModelError::NoWeights { .. }), "{error}");

    let mut copy = Copy::of("towers_vit");
    copy.add("encoder.layer.0.output.dense.bias", Dtype::F32, &[24]);
    let error = Tower::open(copy.write()).unwrap_err().to_string();
    assert!(error.contains("stored twice"), "{error}");

    // A language model is no tower.
    let error = Tower::open(&fixture("bert")).unwrap_err().to_string();
    assert!(error.contains("`model_type` is \"bert\""), "{error}");
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let checkpoint = Tower::open(&fixture("towers_vit")).unwrap();
    for (target, hint) in [
        ("projection", "is neither a linear layer"),
        ("layernorm_before", "is neither a linear layer"),
        ("query", "layers.0.attention.q_proj"),
        ("embeddings", "holds other modules"),
    ] {
        let options = TowerOptions {
            lora: Some(LoraOptions {
                targets: Targets::List(vec![target.to_owned()]),
                ..LoraOptions::default()
            }),
            ..TowerOptions::default()
        };
        let error = Tower::build(&checkpoint, &options, &device())
            .unwrap_err()
            .to_string();
        assert!(error.contains(hint), "{target}: {error}");
    }
}

#[test]
fn layers_to_transform_count_the_layers_of_the_tower() {
    let checkpoint = Tower::open(&fixture("towers_clip")).unwrap();
    let options = TowerOptions {
        lora: Some(LoraOptions {
            targets: Targets::List(vec!["q_proj".to_owned()]),
            layers_to_transform: Some(vec![1]),
            ..LoraOptions::default()
        }),
        ..TowerOptions::default()
    };
    let tower = Tower::build(&checkpoint, &options, &device()).unwrap();
    assert_eq!(tower.lora_modules(), ["encoder.layers.1.self_attn.q_proj"]);
}

#[test]
#[should_panic(expected = "14×14; set the image size of the recipe")]
fn images_of_another_size_are_refused() {
    let tower = build(&fixture("towers_vit"), FloatDType::F32);
    let item = ItemShape::Image {
        channels: 3,
        height: 16,
        width: 14,
    };
    assert!(tower.token_count(item).is_err());
    let pixels = Tensor::zeros([1, 3, 16, 14], &device());
    tower.forward(TowerInput::Image(pixels), Mode::Infer);
}
