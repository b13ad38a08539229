//! A small run through the binary: what it leaves, that it can be stopped, killed and resumed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Ended, PATIENTS, Workplace};

/// Enough steps that a run can be caught in the middle: 100 epochs of 4.
const LONG: [&str; 6] = [
    "--set",
    "train.epochs=100",
    "--set",
    "evaluate.every_steps=40",
    "--set",
    "train.checkpoint_every_steps=25",
];
const LONG_STEPS: usize = 400;

/// The steps in a run's `metrics.jsonl`, as far as they are written.
fn steps(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["event"] == "step")
        .collect()
}

/// What must not depend on how often a run was interrupted: numbers of each step, and the bytes
/// of what it leaves.
pub fn result_of(run: &Path) -> (Vec<String>, Vec<u8>, Vec<u8>) {
    let numbers = steps(run)
        .iter()
        .map(|line| {
            format!(
                "{} {} {} {} {}",
                line["step"],
                line["loss"],
                line["grad_norm"],
                line["learning_rate"],
                line["tokens"]
            )
        })
        .collect();
    let adapter = fs::read(run.join("adapter/adapter_model.safetensors")).expect("the adapter");
    let predictions = fs::read(run.join("predictions.parquet")).expect("the predictions");
    (numbers, adapter, predictions)
}

/// The long run in one go.
fn run_whole(workplace: &Workplace) -> PathBuf {
    let arguments = ["train", "recipe.toml", "--out", "whole"];
    workplace.run(arguments.iter().chain(&LONG)).done();
    workplace.path("whole")
}

/// The long run, or what is left of it, to its end.
fn run_rest(workplace: &Workplace) -> Ended {
    let arguments = ["train", "recipe.toml", "--out", "parts", "--resume"];
    workplace.run(arguments.iter().chain(&LONG)).done()
}

/// The long run, to be interrupted, in a process of its own.
fn start_rest(workplace: &Workplace) -> Child {
    let mut resume: Vec<&str> = LONG.to_vec();
    resume.push("--resume");
    start(workplace, "recipe.toml", "parts", &resume)
}

/// Trains in a process of its own.
pub fn start(workplace: &Workplace, recipe: &str, out: &str, arguments: &[&str]) -> Child {
    let mut command = workplace.calor();
    command
        .args(["train", recipe, "--out", out])
        .args(arguments);
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts")
}

/// Waits until a run has done so many steps, and asserts that it is still going on.
#[track_caller]
pub fn wait_for_step(child: &mut Child, run: &Path, wanted: usize) {
    let started = Instant::now();
    while steps(run).len() < wanted {
        assert!(
            started.elapsed() < Duration::from_secs(120),
            "{} steps after two minutes",
            steps(run).len()
        );
        assert!(
            child.try_wait().expect("a process").is_none(),
            "it ended before step {wanted}"
        );
        thread::sleep(Duration::from_millis(2));
    }
}

pub fn signal(child: &Child, signal: &str) {
    let status = std::process::Command::new("kill")
        .args([&format!("-{signal}"), &child.id().to_string()])
        .status()
        .expect("kill");
    assert!(status.success());
}

pub fn end(workplace: &Workplace, child: Child) -> Ended {
    workplace.ended(child.wait_with_output().expect("a process"))
}

