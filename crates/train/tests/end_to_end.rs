//! Whole runs on a tiny cohort with tiny checkpoints.

mod common;
mod optimizers;

use std::path::Path;
use std::process::Command;

use calor_records::Split;
use calor_train::artifacts::report::Outcome;
use calor_train::{
    BenchTask, DeviceSpec, StepBenchOptions, StopFlag, TrainError, TrainOutcome, UseOptions,
};
use common::{
    AfterStep, Home, Kind, POSITIONS, adapter_bytes, finish, losses, metrics, repeatable,
};
use serde_json::Value;

#[test]
fn a_run_learns_and_leaves_everything_it_should() {
    for kind in [Kind::Bert, Kind::Llama] {
        learns(&Home::new(kind));
    }
}

fn learns(home: &Home) {
    let set = [
        "train.epochs=6",
        "train.learning_rate=3e-2",
        "evaluate.every_steps=12",
    ];
    let options = home.options("run", &set);
    let report = finish(&options);
    let run = home.path("run");
    for file in [
        "recipe.toml",
        "report.json",
        "report.html",
        "predictions.parquet",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/task.json",
    ] {
        assert!(run.join(file).is_file(), "{file} is missing");
    }
    // 64 training patients in batches of 8, six times.
    assert_eq!(report.training.steps, 48);
    let losses = losses(&run);
    assert_eq!(losses.len(), 48);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(
        mean(&losses[40..]) < 0.3 * mean(&losses[..8]),
        "the loss does not go down: {losses:?}"
    );
    let evaluation = &report.evaluation["held_out"];
    assert_eq!(evaluation.metrics.patients, 16);
    let auroc = evaluation.metrics.score("auroc").unwrap();
    assert!(auroc.value().unwrap() > 0.9, "AUROC {auroc:?}");
    assert!(auroc.bounds().is_some());
    assert_eq!(report.data.splits["train"].samples, 64);
    let tokens = &report.meter.throughput.training.counts;
    assert_eq!(tokens.sequences, 48 * 8);
    assert!(tokens.padded_tokens >= tokens.tokens);
    assert!(
        report
            .provenance
            .checkpoint_files
            .iter()
            .any(|file| file.name == "model.safetensors" && file.sha256.len() == 64)
    );

    let page = std::fs::read_to_string(run.join("report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("AUROC"));
    assert!(
        !page.contains("<script") && !page.contains("http"),
        "the page needs nothing else"
    );

    let evaluations = metrics(&run);
    let evaluations = evaluations
        .iter()
        .filter(|line| line["event"] == "evaluation");
    let steps: Vec<u64> = evaluations
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [12, 24, 36, 48]);

    // What the run wrote can be read again and gives the same page.
    let again = calor_train::rewrite_report(&run).unwrap();
    assert_eq!(again.training.steps, report.training.steps);
    assert_eq!(
        std::fs::read_to_string(run.join("report.html")).unwrap(),
        page
    );
}

#[test]
fn a_stopped_run_goes_on_bit_for_bit() {
    for kind in [Kind::Bert, Kind::Llama] {
        let home = Home::new(kind);
        finish(&home.options("whole", &[]));

        // Step 5 has an evaluation due, which the stop puts off; step 11 is of the second epoch.
        for step in [5, 11] {
            stop_after(&home, &[], step);
        }
        let report = finish(&home.resume("parts", &[]));
        assert_eq!(report.earlier_sessions.len(), 2);
        assert_eq!(report.earlier_sessions[1].first_step, 6);
        assert_same(&home.path("whole"), &home.path("parts"));
    }
}

#[test]
fn every_kind_of_adapter_tensor_goes_on_bit_for_bit() {
    let home = Home::new(Kind::Bert);
    let set = [
        "adapter.use_dora=true",
        "adapter.init=pissa_niter_1",
        "adapter.bias=all",
        "adapter.trained_tokens=[\"[CLS]\", 7]",
        "adapter.layers_to_transform=[1]",
        "adapter.layers_pattern=[\"layer\"]",
        "adapter.targets=[\"query\", \"output.dense\"]",
        "adapter.dropout=0.1",
        "train.lora_plus_ratio=4",
    ];
    let report = finish(&home.options("whole", &set));
    stop_after(&home, &set, 5);
    finish(&home.resume("parts", &set));
    assert_same(&home.path("whole"), &home.path("parts"));

    // The adapter that is kept, on the checkpoint as it is, is the model that was trained.
    let options = use_options(&home, "whole", None);
    let again = calor_train::evaluate(&options, Some(Split::HeldOut), &mut (), &StopFlag::new());
    let again = serde_json::to_value(again.unwrap().unwrap().evaluation).unwrap();
    let first = serde_json::to_value(&report.evaluation["held_out"]).unwrap();
    assert!(close(&again, &first), "{again}\n{first}");
}

/// Whether two documents differ in nothing but the rounding of numbers.
fn close(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| close(a, &b[key]))
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| close(a, b))
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            (a - b).abs() <= 1e-4 * a.abs().max(1.0)
        }
        _ => a == b,
    }
}

