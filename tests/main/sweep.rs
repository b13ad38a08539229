//! Sweeps through the binary: a grid, a random search that stops bad trials, killed and resumed.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::Workplace;
use crate::training::{end, result_of, signal, wait_for_step};

const GRID: &str = "[parameters]\n\"train.optimizer\" = [\"adamw\", \"muon\"]\n\"train.learning_rate\" = [1e-2, 1e-9]\n";
const RANDOM: &str = "method = \"random\"\ntrials = 5\nseed = 3\nmetric = \"log_loss\"\n\n[parameters]\n\"train.learning_rate\" = { log_uniform = [1e-5, 1e-1] }\n\"adapter.r\" = [2, 4]\n\n[asha]\nmin_steps = 4\nmax_steps = 16\nreduction_factor = 2\n";

fn sweep_json(folder: &Path) -> Value {
    let text = fs::read_to_string(folder.join("sweep.json")).expect("sweep.json");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn a_grid_is_trained_and_the_best_alone_sees_held_out_patients() {
    let workplace = Workplace::new();
    fs::write(workplace.path("grid.toml"), GRID).expect("the sweep");
    let arguments = [
        "train",
        "recipe.toml",
        "--sweep",
        "grid.toml",
        "--out",
        "sweep",
        "--set",
        "train.epochs=2",
        "--set",
        "evaluate.metric=log_loss",
    ];
    let ended = workplace.run(arguments).done();
    for text in [
        "4 trials, Log loss of tuning patients",
        "train.optimizer",
        "\"muon\"",
        "best",
        "held-out patients",
    ] {
        assert!(
            ended.stdout.contains(text),
            "{text} is not in\n{}",
            ended.stdout
        );
    }
    assert!(ended.stderr.contains("Trial 4 of 4"), "{}", ended.stderr);

    let found = sweep_json(&workplace.path("sweep"));
    let trials = found["trials"].as_array().expect("trials");
    assert_eq!(trials.len(), 4);
    let value = |trial: &Value| trial["reached"][0]["value"].as_f64().expect("a value");
    let best = found["best"].as_u64().expect("a best") as usize;
    let least = trials.iter().map(value).fold(f64::INFINITY, f64::min);
    assert_eq!(value(&trials[best - 1]), least);
    for trial in trials {
        let folder = workplace
            .path("sweep")
            .join(trial["folder"].as_str().expect("a folder"));
        let is_best = trial["number"] == found["best"];
        assert_eq!(trial["reached"][0]["steps"], 8);
        assert_eq!(folder.join("report.json").exists(), is_best);
        assert_eq!(folder.join("predictions.parquet").exists(), is_best);
    }

    // It is there already; another sweep does not go on with it, and the same one adds nothing.
    let again = workplace.run(arguments).with_status(2);
    assert!(
        again.stderr.contains("holds a sweep already"),
        "{}",
        again.stderr
    );
    let resumed = workplace
        .run(arguments.iter().chain(&["--resume", "--json"]))
        .done()
        .json();
    assert_eq!(resumed["sweep"], found);
    assert_eq!(resumed["best"]["training"]["steps"], 8);
    fs::write(workplace.path("grid.toml"), GRID.replace("1e-9", "1e-8")).expect("the sweep");
    let other = workplace
        .run(arguments.iter().chain(&["--resume"]))
        .with_status(2);
    assert!(
        other.stderr.contains("another sweep file"),
        "{}",
        other.stderr
    );
}

#[test]
fn a_killed_search_goes_on_and_its_best_is_an_ordinary_run() {
    let workplace = Workplace::new();
    fs::write(workplace.path("random.toml"), RANDOM).expect("the sweep");
    let arguments = |out| {
        [
            "train",
            "recipe.toml",
            "--sweep",
            "random.toml",
            "--out",
            out,
        ]
    };
    workplace.run(arguments("whole")).done();

    // Killed in the middle of the third trial.
    let mut child = workplace
        .calor()
        .args(arguments("parts"))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the binary starts");
    wait_for_step(&mut child, &workplace.path("parts/trial-3"), 2);
    signal(&child, "KILL");
    assert_eq!(end(&workplace, child).status, 128 + 9);
    workplace
        .run(arguments("parts").iter().chain(&["--resume"]))
        .done();
    let (whole, parts) = (workplace.path("whole"), workplace.path("parts"));
    assert_eq!(sweep_json(&whole), sweep_json(&parts));

    let found = sweep_json(&whole);
    let trials = found["trials"].as_array().expect("trials");
    assert_eq!(trials.len(), 5);
    let rungs: Vec<usize> = trials
        .iter()
        .map(|trial| trial["reached"].as_array().expect("rungs").len())
        .collect();
    assert!(rungs.contains(&1), "some trial is stopped early: {rungs:?}");
    assert!(rungs.contains(&3), "some trial comes to its end: {rungs:?}");

    // The best, trained by itself: the same to the bit.
    let best = &trials[found["best"].as_u64().expect("a best") as usize - 1];
    let mut alone: Vec<&str> = vec!["train", "recipe.toml", "--out", "alone"];
    alone.extend([
        "--set",
        "evaluate.metric=log_loss",
        "--set",
        "train.max_steps=16",
    ]);
    for set in best["set"].as_array().expect("assignments") {
        alone.extend(["--set", set.as_str().expect("an assignment")]);
    }
    workplace.run(alone).done();
    let folder = whole.join(best["folder"].as_str().expect("a folder"));
    assert!(
        result_of(&folder) == result_of(&workplace.path("alone")),
        "the best trial differs from the run by itself"
    );
}

#[test]
fn a_sweep_that_cannot_be_is_told_before_anything_is_trained() {
    let workplace = Workplace::new();
    for (text, says) in [
        (
            "[parameters]\n\"train.learing_rate\" = [1e-3]\n",
            "did you mean `train.learning_rate`?",
        ),
        ("[parameters]\n\"adapter.r\" = [4, 0]\n", "`adapter.r` is 0"),
        (
            "[parameters]\n\"adapter.r\" = { uniform = [1, 2] }\n",
            "a grid needs a list",
        ),
        ("[parameters]\nr = 1\n", "sweep.toml: `r` is neither a list"),
    ] {
        fs::write(workplace.path("sweep.toml"), text).expect("the sweep");
        let ended = workplace
            .run([
                "train",
                "recipe.toml",
                "--sweep",
                "sweep.toml",
                "--out",
                "out",
            ])
            .with_status(2);
        assert!(
            ended.stderr.contains(says),
            "{says} is not in\n{}",
            ended.stderr
        );
        assert!(!workplace.path("out").exists());
    }
}
