//! Language models and token classifiers: runs on files of text, and on the notes of a cohort.

mod common;

use std::path::{Path, PathBuf};

use calor_records::{
    Event, Patient, ShardOptions, Split, write_dataset, write_shard, write_splits,
};
use calor_train::recipe::{Dtype, Recipe, TextSection};
use calor_train::{
    DeviceSpec, Generator, GeneratorSource, RunOptions, Sampling, StopFlag, UseOptions,
};
use common::{Home, Kind, finish, losses, write_checkpoint};
use serde_json::{Value, json};

/// A tiny Llama with what Transformers makes of it, by `scripts/references/dialogues.py`.
fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../sequence/tests/fixtures/dialogue")
}

fn reference() -> Value {
    let text = std::fs::read_to_string(fixture().join("reference.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn recipe(model: &Path, kind: &str, text: &str, set: &[&str]) -> Recipe {
    let recipe = format!(
        "schema = 1\nname = \"tiny\"\n\
         [model]\nid = \"{}\"\n\
         [task]\nkind = \"{kind}\"\n\
         {text}\n\
         [adapter]\nr = 4\nalpha = 8\ndropout = 0.0\n\
         [train]\nglobal_batch = 8\nmicro_batch = 2\nepochs = 2\nlearning_rate = 1e-2\n\
         [evaluate]\nevery_steps = 1000\npatience = 0\nresamples = 100\n\
         [energy]\nidle_window_s = 0\n",
        model.display(),
    );
    let set: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
    Recipe::parse(&recipe, Path::new("tiny.toml"), &set).unwrap()
}

fn options(recipe: Recipe, checkpoint: PathBuf, folder: &Path) -> RunOptions {
    RunOptions {
        recipe,
        checkpoint,
        out: folder.join("run"),
        cache: folder.join("cache"),
        device: DeviceSpec::Cpu,
        resume: false,
    }
}

fn lines(path: &Path, rows: impl IntoIterator<Item = Value>) {
    let text: Vec<String> = rows.into_iter().map(|row| row.to_string()).collect();
    std::fs::write(path, text.join("\n")).unwrap();
}

/// The loss of the first step, before anything has moved, is that of Transformers on the assistant's
/// tokens, with one conversation a row and with all in one. Sums of 50 terms in f32: 1e-6 each.
#[test]
fn the_loss_on_responses_is_that_of_transformers() {
    let reference = reference();
    let expected =
        reference["loss"]["sum"].as_f64().unwrap() / reference["loss"]["tokens"].as_f64().unwrap();
    let cases = reference["templates"]["chatml"].as_array().unwrap();
    for packing in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let train = folder.path().join("train.jsonl");
        lines(
            &train,
            cases
                .iter()
                .map(|case| json!({"messages": case["messages"]})),
        );
        let text = format!("[text]\ntrain = \"{0}\"\ntuning = \"{0}\"", train.display());
        let set = [
            "train.epochs=1",
            "sequence.max_tokens=512",
            &format!("sequence.packing={packing}"),
            "train.micro_batch=2",
        ];
        let recipe = recipe(&fixture(), "causal_lm", &text, &set);
        let report = finish(&options(recipe, fixture(), folder.path()));
        let found = losses(&folder.path().join("run"))[0];
        assert!(
            (found - expected).abs() < 1e-5 * expected,
            "{found} {expected}"
        );
        let counts = &report.meter.throughput.training.counts;
        assert_eq!(
            counts.supervised,
            reference["loss"]["tokens"].as_u64().unwrap()
        );
        assert_eq!(counts.sequences, 3);
    }
}

fn generator(checkpoint: &Path, adapter: Option<&Path>) -> Generator {
    Generator::open(&GeneratorSource {
        checkpoint,
        adapter,
        dtype: Dtype::F32,
        quantization: None,
        text: TextSection::default(),
        device: DeviceSpec::Cpu,
    })
    .unwrap()
}

#[test]
fn greedy_text_is_that_of_transformers() {
    let generator = generator(&fixture(), None);
    let reference = reference();
    let numbers = |value: &Value| -> Vec<u32> {
        let numbers = value.as_array().unwrap().iter();
        numbers
            .map(|token| token.as_u64().unwrap() as u32)
            .collect()
    };
    let cases = reference["generated"].as_array().unwrap();
    let prompts: Vec<Vec<u32>> = cases.iter().map(|case| numbers(&case["prompt"])).collect();
    let greedy = Sampling::greedy(24);
    let generate = |prompts: &[Vec<u32>], first, sampling: &Sampling| {
        let found = generator.generate(prompts, first, sampling, &StopFlag::new());
        found.unwrap().unwrap()
    };
    // Prompts of different lengths together.
    for (found, case) in generate(&prompts, 0, &greedy).iter().zip(cases) {
        let mut expected = numbers(&case["tokens"]);
        let ended = expected.last() == Some(&2);
        if ended {
            expected.pop();
        }
        assert_eq!((&found.tokens, found.ended), (&expected, ended));
    }

    let sampled = Sampling {
        temperature: 1.5,
        top_k: 50,
        top_p: 0.9,
        seed: 3,
        ..greedy
    };
    let once = generate(&prompts, 0, &sampled);
    assert_eq!(once, generate(&prompts, 0, &sampled));
    // What is drawn follows from the prompt's number, not from what is continued beside it.
    assert_eq!(once[2..], generate(&prompts[2..], 2, &sampled)[..]);
    let other = Sampling { seed: 4, ..sampled };
    assert_ne!(once, generate(&prompts, 0, &other));

    let refused = |prompt: Vec<u32>| {
        let found = generator.generate(&[prompt], 4, &greedy, &StopFlag::new());
        found.unwrap_err().to_string()
    };
    assert!(refused(Vec::new()).contains("prompt 5 is empty"));
    assert!(refused(vec![7; 256]).contains("has 256 tokens"));
}

#[test]
fn a_language_model_learns_to_answer() {
    let folder = tempfile::tempdir().unwrap();
    let pairs = [("fever", "high"), ("cough", "low"), ("weeks", "very old")];
    let rows =
        || {
            pairs.iter().cycle().take(24).map(
                |(prompt, response)| json!({"prompt": format!("{prompt} "), "response": response}),
            )
        };
    let [train, tuning] = ["train.jsonl", "tuning.jsonl"].map(|name| folder.path().join(name));
    lines(&train, rows());
    lines(&tuning, rows().take(6));
    let text = format!(
        "[text]\ntrain = \"{}\"\ntuning = \"{}\"\nchat_template = \"none\"",
        train.display(),
        tuning.display()
    );
    let set = [
        "train.epochs=80",
        "train.learning_rate=2e-2",
        "evaluate.every_steps=120",
        "adapter.modules_to_save=[\"lm_head\"]",
        "sequence.max_tokens=64",
    ];
    let recipe = recipe(&fixture(), "causal_lm", &text, &set);
    let options = options(recipe.clone(), fixture(), folder.path());
    let report = finish(&options);
    let metrics = &report.evaluation["tuning"].metrics;
    let perplexity = metrics.score("perplexity").unwrap();
    assert!(perplexity.value().unwrap() < 1.5, "{perplexity:?}");
    assert!(perplexity.bounds().is_some());
    let loss = metrics.score("loss").unwrap().value().unwrap();
    assert!((loss.exp() - perplexity.value().unwrap()).abs() < 1e-9);
    assert!((report.evaluation["tuning"].loss.unwrap() - loss).abs() < 1e-9);
    let page = std::fs::read_to_string(folder.path().join("run/report.html")).unwrap();
    assert!(page.contains("Perplexity"));

    let generator = Generator::open(&GeneratorSource {
        checkpoint: &fixture(),
        adapter: Some(&folder.path().join("run/adapter")),
        dtype: Dtype::F32,
        quantization: None,
        text: recipe.text,
        device: DeviceSpec::Cpu,
    })
    .unwrap();
    let encoder = generator.encoder();
    let prompts: Vec<Vec<u32>> = pairs
        .iter()
        .map(|(prompt, _)| encoder.prompt(&format!("{prompt} "), None).unwrap())
        .collect();
    let found = generator
        .generate(&prompts, 0, &Sampling::greedy(16), &StopFlag::new())
        .unwrap()
        .unwrap();
    for (found, (_, response)) in found.iter().zip(pairs) {
        assert_eq!((found.text.as_str(), found.ended), (response, true));
    }
}

/// Some words are entities.
fn sentences(count: usize) -> String {
    let words = ["old", "cough", "fever", "high", "marker", "low", "weeks"];
    let mut text = String::new();
    for sentence in 0..count {
        for place in 0..5 {
            let word = words[(sentence * 5 + place * place * 3 + sentence / 3) % words.len()];
            let tag = match word {
                "fever" => "B-symptom",
                "high" | "low" => "B-value",
                _ => "O",
            };
            text.push_str(&format!("{word}\t{tag}\n"));
        }
        text.push('\n');
    }
    text
}

#[test]
fn a_token_classifier_finds_entities() {
    for kind in [Kind::Bert, Kind::Llama] {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = folder.path().join("checkpoint");
        write_checkpoint(&checkpoint, kind, 1);
        let [train, held_out] = ["train.tsv", "test.tsv"].map(|name| folder.path().join(name));
        std::fs::write(&train, sentences(64)).unwrap();
        std::fs::write(&held_out, sentences(20)).unwrap();
        let text = format!(
            "[text]\ntrain = \"{0}\"\ntuning = \"{1}\"\nheld_out = \"{1}\"",
            train.display(),
            held_out.display()
        );
        let set = [
            "train.epochs=12",
            "train.learning_rate=3e-2",
            "evaluate.every_steps=48",
            "sequence.max_tokens=64",
        ];
        let recipe = recipe(&checkpoint, "tokens", &text, &set);
        let options = options(recipe, checkpoint.clone(), folder.path());
        let report = finish(&options);
        let run = folder.path().join("run");
        let evaluation = &report.evaluation["held_out"];
        let f1 = evaluation.metrics.score("f1").unwrap();
        assert!(f1.value().unwrap() > 0.9, "{f1:?}");
        let names: Vec<&str> = evaluation
            .entities
            .iter()
            .map(|entity| entity.name.as_str())
            .collect();
        assert_eq!(names, ["symptom", "value"]);
        assert_eq!(report.task.classes, ["B-symptom", "B-value", "O"]);
        assert_eq!(
            report.data.splits["train"].by_class.values().sum::<u64>(),
            320
        );
        let config = std::fs::read_to_string(run.join("adapter/adapter_config.json")).unwrap();
        assert!(config.contains("TOKEN_CLS"));
        let page = std::fs::read_to_string(run.join("report.html")).unwrap();
        assert!(page.contains("symptom: F1") && page.contains("held-out texts"));
        assert!(run.join("predictions.parquet").is_file());

        // The run's model on another file gives the same, and what does not fit is refused.
        let using = UseOptions {
            run: run.clone(),
            checkpoint: checkpoint.clone(),
            cache: folder.path().join("cache"),
            device: DeviceSpec::Cpu,
            cohort: Some(held_out),
            patients: None,
        };
        let again = calor_train::evaluate(&using, Some(Split::HeldOut), &mut (), &StopFlag::new());
        let again = again.unwrap().unwrap();
        assert_eq!(again.evaluation.metrics.scores, evaluation.metrics.scores);
        let refused = calor_train::compare(&using, &using, None, &mut (), &StopFlag::new());
        assert!(refused.unwrap_err().to_string().contains("whole patient"));
    }
}

#[test]
fn the_notes_of_a_cohort_are_learned() {
    let home = Home::new(Kind::Llama);
    let cohort = home.path("notes");
    let event = |time_us, code: &str, text: Option<&str>| Event {
        time_us: Some(time_us),
        code: code.into(),
        numeric_value: None,
        text_value: text.map(Into::into),
        site: None,
        items: None,
    };
    let patients: Vec<Patient> = (0..24)
        .map(|subject_id| {
            let (symptom, note) = match subject_id % 2 {
                0 => ("fever", "very high"),
                _ => ("cough", "low"),
            };
            Patient {
                subject_id,
                events: vec![
                    event(0, symptom, None),
                    event(1_000_000, "NOTE//day", Some(note)),
                ],
            }
        })
        .collect();
    std::fs::create_dir_all(cohort.join("data")).unwrap();
    std::fs::create_dir_all(cohort.join("metadata")).unwrap();
    let shard = ShardOptions {
        sites: false,
        ..ShardOptions::default()
    };
    write_shard(&cohort.join("data/0.parquet"), &patients, shard).unwrap();
    write_dataset(&cohort, &serde_json::Map::new()).unwrap();
    let split = |subject: i64| match subject % 3 {
        0 => (subject, Split::HeldOut),
        _ => (subject, Split::Train),
    };
    let splits: Vec<(i64, Split)> = (0..24).map(split).collect();
    write_splits(&cohort, &splits).unwrap();
    let text = format!(
        "notes = [\"NOTE//*\"]\n[cohort]\npath = \"{}\"",
        cohort.display()
    );
    let set = [
        "train.epochs=40",
        "train.learning_rate=2e-2",
        "sequence.max_tokens=64",
        "adapter.modules_to_save=[\"lm_head\"]",
    ];
    let recipe = recipe(&home.path("checkpoint"), "causal_lm", &text, &set);
    let options = options(recipe, home.path("checkpoint"), home.folder.path());
    let report = finish(&options);
    let held_out = &report.evaluation["held_out"];
    assert_eq!(held_out.metrics.patients, 8);
    let perplexity = held_out
        .metrics
        .score("perplexity")
        .unwrap()
        .value()
        .unwrap();
    assert!(perplexity < 1.5, "{perplexity}");
}
