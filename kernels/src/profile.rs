//! What the operations of a step take, each by itself. Off unless it is asked for: then an operation
//! pays one relaxed load.
//!
//! While it is on, the device is waited for before and after every operation, so that its time is its
//! own. That takes away what host and device do at the same time and what burn fuses across
//! operations: a profiled step is for seeing where time goes, not for timing steps.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

/// One operation as it was called since [`start`] or the last [`take`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OperationCalls {
    /// As the function of this crate is called.
    pub name: &'static str,
    /// Forward passes; a recomputed block has two.
    pub forward_calls: u64,
    /// All of them together.
    pub forward_s: f64,
    /// Backward passes.
    pub backward_calls: u64,
    /// All of them together.
    pub backward_s: f64,
}

/// Which way an operation went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    Forward,
    Backward,
}

static ON: AtomicBool = AtomicBool::new(false);
static FOUND: Mutex<Vec<OperationCalls>> = Mutex::new(Vec::new());
static COUNTING: AtomicBool = AtomicBool::new(false);
static LAUNCHES: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Whether this thread is in an operation that is being timed: what that one calls is its own.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Times every operation of this process from here on. What was recorded before is forgotten.
pub fn start() {
    found().clear();
    ON.store(true, Ordering::Relaxed);
}

/// What was recorded since [`start`] or the last call of this, in the order of the first calls.
pub fn take() -> Vec<OperationCalls> {
    std::mem::take(&mut found())
}

/// Times nothing any more.
pub fn stop() {
    ON.store(false, Ordering::Relaxed);
}

/// Runs `work` and counts the kernels that it launches: through CubeCL, in CUDA C++, and the products
/// handed to cuBLASLt, each one launch. Of the whole process, so nothing else should run; the device
/// has to be waited for in `work`, or what is still queued is not counted. None in a build without
/// such devices.
pub fn count_launches<R>(work: impl FnOnce() -> R) -> (R, Option<u64>) {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    {
        use cubecl::logging::{LaunchObservation, LaunchObserver};

        struct Count;
        impl LaunchObserver for Count {
            fn launched(&self, _: &'static str) {
                launched();
            }
        }
        LAUNCHES.store(0, Ordering::Relaxed);
        COUNTING.store(true, Ordering::Relaxed);
        let observed = LaunchObservation::new(std::sync::Arc::new(Count));
        let result = work();
        drop(observed);
        COUNTING.store(false, Ordering::Relaxed);
        (result, Some(LAUNCHES.load(Ordering::Relaxed)))
    }
    #[cfg(not(any(feature = "cuda", feature = "wgpu")))]
    {
        (work(), None)
    }
}

/// A kernel is on its way to the device.
#[cfg_attr(not(any(feature = "cuda", feature = "wgpu")), allow(dead_code))]
pub(crate) fn launched() {
    if COUNTING.load(Ordering::Relaxed) {
        LAUNCHES.fetch_add(1, Ordering::Relaxed);
    }
}

/// The name to record an operation under; none where it is not recorded.
pub(crate) fn named(name: impl FnOnce() -> &'static str) -> Option<&'static str> {
    (ON.load(Ordering::Relaxed) && !INSIDE.get()).then(name)
}

/// Runs an operation; where it is recorded, between two calls of `wait`, which returns when the device
/// has done all that it was given.
pub(crate) fn timed<R>(
    name: Option<&'static str>,
    pass: Pass,
    wait: impl Fn(),
    work: impl FnOnce() -> R,
) -> R {
    let Some(name) = name else {
        return work();
    };
    INSIDE.set(true);
    wait();
    let started = Instant::now();
    let result = work();
    wait();
    record(name, pass, started.elapsed().as_secs_f64());
    INSIDE.set(false);
    result
}

/// The folder of this crate that a type is in, which is named after its function.
pub(crate) fn folder_of<T>() -> &'static str {
    std::any::type_name::<T>().split("::").nth(1).unwrap_or("?")
}

fn record(name: &'static str, pass: Pass, elapsed_s: f64) {
    let mut found = found();
    let index = match found.iter().position(|calls| calls.name == name) {
        Some(index) => index,
        None => {
            found.push(OperationCalls {
                name,
                forward_calls: 0,
                forward_s: 0.0,
                backward_calls: 0,
                backward_s: 0.0,
            });
            found.len() - 1
        }
    };
    let calls = &mut found[index];
    match pass {
        Pass::Forward => {
            calls.forward_calls += 1;
            calls.forward_s += elapsed_s;
        }
        Pass::Backward => {
            calls.backward_calls += 1;
            calls.backward_s += elapsed_s;
        }
    }
}

fn found() -> MutexGuard<'static, Vec<OperationCalls>> {
    // A panic elsewhere leaves numbers that are still whole.
    FOUND
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use burn::tensor::Tensor;

    use super::*;
    use crate::cpu::testing::{random, weigh};

    fn of(found: &[OperationCalls], name: &str) -> OperationCalls {
        let nothing = OperationCalls {
            name: "",
            forward_calls: 0,
            forward_s: 0.0,
            backward_calls: 0,
            backward_s: 0.0,
        };
        found
            .iter()
            .find(|calls| calls.name == name)
            .copied()
            .unwrap_or(nothing)
    }

    /// One test: the record is the process's. Others may run operations of their own meanwhile, so
    /// what is asked of theirs is "at least".
    #[test]
    fn operations_are_recorded_by_name_while_it_is_on() {
        let pass = || {
            let x: Tensor<3> = random([2, 3, 8], 1).require_grad();
            let weight = random([8], 2);
            let y = crate::rms_norm(x.clone(), weight, 1e-5);
            drop(weigh(crate::gelu(y)).backward());
        };
        let only_ours = |pass| {
            let inner = || timed(named(|| "inner of a test"), pass, || (), || ());
            timed(named(|| "outer of a test"), pass, || (), inner);
        };
        only_ours(Pass::Forward);
        start();
        pass();
        only_ours(Pass::Forward);
        only_ours(Pass::Backward);
        only_ours(Pass::Backward);
        let found = take();
        for name in ["rms_norm", "gelu"] {
            let calls = of(&found, name);
            assert!(calls.forward_calls >= 1 && calls.backward_calls >= 1);
            assert!(calls.forward_s > 0.0 && calls.backward_s > 0.0);
        }
        // What ran before it was on is not in it, and what an operation calls is its own.
        let outer = of(&found, "outer of a test");
        assert_eq!((outer.forward_calls, outer.backward_calls), (1, 2));
        assert_eq!(of(&found, "inner of a test").forward_calls, 0);

        only_ours(Pass::Forward);
        stop();
        only_ours(Pass::Forward);
        assert_eq!(of(&take(), "outer of a test").forward_calls, 1);
    }

    #[test]
    fn a_type_is_called_by_its_folder() {
        assert_eq!(folder_of::<OperationCalls>(), "profile");
        assert_eq!(folder_of::<crate::AttentionOptions>(), "attention");
    }
}
