//! Every recipe of the project is complete, and would run if its data were there.

use std::fs;
use std::path::{Path, PathBuf};

use calor_records::{Label, LabelValue, Labels, write_labels};
use calor_train::recipe::{Recipe, TaskKind};
use serde_json::{Value, json};

use crate::support::{Ended, Workplace, language_model};

/// Where recipes have towers, and small ones in their place.
const TOWERS: [(&str, &str); 2] = [
    ("models/random-vit", "towers_vit"),
    ("models/random-whisper", "towers_whisper"),
];

/// Puts a fixture of `crates/model` where a recipe expects a tower.
fn small_tower(place: &Path, fixture: &str) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/model/tests/fixtures");
    fs::create_dir_all(place).expect("a folder");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixtures.join(fixture).join(file), place.join(file)).expect("a copy");
    }
    let preprocessor =
        r#"{"image_processor_type": "ViTImageProcessor", "size": {"height": 14, "width": 14}}"#;
    fs::write(place.join("preprocessor_config.json"), preprocessor).expect("a file");
}

/// Rows of text as a task reads them.
fn rows(kind: TaskKind) -> String {
    let row = |number: usize| match kind {
        TaskKind::Tokens => json!({
            "tokens": ["no", "fever", "today"],
            "tags": ["O", if number.is_multiple_of(2) { "B-Disease" } else { "O" }, "O"],
        }),
        TaskKind::CausalLm => json!({"messages": [
            {"role": "user", "content": format!("Doctor: how is day {number}?")},
            {"role": "assistant", "content": "Well."},
        ]}),
        _ => json!({"text": "Doctor: how are you?", "label": (["plan", "exam"][number % 2])}),
    };
    (0..40)
        .map(|number| row(number).to_string() + "\n")
        .collect()
}

fn recipes() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut recipes: Vec<PathBuf> = fs::read_dir(folder)
        .expect("recipes/")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "toml")
        })
        .collect();
    recipes.sort();
    assert!(recipes.iter().any(|path| path.ends_with("quickstart.toml")));
    assert!(
        recipes
            .iter()
            .any(|path| path.ends_with("nafld-death.toml"))
    );
    recipes
}

#[test]
fn the_first_line_is_the_command_that_runs_it() {
    for path in recipes() {
        let text = fs::read_to_string(&path).expect("a recipe");
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name");
        let first = text.lines().next().unwrap_or_default();
        assert!(
            first == format!("# calor train recipes/{name}")
                || first.starts_with(&format!("# calor train recipes/{name} ")),
            "{name} begins with `{first}`"
        );
    }
}

#[test]
fn it_parses_and_is_the_same_after_writing_it_back() {
    for path in recipes() {
        let recipe =
            Recipe::load(&path, &[]).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let folder = tempfile::tempdir().expect("a folder");
        let copy = folder.path().join("recipe.toml");
        fs::write(&copy, recipe.to_toml("calor train recipe.toml")).expect("the copy");
        assert_eq!(
            Recipe::load(&copy, &[]).expect("what was written"),
            recipe,
            "{}",
            path.display()
        );
    }
}

/// Where a recipe decodes files of another kind than the small cohort's, what decodes those.
const DECODING: [(&str, &str); 2] = [
    (
        "spoken-digits",
        "modality.speech.decode={ mel_bins = 6, max_seconds = 0.32, pad_to_max = true }",
    ),
    (
        "depresjon",
        "modality.waveform.decode={ rate_hz = 50.0, max_seconds = 2.0 }",
    ),
];

