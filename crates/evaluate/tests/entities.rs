//! Entities and their scores against those of seqeval, stored by `scripts/references/entities.py`.

use calor_evaluate::{
    EvaluateOptions, Metrics, Predictions, entities, entity_scores, evaluate, higher_is_better,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Reference {
    entities: Vec<Read>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Read {
    tags: Vec<String>,
    entities: Vec<(String, usize, usize)>,
}

#[derive(Deserialize)]
struct Case {
    expected: Vec<Vec<String>>,
    predicted: Vec<Vec<String>>,
    f1: f64,
    precision: f64,
    recall: f64,
}

fn reference() -> Reference {
    serde_json::from_str(include_str!("fixtures/entities.json")).expect("the fixture")
}

fn tags(rows: &[Vec<String>]) -> Vec<String> {
    let mut tags: Vec<String> = rows.iter().flatten().cloned().collect();
    tags.sort();
    tags.dedup();
    tags
}

fn numbers(rows: &[Vec<String>], tags: &[String]) -> Vec<Vec<usize>> {
    let number = |tag: &String| tags.binary_search(tag).expect("a tag");
    rows.iter()
        .map(|row| row.iter().map(number).collect())
        .collect()
}

fn scored(case: &Case) -> Metrics {
    let tags = tags(&[&case.expected[..], &case.predicted[..]].concat());
    let patients: Vec<i64> = (0..case.expected.len() as i64).collect();
    let predictions = Predictions::Tokens {
        tags: &tags,
        predicted: &numbers(&case.predicted, &tags),
        targets: &numbers(&case.expected, &tags),
    };
    evaluate(&predictions, &patients, &EvaluateOptions::default()).expect("tags")
}

#[test]
fn entities_are_read_as_seqeval_reads_them() {
    let reference = reference();
    assert!(reference.entities.len() >= 25);
    for read in reference.entities {
        let tags: Vec<&str> = read.tags.iter().map(String::as_str).collect();
        let found: Vec<(String, usize, usize)> = entities(&tags)
            .into_iter()
            .map(|(kind, first, last)| (kind.to_owned(), first, last))
            .collect();
        assert_eq!(found, read.entities, "{:?}", read.tags);
    }
}

/// Both divide the same whole numbers; F1 from these numbers or from precision and recall differs by
/// a few roundings.
#[test]
fn scores_are_those_of_seqeval() {
    let reference = reference();
    assert!(reference.cases.len() >= 20);
    for case in reference.cases {
        let metrics = scored(&case);
        for (name, expected) in [
            ("f1", case.f1),
            ("precision", case.precision),
            ("recall", case.recall),
        ] {
            let value = metrics.score(name).and_then(|score| score.value());
            let value = value.expect("a value");
            assert!(
                (value - expected).abs() < 1e-12,
                "{name}: {value}, seqeval {expected}"
            );
        }
    }
}

#[test]
fn types_are_scored_apart() {
    let row = |tags: &str| -> Vec<String> { tags.split(' ').map(str::to_owned).collect() };
    let expected = [row("B-A I-A O B-B"), row("B-B O")];
    let predicted = [row("B-A I-A O B-A"), row("B-B O")];
    let tags = tags(&[&expected[..], &predicted[..]].concat());
    let scores = entity_scores(
        &tags,
        &numbers(&predicted, &tags),
        &numbers(&expected, &tags),
    );
    let of = |name: &str| scores.iter().find(|scores| scores.name == name).unwrap();
    assert_eq!((of("A").support, of("A").predicted), (1, 2));
    assert_eq!((of("A").precision, of("A").recall), (0.5, 1.0));
    assert_eq!((of("B").precision, of("B").recall), (1.0, 0.5));
}

#[test]
fn a_language_model_is_scored_by_token_and_resampled_by_row() {
    let predictions = Predictions::CausalLm {
        losses: &[2.0, 9.0, 1.0, 4.0],
        tokens: &[2, 3, 1, 4],
    };
    let metrics = evaluate(&predictions, &[1, 2, 3, 4], &EvaluateOptions::default()).unwrap();
    let score = |name: &str| metrics.score(name).unwrap();
    assert_eq!(score("loss").value(), Some(1.6));
    assert!((score("perplexity").value().unwrap() - 1.6f64.exp()).abs() < 1e-12);
    // A resample of one row alone has its mean loss, 1 or 3, and none lies outside.
    let (low, high) = score("loss").bounds().unwrap();
    assert!((1.0..1.6).contains(&low) && 1.6 < high && high <= 3.0);
    assert_eq!(higher_is_better("perplexity"), Some(false));
    let nothing = Predictions::CausalLm {
        losses: &[0.0],
        tokens: &[0],
    };
    let metrics = evaluate(&nothing, &[1], &EvaluateOptions::default()).unwrap();
    assert!(metrics.score("loss").unwrap().value().is_none());
}

#[test]
fn rows_that_do_not_fit_are_named() {
    let tags = ["O".to_owned()];
    let check = |predicted: &[Vec<usize>], targets: &[Vec<usize>]| {
        let predictions = Predictions::Tokens {
            tags: &tags,
            predicted,
            targets,
        };
        let ids: Vec<i64> = (0..targets.len() as i64).collect();
        evaluate(&predictions, &ids, &EvaluateOptions::default())
            .unwrap_err()
            .to_string()
    };
    assert!(check(&[vec![0], vec![1]], &[vec![0], vec![0]]).contains("row 1"));
    assert!(check(&[vec![0, 0]], &[vec![0]]).contains("a row of predicted tags"));
    assert!(check(&[], &[]).contains("empty"));
}
