//! Every recipe of the project is complete, and would run if its data were there.

use std::fs;
use std::path::{Path, PathBuf};

use calor_records::LabelValue;
use calor_train::recipe::{Recipe, TaskKind};

use serde_json::json;

use crate::support::{Workplace, language_model, write_labelled_cohort};

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

/// With a small model and cohort in place of the recipe's own.
#[test]
fn it_passes_the_check_on_data_of_its_shape() {
    for path in recipes() {
        let recipe = Recipe::load(&path, &[]).expect("a recipe");
        let workplace = Workplace::new();
        let label = match recipe.task.kind {
            TaskKind::Multiclass => |outcome| LabelValue::Integer(i64::from(outcome)),
            _ => LabelValue::Boolean,
        };
        let mut set = vec!["sequence.max_tokens=96".to_owned()];
        // A synthetic cohort is made by the check itself.
        if recipe.cohort.synth.is_some() {
            set.push("cohort.synth.patients=60".to_owned());
        } else if recipe.text.is_used() {
            fs::write(workplace.path("rows.jsonl"), rows(recipe.task.kind)).expect("rows");
            let splits = ["train", "tuning", "held_out"];
            set.extend(splits.map(|split| format!("text.{split}=rows.jsonl")));
        } else {
            write_labelled_cohort(&workplace.path("data"), &recipe.task.labels.names(), label);
            set.push("cohort.path=data".to_owned());
        }
        set.push(match recipe.task.kind {
            TaskKind::CausalLm => format!("model.id={}", language_model().display()),
            _ => "model.id=model".to_owned(),
        });
        for (place, fixture) in TOWERS {
            small_tower(&workplace.path(place), fixture);
        }
        let mut arguments = vec!["check", path.to_str().expect("a path")];
        for assignment in &set {
            arguments.extend(["--set", assignment]);
        }
        workplace.run(arguments).done();
    }
}
