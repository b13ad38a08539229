use std::fs;

use super::*;
use crate::batch::collate;
use crate::labels::{NO_TARGET, Targets};
use crate::plan::MicroBatch;
use crate::testing::{tokenizer, wordpiece};

struct Place {
    folder: tempfile::TempDir,
    files: TextFiles,
}

impl Place {
    fn new(files: &[(Split, &str, &str)]) -> Place {
        let folder = tempfile::tempdir().unwrap();
        let files = files.iter().map(|(split, name, text)| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            (*split, path)
        });
        let files = TextFiles {
            files: files.collect(),
        };
        Place { folder, files }
    }

    fn prepare(
        &self,
        task: &TextTask<'_>,
        max_tokens: usize,
        overlength: Overlength,
    ) -> Result<Prepared, String> {
        let options = SequenceOptions {
            max_tokens,
            overlength,
            ..SequenceOptions::default()
        };
        let tokenizer = tokenizer(&wordpiece(), None);
        let cache = self.folder.path().join("cache");
        prepare_text(&self.files, task, &tokenizer, &options, &cache, &|_| {})
            .map_err(|error| error.to_string())
    }
}

const TAGS: TextTask<'_> = TextTask::Tokens { classes: None };
const LANGUAGE: TextTask<'_> = TextTask::CausalLm {
    template: None,
    loss: LossOn::Response,
};

#[test]
fn sentences_become_tokens_with_classes_and_are_cached() {
    let place = Place::new(&[
        (
            Split::Train,
            "train.tsv",
            "creatinine\tB-X\nhigh\tO\n\nold\tO\n",
        ),
        (
            Split::HeldOut,
            "test.jsonl",
            "{\"tokens\": [\"low\"], \"tags\": [\"B-X\"]}\n",
        ),
    ]);
    let prepared = place.prepare(&TAGS, 16, Overlength::Error).unwrap();
    assert!(!prepared.cache_hit());
    assert_eq!(prepared.classes(), ["B-X", "O"]);
    assert_eq!(prepared.len(), 3);
    let first = prepared.sample(0);
    assert_eq!(
        first.targets,
        Targets::Tokens(vec![NO_TARGET, 0, NO_TARGET, 1, NO_TARGET])
    );
    assert_eq!(first.tokens.len(), 5);
    assert_eq!(prepared.sample(2).split, Some(Split::HeldOut));
    assert_eq!(
        prepared.sample(2).targets,
        Targets::Tokens(vec![NO_TARGET, 0, NO_TARGET])
    );
    let report = prepared.report();
    assert_eq!((report.train_samples, report.held_out_samples), (2, 1));
    assert_eq!(report.patients, 3);
    assert_eq!(report.tokens, 11);

    let micro = MicroBatch {
        rows: vec![vec![0, 2], vec![1]],
    };
    let batch = collate(&prepared, &micro, 0, 1);
    assert_eq!(batch.supervised_count, 4);
    assert_eq!(batch.spans.len(), 3);
    drop(prepared);
    assert!(
        place
            .prepare(&TAGS, 16, Overlength::Error)
            .unwrap()
            .cache_hit()
    );
    let cut = place.prepare(&TAGS, 4, Overlength::CutEnd).unwrap();
    assert!(!cut.cache_hit());
    assert_eq!(
        cut.sample(0).targets,
        Targets::Tokens(vec![NO_TARGET, 0, NO_TARGET, NO_TARGET])
    );
    assert_eq!(cut.report().truncated_samples, 1);
}

