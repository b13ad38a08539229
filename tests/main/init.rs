//! A recipe of one's own: copied, on top of another, completed by an editor.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::support::{RECIPE, Workplace};

#[test]
fn every_recipe_of_the_project_can_be_copied() {
    let workplace = Workplace::empty();
    let listed = workplace.run(["init", "--list", "--json"]).done().json();
    let listed: BTreeSet<String> = listed
        .as_array()
        .expect("a list")
        .iter()
        .map(|recipe| {
            let about = recipe["about"].as_str().expect("what it is");
            assert!(about.len() > 20, "{recipe} does not say what it is");
            recipe["name"].as_str().expect("a name").to_owned()
        })
        .collect();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let there: BTreeSet<String> = fs::read_dir(folder)
        .expect("recipes/")
        .filter_map(|entry| {
            let name = entry
                .expect("a file")
                .file_name()
                .into_string()
                .expect("a name");
            name.strip_suffix(".toml").map(str::to_owned)
        })
        .collect();
    assert_eq!(
        listed, there,
        "crates/cli/init.rs lists what is in recipes/"
    );
    for name in &there {
        workplace.run(["init", name]).done();
        assert!(workplace.path(&format!("{name}.toml")).is_file());
    }
    let shown = workplace.run(["init", "--list"]).done().stdout;
    assert!(shown.contains("quickstart"), "{shown}");
}

#[test]
fn a_copy_is_edited_where_it_stands_and_checked() {
    let workplace = Workplace::new();
    let ended = workplace
        .run([
            "init",
            "quickstart",
            "--out",
            "mine.toml",
            "--set",
            "name=mine",
            "--set",
            "model.id=model",
            "--set",
            "cohort.path=cohort",
            "--set",
            "task.labels=outcome",
            "--set",
            "train.seed=3",
        ])
        .done();
    assert!(
        ended.stdout.contains("The recipe can be trained."),
        "{}",
        ended.stdout
    );
    let text = fs::read_to_string(workplace.path("mine.toml")).expect("the copy");
    assert!(
        text.starts_with("# calor train mine.toml\n#\n# The task of"),
        "{text}"
    );
    assert!(text.contains("\nname   = \"mine\"\n"), "{text}");
    assert!(text.contains("\nseed = 3\n"), "{text}");

    let again = workplace
        .run(["init", "quickstart", "--out", "mine.toml"])
        .with_status(2);
    assert!(
        again.stderr.contains("is there already"),
        "{}",
        again.stderr
    );
    let elsewhere = workplace.run(["init", "nafld-death"]).done();
    assert!(
        elsewhere.stderr.contains("data is not there yet"),
        "{}",
        elsewhere.stderr
    );
    for (arguments, says) in [
        (&["init", "quickstrt"][..], "there is no recipe `quickstrt`"),
        (&["init"], "no recipe is named"),
        (
            &["init", "depresjon", "--set", "train.epoch=1"],
            "did you mean `train.epochs`?",
        ),
    ] {
        let ended = workplace.run(arguments).with_status(2);
        assert!(ended.stderr.contains(says), "{}", ended.stderr);
    }
    assert!(!workplace.path("depresjon.toml").exists());
}

#[test]
fn a_recipe_on_top_of_another_leaves_a_complete_one() {
    let workplace = Workplace::new();
    let own =
        "# calor train own.toml\nextends = \"recipe.toml\"\nname = \"own\"\n[train]\nepochs = 1\n";
    fs::write(workplace.path("own.toml"), own).expect("the recipe");
    workplace.run(["train", "own.toml", "--out", "run"]).done();
    let resolved = fs::read_to_string(workplace.path("run/recipe.toml")).expect("the recipe");
    assert!(!resolved.contains("extends"), "{resolved}");
    for line in [
        "name = \"own\"",
        "epochs = 1",
        "seed = 7",
        "max_tokens = 96",
    ] {
        assert!(resolved.contains(line), "{line} is not in\n{resolved}");
    }

    let broken = RECIPE.replace("dropout = 0.1", "dropout = 1.5");
    fs::write(workplace.path("recipe.toml"), broken).expect("the recipe");
    let ended = workplace.run(["check", "own.toml"]).with_status(2);
    assert!(
        ended.stderr.contains("recipe.toml:21: `adapter.dropout`"),
        "{}",
        ended.stderr
    );
}

#[test]
fn the_schema_is_one() {
    let schema = Workplace::empty().run(["schema"]).done().json();
    assert_eq!(
        schema["$schema"],
        "https://json-schema.org/draft/2020-12/schema"
    );
    let train = &schema["properties"]["train"]["properties"];
    assert!(
        train["optimizer"]["enum"]
            .as_array()
            .is_some_and(|names| names.len() == 5)
    );
}