#[test]
fn a_run_leaves_what_the_readme_promises() {
    let workplace = Workplace::new();
    let ended = workplace
        .run(["train", "recipe.toml", "--out", "run"])
        .done();
    assert!(
        ended.stdout.contains("held-out patients"),
        "{}",
        ended.stdout
    );
    for line in [
        "AUROC",
        "AUPRC",
        "95% interval",
        "tokens/s",
        "J/token",
        "run/report.html",
        "run/adapter",
        "run/tensorboard",
    ] {
        assert!(
            ended.stdout.contains(line),
            "{line} is not in\n{}",
            ended.stdout
        );
    }
    for line in ["Training", "step 32/32", "tuning: AUROC", "checkpoint "] {
        assert!(
            ended.stderr.contains(line),
            "{line} is not in\n{}",
            ended.stderr
        );
    }

    let run = workplace.path("run");
    for file in [
        "recipe.toml",
        "metrics.jsonl",
        "predictions.parquet",
        "report.json",
        "report.html",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ] {
        assert!(run.join(file).is_file(), "{file} is missing");
    }
    assert!(
        fs::read_dir(run.join("tensorboard"))
            .expect("a folder")
            .count()
            > 0
    );

    let steps = steps(&run);
    assert_eq!(steps.len(), 32);
    let mean = |steps: &[Value]| {
        steps
            .iter()
            .filter_map(|step| step["loss"].as_f64())
            .sum::<f64>()
            / steps.len() as f64
    };
    let (first, last) = (mean(&steps[..8]), mean(&steps[24..]));
    assert!(last < 0.8 * first, "the loss went from {first} to {last}");

    // What a command prints comes without the scratch folder's name.
    let folder = run.parent().expect("the scratch folder").to_string_lossy();
    let written = fs::read_to_string(run.join("report.json"))
        .expect("report.json")
        .replace(folder.as_ref(), "[folder]");
    let report: Value = serde_json::from_str(&written).expect("JSON");
    assert_eq!(report["training"]["steps"], 32);
    assert_eq!(report["outcome"], "finished");
    let held_out = &report["evaluation"]["held_out"]["metrics"];
    assert_eq!(held_out["patients"], PATIENTS / 6);
    assert_eq!(
        workplace.run(["report", "run", "--json"]).done().json(),
        report
    );

    // The same model says the same when it is used again.
    let evaluated = workplace.run(["evaluate", "run", "--json"]).done().json();
    assert_eq!(
        evaluated["evaluation"]["metrics"]["scores"],
        held_out["scores"]
    );
    let table = workplace
        .run(["evaluate", "run", "--split", "train"])
        .done();
    assert!(
        table.stdout.contains("32 patients of the split `train`"),
        "{}",
        table.stdout
    );
    let predicted = workplace
        .run([
            "predict",
            "run",
            "--cohort",
            "cohort",
            "--out",
            "all.parquet",
        ])
        .done();
    assert_eq!(predicted.stdout, "48 predictions in all.parquet\n");
    assert!(workplace.path("all.parquet").is_file());
}

#[test]
fn a_check_tells_what_a_run_would_be_and_leaves_nothing() {
    let workplace = Workplace::new();
    let ended = workplace.run(["check", "recipe.toml"]).done();
    for line in [
        "train",
        "tuning",
        "held_out",
        "32, 4 an epoch",
        "The recipe can be trained.",
    ] {
        assert!(
            ended.stdout.contains(line),
            "{line} is not in\n{}",
            ended.stdout
        );
    }
    assert!(!workplace.path("runs").exists());
    let report = workplace
        .run(["check", "recipe.toml", "--json"])
        .done()
        .json();
    assert_eq!(report["total_steps"], 32);
    assert_eq!(report["splits"]["train"]["patients"], 32);
}

#[test]
fn a_signal_leaves_a_checkpoint_and_status_3_and_resuming_changes_nothing() {
    let workplace = Workplace::new();
    let whole = run_whole(&workplace);
    assert_eq!(steps(&whole).len(), LONG_STEPS);

    let run = workplace.path("parts");
    for (name, after) in [("TERM", 60), ("USR1", 130), ("INT", 210)] {
        let mut child = start_rest(&workplace);
        wait_for_step(&mut child, &run, after);
        signal(&child, name);
        let ended = end(&workplace, child).with_status(3);
        assert!(
            ended.stderr.contains("Stopped after step"),
            "{name}: {}",
            ended.stderr
        );
        assert!(
            ended.stderr.contains("--resume"),
            "{name}: {}",
            ended.stderr
        );
        let done = steps(&run).len();
        assert!((after..LONG_STEPS).contains(&done), "{name}: {done} steps");
        assert!(
            run.join(format!("checkpoints/step-{done}")).is_dir(),
            "{name}: no checkpoint of step {done}"
        );
        assert!(!run.join("report.json").exists());
    }
    let last = run_rest(&workplace);
    assert!(
        last.stderr.contains("Going on after step"),
        "{}",
        last.stderr
    );
    assert!(
        result_of(&run) == result_of(&whole),
        "the resumed run differs from the unbroken one"
    );
}