#[test]
fn a_response_that_is_cut_off_whole_is_left_out() {
    let rows = "{\"prompt\": \"a b c d e f\", \"response\": \" high\"}\n{\"prompt\": \"a\", \"response\": \" low\"}\n";
    let place = Place::new(&[(Split::Train, "train.jsonl", rows)]);
    let prepared = place.prepare(&LANGUAGE, 6, Overlength::CutEnd).unwrap();
    assert_eq!(prepared.len(), 1);
    assert_eq!(prepared.sample(0).subject_id, 1);
    assert_eq!(prepared.report().samples_without_data, 1);
    // [CLS] a low [SEP]: the response and the end.
    assert_eq!(prepared.sample(0).targets.supervised_count(), 2);
    let prepared = place.prepare(&LANGUAGE, 6, Overlength::CutStart).unwrap();
    assert_eq!(prepared.len(), 2);
    // Where the cut goes through a response, what is the first token then is not learned.
    let rows = "{\"prompt\": \"a\", \"response\": \" b c d e f\"}\n";
    let long = Place::new(&[(Split::Train, "train.jsonl", rows)]);
    let prepared = long.prepare(&LANGUAGE, 3, Overlength::CutStart).unwrap();
    let Targets::Tokens(targets) = prepared.sample(0).targets else {
        panic!("tokens have targets");
    };
    assert_eq!((targets.len(), targets[0]), (3, NO_TARGET));
    let error = place
        .prepare(&LANGUAGE, 6, Overlength::Error)
        .err()
        .unwrap();
    assert!(
        error.contains("1 of 2 samples") && error.contains("cut_end"),
        "{error}"
    );
}

#[test]
fn texts_have_classes() {
    let row = |text: &str, label: &str| format!("{{\"text\": \"{text}\", \"label\": {label}}}\n");
    let train = row("old man", "\"b\"") + &row("old woman", "\"a\"");
    let place = Place::new(&[(Split::Train, "train.jsonl", &train)]);
    let task = TextTask::Class {
        classes: None,
        binary: false,
    };
    let prepared = place.prepare(&task, 8, Overlength::Error).unwrap();
    assert_eq!(prepared.classes(), ["a", "b"]);
    assert_eq!(prepared.sample(0).targets, Targets::Class(1));
    assert_eq!(prepared.sample(1).targets, Targets::Class(0));
    let numbers = row("x", "10") + &row("x", "9");
    let place = Place::new(&[(Split::Train, "train.jsonl", &numbers)]);
    assert_eq!(
        place
            .prepare(&task, 8, Overlength::Error)
            .unwrap()
            .classes(),
        ["9", "10"]
    );
    let truths = row("x", "true") + &row("x", "false");
    let place = Place::new(&[(Split::Train, "train.jsonl", &truths)]);
    let binary = TextTask::Class {
        classes: None,
        binary: true,
    };
    let prepared = place.prepare(&binary, 8, Overlength::Error).unwrap();
    assert_eq!(prepared.sample(0).targets, Targets::Class(1));
}

#[test]
fn what_is_wrong_is_named_by_file_and_line() {
    let good = "{\"tokens\": [\"low\"], \"tags\": [\"O\"]}\n";
    let cases = [
        (
            TAGS,
            "bad.jsonl",
            format!("{good}\n{{\"tokens\": []}}\n"),
            "bad.jsonl, line 3: the row has no list `tags`",
        ),
        (
            TAGS,
            "bad.tsv",
            "high O\nlow\n".to_owned(),
            "breaks off in line 2",
        ),
        (
            LANGUAGE,
            "bad.jsonl",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"secret\"}]}".to_owned(),
            "no chat template",
        ),
        (LANGUAGE, "bad.tsv", "high O\n".to_owned(), "JSON lines"),
        (LANGUAGE, "empty.jsonl", "\n".to_owned(), "hold no row"),
    ];
    for (task, name, text, expected) in cases {
        let place = Place::new(&[(Split::Train, name, &text)]);
        let error = place.prepare(&task, 8, Overlength::Error).err().unwrap();
        assert!(error.contains(expected), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
    let place = Place::new(&[
        (Split::Train, "train.jsonl", good),
        (Split::Tuning, "tuning.tsv", "high B-SECRET\n"),
    ]);
    let error = place.prepare(&TAGS, 8, Overlength::Error).err().unwrap();
    assert!(
        error.contains("tuning.tsv, line 1: the row has a class"),
        "{error}"
    );
    assert!(!error.contains("SECRET"), "{error}");
    let missing = Place::new(&[]);
    let files = TextFiles {
        files: vec![(Split::Train, missing.folder.path().join("none.jsonl"))],
    };
    let place = Place { files, ..missing };
    assert!(
        place
            .prepare(&TAGS, 8, Overlength::Error)
            .err()
            .unwrap()
            .contains("none.jsonl")
    );
}
