use std::path::Path;

use serde_json::{Value, json};

use crate::config::*;
use crate::error::ModelError;
use crate::keys::Keys;

fn parse(json: Value) -> Result<ModelConfig, ModelError> {
    let Value::Object(object) = json else {
        panic!("an object")
    };
    Keys::new(Path::new("config.json"), &object).model()
}

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4,
        "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 48,
    })
}

fn windows(config: &ModelConfig) -> Vec<Option<usize>> {
    config
        .design
        .layers
        .iter()
        .map(|layer| layer.window)
        .collect()
}

#[test]
fn defaults_follow_the_configuration_classes() {
    let config = parse(llama()).unwrap();
    assert_eq!(config.design.kv_heads, 4);
    assert_eq!(config.design.head_dim, 8);
    assert_eq!(windows(&config), [None, None]);
    let mut mistral = llama();
    mistral["model_type"] = "mistral".into();
    mistral["num_attention_heads"] = 8.into();
    let config = parse(mistral).unwrap();
    assert_eq!(config.design.kv_heads, 8);
    assert_eq!(windows(&config), [Some(4096), Some(4096)]);
    let mut qwen3 = llama();
    qwen3["model_type"] = "qwen3".into();
    qwen3["num_key_value_heads"] = 2.into();
    assert_eq!(parse(qwen3).unwrap().design.head_dim, 128);
}

#[test]
fn qwen_windows_start_at_max_window_layers() {
    let mut qwen = llama();
    qwen["model_type"] = "qwen2".into();
    qwen["num_key_value_heads"] = 2.into();
    qwen["sliding_window"] = 16.into();
    qwen["max_window_layers"] = 1.into();
    assert_eq!(windows(&parse(qwen.clone()).unwrap()), [None, None]);
    qwen["use_sliding_window"] = true.into();
    assert_eq!(windows(&parse(qwen.clone()).unwrap()), [None, Some(16)]);
    qwen["layer_types"] = json!(["sliding_attention", "full_attention"]);
    assert_eq!(windows(&parse(qwen).unwrap()), [Some(16), None]);
}

