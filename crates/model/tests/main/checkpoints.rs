//! Checkpoint folders: sharded, in half precision, under other prefixes, and broken in every way a
//! download or a conversion breaks them.

use std::path::Path;

use crate::common::copy::Copy;
use crate::common::{device, fixture, largest_difference, packed, sequences, values};
use ::half::bf16;
use burn::tensor::FloatDType;
use calor_model::{
    Checkpoint, HeadOptions, Mode, Model, ModelError, ModelOptions, Pooling, Problem,
};
use safetensors::tensor::Dtype;
use serde_json::json;

fn hidden(dir: &Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let model = Model::load(&checkpoint, &ModelOptions::default(), &device()).unwrap();
    values(model.hidden(&packed(&[sequences()], 32), Mode::Infer))
}

#[test]
fn shards_give_what_one_file_gives() {
    let copy = Copy::of("llama2");
    let dir = copy.dir.path();
    std::fs::write(dir.join("config.json"), copy.config.to_string()).unwrap();
    let mut map = serde_json::Map::new();
    for (index, tensor) in copy.tensors.iter().enumerate() {
        map.insert(
            tensor.name.clone(),
            json!(format!("part-{}.safetensors", index % 3)),
        );
    }
    for part in 0..3 {
        copy.write_file(&format!("part-{part}.safetensors"), |index| {
            index % 3 == part
        });
    }
    let index = dir.join("model.safetensors.index.json");
    std::fs::write(
        &index,
        json!({"metadata": {}, "weight_map": map}).to_string(),
    )
    .unwrap();
    assert_eq!(hidden(dir), hidden(&fixture("llama2")));

    map.insert(
        "model.layers.0.ghost".to_owned(),
        json!("part-0.safetensors"),
    );
    std::fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
    let error = Checkpoint::open(dir).unwrap_err().to_string();
    assert!(error.contains("layers.0.ghost"), "{error}");

    map.remove("model.layers.0.ghost");
    std::fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
    std::fs::remove_file(dir.join("part-1.safetensors")).unwrap();
    let error = Checkpoint::open(dir).unwrap_err().to_string();
    assert!(error.contains("part-1.safetensors"), "{error}");
}

#[test]
fn half_precision_checkpoints_are_read_exactly() {
    let original = hidden(&fixture("llama2"));
    for dtype in [Dtype::BF16, Dtype::F16] {
        // The same rounded numbers, stored in half precision and in f32.
        let mut half = Copy::of("llama2");
        let mut full = Copy::of("llama2");
        for (half, full) in half.tensors.iter_mut().zip(&mut full.tensors) {
            let floats: &[[u8; 4]] = full.bytes.as_chunks().0;
            let rounded: Vec<([u8; 2], f32)> = floats
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .map(|value| match dtype {
                    Dtype::BF16 => {
                        let value = bf16::from_f32(value);
                        (value.to_le_bytes(), value.to_f32())
                    }
                    _ => {
                        let value = ::half::f16::from_f32(value);
                        (value.to_le_bytes(), value.to_f32())
                    }
                })
                .collect();
            half.bytes = rounded.iter().flat_map(|(bytes, _)| *bytes).collect();
            half.dtype = dtype;
            full.bytes = rounded
                .iter()
                .flat_map(|(_, value)| value.to_le_bytes())
                .collect();
        }
        let read = hidden(half.write());
        assert_eq!(read, hidden(full.write()), "{dtype:?}");
        assert_ne!(read, original, "{dtype:?}");
    }
}

#[test]
fn a_half_precision_model_stays_close_to_f32() {
    let input = packed(&[sequences()], 32);
    for base in [
        "llama2",
        "olmo2",
        "phi3-long",
        "gemma2",
        "gemma3",
        "gpt2",
        "gpt-neox",
        "electra",
        "modernbert",
        "deberta",
        "deberta-own-keys",
    ] {
        let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
        let logits = |dtype| {
            let options = ModelOptions {
                lora: Some(calor_model::LoraOptions::default()),
                head: HeadOptions::Classifier {
                    labels: 2,
                    pooling: Pooling::default_for(checkpoint.config().family()),
                    problem: Problem::Multiclass,
                },
                dtype,
                ..ModelOptions::default()
            };
            let model = Model::load(&checkpoint, &options, &device()).unwrap();
            values(model.forward(&input, Mode::Infer))
        };
        let (half, full) = (logits(FloatDType::BF16), logits(FloatDType::F32));
        let difference = largest_difference(&half, &full);
        // bf16 has 8 bits: 2⁻⁸ of the largest number at every rounding, through two or three layers.
        let largest = full
            .iter()
            .fold(0f32, |largest, logit| largest.max(logit.abs()));
        assert!(
            difference > 0.0 && difference < 0.1 * largest,
            "{base}: {difference} of {largest}"
        );
    }
}

