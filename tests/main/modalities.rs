//! Modality items through the binary: a synthetic cohort trained, resumed, evaluated and taken
//! apart.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{Ended, RECIPE, Workplace};
use crate::training::{end, result_of, signal, start, wait_for_step};

/// All modalities, each small.
const MODALITIES: &str = r#"
[modality]
dropout = 0.2

[modality.image]
tokens = 2
decode = { height = 16, width = 16 }
encoder = { kind = "patches", patch = 8, width = 8, depth = 1, heads = 2 }
resampler = { width = 8, depth = 1, heads = 2 }

[modality.waveform]
tokens = 2
decode = { rate_hz = 50.0, max_seconds = 2.0 }
encoder = { kind = "signal", patch_samples = 10, width = 8, depth = 1, heads = 2 }
resampler = { width = 8, depth = 1, heads = 2 }

[modality.series]
tokens = 1
in_text = false
encoder = { kind = "series", hidden = 4, width = 8, depth = 1, heads = 2 }
resampler = { width = 8, depth = 1, heads = 2 }

[modality.omics]
tokens = 2
groups = { kind = "gmt", path = "synth/metadata/pathways.gmt" }
encoder = { kind = "omics", width = 8, depth = 1, heads = 2 }
resampler = { width = 8, depth = 1, heads = 2 }

[modality.speech]
tokens = 2
decode = { max_seconds = 1.0 }
encoder = { kind = "signal", patch_samples = 20, width = 8, depth = 1, heads = 2 }
resampler = { width = 8, depth = 1, heads = 2 }
"#;

/// A synthetic cohort of 48 patients in `synth`, of whom such a share of speech is missing, and a recipe
/// for it, `fused.toml`.
fn workplace_without(missing: &str) -> Workplace {
    let workplace = Workplace::new();
    workplace
        .run([
            "cohort",
            "synth",
            "synth",
            "--patients",
            "48",
            "--missing",
            missing,
        ])
        .done();
    let recipe = with_room(&RECIPE.replace("path = \"cohort\"", "path = \"synth\"")) + MODALITIES;
    fs::write(workplace.path("fused.toml"), recipe).expect("the recipe");
    workplace
}

fn workplace() -> Workplace {
    workplace_without("speech=0.3")
}

/// A synthetic patient is longer than those of the recipe.
fn with_room(recipe: &str) -> String {
    recipe.replace(
        "max_tokens = 96",
        "max_tokens = 128\noverlength = \"drop_oldest_events\"",
    )
}

fn train(workplace: &Workplace, out: &str, set: &[&str]) -> Ended {
    let mut arguments = vec!["train", "fused.toml", "--out", out];
    for assignment in set {
        arguments.extend(["--set", assignment]);
    }
    workplace.run(arguments)
}

