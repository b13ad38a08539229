use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::testing::{
    ByteLevelKind, across_words, byte_level, sentencepiece, tokenizer, wordpiece,
};

fn plain(tokenizer: &PatientTokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode_whole(text).unwrap()
}

fn cached(tokenizer: &PatientTokenizer, text: &str, cache: &mut WordCache) -> Vec<u32> {
    let mut tokens = Vec::new();
    tokenizer
        .encode_cached(text, true, cache, &mut tokens)
        .unwrap();
    tokens
}

static EVERY_KIND: LazyLock<Vec<PatientTokenizer>> = LazyLock::new(|| {
    [
        wordpiece(),
        byte_level(ByteLevelKind::Roberta),
        byte_level(ByteLevelKind::Llama3),
        byte_level(ByteLevelKind::SmolLm2),
        sentencepiece(),
        across_words(),
    ]
    .iter()
    .map(|json| tokenizer(json, None))
    .collect()
});

#[test]
fn bert_is_framed_by_cls_and_sep_and_never_truncated_or_padded() {
    let tokenizer = tokenizer(&wordpiece(), None);
    assert_eq!(
        (tokenizer.prefix(), tokenizer.suffix()),
        (&[2][..], &[3][..])
    );
    assert_eq!(tokenizer.pad_id(), 0);
    assert_eq!(tokenizer.joining, Joining::Spaced);
    // The file says: cut to 8 tokens and pad to 8.
    let long = tokenizer
        .encode("old old old old old old old old old old")
        .unwrap();
    assert_eq!(long.len(), 12);
    assert_eq!(tokenizer.encode("old").unwrap().len(), 3);
}

#[test]
fn roberta_is_framed_by_its_processor() {
    let json = byte_level(ByteLevelKind::Roberta);
    let config = json!({"pad_token": "<pad>", "tokenizer_class": "RobertaTokenizer"});
    let tokenizer = tokenizer(&json, Some(config));
    assert_eq!(
        (tokenizer.prefix(), tokenizer.suffix()),
        (&[0][..], &[2][..])
    );
    assert_eq!(tokenizer.pad_id(), 1);
    assert_eq!(tokenizer.joining, Joining::Spaced);
}

#[test]
fn llama_begins_with_its_token_and_pads_with_its_end() {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}});
    let llama3 = tokenizer(&byte_level(ByteLevelKind::Llama3), Some(config.clone()));
    assert_eq!((llama3.prefix(), llama3.suffix()), (&[0][..], &[][..]));
    assert_eq!(llama3.pad_id(), 2);
    let llama2 = tokenizer(&sentencepiece(), Some(config));
    assert_eq!((llama2.prefix(), llama2.suffix()), (&[1][..], &[][..]));
    assert_eq!(llama2.pad_id(), 2);
    assert_eq!(llama2.joining, Joining::Bare);
}

#[test]
fn smollm2_has_no_frame_unless_the_configuration_asks_for_one() {
    let json = byte_level(ByteLevelKind::SmolLm2);
    let bare = tokenizer(
        &json,
        Some(json!({"bos_token": "<s>", "eos_token": "</s>"})),
    );
    assert_eq!((bare.prefix(), bare.suffix()), (&[][..], &[][..]));
    let config = json!({
        "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true, "add_eos_token": true,
    });
    let framed = tokenizer(&json, Some(config));
    assert_eq!((framed.prefix(), framed.suffix()), (&[0][..], &[2][..]));
}

#[test]
fn the_configuration_can_take_a_frame_away() {
    let config = json!({"bos_token": "<s>", "add_bos_token": false});
    let tokenizer = tokenizer(&byte_level(ByteLevelKind::Llama3), Some(config));
    assert!(tokenizer.prefix().is_empty());
}

