//! What must not change a step: micro-batches, packing, recomputation, the preflight.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use calor_train::{StopFlag, TrainOutcome};
use common::{AfterStep, Home, Kind, adapter_bytes, finish, repeatable};
use proptest::prelude::*;
use safetensors::SafeTensors;

/// Tensors of the checkpoint after a step: parameters and moments by name.
fn trainer_tensors(run: &Path, step: u64) -> BTreeMap<String, Vec<f32>> {
    let path = run.join(format!("checkpoints/step-{step}/trainer.safetensors"));
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter();
    tensors
        .filter(|(name, _)| !name.starts_with("step."))
        .map(|(name, view)| {
            let values = view.data().chunks_exact(4);
            let values = values.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            (name, values.collect())
        })
        .collect()
}

fn all_loss(run: &Path) -> Vec<f64> {
    common::losses(run)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    /// Loss, gradient (the first moment is a tenth of it) and updated parameters of a step.
    #[test]
    fn a_step_is_the_same_however_it_is_computed(
        encoder in any::<bool>(),
        micro_batch in 1usize..8,
        packing in any::<bool>(),
        recompute in prop::sample::select(vec!["none", "all", "2"]),
        offload in any::<bool>(),
        seed in 0u64..1000,
    ) {
        let home = Home::new(if encoder { Kind::Bert } else { Kind::Llama });
        let seed = format!("train.seed={seed}");
        let run = |name: &str, set: &[String]| {
            let mut all = vec![
                "adapter.dropout=0",
                "train.max_steps=1",
                "train.schedule.kind=constant",
                "train.schedule.warmup_steps=0",
                seed.as_str(),
            ];
            all.extend(set.iter().map(String::as_str));
            finish(&home.options(name, &all));
            let run = home.path(name);
            (all_loss(&run)[0], trainer_tensors(&run, 1))
        };
        let whole = run("whole", &["train.micro_batch=8".into(), "sequence.packing=false".into()]);
        let other = run("other", &[
            format!("train.micro_batch={micro_batch}"),
            format!("sequence.packing={packing}"),
            format!("train.recompute={recompute}"),
            format!("train.offload={}", offload && recompute != "none"),
        ]);
        prop_assert!((whole.0 - other.0).abs() <= 1e-5 * whole.0, "{} {}", whole.0, other.0);
        prop_assert_eq!(whole.1.len(), other.1.len());
        for (name, expected) in &whole.1 {
            // AdamW's first update is the learning rate times the sign of almost every gradient:
            // a gradient that is zero but for rounding has no sign to agree on.
            let square = name.starts_with("exp_avg_sq");
            let gradient = &whole.1[&name.replace("parameter.", "exp_avg.").replace("_sq", "")];
            let largest_gradient = gradient.iter().fold(0f32, |m, v| m.max(v.abs()));
            let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
            let tolerance = if square { 2e-5 } else { 1e-5 } * largest;
            for ((a, b), gradient) in expected.iter().zip(&other.1[name]).zip(gradient) {
                if name.starts_with("parameter.") && gradient.abs() < 1e-3 * largest_gradient {
                    continue;
                }
                prop_assert!((a - b).abs() <= tolerance, "{name}: {a} {b}");
            }
        }
    }
}

/// Adapters, metrics and predictions, to the last bit.
fn assert_same(one: &Path, other: &Path) {
    assert_eq!(repeatable(one), repeatable(other));
    assert!(
        adapter_bytes(one) == adapter_bytes(other),
        "adapters differ"
    );
    let predictions = |run: &Path| std::fs::read(run.join("predictions.parquet")).unwrap();
    assert!(predictions(one) == predictions(other), "predictions differ");
}

#[test]
fn runs_with_recomputed_blocks_are_the_same_to_the_bit() {
    for kind in [Kind::Bert, Kind::Llama] {
        let home = Home::new(kind);
        finish(&home.options("plain", &[]));
        for (name, set) in [
            ("all", vec!["train.recompute=all"]),
            ("second", vec!["train.recompute=2"]),
            ("auto", vec!["train.recompute=auto"]),
            ("offload", vec!["train.recompute=all", "train.offload=true"]),
            ("without preflight", vec!["train.preflight=false"]),
        ] {
            finish(&home.options(name, &set));
            assert_same(&home.path("plain"), &home.path(name));
            let left = std::fs::read_dir(home.path(name)).unwrap();
            let mut left = left.map(|entry| entry.unwrap().file_name());
            assert!(!left.any(|name| name == ".preflight"));
        }
    }
}