/// Goes on with the run `parts` until it has done `step` steps.
fn stop_after(home: &Home, set: &[&str], step: u64) {
    let stop = StopFlag::new();
    let flag = stop.clone();
    let mut observer = AfterStep(|progress: &calor_train::StepProgress| {
        if progress.step == step {
            flag.set();
        }
    });
    let outcome = calor_train::train(&home.resume("parts", set), &mut observer, &stop);
    match outcome.unwrap() {
        TrainOutcome::Stopped {
            step: at,
            checkpoint,
        } => {
            assert_eq!(at, step);
            assert!(checkpoint.ends_with(format!("checkpoints/step-{step}")));
        }
        TrainOutcome::Finished(_) => panic!("it was asked to stop"),
    }
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let home = Home::new(Kind::Bert);
    let set = ["train.checkpoint_every_steps=3"];
    finish(&home.options("whole", &set));
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_that_is_killed", "--ignored"])
        .env("CALOR_TEST_HOME", home.folder.path())
        .status()
        .unwrap();
    assert!(!status.success(), "the process was killed");
    // It had done step 7 when it died; its last checkpoint is of step 6.
    assert_eq!(losses(&home.path("killed")).len(), 7);
    finish(&home.resume("killed", &set));
    assert_same(&home.path("whole"), &home.path("killed"));
}

/// Not a test of its own: [`a_killed_run_goes_on_bit_for_bit`] starts it in a process.
#[test]
#[ignore = "started by another test, in a process of its own"]
fn a_process_that_is_killed() {
    let Ok(folder) = std::env::var("CALOR_TEST_HOME") else {
        return;
    };
    // The folder belongs to the test that started this process.
    let folder = tempfile::TempDir::new_in(&folder).unwrap();
    let parent = folder.path().parent().unwrap().to_owned();
    let home = Home { folder };
    let mut options = home.options("killed", &["train.checkpoint_every_steps=3"]);
    options.out = parent.join("killed");
    options.cache = parent.join("cache");
    options.checkpoint = parent.join("checkpoint");
    options.recipe.model.id = parent.join("checkpoint").display().to_string();
    options.recipe.cohort.path = parent.join("cohort");
    let mut observer = AfterStep(|progress: &calor_train::StepProgress| {
        if progress.step == 8 {
            let process = std::process::id().to_string();
            Command::new("kill")
                .args(["-9", &process])
                .status()
                .unwrap();
            std::thread::sleep(std::time::Duration::from_secs(60));
        }
    });
    let _ = calor_train::train(&options, &mut observer, &StopFlag::new());
    unreachable!("the process was to be killed");
}

/// Adapters, metrics and predictions are the same to the last bit.
fn assert_same(whole: &Path, other: &Path) {
    assert_eq!(repeatable(whole), repeatable(other));
    let (whole_adapter, other_adapter) = (adapter_bytes(whole), adapter_bytes(other));
    assert_eq!(
        whole_adapter.keys().collect::<Vec<_>>(),
        other_adapter.keys().collect::<Vec<_>>()
    );
    for (name, bytes) in &whole_adapter {
        assert!(*bytes == other_adapter[name], "{name} differs");
    }
    let predictions = |run: &Path| std::fs::read(run.join("predictions.parquet")).unwrap();
    assert!(
        predictions(whole) == predictions(other),
        "predictions differ"
    );
}