#[test]
fn rope_is_read_in_both_spellings() {
    let mut config = llama();
    config["rope_theta"] = 5e5.into();
    config["rope_scaling"] = json!({"type": "linear", "factor": 4.0});
    let parsed = parse(config).unwrap();
    assert_eq!(parsed.design.ropes[0].theta, 5e5);
    assert_eq!(
        parsed.design.ropes[0].scaling,
        RopeScaling::Linear { factor: 4.0 }
    );
    let mut config = llama();
    config["rope_parameters"] = json!({
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    });
    assert_eq!(
        parse(config).unwrap().design.ropes[0].scaling,
        RopeScaling::Llama3 {
            factor: 8.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_positions: 2048.0,
        }
    );
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    let cases: [(&str, Value); 9] = [
        ("model_type", "gptj".into()),
        ("model_type", "gemma3".into()),
        ("hidden_act", "gelu".into()),
        ("rope_scaling", json!({"type": "yarn", "factor": 2.0})),
        ("partial_rotary_factor", 0.5.into()),
        ("quantization_config", json!({"bits": 4})),
        ("num_key_value_heads", 3.into()),
        ("num_hidden_layers", 1_000_000_000.into()),
        ("hidden_size", "wide".into()),
    ];
    for (key, value) in cases {
        let mut config = llama();
        config[key] = value;
        let error = parse(config).unwrap_err().to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
}

#[test]
fn roberta_positions_start_after_the_padding_token() {
    let config = parse(json!({
        "model_type": "roberta", "hidden_size": 32, "num_attention_heads": 4,
        "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 48,
        "max_position_embeddings": 42, "pad_token_id": 1,
    }))
    .unwrap();
    assert_eq!(config.max_positions(), 40);
    assert_eq!(config.family(), Family::Encoder);
}

fn sized(model_type: &str, changes: Value) -> Value {
    let mut config = llama();
    config["model_type"] = model_type.into();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

#[test]
fn phi3_ropes_are_long_by_any_of_their_names() {
    for name in ["longrope", "su", "yarn"] {
        let scaling = json!({
            "type": name, "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0],
        });
        let config = sized(
            "phi3",
            json!({
                "partial_rotary_factor": 0.75, "rope_scaling": scaling,
                "max_position_embeddings": 256, "original_max_position_embeddings": 16,
            }),
        );
        let config = parse(config).unwrap();
        // Three quarters of a head of 8; √(1 + ln 16 / ln 16).
        assert_eq!(config.design.ropes[0].rotated, 6);
        assert_eq!(
            config.design.ropes[0].scaling,
            RopeScaling::Long {
                short_factors: vec![1.0, 1.5, 2.0],
                long_factors: vec![2.0, 3.0, 4.0],
                original_positions: 16,
                attention_factor: std::f32::consts::SQRT_2,
            }
        );
    }
    let short = json!({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]});
    let error = parse(sized("phi3", json!({"rope_scaling": short}))).unwrap_err();
    assert!(error.to_string().contains("short_factor"), "{error}");
}

#[test]
fn gemma_windows_alternate_and_turn_by_their_own_frequencies() {
    let layers = json!({"num_hidden_layers": 7, "sliding_window": 16, "rope_local_base_freq": 5e3});
    let second = parse(sized("gemma2", layers.clone())).unwrap();
    let window = Some(16);
    assert_eq!(
        windows(&second),
        [window, None, window, None, window, None, window]
    );
    assert_eq!(second.design.attention_soft_cap, Some(50.0));
    assert_eq!(second.design.logit_soft_cap, Some(30.0));
    let third = parse(sized("gemma3_text", layers)).unwrap();
    let mut expected = [window; 7];
    expected[5] = None;
    assert_eq!(windows(&third), expected);
    let ropes: Vec<f64> = third
        .design
        .layers
        .iter()
        .map(|layer| third.design.ropes[layer.rope.unwrap()].theta)
        .collect();
    assert_eq!(ropes, [5e3, 5e3, 5e3, 5e3, 5e3, 1e6, 5e3]);
    assert_eq!(third.design.attention_soft_cap, None);
    let off = json!({"attn_logit_softcapping": null, "final_logit_softcapping": null});
    let off = parse(sized("gemma2", off)).unwrap();
    assert_eq!(off.design.attention_soft_cap, None);
    assert_eq!(off.design.logit_soft_cap, None);
}

#[test]
fn gpt2_is_read_under_its_own_keys() {
    let config = json!({
        "model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64,
        "n_positions": 48, "scale_attn_by_inverse_layer_idx": true,
    });
    let config = parse(config).unwrap();
    assert_eq!(config.intermediate, 128);
    assert_eq!(config.position_limit(), Some(48));
    assert_eq!(
        config.design.layers[1].scale,
        config.design.layers[0].scale / 2.0
    );
}

#[test]
fn modernbert_looks_everywhere_in_every_third_layer() {
    let layers = json!({"num_hidden_layers": 4, "local_attention": 10});
    let config = parse(sized("modernbert", layers)).unwrap();
    assert_eq!(windows(&config), [None, Some(6), Some(6), None]);
    assert_eq!(config.position_limit(), None);
    assert_eq!(config.max_positions(), 8192);
}

#[test]
fn what_encoders_lack_is_refused_by_name() {
    let deberta = json!({"relative_attention": true, "pos_att_type": "p2c|c2p"});
    parse(sized("deberta-v2", deberta.clone())).unwrap();
    let cases = [
        ("deberta-v2", "relative_attention", json!(false)),
        ("deberta-v2", "conv_kernel_size", json!(3)),
        ("deberta-v2", "pos_att_type", json!(["p2p"])),
        ("deberta-v2", "norm_rel_ebd", json!("batch_norm")),
        ("deberta-v2", "position_buckets", json!(1)),
        ("electra", "is_decoder", json!(true)),
        ("electra", "position_embedding_type", json!("relative_key")),
        ("modernbert", "classifier_pooling", json!("max")),
        (
            "modernbert",
            "layer_types",
            json!(["full_attention", "chunked"]),
        ),
        ("gemma3_text", "use_bidirectional_attention", json!(true)),
        ("gpt2", "add_cross_attention", json!(true)),
    ];
    for (model_type, key, value) in cases {
        let mut config = sized(model_type, deberta.clone());
        config[key] = value;
        let error = parse(config).unwrap_err().to_string();
        assert!(error.contains(key), "{model_type} {key}: {error}");
    }
}
