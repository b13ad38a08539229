//! A checkpoint, a cohort and a recipe small enough to train in a second, and the binary run on
//! them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use calor_records::{
    CodeEntry, Event, Label, LabelValue, Patient, ShardOptions, Split, write_codes, write_dataset,
    write_labels, write_shard, write_splits,
};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// Patients of the small cohort.
pub const PATIENTS: i64 = 48;
const DAY_US: i64 = 86_400_000_000;

/// A scratch folder with a checkpoint, a cohort and a recipe in it.
pub struct Workplace {
    folder: tempfile::TempDir,
}

/// What a finished command said and how it ended.
pub struct Ended {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Workplace {
    /// An empty one.
    pub fn empty() -> Workplace {
        Workplace {
            folder: tempfile::tempdir().expect("a scratch folder"),
        }
    }

    /// One with a checkpoint in `model`, a cohort in `cohort` and a recipe, `recipe.toml`.
    pub fn new() -> Workplace {
        let workplace = Workplace::empty();
        write_checkpoint(&workplace.path("model"));
        write_cohort(&workplace.path("cohort"), &["outcome"]);
        fs::write(workplace.path("recipe.toml"), RECIPE).expect("the recipe");
        workplace
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The binary, to be run in it, with nothing in its environment that would reach the network
    /// or another cache.
    pub fn calor(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_calor"));
        command.current_dir(self.folder.path());
        for variable in [
            "HF_HUB_CACHE",
            "HF_TOKEN",
            "HF_TOKEN_PATH",
            "HF_HUB_OFFLINE",
            "CALOR_LOG",
        ] {
            command.env_remove(variable);
        }
        command.env("HF_HOME", self.path("hub"));
        command.env("CALOR_CACHE", self.path("cache"));
        command.env("HF_ENDPOINT", closed_port());
        for proxy in [
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
        ] {
            command.env_remove(proxy);
        }
        // Two threads whatever the machine has: the same rounding everywhere.
        command.env("RAYON_NUM_THREADS", "2");
        command
    }

    /// Runs the binary to its end.
    pub fn run(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ended {
        let mut command = self.calor();
        command.args(arguments);
        self.ended(command.output().expect("the binary starts"))
    }

    /// What a command said, with the scratch folder's name taken out.
    pub fn ended(&self, output: Output) -> Ended {
        let clean = |bytes: &[u8]| {
            let text = String::from_utf8(bytes.to_vec()).expect("output in UTF-8");
            let folder = self.folder.path().to_str().expect("a path in UTF-8");
            let canonical = fs::canonicalize(folder).expect("a folder");
            text.replace(canonical.to_str().expect("a path in UTF-8"), "[folder]")
                .replace(folder, "[folder]")
        };
        Ended {
            // A process ended by a signal has no status; 128 + signal is how shells say it.
            status: output.status.code().unwrap_or_else(|| {
                use std::os::unix::process::ExitStatusExt;
                128 + output.status.signal().unwrap_or_default()
            }),
            stdout: clean(&output.stdout),
            stderr: clean(&output.stderr),
        }
    }
}

impl Ended {
    /// Asserts that it ended well.
    #[track_caller]
    pub fn done(self) -> Ended {
        self.with_status(0)
    }

    /// Asserts its exit status.
    #[track_caller]
    pub fn with_status(self, status: i32) -> Ended {
        assert_eq!(
            self.status, status,
            "stdout:\n{}\nstderr:\n{}",
            self.stdout, self.stderr
        );
        self
    }

    /// Its stdout as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error} in\n{}", self.stdout))
    }

    /// Status and both streams, for a snapshot.
    pub fn shown(&self) -> String {
        format!(
            "status: {}\n--- stdout\n{}--- stderr\n{}",
            self.status, self.stdout, self.stderr
        )
    }
}

/// A tiny language model with a chat template: `scripts/references/dialogues.py` made it.
pub fn language_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/sequence/tests/fixtures/dialogue")
}

/// An address on this machine where nobody listens.
pub fn closed_port() -> String {
    // Port 9 (discard) is never used by a system's ephemeral ports.
    "http://127.0.0.1:9".to_owned()
}

/// 8 epochs of 4 steps on a model of two layers.
pub const RECIPE: &str = r#"# calor train recipe.toml
schema = 1
name = "small"

[model]
id = "model"

[task]
kind = "binary"
labels = "outcome"

[cohort]
path = "cohort"

[sequence]
max_tokens = 96

[adapter]
r = 4
alpha = 8
dropout = 0.1

[train]
seed = 7
global_batch = 8
micro_batch = 2
epochs = 8
learning_rate = 1e-2
head_learning_rate = 1e-1
checkpoint_every_steps = 3

[evaluate]
every_steps = 4
metric = "auroc"
patience = 0
resamples = 100

[energy]
idle_window_s = 0
"#;

/// Numbers that look random and are the same everywhere.
pub struct Draws(u64);

impl Draws {
    pub fn new(seed: u64) -> Draws {
        Draws(seed)
    }