#[test]
fn an_encoder_without_post_processor_gets_its_frame_from_the_configuration() {
    let mut json = wordpiece();
    json["post_processor"] = Value::Null;
    let config = json!({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"});
    let tokenizer = tokenizer(&json, Some(config));
    assert_eq!(
        (tokenizer.prefix(), tokenizer.suffix()),
        (&[2][..], &[3][..])
    );
}

#[test]
fn the_text_of_a_special_token_is_only_text() {
    for tokenizer in EVERY_KIND.iter() {
        for text in ["[SEP]", "</s>", "<s>"] {
            let tokens = plain(tokenizer, text);
            let id = tokenizer.tokenizer.token_to_id(text);
            assert!(id.is_none_or(|id| !tokens.contains(&id)), "{text}");
        }
    }
}

#[test]
fn files_that_are_missing_or_broken_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let open = || match PatientTokenizer::open(folder.path()) {
        Ok(_) => panic!("it opened"),
        Err(error) => error.to_string(),
    };
    let missing = open();
    assert!(missing.contains("tokenizer.json is missing"), "{missing}");
    std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
    let broken = open();
    assert!(
        broken.contains("tokenizer.json is not a tokenizer"),
        "{broken}"
    );
    std::fs::write(
        folder.path().join("tokenizer.json"),
        wordpiece().to_string(),
    )
    .unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), "{").unwrap();
    let config = open();
    assert!(
        config.contains("tokenizer_config.json is not valid JSON"),
        "{config}"
    );
}

#[test]
fn the_digest_follows_every_file() {
    let json = wordpiece();
    let digest = |json: &Value, config| tokenizer(json, config).digest();
    assert_eq!(digest(&json, None), digest(&json, None));
    assert_ne!(digest(&json, None), digest(&json, Some(json!({}))));
    let mut other = json.clone();
    other["version"] = json!("1.1");
    other["version"] = json!("1.0");
    other["model"]["vocab"]["extra"] = json!(999);
    assert_ne!(digest(&json, None), digest(&other, None));
}

#[test]
fn tokens_across_words_are_found_out() {
    let tokenizer = tokenizer(&across_words(), None);
    assert_eq!(tokenizer.joining, Joining::Whole);
}

#[test]
fn a_word_that_turns_into_several_is_encoded_with_its_neighbours() {
    let mut json = byte_level(ByteLevelKind::SmolLm2);
    json["normalizer"] = json!({"type": "NFKC"});
    let tokenizer = tokenizer(&json, None);
    assert_eq!(tokenizer.joining, Joining::Spaced);
    // U+00A8 is a space and a combining mark under NFKC: after a space that makes two.
    let mut cache = WordCache::default();
    for text in [
        "high \u{a8} low",
        "high \u{a8}",
        "\u{a8} low 1.5",
        "high low",
    ] {
        assert_eq!(
            cached(&tokenizer, text, &mut cache),
            plain(&tokenizer, text),
            "{text}"
        );
    }
}

#[test]
fn a_full_cache_changes_nothing() {
    let tokenizer = tokenizer(&wordpiece(), None);
    let mut cache = WordCache::default();
    for number in 0..CACHED_WORDS {
        cache
            .rest
            .insert(format!("\u{1}{number}").into(), Word::Entangled);
    }
    let text = "67 year old man. creatinine high 1.42";
    assert_eq!(
        cached(&tokenizer, text, &mut cache),
        plain(&tokenizer, text)
    );
    assert_eq!(cache.rest.len(), CACHED_WORDS);
}

proptest! {
    #[test]
    fn words_from_the_cache_are_the_whole_text(
        texts in prop::collection::vec("[a-zA-Z0-9.,;:()<>='äöβ≥/-]{1,9}( [a-zA-Z0-9.,;:()<>='äöβ≥/-]{1,9}){0,12}", 1..4),
    ) {
        for tokenizer in EVERY_KIND.iter() {
            let mut cache = WordCache::default();
            // Twice: from an empty and from a filled cache.
            for text in texts.iter().chain(&texts) {
                prop_assert_eq!(cached(tokenizer, text, &mut cache), plain(tokenizer, text));
            }
        }
    }
}
