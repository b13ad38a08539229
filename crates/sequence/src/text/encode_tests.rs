use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::*;
use crate::testing::{tokenizer, wordpiece};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/dialogue");

#[derive(Deserialize)]
struct Case {
    messages: Vec<Value>,
    text: String,
    prompt: String,
    tokens: Vec<u32>,
    mask: Vec<u8>,
}

/// A folder with the fixture's tokenizer and one of its templates.
fn checkpoint(template: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(Path::new(FIXTURE).join(name), folder.path().join(name)).unwrap();
    }
    if template != "chatml" {
        let source = Path::new(FIXTURE).join(format!("{template}.jinja"));
        std::fs::copy(source, folder.path().join("chat_template.jinja")).unwrap();
    }
    folder
}

fn cases(template: &str) -> Vec<Case> {
    let text = std::fs::read_to_string(Path::new(FIXTURE).join("reference.json")).unwrap();
    let reference: Value = serde_json::from_str(&text).unwrap();
    serde_json::from_value(reference["templates"][template].clone()).unwrap()
}

/// Texts, tokens and the mask of the assistant's words are those of `apply_chat_template`, stored by
/// `scripts/references/dialogues.py`. Transformers finds the mask by a block in the template, and we
/// by what the conversation gains with each turn.
#[test]
fn conversations_are_written_and_masked_as_in_transformers() {
    for name in ["chatml", "headers"] {
        let folder = checkpoint(name);
        let tokenizer = PatientTokenizer::open(folder.path()).unwrap();
        let template = ChatTemplate::open(folder.path(), "2024-07-26")
            .unwrap()
            .unwrap();
        let encoder = DialogueEncoder::new(&tokenizer, Some(&template));
        let cases = cases(name);
        assert_eq!(cases.len(), 3);
        for case in cases {
            assert_eq!(template.render(&case.messages, false).unwrap(), case.text);
            let asked = &case.messages[..case.messages.len() - 1];
            assert_eq!(template.render(asked, true).unwrap(), case.prompt);
            let row = Row::Messages(case.messages.clone());
            let encoded = encoder.row(&row, LossOn::Response).unwrap();
            assert_eq!(encoded.tokens, case.tokens);
            let mask: Vec<u8> = encoded
                .targets
                .iter()
                .map(|target| u8::from(*target != NO_TARGET))
                .collect();
            assert_eq!(mask, case.mask, "{name}");
            let prompt = encoder.conversation(asked).unwrap();
            assert!(encoded.tokens.starts_with(&prompt));
            let row_asked = json!({"messages": case.messages});
            assert_eq!(encoder.request(&row_asked, None).unwrap(), prompt);
            let all = encoder.row(&row, LossOn::All).unwrap();
            assert_eq!(all.targets[0], NO_TARGET);
            assert!(all.targets[1..].iter().all(|target| *target != NO_TARGET));
        }
    }
}

#[test]
fn a_template_that_rewrites_earlier_turns_is_refused() {
    let folder = checkpoint("chatml");
    let source = "{% for m in messages %}{{ m.content if loop.last else '…' }}|{% endfor %}";
    std::fs::write(folder.path().join("chat_template.jinja"), source).unwrap();
    let tokenizer = PatientTokenizer::open(folder.path()).unwrap();
    let template = ChatTemplate::open(folder.path(), "2024-07-26").unwrap();
    let encoder = DialogueEncoder::new(&tokenizer, template.as_ref());
    let row = Row::Messages(cases("chatml").remove(1).messages);
    let problem = encoder.row(&row, LossOn::Response).unwrap_err();
    assert!(problem.contains("up to message 3"), "{problem}");
    assert!(encoder.row(&row, LossOn::All).is_ok());
    let nobody = Row::Messages(vec![json!({"role": "user", "content": "secret"})]);
    let problem = encoder.row(&nobody, LossOn::Response).unwrap_err();
    assert!(problem.contains("`assistant`"), "{problem}");
}

#[test]
fn a_pair_without_template_ends_with_the_end_of_text() {
    let folder = checkpoint("chatml");
    let tokenizer = PatientTokenizer::open(folder.path()).unwrap();
    let encoder = DialogueEncoder::new(&tokenizer, None);
    let row = Row::Pair {
        prompt: "Is fever a symptom?".to_owned(),
        response: " Yes.".to_owned(),
    };
    let encoded = encoder.row(&row, LossOn::Response).unwrap();
    let prompt = encoder.prompt("Is fever a symptom?", None).unwrap();
    assert!(encoded.tokens.starts_with(&prompt));
    assert!(
        encoded.targets[..prompt.len()]
            .iter()
            .all(|target| *target == NO_TARGET)
    );
    let learned: Vec<u32> = encoded.targets[prompt.len()..]
        .iter()
        .map(|target| *target as u32)
        .collect();
    assert_eq!(tokenizer.decode(&learned).unwrap(), " Yes.<|end|>");
    assert_eq!(learned, encoded.tokens[prompt.len()..]);
    // Special tokens in somebody's words are words.
    let typed = encoder.prompt("<|end|>", None).unwrap();
    assert!(typed.len() > 1);
    assert!(
        encoder
            .prompt("x", Some("y"))
            .unwrap_err()
            .contains("no chat template")
    );
    let seam = Row::Pair {
        prompt: "sym".to_owned(),
        response: "ptom".to_owned(),
    };
    let encoded = encoder.row(&seam, LossOn::Response).unwrap();
    assert!(
        encoded
            .tokens
            .starts_with(&encoder.prompt("sym", None).unwrap())
    );
}

#[test]
fn a_word_has_its_class_at_its_first_token() {
    let tokenizer = tokenizer(&wordpiece(), None);
    let words: Vec<String> = ["creatinine", "high", "ab"].map(String::from).to_vec();
    let encoded = tagged_words(&words, &[2, 0, 1], &tokenizer).unwrap();
    // [CLS] creatin ##ine high a ##b [SEP]
    assert_eq!(encoded.targets, [-100, 2, -100, 0, 1, -100, -100]);
    assert_eq!(
        encoded.tokens,
        tokenizer.encode("creatinine high ab").unwrap()
    );
}

#[test]
fn rows_are_cut_at_the_end_or_at_the_start() {
    let encoded = Encoded {
        tokens: (0..10).collect(),
        targets: (100..110).collect(),
        full_length: 10,
    };
    let cut = |overlength, keep_start, keep_end| {
        let mut encoded = encoded.clone();
        let options = SequenceOptions {
            max_tokens: 6,
            overlength,
            ..SequenceOptions::default()
        };
        encoded.cut(&options, keep_start, keep_end);
        assert_eq!(encoded.tokens.len(), encoded.targets.len());
        assert!(
            encoded
                .tokens
                .iter()
                .zip(&encoded.targets)
                .all(|(token, target)| *token as i32 + 100 == *target)
        );
        encoded.tokens
    };
    assert_eq!(cut(Overlength::CutEnd, 1, 0), [0, 1, 2, 3, 4, 5]);
    assert_eq!(cut(Overlength::CutEnd, 1, 1), [0, 1, 2, 3, 4, 9]);
    assert_eq!(cut(Overlength::CutStart, 0, 0), [4, 5, 6, 7, 8, 9]);
    assert_eq!(cut(Overlength::CutStart, 1, 1), [0, 5, 6, 7, 8, 9]);
    assert_eq!(cut(Overlength::Error, 1, 1).len(), 10);
}