    /// In 0..1 (SplitMix64, Steele et al. 2014).
    pub fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A BERT of two layers with weights drawn from `Draws`, and a tokenizer that knows single
/// characters.
pub fn write_checkpoint(folder: &Path) {
    const HIDDEN: usize = 16;
    const WIDE: usize = 32;
    const POSITIONS: usize = 128;
    fs::create_dir_all(folder).expect("a folder");
    let mut vocabulary: BTreeMap<String, usize> = BTreeMap::new();
    for special in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] {
        vocabulary.insert(special.to_owned(), vocabulary.len());
    }
    for character in (33u8..127)
        .map(char::from)
        .filter(|c| !c.is_ascii_uppercase())
    {
        for token in [character.to_string(), format!("##{character}")] {
            let id = vocabulary.len();
            vocabulary.entry(token).or_insert(id);
        }
    }
    let vocab = vocabulary.len();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].iter().enumerate().map(|(id, content)| json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })).collect::<Vec<_>>()),
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "[SEP]", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}},
                     {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                               "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocabulary},
    });
    let config = json!({
        "architectures": ["BertModel"], "model_type": "bert", "hidden_size": HIDDEN, "intermediate_size": WIDE,
        "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "vocab_size": vocab, "pad_token_id": 0,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "position_embedding_type": "absolute",
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).expect("tokenizer.json");
    fs::write(folder.join("config.json"), config.to_string()).expect("config.json");

    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        (
            "embeddings.word_embeddings.weight".into(),
            vec![vocab, HIDDEN],
        ),
        (
            "embeddings.position_embeddings.weight".into(),
            vec![POSITIONS, HIDDEN],
        ),
        (
            "embeddings.token_type_embeddings.weight".into(),
            vec![2, HIDDEN],
        ),
    ];
    let linear =
        |shapes: &mut Vec<(String, Vec<usize>)>, name: String, output: usize, input: usize| {
            shapes.push((format!("{name}.weight"), vec![output, input]));
            shapes.push((format!("{name}.bias"), vec![output]));
        };
    let norm = |shapes: &mut Vec<(String, Vec<usize>)>, name: String| {
        shapes.push((format!("{name}.weight"), vec![HIDDEN]));
        shapes.push((format!("{name}.bias"), vec![HIDDEN]));
    };
    norm(&mut shapes, "embeddings.LayerNorm".into());
    for layer in 0..2 {
        let at = |name: &str| format!("encoder.layer.{layer}.{name}");
        for name in [
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ] {
            linear(&mut shapes, at(name), HIDDEN, HIDDEN);
        }
        norm(&mut shapes, at("attention.output.LayerNorm"));
        linear(&mut shapes, at("intermediate.dense"), WIDE, HIDDEN);
        linear(&mut shapes, at("output.dense"), HIDDEN, WIDE);
        norm(&mut shapes, at("output.LayerNorm"));
    }
    linear(&mut shapes, "pooler.dense".into(), HIDDEN, HIDDEN);

    let mut draws = Draws::new(1);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let bytes = (0..shape.iter().product::<usize>())
                .map(|_| {
                    let value = (draws.next() - 0.5) * 0.4;
                    let centre = if name.contains("LayerNorm.weight") {
                        1.0
                    } else {
                        0.0
                    };
                    (centre + value) as f32
                })
                .flat_map(f32::to_le_bytes)
                .collect();
            (name, shape, bytes)
        })
        .collect();
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, shape, bytes)| {
            (
                name.as_str(),
                TensorView::new(Dtype::F32, shape.clone(), bytes).expect("a tensor"),
            )
        })
        .collect();
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))
        .expect("model.safetensors");
}

