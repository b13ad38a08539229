use std::sync::LazyLock;

use calor_records::{CodeTable, Patient};
use proptest::prelude::*;

use super::*;
use crate::render::Renderer;
use crate::statistics::ValueStatistics;
use crate::testing::{
    ByteLevelKind, DAY_US, across_words, any_patient, byte_level, event, note, sentencepiece,
    tokenizer, wordpiece,
};

fn options(max_tokens: usize) -> SequenceOptions {
    SequenceOptions {
        max_tokens,
        overlength: Overlength::DropOldestEvents,
        ..Default::default()
    }
}

fn render(patient: &Patient, day: i64, options: &SequenceOptions) -> Rendered {
    let (codes, statistics) = (CodeTable::default(), ValueStatistics::default());
    Renderer::new(&codes, &statistics, options).render(patient, day * DAY_US)
}

fn patient(events: Vec<calor_records::Event>) -> Patient {
    Patient {
        subject_id: 1,
        events,
    }
}

fn fit_to(patient: &Patient, max_tokens: usize) -> Result<(Fitted, String), SequenceError> {
    let tokenizer = tokenizer(&byte_level(ByteLevelKind::SmolLm2), None);
    let options = options(max_tokens);
    let rendered = render(patient, 100, &options);
    let fitted = fit(&rendered, &tokenizer, &options, &mut WordCache::default())?;
    let text = tokenizer.decode(&fitted.tokens)?;
    Ok((fitted, text))
}

fn history() -> Patient {
    patient(vec![
        event(None, "GENDER//F", None),
        event(None, "smoker", None),
        event(Some(0), "alpha", None),
        event(Some(0), "beta", None),
        event(Some(10 * DAY_US), "gamma", Some(1.0)),
        event(Some(99 * DAY_US), "delta", None),
    ])
}

#[test]
fn what_fits_is_left_alone() {
    let (fitted, text) = fit_to(&history(), 256).unwrap();
    assert_eq!(
        text,
        "woman, smoker. 3 months ago alpha, beta. 10 days later gamma 1. 3 months later delta."
    );
    assert_eq!((fitted.rows, fitted.dropped_rows), (5, 0));
    assert_eq!(fitted.full_length as usize, fitted.tokens.len());
}

#[test]
fn the_oldest_go_first_and_the_next_one_says_how_long_ago() {
    let full = fit_to(&history(), 256).unwrap().0.full_length as usize;
    let (fitted, text) = fit_to(&history(), full - 1).unwrap();
    assert_eq!(
        text,
        "woman, smoker. 3 months ago beta. 10 days later gamma 1. 3 months later delta."
    );
    assert_eq!((fitted.rows, fitted.dropped_rows), (5, 1));
    assert_eq!(fitted.full_length as usize, full);
    // A token is a character, but for the "er" of "smoker": 13 of the header, 17 of the last unit.
    let (fitted, text) = fit_to(&history(), 30).unwrap();
    assert_eq!(text, "woman, smoker. 1 day ago delta.");
    assert_eq!(fitted.dropped_rows, 3);
    let (fitted, text) = fit_to(&history(), 29).unwrap();
    assert_eq!(text, "woman, smoker.");
    assert_eq!(fitted.dropped_rows, 4);
    // Static rows are the last to go.
    let (fitted, text) = fit_to(&history(), 12).unwrap();
    assert_eq!(text, "woman.");
    assert_eq!(fitted.dropped_rows, 5);
}

#[test]
fn age_and_sex_must_fit() {
    let error = fit_to(&history(), 5).unwrap_err().to_string();
    assert!(error.contains("need 6 tokens"), "{error}");
}

#[test]
fn one_long_note_does_not_take_everything_older_with_it() {
    let long = "x".repeat(300);
    let patient = patient(vec![
        event(Some(0), "alpha", None),
        event(Some(DAY_US), "beta", None),
        note(Some(2 * DAY_US), "note", &long),
        event(Some(3 * DAY_US), "gamma", None),
    ]);
    let (fitted, text) = fit_to(&patient, 80).unwrap();
    assert_eq!(
        text,
        "patient. 3 months ago alpha. 1 day later beta. 2 days later gamma."
    );
    assert_eq!((fitted.dropped_rows, fitted.oversized_rows), (1, 1));
}

#[test]
fn overlength_as_an_error_keeps_everything_for_the_report() {
    let tokenizer = tokenizer(&wordpiece(), None);
    let options = SequenceOptions {
        max_tokens: 10,
        ..Default::default()
    };
    let rendered = render(&history(), 100, &options);
    let fitted = fit(&rendered, &tokenizer, &options, &mut WordCache::default()).unwrap();
    assert!(fitted.tokens.len() > 10);
    assert_eq!(fitted.dropped_rows, 0);
}

static KINDS: LazyLock<[PatientTokenizer; 4]> = LazyLock::new(|| {
    [
        wordpiece(),
        byte_level(ByteLevelKind::Llama3),
        sentencepiece(),
        across_words(),
    ]
    .map(|json| tokenizer(&json, None))
});

proptest! {
    #[test]
    fn the_newest_units_stay_whole_and_no_shorter_cut_would_do(
        patient in any_patient(),
        max_tokens in 45usize..300,
        kind in 0usize..4,
        sites: bool,
    ) {
        let tokenizer = &KINDS[kind];
        let options = SequenceOptions { sites, ..options(max_tokens) };
        let rendered = render(&patient, 11_000, &options);
        let mut cache = WordCache::default();
        let fitted = fit(&rendered, tokenizer, &options, &mut cache).unwrap();
        prop_assert!(fitted.tokens.len() <= max_tokens);

        // What may stand in the sequence: with every number of the oldest units left out.
        let statics = rendered.statics.len();
        let length = |units: &[&Unit], statics| {
            tokenizer.encode(&rendered.compose(statics, units, &options)).unwrap()
        };
        let all: Vec<&Unit> = rendered.units.iter().collect();
        prop_assert_eq!(fitted.full_length as usize, length(&all, statics).len());
        if fitted.dropped_rows == 0 {
            prop_assert_eq!(&fitted.tokens, &length(&all, statics));
            return Ok(());
        }
        prop_assert!(fitted.full_length as usize > max_tokens);
        let possible: Vec<&Unit> = all
            .iter()
            .copied()
            .filter(|unit| {
                // With a full stop, as when it stands alone.
                let header = rendered.header_text(statics);
                let alone = rendered.unit_text(unit, None, None, &options);
                let text = format!("{header} {alone}");
                tokenizer.encode(&text).unwrap().len() <= max_tokens
            })
            .collect();
        let start = (0..=possible.len())
            .find(|&start| length(&possible[start..], statics).len() <= max_tokens);
        match start {
            // Header and static rows alone are too long: the last static rows went.
            None => prop_assert!(fitted.dropped_rows > count_rows(&all)),
            Some(start) => {
                let expected = length(&possible[start..], statics);
                if kind == 3 {
                    // Lengths are estimates where tokens reach over words.
                    prop_assert!(fitted.tokens.len() <= expected.len());
                } else {
                    prop_assert_eq!(&fitted.tokens, &expected);
                }
            }
        }
    }
}
