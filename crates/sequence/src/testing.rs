//! Small tokenizers, patients and cohorts for tests.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use calor_records::{
    CodeEntry, Cohort, Event, Label, LabelValue, Labels, Patient, ShardOptions, Split, write_codes,
    write_dataset, write_labels, write_shard, write_splits,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::PatientTokenizer;

pub(crate) const DAY_US: i64 = 86_400_000_000;

fn special(id: usize, content: &str) -> Value {
    json!({
        "id": id, "content": content, "special": true, "normalized": false,
        "single_word": false, "lstrip": false, "rstrip": false,
    })
}

fn numbered(tokens: impl IntoIterator<Item = String>) -> BTreeMap<String, usize> {
    let mut vocab = BTreeMap::new();
    for token in tokens {
        let next = vocab.len();
        vocab.entry(token).or_insert(next);
    }
    vocab
}

/// BERT's kind: lower case, words and pieces of words, `[CLS] … [SEP]`; with the truncation and
/// padding that hub files carry.
pub(crate) fn wordpiece() -> Value {
    let specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"];
    let mut tokens: Vec<String> = specials.map(String::from).to_vec();
    for word in [
        "year", "old", "man", "woman", "ago", "later", "high", "low", "weight", "creatin",
    ] {
        tokens.push(word.to_string());
    }
    tokens.push("##ine".to_string());
    for c in ('!'..='~').chain("äöβ≥".chars()) {
        tokens.push(c.to_string());
        tokens.push(format!("##{c}"));
    }
    let framed = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let single = [
        framed("[CLS]"),
        json!({"Sequence": {"id": "A", "type_id": 0}}),
        framed("[SEP]"),
    ];
    json!({
        "version": "1.0",
        "truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
        },
        "added_tokens": specials.iter().enumerate().map(|(id, c)| special(id, c)).collect::<Vec<_>>(),
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing", "single": single, "pair": single,
            "special_tokens": {
                "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]},
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": numbered(tokens),
        },
    })
}

/// What a byte-level tokenizer does before BPE and around the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ByteLevelKind {
    /// `<s> … </s>`.
    Roberta,
    /// Three digits at a time, `<s> …`.
    Llama3,
    /// Single digits, nothing around the text.
    SmolLm2,
}

pub(crate) fn byte_level(kind: ByteLevelKind) -> Value {
    let specials = ["<s>", "<pad>", "</s>"];
    let mut tokens: Vec<String> = specials.map(String::from).to_vec();
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    tokens.extend(alphabet.iter().map(char::to_string));
    let merges = [
        ("h", "i"),
        ("hi", "g"),
        ("hig", "h"),
        ("Ġ", "high"),
        ("l", "o"),
        ("lo", "w"),
        ("Ġ", "low"),
        ("1", "2"),
        ("12", "3"),
        ("Ġ", "1"),
        ("e", "r"),
        (".", ","),
    ];
    tokens.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let pre_tokenizer = match kind {
        ByteLevelKind::Roberta => bytes.clone(),
        ByteLevelKind::Llama3 => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": false,
            },
        ]}),
        ByteLevelKind::SmolLm2 => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, bytes.clone(),
        ]}),
    };
    let post_processor = match kind {
        ByteLevelKind::Roberta => json!({
            "type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0],
            "trim_offsets": true, "add_prefix_space": false,
        }),
        ByteLevelKind::Llama3 => {
            let single = [
                json!({"SpecialToken": {"id": "<s>", "type_id": 0}}),
                json!({"Sequence": {"id": "A", "type_id": 0}}),
            ];
            json!({"type": "Sequence", "processors": [bytes, {
                "type": "TemplateProcessing", "single": single, "pair": single,
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
            }]})
        }
        ByteLevelKind::SmolLm2 => bytes,
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": specials.iter().enumerate().map(|(id, c)| special(id, c)).collect::<Vec<_>>(),
        "normalizer": if kind == ByteLevelKind::Llama3 { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": numbered(tokens),
            "merges": merges.iter().map(|(l, r)| format!("{l} {r}")).collect::<Vec<_>>(),
        },
    })
}

/// Llama 2's kind: the space is a character of the word behind it, `<s> …`.
pub(crate) fn sentencepiece() -> Value {
    let specials = ["<unk>", "<s>", "</s>"];
    let mut tokens: Vec<String> = specials.map(String::from).to_vec();
    tokens.push("▁".to_string());
    tokens.extend(('!'..='~').map(String::from));
    let merges = [
        ("▁", "h"),
        ("▁h", "i"),
        ("o", "l"),
        ("ol", "d"),
        ("▁", "old"),
        ("1", "2"),
    ];
    tokens.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
    let single = [
        json!({"SpecialToken": {"id": "<s>", "type_id": 0}}),
        json!({"Sequence": {"id": "A", "type_id": 0}}),
    ];
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": specials.iter().enumerate().map(|(id, c)| special(id, c)).collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing", "single": single, "pair": single,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": false, "ignore_merges": false, "vocab": numbered(tokens),
            "merges": merges.iter().map(|(l, r)| format!("{l} {r}")).collect::<Vec<_>>(),
        },
    })
}

