//! Where the time of a step goes: by phase, by operation, and how much is launched.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use burn::tensor::Device;
use calor_kernels::profile::{self, OperationCalls};
use calor_meter::{Meter, Phase, Quantity};
use serde::Serialize;

use super::Bench;
use crate::TrainError;
use crate::device::synchronise;

/// Steps that were taken apart, after those that were timed. All times are of a step, means over the
/// steps.
#[derive(Clone, Debug, Serialize)]
pub struct StepProfile {
    /// How many.
    pub steps: usize,
    /// The device was waited for at the end of each phase.
    pub phases: PhaseTimes,
    /// The whole of a step whose operations were timed, the device waited for before and after each.
    pub step_s: f64,
    /// Each operation in such a step.
    pub operations: Vec<OperationProfile>,
    /// Everything else in such a step.
    pub other: OtherTimes,
    /// Operations in a step, both passes.
    pub operation_calls: u64,
    /// Kernels that the device was given in a step, without the waiting.
    pub kernel_launches: Quantity,
}

/// The phases of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PhaseTimes {
    /// Up to the loss.
    pub forward_s: f64,
    /// Up to the gradients, the loss and their norm.
    pub backward_s: f64,
    /// Clipping and the update.
    pub optimizer_s: f64,
}

/// One operation of `calor_kernels`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OperationProfile {
    /// Its name.
    pub name: &'static str,
    /// Forward passes; those of blocks that are run again in the backward pass are among them.
    pub forward_calls: u64,
    /// All of them together.
    pub forward_s: f64,
    /// Backward passes.
    pub backward_calls: u64,
    /// All of them together.
    pub backward_s: f64,
    /// Both, of the whole step.
    pub share: f64,
}

/// The time of each phase that is no operation's: other tensor operations and the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct OtherTimes {
    /// Of the forward pass.
    pub forward_s: f64,
    /// Of the backward pass.
    pub backward_s: f64,
    /// Of clipping and the update.
    pub optimizer_s: f64,
    /// All three, of the whole step.
    pub share: f64,
}

/// Takes `steps` steps apart. They are updates like any other.
pub(super) fn profile(
    bench: &mut Bench,
    meter: &mut Meter,
    steps: usize,
) -> Result<StepProfile, TrainError> {
    let kernel_launches = match bench.options.device.is_asynchronous() {
        true => count(bench, meter)?,
        false => Quantity::unavailable("the CPU launches no kernels"),
    };
    let watch = Arc::new(Watch::new(bench.device.clone()));
    let told = watch.clone();
    bench.step.phase_end = Some(Box::new(move |phase| told.ended(phase)));
    // Waiting for each operation changes nothing where none is asynchronous.
    let phases = match bench.options.device.is_asynchronous() {
        true => Some(watched(bench, meter, &watch, steps)?),
        false => None,
    };
    profile::start();
    let found = watched(bench, meter, &watch, steps);
    profile::stop();
    bench.step.phase_end = None;
    let found = found?;
    let mut profile = summary(phases.as_ref().unwrap_or(&found), &found, steps);
    profile.kernel_launches = kernel_launches;
    Ok(profile)
}

/// The launches of a step that is waited for at its end only.
fn count(bench: &mut Bench, meter: &mut Meter) -> Result<Quantity, TrainError> {
    let (done, launches) = profile::count_launches(|| {
        bench.one(meter)?;
        synchronise(&bench.device, "benchmarking")
    });
    done?;
    Ok(match launches {
        Some(launches) => Quantity::measured(
            launches as f64,
            "CubeCL's launch observer, kernels in CUDA C++ and cuBLASLt's products",
        ),
        None => Quantity::unavailable("this build has no device that kernels are launched on"),
    })
}

fn watched(
    bench: &mut Bench,
    meter: &mut Meter,
    watch: &Watch,
    steps: usize,
) -> Result<PhaseSums, TrainError> {
    // What burn fuses follows from where it is waited for: such steps are compiled anew.
    let warm_up = usize::from(bench.options.device.is_asynchronous());
    for number in 0..warm_up + steps {
        synchronise(&bench.device, "benchmarking")?;
        if number == 0 || number == warm_up {
            watch.begin();
        }
        watch.step();
        bench.one(meter)?;
    }
    watch.end()
}

/// What phases took in all steps together, and the operations in each of them.
#[derive(Clone, Debug, Default, PartialEq)]
struct PhaseSums([(f64, Vec<OperationCalls>); 3]);

/// Waits for the device at the end of a phase.
struct Watch {
    device: Device,
    state: Mutex<Watched>,
}

struct Watched {
    last: Instant,
    sums: PhaseSums,
    failed: Option<TrainError>,
}