#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let workplace = Workplace::new();
    let whole = run_whole(&workplace);

    let run = workplace.path("parts");
    // Between checkpoints, twice: what was done after the last one is done again.
    for after in [60, 165] {
        let mut child = start_rest(&workplace);
        wait_for_step(&mut child, &run, after);
        signal(&child, "KILL");
        assert_eq!(end(&workplace, child).status, 128 + 9);
    }
    run_rest(&workplace);
    assert!(
        result_of(&run) == result_of(&whole),
        "the resumed run differs from the unbroken one"
    );
}

#[test]
fn the_same_recipe_gives_the_same_bits_and_another_seed_does_not() {
    let workplace = Workplace::new();
    for out in ["first", "second"] {
        workplace.run(["train", "recipe.toml", "--out", out]).done();
    }
    workplace
        .run([
            "train",
            "recipe.toml",
            "--out",
            "third",
            "--set",
            "train.seed=8",
        ])
        .done();
    let results = ["first", "second", "third"].map(|out| result_of(&workplace.path(out)));
    assert!(results[0] == results[1], "two runs of one recipe differ");
    assert!(results[0].1 != results[2].1, "the seed changes nothing");
}

#[test]
fn a_folder_that_holds_a_run_is_not_overwritten() {
    let workplace = Workplace::new();
    workplace
        .run([
            "train",
            "recipe.toml",
            "--out",
            "run",
            "--set",
            "train.epochs=1",
        ])
        .done();
    let before = fs::read(workplace.path("run/report.json")).expect("the report");
    let again = workplace
        .run([
            "train",
            "recipe.toml",
            "--out",
            "run",
            "--set",
            "train.epochs=1",
        ])
        .with_status(2);
    assert!(
        again.stderr.contains("holds a run already"),
        "{}",
        again.stderr
    );
    let other = workplace
        .run(["train", "recipe.toml", "--out", "run", "--resume"])
        .with_status(2);
    assert!(
        other.stderr.contains("train.epochs: 1 then, 8 now"),
        "{}",
        other.stderr
    );
    assert_eq!(
        fs::read(workplace.path("run/report.json")).expect("the report"),
        before
    );
}

#[test]
fn a_step_is_benchmarked_on_random_tokens() {
    let workplace = Workplace::new();
    let arguments = [
        "bench",
        "step",
        "--model",
        "model",
        "--task",
        "sequence_classification",
        "--windows",
        "2",
        "--steps",
        "3",
        "--warmup",
        "1",
    ];
    let size = ["--batch", "2", "--seq", "16", "--rank", "4"];
    let report = workplace
        .run(arguments.iter().chain(&size).chain(&["--json"]))
        .done()
        .json();
    assert_eq!(report["losses"].as_array().map(Vec::len), Some(7));
    assert_eq!(report["step_s"].as_array().map(Vec::len), Some(6));
    assert_eq!(report["windows"].as_array().map(Vec::len), Some(2));
    assert!(
        report["tokens_per_s"]
            .as_f64()
            .is_some_and(|rate| rate > 0.0)
    );
    let table = workplace.run(arguments.iter().chain(&size)).done();
    for part in ["2 × 16 tokens", "MFU", "backward", "lora_linear", "random"] {
        assert!(table.stdout.contains(part), "{part}\n{}", table.stdout);
    }
}

#[test]
fn the_step_of_a_recipe_is_benchmarked_without_its_cohort() {
    let workplace = Workplace::new();
    fs::remove_dir_all(workplace.path("cohort")).unwrap();
    let bench = |more: &[&str]| {
        let arguments = [
            "bench",
            "step",
            "recipe.toml",
            "--windows",
            "1",
            "--steps",
            "2",
        ];
        workplace.run(arguments.iter().chain(more).chain(&["--json"]))
    };
    let fused = bench(&["--batch", "3"]).done().json();
    assert_eq!(fused["batch"], 3);
    assert_eq!(fused["kernels"], "fused");
    let plain = bench(&["--batch", "3", "--kernels", "reference"])
        .done()
        .json();
    let loss = |report: &Value| report["losses"][3].as_f64().unwrap();
    assert!((loss(&plain) - loss(&fused)).abs() < 1e-4 * loss(&fused));
    let operations = |report: &Value| report["profile"]["operations"].to_string();
    assert!(operations(&fused).contains("attention"));
    assert!(!operations(&plain).contains("attention"));
    let wrong = bench(&["--set", "train.kernels=fast"]).with_status(2);
    assert!(wrong.stderr.contains("train.kernels"), "{}", wrong.stderr);
}
