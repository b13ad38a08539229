//! Which modules an adapter touches, against what PEFT 0.21.2 picked.

use std::collections::BTreeMap;

use crate::common::{device, fixture};
use calor_model::{
    Checkpoint, HeadOptions, LoraOptions, Model, ModelError, ModelOptions, Pooling, Problem,
};
use serde_json::{Map, Value, json};

/// PEFT's fields under the names of a recipe.
fn options(config: &Map<String, Value>) -> LoraOptions {
    let mut recipe = json!({"r": 4, "alpha": 8});
    for (key, value) in config {
        let (key, value) = match (key.as_str(), value) {
            ("target_modules", value) => ("targets", value.clone()),
            ("exclude_modules", value) => ("exclude", value.clone()),
            ("layers_to_transform", Value::Number(layer)) => (key.as_str(), json!([layer])),
            ("layers_pattern", Value::String(name)) => (key.as_str(), json!([name])),
            (key, value) => (key, value.clone()),
        };
        recipe[key] = value;
    }
    serde_json::from_value(recipe).expect("a recipe's adapter")
}

/// A checkpoint folder of zeros for a configuration.
fn checkpoint(dir: &std::path::Path, model_type: &str, base: &Value) -> Checkpoint {
    let mut config = base.clone();
    config["model_type"] = model_type.into();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let hidden = base["hidden_size"].as_u64().unwrap() as usize;
    let wide = base["intermediate_size"].as_u64().unwrap() as usize;
    let vocab = base["vocab_size"].as_u64().unwrap() as usize;
    let mut shapes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| {
        shapes.insert(name, shape.to_vec());
    };
    for layer in 0..base["num_hidden_layers"].as_u64().unwrap() {
        if model_type == "llama" {
            let at = |name: &str| format!("model.layers.{layer}.{name}.weight");
            for (name, shape) in [
                ("self_attn.q_proj", [hidden, hidden]),
                ("self_attn.k_proj", [hidden / 2, hidden]),
                ("self_attn.v_proj", [hidden / 2, hidden]),
                ("self_attn.o_proj", [hidden, hidden]),
                ("mlp.gate_proj", [wide, hidden]),
                ("mlp.up_proj", [wide, hidden]),
                ("mlp.down_proj", [hidden, wide]),
            ] {
                add(at(name), &shape);
            }
            add(at("input_layernorm"), &[hidden]);
            add(at("post_attention_layernorm"), &[hidden]);
        } else {
            for (name, shape) in [
                ("attention.self.query", vec![hidden, hidden]),
                ("attention.self.key", vec![hidden, hidden]),
                ("attention.self.value", vec![hidden, hidden]),
                ("attention.output.dense", vec![hidden, hidden]),
                ("attention.output.LayerNorm", vec![hidden]),
                ("intermediate.dense", vec![wide, hidden]),
                ("output.dense", vec![hidden, wide]),
                ("output.LayerNorm", vec![hidden]),
            ] {
                let at = format!("encoder.layer.{layer}.{name}");
                add(format!("{at}.bias"), &shape[..1]);
                add(format!("{at}.weight"), &shape);
            }
        }
    }
    if model_type == "llama" {
        add("model.embed_tokens.weight".to_owned(), &[vocab, hidden]);
        add("model.norm.weight".to_owned(), &[hidden]);
        add("lm_head.weight".to_owned(), &[vocab, hidden]);
    } else {
        let positions = base["max_position_embeddings"].as_u64().unwrap() as usize;
        for (name, entries) in [
            ("word_embeddings", vocab),
            ("position_embeddings", positions),
            ("token_type_embeddings", 2),
        ] {
            add(format!("embeddings.{name}.weight"), &[entries, hidden]);
        }
        add("embeddings.LayerNorm.weight".to_owned(), &[hidden]);
        add("embeddings.LayerNorm.bias".to_owned(), &[hidden]);
        add("pooler.dense.weight".to_owned(), &[hidden, hidden]);
        add("pooler.dense.bias".to_owned(), &[hidden]);
    }
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape) in &shapes {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        header.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]}),
        );
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + end, 0);
    std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
    Checkpoint::open(dir).expect("a whole checkpoint")
}

#[test]
fn targets_ranks_and_alphas_are_those_of_peft() {
    let text = std::fs::read_to_string(fixture("matching.json")).unwrap();
    let stored: Value = serde_json::from_str(&text).unwrap();
    let cases = stored["cases"].as_array().unwrap();
    assert!(cases.len() >= 35);
    for case in cases {
        let model_type = case["model_type"].as_str().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let family = if model_type == "llama" {
            "decoder"
        } else {
            "encoder"
        };
        let checkpoint = checkpoint(dir.path(), model_type, &stored[family]);
        let head = match case["task_type"].as_str().unwrap() {
            "CAUSAL_LM" => HeadOptions::CausalLm,
            "SEQ_CLS" => HeadOptions::Classifier {
                labels: 2,
                pooling: Pooling::default_for(checkpoint.config().family()),
                problem: Problem::Multiclass,
            },
            _ => HeadOptions::None,
        };
        let config = case["config"].as_object().unwrap();
        let lora = options(config);
        let loaded = Model::load(
            &checkpoint,
            &ModelOptions {
                lora: Some(lora.clone()),
                head,
                ..ModelOptions::default()
            },
            &device(),
        );
        let Some(expected) = case["modules"].as_object() else {
            assert!(
                matches!(loaded, Err(ModelError::Target { .. })),
                "{case}: {loaded:?}"
            );
            continue;
        };
        let model = loaded.unwrap_or_else(|error| panic!("{case}: {error}"));
        let mut expected: BTreeMap<String, (usize, f64)> = expected
            .iter()
            .map(|(path, pair)| {
                let rank = pair[0].as_u64().unwrap() as usize;
                (path.clone(), (rank, pair[1].as_f64().unwrap()))
            })
            .collect();
        if head == HeadOptions::None {
            // Ours never runs the pooler of a bare encoder and gives it no pair.
            expected.remove("pooler.dense");
        }
        let modules = model.lora_modules();
        assert_eq!(
            modules,
            expected.keys().cloned().collect::<Vec<_>>(),
            "{case}"
        );

        // Written and read again, the same modules, ranks and scalings.
        let adapter = dir.path().join("adapter");
        model.save_adapter(&adapter, "base").unwrap();
        let again = Model::load_with_adapter(
            &checkpoint,
            &adapter,
            burn::tensor::FloatDType::F32,
            &device(),
        )
        .unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_eq!(again.lora_modules(), modules, "{case}");
        for (path, (rank, alpha)) in expected {
            let ours = again.lora_scaling(&path).expect("a pair");
            assert_eq!(ours, (rank, (alpha / rank as f64) as f32), "{case} {path}");
        }
    }
}

#[test]
fn of_embeddings_only_that_of_tokens_takes_a_pair() {
    let checkpoint = Checkpoint::open(&fixture("bert")).unwrap();
    let load = |target: &str| {
        let options = ModelOptions {
            lora: Some(LoraOptions {
                targets: calor_model::Targets::List(vec![target.to_owned()]),
                ..LoraOptions::default()
            }),
            ..ModelOptions::default()
        };
        Model::load(&checkpoint, &options, &device())
    };
    let model = load("word_embeddings").unwrap();
    assert_eq!(model.lora_modules(), ["embeddings.word_embeddings"]);
    let error = load("position_embeddings").unwrap_err();
    assert!(error.to_string().contains("position_embeddings"), "{error}");
}
