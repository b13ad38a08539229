//! What goes wrong is said with place and remedy, on stderr, and with the right exit status.

use std::fmt::Write;
use std::fs;

use crate::support::{RECIPE, Workplace};

/// Runs each command line and collects status and both streams.
fn said(workplace: &Workplace, command_lines: &[(&str, i32)]) -> String {
    let mut text = String::new();
    for (command_line, status) in command_lines {
        let ended = workplace
            .run(command_line.split_whitespace())
            .with_status(*status);
        assert_eq!(
            ended.stdout, "",
            "calor {command_line}: an error belongs on stderr"
        );
        let _ = writeln!(text, "$ calor {command_line}\n{}", ended.stderr);
    }
    text
}

#[test]
fn wrong_usage_ends_with_status_2() {
    let workplace = Workplace::new();
    assert_snapshot!(said(
        &workplace,
        &[
            ("", 2),
            ("tran recipe.toml", 2),
            ("train", 2),
            ("train recipe.toml --device gpu", 2),
            ("train recipe.toml --device cuda:x", 2),
            ("train missing.toml", 2),
            ("train recipe.toml --set epochs", 2),
            ("train recipe.toml --set train.epoch=2", 2),
            ("train recipe.toml --set train.epochs=many", 2),
            ("train recipe.toml --set model.id=nowhere/at/all", 2),
            ("fetch ./model", 2),
            (
                "parity model --reference model/model.safetensors --tolerance 0",
                2
            ),
        ]
    ));
}

#[test]
fn a_recipe_with_mistakes_is_told_all_of_them_with_their_lines() {
    let workplace = Workplace::new();
    let recipe = RECIPE
        .replace("\nlearning_rate", "\nlearning_rte")
        .replace("kind = \"binary\"", "kind = \"binry\"")
        .replace("max_tokens = 96", "max_tokens = \"96\"")
        .replace("[adapter]", "[adaptor]");
    fs::write(workplace.path("wrong.toml"), recipe).expect("the recipe");
    let broken = RECIPE.replace("schema = 1", "schema = ");
    fs::write(workplace.path("broken.toml"), broken).expect("the recipe");
    let other = RECIPE.replace("schema = 1", "schema = 2");
    fs::write(workplace.path("other.toml"), other).expect("the recipe");
    assert_snapshot!(said(
        &workplace,
        &[
            ("check wrong.toml", 2),
            ("check broken.toml", 2),
            ("check other.toml", 2)
        ]
    ));
}

#[test]
fn what_is_missing_or_damaged_is_named() {
    let workplace = Workplace::new();
    fs::create_dir(workplace.path("empty")).expect("a folder");
    let weights = fs::read(workplace.path("model/model.safetensors")).expect("the weights");
    fs::create_dir(workplace.path("cut")).expect("a folder");
    for name in ["config.json", "tokenizer.json"] {
        fs::copy(
            workplace.path("model").join(name),
            workplace.path("cut").join(name),
        )
        .expect("a copy");
    }
    fs::write(
        workplace.path("cut/model.safetensors"),
        &weights[..weights.len() / 2],
    )
    .expect("a file");
    assert_snapshot!(said(
        &workplace,
        &[
            ("cohort inspect nowhere", 1),
            ("cohort inspect empty", 1),
            ("train recipe.toml --set cohort.path=empty", 1),
            ("train recipe.toml --set task.labels=outcom", 2),
            ("train recipe.toml --set model.id=empty", 1),
            ("train recipe.toml --set model.id=cut", 1),
            ("evaluate nowhere", 2),
            ("predict nowhere --cohort cohort --out out.parquet", 2),
            ("report nowhere", 2),
            ("parity model --reference nowhere.safetensors", 1),
            ("parity model --reference model/model.safetensors", 1),
        ]
    ));
}