impl Watch {
    fn new(device: Device) -> Watch {
        Watch {
            device,
            state: Mutex::new(Watched {
                last: Instant::now(),
                sums: PhaseSums::default(),
                failed: None,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, Watched> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Forgets what there was.
    fn begin(&self) {
        self.state().sums = PhaseSums::default();
        profile::take();
    }

    fn step(&self) {
        self.state().last = Instant::now();
    }

    fn ended(&self, phase: Phase) {
        let waited = synchronise(&self.device, "benchmarking");
        let mut state = self.state();
        if let Err(error) = waited {
            state.failed.get_or_insert(error);
        }
        let now = Instant::now();
        let elapsed_s = (now - state.last).as_secs_f64();
        let (seconds, calls) = &mut state.sums.0[index(phase)];
        *seconds += elapsed_s;
        merge(calls, profile::take());
        state.last = Instant::now();
    }

    fn end(&self) -> Result<PhaseSums, TrainError> {
        let mut state = self.state();
        match state.failed.take() {
            Some(error) => Err(error),
            None => Ok(std::mem::take(&mut state.sums)),
        }
    }
}

/// The batch is on the device already: handing it out belongs to the forward pass.
fn index(phase: Phase) -> usize {
    match phase {
        Phase::Data | Phase::Forward => 0,
        Phase::Backward => 1,
        Phase::Optimizer | Phase::Evaluation => 2,
    }
}

fn merge(all: &mut Vec<OperationCalls>, found: Vec<OperationCalls>) {
    for calls in found {
        match all.iter_mut().find(|known| known.name == calls.name) {
            Some(known) => {
                known.forward_calls += calls.forward_calls;
                known.forward_s += calls.forward_s;
                known.backward_calls += calls.backward_calls;
                known.backward_s += calls.backward_s;
            }
            None => all.push(calls),
        }
    }
}

/// Means over the steps; the launches are left out.
fn summary(phases: &PhaseSums, found: &PhaseSums, steps: usize) -> StepProfile {
    let a_step = 1.0 / steps as f64;
    let [forward_s, backward_s, optimizer_s] = [0, 1, 2].map(|index| phases.0[index].0 * a_step);
    let mut all = Vec::new();
    let others = found.0.each_ref().map(|(seconds, calls)| {
        merge(&mut all, calls.clone());
        let inside: f64 = calls
            .iter()
            .map(|calls| calls.forward_s + calls.backward_s)
            .sum();
        (seconds - inside) * a_step
    });
    let step_s = found.0.iter().map(|(seconds, _)| seconds).sum::<f64>() * a_step;
    let count = |calls: u64| calls / steps as u64;
    let mut operations: Vec<OperationProfile> = all
        .into_iter()
        .map(|calls| OperationProfile {
            name: calls.name,
            forward_calls: count(calls.forward_calls),
            forward_s: calls.forward_s * a_step,
            backward_calls: count(calls.backward_calls),
            backward_s: calls.backward_s * a_step,
            share: (calls.forward_s + calls.backward_s) * a_step / step_s,
        })
        .collect();
    operations.sort_by(|one, other| other.share.total_cmp(&one.share));
    StepProfile {
        steps,
        phases: PhaseTimes {
            forward_s,
            backward_s,
            optimizer_s,
        },
        step_s,
        operation_calls: operations
            .iter()
            .map(|operation| operation.forward_calls + operation.backward_calls)
            .sum(),
        operations,
        other: OtherTimes {
            forward_s: others[0],
            backward_s: others[1],
            optimizer_s: others[2],
            share: others.iter().sum::<f64>() / step_s,
        },
        kernel_launches: Quantity::unavailable("not counted"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_operations_time_is_shown_by_phase() {
        let calls = |name, forward_calls, forward_s, backward_calls, backward_s| OperationCalls {
            name,
            forward_calls,
            forward_s,
            backward_calls,
            backward_s,
        };
        let phases = PhaseSums([(4.0, vec![]), (8.0, vec![]), (2.0, vec![])]);
        // Two steps; a block is run again in the backward pass.
        let found = PhaseSums([
            (
                6.0,
                vec![
                    calls("linear", 4, 3.0, 0, 0.0),
                    calls("norm", 2, 1.0, 0, 0.0),
                ],
            ),
            (12.0, vec![calls("linear", 2, 1.5, 4, 6.0)]),
            (2.0, vec![calls("adamw", 6, 1.0, 0, 0.0)]),
        ]);
        let profile = summary(&phases, &found, 2);
        assert_eq!(
            profile.phases,
            PhaseTimes {
                forward_s: 2.0,
                backward_s: 4.0,
                optimizer_s: 1.0
            }
        );
        assert_eq!(profile.step_s, 10.0);
        let linear = &profile.operations[0];
        assert_eq!((linear.name, linear.share), ("linear", 0.525));
        assert_eq!((linear.forward_calls, linear.backward_calls), (3, 2));
        assert_eq!((linear.forward_s, linear.backward_s), (2.25, 3.0));
        assert_eq!(profile.operation_calls, 5 + 1 + 3);
        let other = profile.other;
        assert_eq!(
            (other.forward_s, other.backward_s, other.optimizer_s),
            (1.0, 2.25, 0.5)
        );
        let shares: f64 = profile.operations.iter().map(|one| one.share).sum();
        assert!((shares + other.share - 1.0).abs() < 1e-12);
    }
}