#[test]
fn names_are_read_under_every_prefix_hub_files_have() {
    for (base, prefix) in [
        ("llama2", "model."),
        ("bert", "bert."),
        ("roberta", "roberta."),
        ("gpt2", "transformer."),
        ("gpt-neox", "gpt_neox."),
        ("electra", "electra."),
        ("modernbert", "model."),
        ("deberta", "deberta."),
    ] {
        let expected = hidden(&fixture(base));
        let mut copy = Copy::of(base);
        for tensor in &mut copy.tensors {
            tensor.name = match tensor.name.strip_prefix(prefix) {
                Some(name) => name.to_owned(),
                None if ["lm_head.weight", "embed_out.weight"].contains(&tensor.name.as_str()) => {
                    tensor.name.clone()
                }
                None => format!("{prefix}{}", tensor.name),
            };
        }
        assert_eq!(hidden(copy.write()), expected, "{base}");
    }
    // BERT's first checkpoints call a norm's weight and bias gamma and beta.
    let mut copy = Copy::of("bert");
    for tensor in &mut copy.tensors {
        tensor.name = tensor
            .name
            .replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta");
    }
    assert_eq!(hidden(copy.write()), hidden(&fixture("bert")));
}

#[test]
fn what_hub_files_carry_beside_the_model_is_tolerated() {
    let mut copy = Copy::of("llama3");
    copy.add(
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        Dtype::F32,
        &[4],
    );
    assert_eq!(hidden(copy.write()), hidden(&fixture("llama3")));

    let mut copy = Copy::of("bert");
    copy.add("embeddings.position_ids", Dtype::I64, &[1, 40]);
    copy.add("cls.predictions.bias", Dtype::F32, &[120]);
    copy.add("cls.seq_relationship.weight", Dtype::F32, &[2, 32]);
    let dir = copy.write();
    assert_eq!(hidden(dir), hidden(&fixture("bert")));
    assert_eq!(Checkpoint::open(dir).unwrap().unused_tensors().len(), 3);

    for (base, extras) in [
        ("gpt2", ["h.0.attn.bias", "h.1.attn.masked_bias"].as_slice()),
        ("gpt-neox", &["gpt_neox.layers.1.attention.masked_bias"]),
        ("electra", &["discriminator_predictions.dense.weight"]),
        ("modernbert", &["decoder.bias"]),
        (
            "deberta",
            &[
                "lm_predictions.lm_head.bias",
                "deberta.embeddings.position_embeddings.weight",
            ],
        ),
    ] {
        let mut copy = Copy::of(base);
        for extra in extras {
            copy.add(extra, Dtype::F32, &[4]);
        }
        let dir = copy.write();
        assert_eq!(hidden(dir), hidden(&fixture(base)), "{base}");
        let unused = Checkpoint::open(dir).unwrap().unused_tensors().len();
        assert_eq!(unused, extras.len(), "{base}");
    }
}

#[test]
fn tied_embeddings_are_those_of_the_file_where_it_has_others() {
    let logits = |dir: &Path| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let options = ModelOptions {
            head: HeadOptions::CausalLm,
            ..ModelOptions::default()
        };
        let model = Model::load(&checkpoint, &options, &device()).unwrap();
        values(model.logits(&packed(&[sequences()], 32), Mode::Infer))
    };
    let expected = logits(&fixture("llama3"));
    let mut copy = Copy::of("llama3");
    let embedding = copy.tensor("model.embed_tokens.weight").bytes.clone();
    copy.add("lm_head.weight", Dtype::F32, &[120, 32]);
    // The same values: tied. Zeros: not, as Transformers decides.
    assert!(logits(copy.write()).iter().all(|&logit| logit == 0.0));
    copy.tensor("lm_head.weight").bytes = embedding;
    assert_eq!(logits(copy.write()), expected);
}