/// A tokenizer with tokens that reach over spaces, so that words alone do not determine a text.
pub(crate) fn across_words() -> Value {
    let mut json = byte_level(ByteLevelKind::SmolLm2);
    json["pre_tokenizer"] = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    let next = json["model"]["vocab"].as_object().unwrap().len();
    json["model"]["vocab"]["dĠ"] = json!(next);
    json["model"]["merges"]
        .as_array_mut()
        .unwrap()
        .push(json!("d Ġ"));
    json
}

pub(crate) fn tokenizer(json: &Value, config: Option<Value>) -> PatientTokenizer {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    if let Some(config) = config {
        let path = folder.path().join("tokenizer_config.json");
        std::fs::write(path, config.to_string()).unwrap();
    }
    PatientTokenizer::open(folder.path()).unwrap()
}

pub(crate) fn event(time_us: Option<i64>, code: &str, value: Option<f32>) -> Event {
    Event {
        time_us,
        code: code.into(),
        numeric_value: value,
        text_value: None,
        site: None,
        items: None,
    }
}

pub(crate) fn note(time_us: Option<i64>, code: &str, text: &str) -> Event {
    Event {
        text_value: Some(text.into()),
        ..event(time_us, code, None)
    }
}

/// Patients with static rows, repeated codes, ties in time and notes, over about 30 years.
pub(crate) fn any_patient() -> impl Strategy<Value = Patient> {
    let code = prop_oneof![
        Just("LAB//creatinine"),
        Just("weight"),
        Just("DIAGNOSIS//E11.9"),
        Just("noteworthy_event"),
    ];
    let value = prop_oneof![Just(None), (-1e3f32..1e4).prop_map(Some)];
    let text = prop_oneof![
        4 => Just(None),
        1 => "[a-c .,\n]{1,40}".prop_map(|text| Some(Arc::from(text))),
    ];
    let site = prop_oneof![
        Just(None),
        Just(Some(Arc::from("register"))),
        Just(Some(Arc::from("clinic")))
    ];
    let row = (0i64..11_000 * 24, code, value, text, site);
    (
        prop::collection::vec(row, 0..40),
        prop::option::of(-9_000i64..0),
        prop_oneof![Just(None), Just(Some("GENDER//F")), Just(Some("SEX//male"))],
        0usize..3,
    )
        .prop_map(|(rows, birth_day, sex, statics)| {
            let mut events: Vec<Event> = sex.iter().map(|sex| event(None, sex, None)).collect();
            for fact in &["smoker", "RACE//white", "region_north"][..statics] {
                events.push(event(None, fact, None));
            }
            let mut dated: Vec<Event> = birth_day
                .iter()
                .map(|day| event(Some(day * DAY_US), "MEDS_BIRTH", None))
                .collect();
            dated.extend(
                rows.into_iter()
                    .map(|(hour, code, value, text, site)| Event {
                        time_us: Some(hour * 3_600_000_000),
                        code: code.into(),
                        numeric_value: value,
                        text_value: text,
                        site,
                        items: None,
                    }),
            );
            dated.sort_by_key(|event| event.time_us);
            events.extend(dated);
            Patient {
                subject_id: 1,
                events,
            }
        })
}

/// Writes a cohort with `shards` shards, in which every patient has their position as identifier,
/// and a label at each of `prediction_days`; true for every third sample.
pub(crate) fn write_cohort(
    folder: &Path,
    patients: &[Patient],
    shards: usize,
    prediction_days: &[i64],
) -> (Cohort, Labels) {
    let mut named = Vec::new();
    for (subject, patient) in patients.iter().enumerate() {
        named.push(Patient {
            subject_id: subject as i64,
            events: patient.events.clone(),
        });
    }
    for (shard, part) in named.chunks(named.len().div_ceil(shards)).enumerate() {
        let path = folder.join(format!("data/{shard}.parquet"));
        write_shard(&path, part, ShardOptions::default()).unwrap();
    }
    let splits: Vec<(i64, Split)> = (0..patients.len() as i64)
        .map(|subject| (subject, Split::ALL[[0, 0, 1, 2][subject as usize % 4]]))
        .collect();
    write_splits(folder, &splits).unwrap();
    let described = |text: &str| CodeEntry {
        description: Some(text.into()),
        ..Default::default()
    };
    write_codes(
        folder,
        [
            ("LAB//creatinine", &described("creatinine")),
            ("DIAGNOSIS//E11.9", &described("type 2  diabetes")),
        ],
    )
    .unwrap();
    write_dataset(folder, &serde_json::Map::new()).unwrap();
    let mut labels = Vec::new();
    for subject_id in 0..patients.len() as i64 {
        for day in prediction_days {
            labels.push(Label {
                subject_id,
                prediction_time_us: day * DAY_US,
                value: LabelValue::Boolean(labels.len() % 3 == 0),
            });
        }
    }
    let path = folder.join("labels/task/0.parquet");
    write_labels(&path, &labels).unwrap();
    (
        Cohort::open(folder).unwrap(),
        Labels::read(path.parent().unwrap()).unwrap(),
    )
}
