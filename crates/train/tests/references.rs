//! Training in plain tensor operations, for measuring what the kernels gain. One test alone in its
//! process: which operations are taken is the process's.

mod common;

use calor_train::recipe::KernelChoice;
use calor_train::{BenchTask, DeviceSpec, StepBenchOptions, StepBenchReport, step_bench};
use common::{Home, Kind, finish, losses};

/// Sums of a few dozen terms in another order, carried on by four steps.
const TOLERANCE: f64 = 1e-4;

fn near(plain: &[f64], fused: &[f64]) -> bool {
    let pairs = plain.iter().zip(fused);
    plain.len() == fused.len()
        && !plain.is_empty()
        && pairs
            .into_iter()
            .all(|(plain, fused)| (plain - fused).abs() <= TOLERANCE * fused.abs())
}

fn names(report: &StepBenchReport) -> Vec<&'static str> {
    let profile = report.profile.as_ref().unwrap();
    profile.operations.iter().map(|one| one.name).collect()
}

#[test]
fn plain_operations_come_to_the_same_losses() {
    for kind in [Kind::Llama, Kind::Bert] {
        let home = Home::new(kind);
        for set in [
            &[][..],
            &["train.recompute=all"],
            &["model.quantization=nf4"],
            &["model.quantization=int8", "adapter.kind=none"],
        ] {
            let bench = |kernels, task| {
                let options = StepBenchOptions::of_recipe(
                    home.recipe(set),
                    home.path("checkpoint"),
                    DeviceSpec::Cpu,
                );
                let recipe = match task {
                    Some(_) => None,
                    None => options.recipe.clone(),
                };
                step_bench(&StepBenchOptions {
                    task: task.unwrap_or(options.task),
                    kernels,
                    windows: 1,
                    steps: 4,
                    warmup: 0,
                    large_products: false,
                    recipe,
                    ..options
                })
                .unwrap()
            };
            let language = (kind == Kind::Llama).then_some(Some(BenchTask::CausalLm));
            for task in [None].into_iter().chain(language) {
                let fused = bench(KernelChoice::Fused, task);
                let plain = bench(KernelChoice::Reference, task);
                assert!(near(&plain.losses, &fused.losses), "{set:?} {task:?}");
                assert!(
                    near(&plain.gradient_norms, &fused.gradient_norms),
                    "{set:?}"
                );
                assert!(names(&fused).contains(&"attention"), "{:?}", names(&fused));
                // AdamW is plain operations on the CPU, with a name nevertheless.
                assert_eq!(names(&plain), ["adamw"], "{set:?}");
            }
        }
    }
    let home = Home::new(Kind::Bert);
    let run = |out: &str, kernels: &str| {
        finish(&home.options(out, &["train.epochs=1", kernels]));
        losses(&home.path(out))
    };
    let fused = run("fused", "train.kernels=fused");
    let plain = run("plain", "train.kernels=reference");
    assert!(near(&plain, &fused), "{plain:?} {fused:?}");
}