fn report(run: &Path) -> Value {
    let text = fs::read_to_string(run.join("report.json")).expect("the report");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn every_modality_is_trained_and_its_worth_adds_up() {
    let workplace = workplace();
    workplace.run(["cohort", "validate", "synth"]).done();
    train(&workplace, "run", &[]).done();
    let found = report(&workplace.path("run"));
    let modalities = found["data"]["sequences"]["modalities"]
        .as_object()
        .expect("modalities");
    assert_eq!(modalities.len(), 5);
    assert_eq!(modalities["image"]["items"], 48);
    let speech = &modalities["speech"];
    let missing = speech["missing_samples"].as_u64().expect("a count");
    assert!((1..48).contains(&missing), "{missing}");
    assert_eq!(speech["items"].as_u64().expect("a count") + missing, 48);

    let evaluated = workplace.run(["evaluate", "run", "--json"]).done().json();
    let same = |key: &str| {
        let ours = &evaluated["evaluation"]["metrics"]["scores"][key]["value"];
        let theirs = &found["evaluation"]["held_out"]["metrics"]["scores"][key]["value"];
        assert!(ours.is_number() && ours == theirs, "{key}: {ours} {theirs}");
    };
    same("auroc");
    same("log_loss");

    let ablation = workplace
        .run([
            "evaluate", "run", "--split", "all", "--ablate", "modality", "--json",
        ])
        .done()
        .json();
    let sources = ablation["sources"].as_array().expect("sources");
    let names: Vec<&str> = sources
        .iter()
        .map(|source| source["name"].as_str().expect("a name"))
        .collect();
    assert_eq!(
        names,
        ["text", "image", "waveform", "series", "omics", "speech"]
    );
    assert_eq!(ablation["subsets"].as_array().expect("subsets").len(), 64);
    let value = |score: &Value| score["value"].as_f64().expect("a value");
    let total: f64 = sources.iter().map(|source| value(&source["shapley"])).sum();
    let gain = value(&ablation["all"]) - value(&ablation["none"]);
    assert!((total - gain).abs() < 1e-12, "{total} and {gain}");

    let shown = workplace
        .run(["evaluate", "run", "--split", "all", "--ablate", "site"])
        .done()
        .stdout;
    for word in ["north", "west", "Shapley value", "all sources"] {
        assert!(shown.contains(word), "{word} is not in\n{shown}");
    }
}

#[test]
fn a_recipe_makes_its_synthetic_cohort_once() {
    let workplace = Workplace::new();
    let recipe = with_room(&RECIPE.replace(
        "path = \"cohort\"",
        "path = \"made/here\"\nsynth = { patients = 48, modalities = [\"notes\", \"labs\"] }",
    ));
    fs::write(workplace.path("made.toml"), recipe).expect("the recipe");
    let run = |out: &str, set: &[&str]| {
        let mut arguments = vec![
            "train",
            "made.toml",
            "--out",
            out,
            "--set",
            "train.epochs=1",
        ];
        for assignment in set {
            arguments.extend(["--set", assignment]);
        }
        workplace.run(arguments)
    };
    let first = run("first", &[]).done();
    assert!(
        first.stderr.contains("synthetic cohort"),
        "{}",
        first.stderr
    );
    let model = workplace.path("made/here/generating_model.json");
    let made = fs::metadata(&model).and_then(|file| file.modified());
    let second = run("second", &[]).done();
    assert!(
        !second.stderr.contains("synthetic cohort"),
        "{}",
        second.stderr
    );
    let kept = fs::metadata(&model).and_then(|file| file.modified());
    assert_eq!(kept.expect("a time"), made.expect("a time"));
    // The run knows how its cohort came about.
    let resolved = fs::read_to_string(workplace.path("first/recipe.toml")).expect("the recipe");
    assert!(resolved.contains("patients = 48"), "{resolved}");

    let other = run("other", &["cohort.synth.patients=49"]).with_status(1);
    assert!(
        other.stderr.contains("`patients` 48 instead of 49"),
        "{}",
        other.stderr
    );
    let wrong = run("wrong", &["cohort.synth.prevalence=2"]).with_status(2);
    assert!(
        wrong.stderr.contains("`prevalence` must be between"),
        "{}",
        wrong.stderr
    );
}

/// A modality that nobody has: the run goes through, says so, and comes close to the one without it.
#[test]
fn every_item_of_a_modality_may_be_missing() {
    let workplace = workplace_without("speech=1.0");
    let missing = train(&workplace, "missing", &[]).done();
    assert!(
        missing
            .stderr
            .contains("no training patient has an item of the modality `speech`"),
        "{}",
        missing.stderr
    );
    train(&workplace, "without", &["modality.exclude=[\"speech\"]"]).done();
    let found = workplace
        .run([
            "evaluate",
            "missing",
            "--split",
            "all",
            "--against",
            "without",
            "--json",
        ])
        .done()
        .json();
    let value = |key: &str| found[key]["value"].as_f64().expect("a value");
    assert_eq!(found["metric"], "auroc");
    assert_eq!(found["patients"], 48);
    assert!((value("run") - value("other") - value("difference")).abs() < 1e-12);
    assert!(value("difference").abs() < 0.2, "{found}");

    // The same comparison on fewer patients, and with a run that it cannot be made with.
    let some = [
        "evaluate",
        "missing",
        "--split",
        "all",
        "--against",
        "without",
        "--patients",
        "20",
    ];
    let shown = workplace.run(some).done().stdout;
    assert!(
        shown.contains("20 patients") && shown.contains("difference"),
        "{shown}"
    );
    let gone = workplace
        .run(["evaluate", "missing", "--against", "nowhere"])
        .with_status(2);
    assert!(gone.stderr.contains("nowhere"), "{}", gone.stderr);
}

#[test]
fn a_stopped_run_with_modalities_resumes_to_the_same_bits() {
    let workplace = workplace();
    let set = ["train.epochs=12", "train.checkpoint_every_steps=5"];
    train(&workplace, "whole", &set).done();
    let run = workplace.path("parts");
    let mut resume = vec!["--resume"];
    for assignment in set {
        resume.extend(["--set", assignment]);
    }
    for (name, after) in [("TERM", 8), ("KILL", 22)] {
        let mut child = start(&workplace, "fused.toml", "parts", &resume);
        wait_for_step(&mut child, &run, after);
        signal(&child, name);
        end(&workplace, child);
        assert!(!run.join("report.json").exists());
    }
    let mut arguments = vec!["train", "fused.toml", "--out", "parts"];
    arguments.extend(&resume);
    workplace.run(arguments).done();
    assert!(
        result_of(&run) == result_of(&workplace.path("whole")),
        "the resumed run differs from the unbroken one"
    );
    let own = |run: &str| fs::read(workplace.path(run).join("adapter/calor.safetensors"));
    assert_eq!(
        own("parts").expect("tensors"),
        own("whole").expect("tensors")
    );
}

#[test]
fn a_file_that_is_gone_is_an_error_or_counted() {
    let workplace = workplace();
    let images = workplace.path("synth/items/image");
    let mut gone = Vec::new();
    remove_some(&images, &mut gone);
    assert!(!gone.is_empty());
    let failed = train(&workplace, "strict", &[]).with_status(1);
    assert!(failed.stderr.contains("items/image"), "{}", failed.stderr);
    let ended = train(&workplace, "lenient", &["modality.image.on_missing=absent"]).done();
    assert!(
        ended.stderr.contains("counted as missing"),
        "{}",
        ended.stderr
    );
    let found = report(&workplace.path("lenient"));
    assert_eq!(found["data"]["absent_items"]["image"], gone.len());
}

/// Removes every eighth file below a folder.
fn remove_some(folder: &Path, gone: &mut Vec<std::path::PathBuf>) {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder").flatten() {
            match entry.path() {
                path if path.is_dir() => folders.push(path),
                path => files.push(path),
            }
        }
    }
    files.sort();
    for file in files.into_iter().step_by(8) {
        fs::remove_file(&file).expect("a file");
        gone.push(file);
    }
}

#[test]
fn modalities_and_sites_can_be_left_out_and_wrong_ones_are_told() {
    let workplace = workplace();
    train(
        &workplace,
        "fewer",
        &[
            "modality.exclude=[\"image\", \"text\", \"speech\"]",
            "sequence.exclude_sites=[\"north\"]",
            "train.epochs=1",
        ],
    )
    .done();
    let found = report(&workplace.path("fewer"));
    let modalities = found["data"]["sequences"]["modalities"]
        .as_object()
        .expect("modalities");
    assert_eq!(
        modalities.keys().collect::<Vec<_>>(),
        ["omics", "series", "waveform"]
    );
    let wrong = train(&workplace, "wrong", &["modality.exclude=[\"pictures\"]"]).with_status(2);
    assert!(
        wrong.stderr.contains("`pictures`") && wrong.stderr.contains("`image`"),
        "{}",
        wrong.stderr
    );
    let heads = train(
        &workplace,
        "heads",
        &["modality.omics.encoder={ kind = \"omics\", width = 9, heads = 2 }"],
    );
    assert_ne!(heads.status, 0);
    assert!(heads.stderr.contains("omics"), "{}", heads.stderr);
}