#[test]
fn a_missing_extra_or_misshapen_tensor_is_named() {
    for base in [
        "llama2",
        "qwen3",
        "bert",
        "roberta",
        "olmo2",
        "phi3",
        "gpt2",
        "gpt-neox",
        "gemma3",
        "electra",
        "modernbert",
        "deberta",
        "deberta-own-keys",
    ] {
        let names: Vec<String> = Copy::of(base)
            .tensors
            .iter()
            .map(|tensor| tensor.name.clone())
            .filter(|name| !name.starts_with("pooler"))
            .collect();
        for name in &names {
            let mut copy = Copy::of(base);
            copy.tensors.retain(|tensor| tensor.name != *name);
            match Checkpoint::open(copy.write()).unwrap_err() {
                ModelError::MissingTensor {
                    tensor, expected, ..
                } => {
                    assert_eq!(&tensor, name);
                    assert!(!expected.is_empty());
                }
                other => panic!("{base} without {name}: {other}"),
            }
            let mut copy = Copy::of(base);
            copy.tensor(name).shape.push(1);
            match Checkpoint::open(copy.write()).unwrap_err() {
                ModelError::Shape { tensor, found, .. } => {
                    assert_eq!(&tensor, name);
                    assert_eq!(found.last(), Some(&1));
                }
                other => panic!("{base} with another {name}: {other}"),
            }
        }
        let mut copy = Copy::of(base);
        // A layer that the configuration does not count.
        let (stem, _) = names
            .iter()
            .find_map(|name| name.split_once(".0."))
            .expect("a first layer");
        let extra = &format!("{stem}.7.ghost.weight");
        copy.add(extra, Dtype::F32, &[2, 2]);
        let error = Checkpoint::open(copy.write()).unwrap_err();
        assert!(
            matches!(&error, ModelError::UnusedTensor { tensor, .. } if tensor == extra),
            "{error}"
        );
    }
}

#[test]
fn half_a_pooler_is_refused() {
    let mut copy = Copy::of("bert");
    copy.tensors
        .retain(|tensor| tensor.name != "pooler.dense.bias");
    let error = Checkpoint::open(copy.write()).unwrap_err();
    assert!(
        matches!(&error, ModelError::MissingTensor { tensor, .. } if tensor == "pooler.dense.bias"),
        "{error}"
    );
}

#[test]
fn integer_weights_are_refused() {
    let mut copy = Copy::of("llama2");
    let tensor = copy.tensor("model.norm.weight");
    tensor.dtype = Dtype::I32;
    let error = Checkpoint::open(copy.write()).unwrap_err().to_string();
    assert!(
        error.contains("model.norm.weight") && error.contains("I32"),
        "{error}"
    );
}

#[test]
fn a_truncated_or_rewritten_file_is_refused_wherever_it_is_cut() {
    let copy = Copy::of("qwen3");
    let dir = copy.write();
    let path = dir.join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 5, 8, 40, 2000, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = Checkpoint::open(dir).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("model.safetensors"), "{length}: {text}");
        // Behind the header there is a tensor to name.
        if length > whole.len() / 2 {
            assert!(
                matches!(error, ModelError::Tensor { .. }),
                "{length}: {text}"
            );
        }
    }
    let mut longer = whole.clone();
    longer.push(0);
    std::fs::write(&path, longer).unwrap();
    assert!(matches!(
        Checkpoint::open(dir),
        Err(ModelError::Header { .. })
    ));
}

#[test]
fn a_folder_without_weights_or_configuration_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("config.json"), "{error}");
    std::fs::copy(
        fixture("bert").join("config.json"),
        dir.path().join("config.json"),
    )
    .unwrap();
    assert!(matches!(
        Checkpoint::open(dir.path()),
        Err(ModelError::NoWeights { .. })
    ));
}

#[test]
fn a_classifier_of_the_checkpoint_is_where_training_starts() {
    let mut copy = Copy::of("llama2");
    copy.tensors
        .retain(|tensor| tensor.name != "lm_head.weight");
    copy.config["architectures"] = json!(["LlamaForSequenceClassification"]);
    copy.add("score.weight", Dtype::F32, &[3, 32]);
    let dir = copy.write();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let logits = |labels| {
        let options = ModelOptions {
            head: HeadOptions::Classifier {
                labels,
                pooling: Pooling::Last,
                problem: Problem::Multiclass,
            },
            ..ModelOptions::default()
        };
        let model = Model::load(&checkpoint, &options, &device()).unwrap();
        values(model.forward(&packed(&[sequences()], 32), Mode::Infer))
    };
    // Zeros in the file; a head of another size is drawn.
    assert!(logits(3).iter().all(|&logit| logit == 0.0));
    assert!(logits(2).iter().all(|&logit| logit != 0.0));
    // And no language model without its output layer.
    let options = ModelOptions {
        head: HeadOptions::CausalLm,
        ..ModelOptions::default()
    };
    let error = Model::load(&checkpoint, &options, &device()).unwrap_err();
    assert!(error.to_string().contains("lm_head.weight"), "{error}");
}