#[test]
fn a_finished_run_that_is_resumed_gives_the_same_results() {
    let home = Home::new(Kind::Bert);
    let first = finish(&home.options("run", &["train.epochs=1"]));
    let before = adapter_bytes(&home.path("run"));
    let again = finish(&home.resume("run", &["train.epochs=1"]));
    assert_eq!(first.evaluation, again.evaluation);
    assert_eq!(before, adapter_bytes(&home.path("run")));
    assert_eq!(losses(&home.path("run")).len(), 8);
}

#[test]
fn a_run_that_is_stopped_before_its_first_step_can_be_resumed() {
    let home = Home::new(Kind::Bert);
    let stop = StopFlag::new();
    stop.set();
    let outcome = calor_train::train(&home.options("run", &[]), &mut (), &stop).unwrap();
    assert!(matches!(outcome, TrainOutcome::Stopped { step: 0, .. }));
    finish(&home.resume("run", &[]));
    finish(&home.options("whole", &[]));
    assert_same(&home.path("whole"), &home.path("run"));
}

#[test]
fn micro_batches_and_packing_do_not_change_the_step() {
    let home = Home::new(Kind::Bert);
    let run = |name: &str, set: &[&str]| {
        let mut all = vec!["adapter.dropout=0", "train.max_steps=6"];
        all.extend_from_slice(set);
        finish(&home.options(name, &all));
        let lines = repeatable(&home.path(name));
        let number = |line: &serde_json::Value, key: &str| line[key].as_f64().unwrap();
        let steps = lines.iter().filter(|line| line["event"] == "step");
        steps
            .map(|line| [number(line, "loss"), number(line, "grad_norm")])
            .collect::<Vec<_>>()
    };
    let whole = run("whole", &["train.micro_batch=8", "sequence.packing=false"]);
    let parts = run("parts", &["train.micro_batch=3", "sequence.packing=false"]);
    let packed = run("packed", &["train.micro_batch=2", "sequence.packing=true"]);
    assert_eq!(whole.len(), 6);
    for (what, other) in [("accumulated", &parts), ("packed", &packed)] {
        for (step, (one, two)) in whole.iter().zip(other.iter()).enumerate() {
            for (one, two) in one.iter().zip(two) {
                let difference = (one - two).abs() / one.abs();
                assert!(difference < 2e-4, "{what}, step {step}: {one} and {two}");
            }
        }
    }
}

#[test]
fn the_watchdog_names_the_step_and_the_last_good_checkpoint() {
    let home = Home::new(Kind::Bert);
    let set = [
        "train.learning_rate=1e38",
        "train.schedule.kind=constant",
        "train.schedule.warmup_steps=1",
        "train.checkpoint_every_steps=1",
    ];
    let error = calor_train::train(&home.options("run", &set), &mut (), &StopFlag::new());
    let error = error.unwrap_err();
    let TrainError::NonFinite {
        step,
        last_checkpoint,
        ..
    } = &error
    else {
        panic!("{error}");
    };
    let last = last_checkpoint.as_ref().unwrap();
    assert!(last.ends_with(format!("step-{}", step - 1)), "{error}");
    assert!(
        error.to_string().contains(&format!("at step {step}")),
        "{error}"
    );
    assert!(last.join("manifest.json").is_file());
}

#[test]
fn patience_stops_early_and_the_best_model_is_kept() {
    let home = Home::new(Kind::Bert);
    // So small a rate changes no ranking: the first evaluation stays the best.
    let set = [
        "train.learning_rate=1e-12",
        "evaluate.every_steps=2",
        "evaluate.patience=2",
        "train.epochs=9",
    ];
    let report = finish(&home.options("run", &set));
    assert_eq!(report.outcome, Outcome::StoppedEarly);
    assert_eq!(report.training.best.unwrap().step, 2);
    assert_eq!(report.training.steps, 6);
}

