//! A tiny cohort, tiny checkpoints and runs on them.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use calor_records::{
    BIRTH_CODE, Event, Label, LabelValue, Patient, ShardOptions, Split, write_dataset,
    write_labels, write_shard, write_splits,
};
use calor_train::recipe::Recipe;
use calor_train::{DeviceSpec, Observer, RunOptions, StepProgress, StopFlag, TrainOutcome};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const DAY_US: i64 = 86_400_000_000;
pub const VOCAB: usize = 160;
pub const POSITIONS: usize = 64;
const HIDDEN: usize = 16;

/// A folder with a cohort, a checkpoint and a cache.
pub struct Home {
    pub folder: tempfile::TempDir,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Bert,
    Llama,
}

impl Home {
    pub fn new(kind: Kind) -> Home {
        let folder = tempfile::tempdir().unwrap();
        write_cohort(&folder.path().join("cohort"), true);
        write_checkpoint(&folder.path().join("checkpoint"), kind, 1);
        Home { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A recipe for this home; later assignments count.
    pub fn recipe(&self, set: &[&str]) -> Recipe {
        let text = format!(
            "schema = 1\nname = \"tiny\"\n\
             [model]\nid = \"{}\"\n\
             [task]\nkind = \"binary\"\nlabels = \"sick\"\n\
             [cohort]\npath = \"{}\"\n\
             [sequence]\nmax_tokens = {POSITIONS}\noverlength = \"drop_oldest_events\"\n\
             [adapter]\nr = 4\nalpha = 8\ndropout = 0.1\n\
             [train]\nglobal_batch = 8\nmicro_batch = 2\nepochs = 2\nlearning_rate = 5e-3\n\
             schedule = {{ kind = \"cosine\", warmup_steps = 2 }}\n\
             [evaluate]\nevery_steps = 5\npatience = 0\nresamples = 100\n\
             [energy]\nidle_window_s = 0\n",
            self.path("checkpoint").display(),
            self.path("cohort").display(),
        );
        let set: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
        Recipe::parse(&text, Path::new("tiny.toml"), &set).unwrap()
    }

    pub fn options(&self, out: &str, set: &[&str]) -> RunOptions {
        RunOptions {
            recipe: self.recipe(set),
            checkpoint: self.path("checkpoint"),
            out: self.path(out),
            cache: self.path("cache"),
            device: DeviceSpec::Cpu,
            resume: false,
        }
    }

    pub fn resume(&self, out: &str, set: &[&str]) -> RunOptions {
        RunOptions {
            resume: true,
            ..self.options(out, set)
        }
    }
}

/// Trains to the end.
pub fn finish(options: &RunOptions) -> calor_train::artifacts::report::Report {
    match calor_train::train(options, &mut (), &StopFlag::new()).unwrap() {
        TrainOutcome::Finished(report) => *report,
        TrainOutcome::Stopped { step, .. } => panic!("stopped at step {step}"),
    }
}

/// Does something after a step.
pub struct AfterStep<F: FnMut(&StepProgress)>(pub F);

impl<F: FnMut(&StepProgress)> Observer for AfterStep<F> {
    fn step(&mut self, progress: &StepProgress) {
        (self.0)(progress);
    }
}

/// Losses and gradient norms of all steps, and evaluations, as they are in the file.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// What a resumed run has to repeat: everything but times and watts.
pub fn repeatable(run: &Path) -> Vec<Value> {
    let measured = [
        "elapsed_s",
        "data_s",
        "forward_s",
        "backward_s",
        "optimizer_s",
        "tokens_per_s",
        "watts",
    ];
    let mut lines = metrics(run);
    for line in &mut lines {
        for name in measured {
            line.as_object_mut().unwrap().shift_remove(name);
        }
    }
    lines
}

pub fn losses(run: &Path) -> Vec<f64> {
    let lines = metrics(run);
    let steps = lines.iter().filter(|line| line["event"] == "step");
    steps.map(|line| line["loss"].as_f64().unwrap()).collect()
}

/// Every file of an adapter folder.
pub fn adapter_bytes(run: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(run.join("adapter"))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// 96 patients: those with fever and a high marker get sick. `labelled` writes the label sets.
pub fn write_cohort(cohort: &Path, labelled: bool) {
    let mut draw = Draw(7);
    let mut patients = Vec::new();
    let mut labels: BTreeMap<&str, Vec<Label>> = BTreeMap::new();
    let mut splits = Vec::new();
    for subject_id in 1..=96i64 {
        let sick = draw.below(2) == 1;
        let mut events = vec![event(
            None,
            if draw.below(2) == 0 {
                "SEX//male"
            } else {
                "SEX//female"
            },
            None,
        )];
        events.push(event(
            Some(-(10_000 + draw.below(10_000) as i64) * DAY_US),
            BIRTH_CODE,
            None,
        ));
        let mut day = 0;
        let mut sum = 0.0;
        for _ in 0..3 + draw.below(5) {
            day += 1 + draw.below(60) as i64;
            let value = draw.unit() + if sick { 6.0 } else { 1.0 };
            sum += value;
            events.push(event(Some(day * DAY_US), "marker", Some(value)));
            let symptom = if sick { "fever" } else { "cough" };
            if draw.below(2) == 0 {
                events.push(event(Some(day * DAY_US), symptom, None));
            }
        }
        patients.push(Patient { subject_id, events });
        let mut label = |task, value| {
            let prediction_time_us = (day + 1) * DAY_US;
            let label = Label {
                subject_id,
                prediction_time_us,
                value,
            };
            labels.entry(task).or_default().push(label);
        };
        label("sick", LabelValue::Boolean(sick));
        label(
            "ward",
            LabelValue::Categorical(["a", "b", "c"][draw.below(3) as usize].into()),
        );
        label("sum", LabelValue::Float(sum));
        if subject_id % 3 != 0 {
            label("coughs", LabelValue::Boolean(draw.below(2) == 0));
        }
        let split = match subject_id % 6 {
            0 => Split::Tuning,
            1 => Split::HeldOut,
            _ => Split::Train,
        };
        splits.push((subject_id, split));
    }
    std::fs::create_dir_all(cohort.join("data")).unwrap();
    std::fs::create_dir_all(cohort.join("metadata")).unwrap();
    let (first, second) = patients.split_at(40);
    for (name, part) in [("0.parquet", first), ("1.parquet", second)] {
        let options = ShardOptions {
            sites: false,
            ..ShardOptions::default()
        };
        write_shard(&cohort.join("data").join(name), part, options).unwrap();
    }
    write_dataset(cohort, &serde_json::Map::new()).unwrap();
    write_splits(cohort, &splits).unwrap();
    if labelled {
        for (task, labels) in labels {
            let folder = cohort.join("labels").join(task);
            std::fs::create_dir_all(&folder).unwrap();
            write_labels(&folder.join("0.parquet"), &labels).unwrap();
        }
    }
}

fn event(time_us: Option<i64>, code: &str, numeric_value: Option<f32>) -> Event {
    Event {
        time_us,
        code: code.into(),
        numeric_value,
        text_value: None,
        site: None,
        items: None,
    }
}

/// A checkpoint with random weights.
pub fn write_checkpoint(folder: &Path, kind: Kind, seed: u64) {
    std::fs::create_dir_all(folder).unwrap();
    let (config, tensors) = match kind {
        Kind::Bert => (bert_config(), bert_tensors()),
        Kind::Llama => (llama_config(), llama_tensors()),
    };
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer.json"), tokenizer(kind).to_string()).unwrap();
    let mut draw = Draw(seed);
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape)| {
            let count: usize = shape.iter().product();
            let norm = shape.len() == 1 && name.to_lowercase().contains("norm.weight")
                || name.ends_with("layernorm.weight");
            let width = if name.contains("embed") { 2.0 } else { 0.6 };
            let values = (0..count).map(|_| {
                let value = (draw.unit() - 0.5) * width;
                if norm { 1.0 } else { value }
            });
            let bytes = values.flat_map(f32::to_le_bytes).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (
            name.as_str(),
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
}

fn bert_config() -> Value {
    json!({
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "initializer_range": 0.02,
        "pad_token_id": 0,
    })
}

fn bert_tensors() -> Vec<(String, Vec<usize>)> {
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        (
            "embeddings.word_embeddings.weight".into(),
            vec![VOCAB, HIDDEN],
        ),
        (
            "embeddings.position_embeddings.weight".into(),
            vec![POSITIONS, HIDDEN],
        ),
        (
            "embeddings.token_type_embeddings.weight".into(),
            vec![2, HIDDEN],
        ),
        ("pooler.dense.weight".into(), vec![HIDDEN, HIDDEN]),
        ("pooler.dense.bias".into(), vec![HIDDEN]),
    ];
    let mut norms = vec!["embeddings".to_owned()];
    for layer in 0..2 {
        let path = format!("encoder.layer.{layer}");
        for (name, out, input) in [
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", 32, HIDDEN),
            ("output.dense", HIDDEN, 32),
        ] {
            tensors.push((format!("{path}.{name}.weight"), vec![out, input]));
            tensors.push((format!("{path}.{name}.bias"), vec![out]));
        }
        norms.push(format!("{path}.attention.output"));
        norms.push(format!("{path}.output"));
    }
    for norm in norms {
        tensors.push((format!("{norm}.LayerNorm.weight"), vec![HIDDEN]));
        tensors.push((format!("{norm}.LayerNorm.bias"), vec![HIDDEN]));
    }
    tensors
}

fn llama_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 32, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": true, "initializer_range": 0.02, "attention_bias": false,
        "mlp_bias": false, "bos_token_id": 2, "eos_token_id": 3,
    })
}