/// Recomputation may even change on the way.
#[test]
fn a_stopped_run_goes_on_bit_for_bit_with_and_without_recomputation() {
    for dtype in ["f32", "f16"] {
        let home = Home::new(Kind::Llama);
        let dtype = format!("model.dtype={dtype}");
        finish(&home.options("whole", &[dtype.as_str()]));
        let stop = StopFlag::new();
        let flag = stop.clone();
        let mut observer = AfterStep(|progress: &calor_train::StepProgress| {
            if progress.step == 5 {
                flag.set();
            }
        });
        let set = [dtype.as_str(), "train.recompute=all", "train.offload=true"];
        let outcome = calor_train::train(&home.options("parts", &set), &mut observer, &stop);
        assert!(matches!(outcome, Ok(TrainOutcome::Stopped { step: 5, .. })));
        finish(&home.resume("parts", &[dtype.as_str(), "train.recompute=2"]));
        assert_same(&home.path("whole"), &home.path("parts"));
    }
}

#[test]
fn half_precision_trains_as_f32_does() {
    // Rounding to 8 and to 11 bits, through two layers and twelve steps.
    for (kind, dtype, tolerance) in [
        (Kind::Bert, "bf16", 0.04),
        (Kind::Bert, "f16", 0.006),
        (Kind::Llama, "bf16", 0.04),
        (Kind::Llama, "f16", 0.006),
    ] {
        let home = Home::new(kind);
        let run = |name: &str, dtype: &str| {
            let dtype = format!("model.dtype={dtype}");
            finish(&home.options(name, &[dtype.as_str(), "train.max_steps=12"]));
            all_loss(&home.path(name))
        };
        let (wide, half) = (run("wide", "f32"), run("half", dtype));
        for (step, (wide, half)) in wide.iter().zip(&half).enumerate() {
            let difference = (wide - half).abs() / wide;
            assert!(
                difference < tolerance,
                "{dtype}, step {step}: {wide} {half}"
            );
        }
        assert_ne!(wide, half);
        let lines = common::metrics(&home.path("half"));
        let scales: Vec<_> = lines
            .iter()
            .filter_map(|line| line.get("loss_scale"))
            .collect();
        assert_eq!(scales.len(), if dtype == "f16" { 12 } else { 0 });
    }
}

#[test]
fn a_run_that_cannot_fit_is_refused_with_what_fits() {
    let home = Home::new(Kind::Llama);
    // A patient's rows are short; a long vocabulary of rows is not: a hundred million of them.
    let error = calor_train::train(
        &home.options("run", &["adapter.r=100000000"]),
        &mut (),
        &StopFlag::new(),
    );
    let error = error.unwrap_err();
    assert!(
        matches!(error, calor_train::TrainError::Memory(_)),
        "{error}"
    );
    let text = error.to_string();
    assert!(text.contains("adapter and head"), "{text}");
}

#[test]
fn a_check_predicts_memory_by_component() {
    let home = Home::new(Kind::Bert);
    let report =
        calor_train::check(&home.options("run", &["train.recompute=all"]), &mut ()).unwrap();
    let memory = &report.memory;
    assert_eq!((memory.recomputed_blocks, memory.blocks), (2, 2));
    let sum: u64 = memory.components.iter().map(|part| part.bytes).sum();
    assert!(sum == memory.peak_bytes && memory.fits == Some(true));
    let size = &report.model;
    let trained = size.adapter_parameters + size.head_parameters;
    let of = |name| memory.components.iter().find(|part| part.name == name);
    assert_eq!(of("adapter and head").unwrap().bytes, 4 * trained);
    assert_eq!(of("optimizer").unwrap().bytes, 8 * trained);
}