#[test]
fn every_kind_of_task_runs() {
    let home = Home::new(Kind::Bert);
    let cases: [(&str, &[&str], &str); 4] = [
        (
            "multiclass",
            &["task.labels=ward", "task.class_weights=balanced"],
            "macro_f1",
        ),
        (
            "regression",
            &["task.labels=sum", "task.pooling=cls"],
            "rmse",
        ),
        (
            "multilabel",
            &[
                "task.labels=[\"sick\", \"coughs\"]",
                "task.class_weights=[2.0, 1.0]",
            ],
            "auroc",
        ),
        (
            "binary",
            &["adapter.kind=none", "task.class_weights=balanced"],
            "auroc",
        ),
    ];
    for (kind, set, metric) in cases {
        let kind_key = format!("task.kind={kind}");
        // The kind comes last: label sets are checked against it.
        let mut all = vec!["train.epochs=1"];
        let mut set = set.to_vec();
        set.push(&kind_key);
        all.extend(set);
        let text_home = &home;
        let report = finish(&text_home.options(kind, &all));
        let scores = &report.evaluation["held_out"].metrics;
        assert!(scores.score(metric).is_some(), "{kind}: {scores:?}");
        assert!(home.path(kind).join("predictions.parquet").is_file());
    }
    // Output of a regression is in the unit of its labels: sums of three to seven values of 1 to 7.
    let options = use_options(&home, "regression", None);
    let scored = calor_train::predict(&options, &mut (), &StopFlag::new())
        .unwrap()
        .unwrap();
    let mean = scored.probabilities().iter().sum::<f64>() / scored.len() as f64;
    assert!((5.0..40.0).contains(&mean), "mean prediction {mean}");
}

fn use_options(home: &Home, run: &str, cohort: Option<&str>) -> UseOptions {
    UseOptions {
        run: home.path(run),
        checkpoint: home.path("checkpoint"),
        cache: home.path("cache"),
        device: DeviceSpec::Cpu,
        cohort: cohort.map(|name| home.path(name)),
        patients: None,
    }
}

#[test]
fn a_run_is_evaluated_and_predicts_for_other_cohorts() {
    let home = Home::new(Kind::Llama);
    let report = finish(&home.options("run", &[]));
    let options = use_options(&home, "run", None);
    let held_out = calor_train::evaluate(&options, Some(Split::HeldOut), &mut (), &StopFlag::new());
    let held_out = held_out.unwrap().unwrap();
    assert_eq!(held_out.evaluation, report.evaluation["held_out"]);
    assert!(held_out.meter.throughput.evaluation.counts.sequences == 16);

    // A cohort of the same patients without labels: one prediction a subject, at the last event.
    common::write_cohort(&home.path("other"), false);
    let options = use_options(&home, "run", Some("other"));
    let scored = calor_train::predict(&options, &mut (), &StopFlag::new())
        .unwrap()
        .unwrap();
    assert_eq!(scored.len(), 96);
    assert!(scored.loss().is_none());
    let path = home.path("predictions.parquet");
    scored.write_parquet(&path).unwrap();
    assert!(path.is_file());

    // Another checkpoint of the same shape is refused.
    common::write_checkpoint(&home.path("checkpoint"), Kind::Llama, 2);
    let error = calor_train::predict(&options, &mut (), &StopFlag::new()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("not the file that the run was trained with"),
        "{error}"
    );
}

#[test]
fn a_check_tries_a_step_and_names_what_would_fail() {
    let home = Home::new(Kind::Bert);
    let report = calor_train::check(&home.options("run", &[]), &mut ()).unwrap();
    assert_eq!((report.steps_per_epoch, report.total_steps), (8, 16));
    assert_eq!(report.splits["tuning"].samples, 16);
    assert!(report.trial.loss.is_finite() && report.trial.grad_norm.unwrap() > 0.0);
    assert_eq!(report.adapted_modules, 12);
    assert!(!home.path("run").exists(), "a check leaves no run");

    let complaint = |set: &[&str]| {
        let error = calor_train::check(&home.options("run", set), &mut ()).unwrap_err();
        let mut text = error.to_string();
        let mut source: Option<&dyn std::error::Error> = std::error::Error::source(&error);
        while let Some(inner) = source {
            text.push_str(&format!(": {inner}"));
            source = inner.source();
        }
        text
    };
    let labels = complaint(&["task.labels=dead"]);
    assert!(
        labels.contains("`dead`") && labels.contains("`sick`"),
        "{labels}"
    );
    let length = complaint(&["sequence.max_tokens=65"]);
    assert!(length.contains("`sequence.max_tokens` is 65"), "{length}");
    let targets = complaint(&["adapter.targets=[\"q_proj\"]"]);
    assert!(targets.contains("q_proj"), "{targets}");
    let kind = complaint(&["task.labels=ward"]);
    assert!(kind.contains("categorical_value"), "{kind}");
    let dir = complaint(&["task.pooling=last"]);
    assert!(dir.contains("pooling"), "{dir}");
}