/// A workplace with a small model and a small cohort that has items of every modality, and the
/// assignments that put them in place of a recipe's own.
fn small(path: &Path) -> (Workplace, Vec<String>) {
    let recipe = Recipe::load(path, &[]).expect("a recipe");
    let workplace = Workplace::new();
    for (place, fixture) in TOWERS {
        small_tower(&workplace.path(place), fixture);
    }
    let mut set = vec![match recipe.task.kind {
        TaskKind::CausalLm => format!("model.id={}", language_model().display()),
        _ => "model.id=model".to_owned(),
    }];
    if recipe.cohort.synth.is_some() {
        // Made by the command itself.
        set.push("cohort.synth.patients=60".to_owned());
    } else if recipe.text.is_used() {
        fs::write(workplace.path("rows.jsonl"), rows(recipe.task.kind)).expect("rows");
        let splits = ["train", "tuning", "held_out"];
        set.extend(splits.map(|split| format!("text.{split}=rows.jsonl")));
    } else {
        let made = ["cohort", "synth", "data", "--patients", "60"];
        workplace.run(made).done();
        relabel(&workplace.path("data"), &recipe);
        set.push("cohort.path=data".to_owned());
    }
    set.push("sequence.max_tokens=96".to_owned());
    let decoding = DECODING
        .iter()
        .filter(|(name, _)| path.file_stem().is_some_and(|stem| stem == *name));
    set.extend(decoding.map(|(_, decode)| (*decode).to_owned()));
    (workplace, set)
}

/// Writes the outcome of a synthetic cohort under a recipe's own labels.
fn relabel(cohort: &Path, recipe: &Recipe) {
    let outcome = Labels::read(&cohort.join("labels/outcome")).expect("labels");
    // A task of another kind has to say here what its data is.
    let value = |outcome: bool| match recipe.task.kind {
        TaskKind::Binary | TaskKind::Multilabel => LabelValue::Boolean(outcome),
        TaskKind::Multiclass => LabelValue::Integer(i64::from(outcome)),
        TaskKind::Regression => LabelValue::Float(if outcome { 1.0 } else { 0.0 }),
        TaskKind::Tokens | TaskKind::CausalLm => {
            panic!("rows of text carry what is learned of them")
        }
    };
    let labels: Vec<Label> = outcome
        .rows()
        .iter()
        .map(|label| Label {
            value: value(label.value == LabelValue::Boolean(true)),
            ..label.clone()
        })
        .collect();
    for name in recipe.task.labels.names() {
        let file = cohort.join("labels").join(name).join("0.parquet");
        write_labels(&file, &labels).expect("labels");
    }
}

fn run(workplace: &Workplace, verb: &str, path: &Path, set: &[String]) -> Ended {
    let path = path.to_str().expect("a path");
    let set = set.iter().flat_map(|set| ["--set", set.as_str()]);
    workplace.run([verb, path].into_iter().chain(set))
}

#[test]
fn it_passes_the_check_on_data_of_its_shape() {
    for path in recipes() {
        let (workplace, set) = small(&path);
        run(&workplace, "check", &path, &set).done();
    }
}

#[test]
fn it_trains_two_steps_and_leaves_a_report() {
    for path in recipes() {
        let (workplace, mut set) = small(&path);
        for short in [
            "name=two-steps",
            "train.max_steps=2",
            "train.global_batch=8",
            "train.micro_batch=4",
            "evaluate.every_steps=2",
            "evaluate.resamples=100",
            "energy.idle_window_s=0",
        ] {
            set.push(short.to_owned());
        }
        run(&workplace, "train", &path, &set).done();
        let folder = workplace.path("runs/two-steps");
        let lines = fs::read_to_string(folder.join("metrics.jsonl")).expect("metrics");
        let lines: Vec<Value> = lines
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        let name = path.display();
        let losses: Vec<f64> = lines
            .iter()
            .filter(|line| line["event"] == "step")
            .map(|line| line["loss"].as_f64().expect("a loss"))
            .collect();
        assert_eq!(losses.len(), 2, "{name}");
        assert!(
            losses.iter().all(|loss| loss.is_finite()),
            "{name}: {losses:?}"
        );
        assert!(
            lines.iter().any(|line| line["event"] == "evaluation"),
            "{name}"
        );
        assert!(folder.join("report.json").is_file(), "{name}");
        assert!(
            folder.join("adapter/adapter_config.json").is_file(),
            "{name}"
        );
    }
}