fn llama_tensors() -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..2 {
        for (name, shape) in [
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![HIDDEN / 2, HIDDEN]),
            ("self_attn.v_proj", vec![HIDDEN / 2, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![32, HIDDEN]),
            ("mlp.up_proj", vec![32, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, 32]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    tensors
}

/// Words and single characters; `[CLS] … [SEP]` for the encoder, nothing for the decoder.
fn tokenizer(kind: Kind) -> Value {
    let specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"];
    let words = [
        "year", "old", "man", "woman", "marker", "cough", "fever", "very", "high", "low", "normal",
        "days", "weeks", "months", "later", "ago", "week", "month", "day",
    ];
    let mut vocab = serde_json::Map::new();
    let pieces = ('!'..='~')
        .filter(|c| !c.is_ascii_uppercase())
        .flat_map(|c| {
            let continued = c.is_ascii_digit().then(|| format!("##{c}"));
            std::iter::once(c.to_string()).chain(continued)
        });
    let all = specials
        .iter()
        .chain(&words)
        .map(|word| (*word).to_owned())
        .chain(pieces);
    for token in all {
        let id = vocab.len();
        vocab.entry(token).or_insert(json!(id));
    }
    assert!(vocab.len() <= VOCAB);
    let special = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let framed = [special("[CLS]"), text, special("[SEP]")];
    let post_processor = json!({
        "type": "TemplateProcessing", "single": framed, "pair": framed,
        "special_tokens": {
            "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
            "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]},
        },
    });
    let added = specials.iter().enumerate().map(|(id, content)| {
        json!({
            "id": id, "content": content, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false,
        })
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": if kind == Kind::Bert { post_processor } else { Value::Null },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab,
        },
    })
}

/// SplitMix64: the same numbers on every machine.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }
}