#[test]
fn a_bench_takes_the_step_of_a_recipe() {
    let home = Home::new(Kind::Bert);
    for (kind, labels, rows) in [
        ("binary", "sick", 2),
        ("multiclass", "ward", 3),
        ("regression", "sum", 2),
    ] {
        let recipe = home.recipe(&[
            &format!("task.kind={kind}"),
            &format!("task.labels={labels}"),
            &format!("train.micro_batch={rows}"),
            "train.optimizer=sgd",
            "train.recompute=auto",
        ]);
        // Neither the cohort nor its labels are read.
        let recipe = calor_train::recipe::Recipe {
            cohort: Default::default(),
            ..recipe
        };
        let report = calor_train::step_bench(&StepBenchOptions {
            windows: 1,
            steps: 2,
            warmup: 0,
            profiled_steps: 0,
            large_products: false,
            ..StepBenchOptions::of_recipe(recipe, home.path("checkpoint"), DeviceSpec::Cpu)
        })
        .unwrap();
        assert_eq!((report.batch, report.seq), (rows, POSITIONS));
        assert_eq!(serde_json::to_value(report.task).unwrap(), kind);
        assert_eq!(report.recipe.as_deref(), Some("tiny"));
        assert!(report.losses.iter().all(|loss| loss.is_finite()));
        let notes = report.notes.join("\n");
        assert!(
            notes.contains("random") && notes.contains("8 patients"),
            "{notes}"
        );
        assert_eq!(notes.contains("2 outputs"), kind == "multiclass", "{notes}");
    }
    let long = StepBenchOptions {
        seq: POSITIONS + 1,
        ..StepBenchOptions::of_recipe(home.recipe(&[]), home.path("checkpoint"), DeviceSpec::Cpu)
    };
    let error = calor_train::step_bench(&long).unwrap_err().to_string();
    assert!(
        error.contains(&format!("positions for {POSITIONS}")),
        "{error}"
    );
}

#[test]
fn a_bench_runs_the_steps_of_training() {
    for (kind, task) in [
        (Kind::Llama, BenchTask::CausalLm),
        (Kind::Bert, BenchTask::SequenceClassification),
    ] {
        let home = Home::new(kind);
        let options = StepBenchOptions {
            model: home.path("checkpoint"),
            task,
            adapter: None,
            lora: calor_train::lora_options(&home.recipe(&["adapter.dropout=0"]).adapter).unwrap(),
            data: None,
            pack: false,
            batch: 4,
            seq: 16,
            windows: 2,
            steps: 6,
            warmup: 2,
            profiled_steps: 2,
            large_products: false,
            learning_rate: 1e-2,
            max_grad_norm: 1.0,
            seed: 0,
            device: DeviceSpec::Cpu,
            dtype: calor_train::recipe::Dtype::F32,
            recompute: Default::default(),
            kernels: calor_train::recipe::KernelChoice::Fused,
            quantization: None,
            energy: home.recipe(&[]).energy,
            recipe: None,
        };
        let report = calor_train::step_bench(&options).unwrap();
        assert_eq!((report.losses.len(), report.step_s.len()), (14, 12));
        assert!(report.losses[13] < report.losses[0], "{:?}", report.losses);
        assert!(report.tokens_per_s > 0.0);
        assert_eq!(report.meter.throughput.training.counts.tokens, 12 * 64);
        assert_eq!(report.windows.len(), 2);
        let speed = &report.window_tokens_per_s;
        assert!(0.0 < speed.least && speed.least <= speed.median && speed.median <= speed.most);
        assert!(report.mfu.value().unwrap() > 0.0 && report.peak == report.fastest_product);
        let profile = report.profile.as_ref().unwrap();
        let phases = &profile.phases;
        assert!(phases.forward_s > 0.0 && phases.backward_s > 0.0 && phases.optimizer_s > 0.0);
        for name in ["lora_linear", "attention", "adamw"] {
            let operation = profile.operations.iter().find(|one| one.name == name);
            assert!(operation.unwrap().forward_calls > 0, "{name}");
        }
        assert!(profile.kernel_launches.value().is_none());
        let again = calor_train::step_bench(&options).unwrap();
        assert_eq!(
            report.losses, again.losses,
            "the same seed gives the same steps"
        );
    }
}