/// A cohort in two shards. Who has the code `RISK` mostly has the outcome; a value rises with it;
/// an event after the prediction time gives it away entirely, and must not be seen.
pub fn write_cohort(folder: &Path, tasks: &[&str]) {
    let mut draws = Draws::new(2);
    let mut patients = Vec::new();
    let mut labels = Vec::new();
    let mut splits = Vec::new();
    for subject_id in 1..=PATIENTS {
        let born = -(subject_id % 60 + 20) * 365 * DAY_US;
        let index = 10_000 * DAY_US + subject_id * DAY_US;
        let outcome = draws.next() < 0.5;
        let risky = outcome == (draws.next() < 0.9);
        let value = (if risky { 8.0 } else { 4.0 }) + draws.next();
        let event = |time_us: Option<i64>, code: &str, value: Option<f64>, site: &str| Event {
            time_us,
            code: Arc::from(code),
            numeric_value: value.map(|value| value as f32),
            text_value: None,
            site: Some(Arc::from(site)),
            items: None,
        };
        let sex = if subject_id % 2 == 0 {
            "SEX//F"
        } else {
            "SEX//M"
        };
        let mut events = vec![
            event(None, sex, None, "register"),
            event(Some(born), "MEDS_BIRTH", None, "register"),
            event(
                Some(index - 400 * DAY_US),
                "LAB//K",
                Some(value),
                "laboratory",
            ),
        ];
        if risky {
            events.push(event(Some(index - 30 * DAY_US), "RISK", None, "diagnoses"));
        }
        events.push(event(
            Some(index + DAY_US),
            if outcome { "AFTER//YES" } else { "AFTER//NO" },
            None,
            "register",
        ));
        patients.push(Patient { subject_id, events });
        labels.push(Label {
            subject_id,
            prediction_time_us: index,
            value: LabelValue::Boolean(outcome),
        });
        splits.push((
            subject_id,
            match subject_id % 6 {
                0 => Split::HeldOut,
                1 => Split::Tuning,
                _ => Split::Train,
            },
        ));
    }
    let (first, second) = patients.split_at(patients.len() / 2);
    write_shard(
        &folder.join("data/0.parquet"),
        first,
        ShardOptions::default(),
    )
    .expect("a shard");
    write_shard(
        &folder.join("data/1.parquet"),
        second,
        ShardOptions::default(),
    )
    .expect("a shard");
    for task in tasks {
        write_labels(&folder.join("labels").join(task).join("0.parquet"), &labels).expect("labels");
    }
    write_splits(folder, &splits).expect("splits");
    let described = |text: &str| CodeEntry {
        description: Some(Arc::from(text)),
        parent_codes: Vec::new(),
    };
    let codes = [
        ("MEDS_BIRTH", described("birth")),
        ("SEX//F", described("female")),
        ("SEX//M", described("male")),
        ("LAB//K", described("potassium")),
        ("RISK", described("heart failure")),
        ("AFTER//YES", described("death")),
        ("AFTER//NO", described("alive")),
    ];
    write_codes(folder, codes.iter().map(|(code, entry)| (*code, entry))).expect("codes");
    let dataset =
        json!({"dataset_name": "small", "meds_version": "0.4.0", "site_id_columns": ["site"]});
    write_dataset(folder, dataset.as_object().expect("an object")).expect("dataset.json");
}
