//! How a run tells what it is doing, and how it is asked to stop. Nothing here prints.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use calor_meter::Quantity;

use crate::artifacts::metrics::EvaluationLine;
use crate::recipe::Metric;

/// What a run does before, between and after its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Making the synthetic cohort that the recipe asks for, unless it is there.
    Synthesize,
    /// Opening and checking cohort, labels and checkpoint.
    Open,
    /// Turning patients into sequences.
    Prepare,
    /// Reading the checkpoint's weights.
    Load,
    /// Watching the machine at rest.
    Idle,
    /// Trying the largest batch, an evaluation and a checkpoint.
    Preflight,
    /// Optimizer steps.
    Train,
    /// Scoring patients of a split.
    Evaluate,
    /// Computing metrics and intervals, writing reports.
    Report,
}

/// An optimizer step that was done.
#[derive(Clone, Debug, PartialEq)]
pub struct StepProgress {
    /// Steps done, this one included.
    pub step: u64,
    /// Steps of the run.
    pub total_steps: u64,
    /// Epochs done, as a fraction.
    pub epoch: f64,
    /// Mean loss over the step's labels.
    pub loss: f64,
    /// Learning rate of the adapter.
    pub learning_rate: f64,
    /// Tokens a second over the last steps, padding excluded.
    pub tokens_per_s: Option<f64>,
    /// Power over the last seconds.
    pub watts: Quantity,
    /// Seconds to the end of the steps, from the time of the last ones.
    pub remaining_s: Option<f64>,
}

/// What wants to know how a run goes. Every method does nothing unless it is overridden.
pub trait Observer {
    /// A sweep trains its trial `number`, counted from 1, of `trials` at most, which sets these keys;
    /// up to step `until`, or to its end.
    fn trial(&mut self, number: usize, trials: usize, set: &[String], until: Option<u64>) {
        let _ = (number, trials, set, until);
    }

    /// A stage begins.
    fn stage(&mut self, stage: Stage) {
        let _ = stage;
    }

    /// Rows of the cohort gone through while preparing sequences.
    fn preparing(&mut self, progress: calor_sequence::Progress) {
        let _ = progress;
    }

    /// The run goes on from a checkpoint.
    fn resumed(&mut self, checkpoint: &Path, step: u64) {
        let _ = (checkpoint, step);
    }

    /// An optimizer step was done.
    fn step(&mut self, progress: &StepProgress) {
        let _ = progress;
    }

    /// Samples of an evaluation that are scored.
    fn scoring(&mut self, done: usize, total: usize) {
        let _ = (done, total);
    }

    /// The `tuning` patients were evaluated; `watched` decides on the best model.
    fn evaluated(&mut self, evaluation: &EvaluationLine, watched: Metric) {
        let _ = (evaluation, watched);
    }

    /// A checkpoint was written.
    fn checkpoint(&mut self, path: &Path) {
        let _ = path;
    }

    /// Something that is no error and that a person should know.
    fn warning(&mut self, message: &str) {
        let _ = message;
    }
}

/// An observer that does nothing.
impl Observer for () {}

/// Asks a run to stop at the end of its step. Clones share the flag; a signal handler sets it.
#[derive(Clone, Debug, Default)]
pub struct StopFlag {
    asked: Arc<AtomicBool>,
    /// See [`StopFlag::pausing_after`].
    pause_after: Option<u64>,
}

impl StopFlag {
    /// A flag that is not set.
    pub fn new() -> StopFlag {
        StopFlag::default()
    }

    /// The same flag for a run that is also to stop by itself: when so many steps are done, or at its
    /// end if that comes earlier; after `tuning` patients were evaluated there, and before held-out
    /// ones are.
    pub fn pausing_after(&self, step: u64) -> StopFlag {
        StopFlag {
            asked: self.asked.clone(),
            pause_after: Some(step),
        }
    }

    /// Whether the run is to stop by itself after this step, of which `done` says whether it is the last.
    pub(crate) fn pauses(&self, step: u64, done: bool) -> bool {
        self.pause_after.is_some_and(|after| done || step >= after)
    }

    /// Asks to stop.
    pub fn set(&self) {
        self.asked.store(true, Ordering::SeqCst);
    }

    /// Whether it was asked to stop.
    pub fn is_set(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// The flag itself, for `signal_hook::flag::register`.
    pub fn shared(&self) -> Arc<AtomicBool> {
        self.asked.clone()
    }
}
