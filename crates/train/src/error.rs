//! What can go wrong between a recipe and its report.

use std::path::PathBuf;

use crate::recipe::RecipeError;

/// An error of a run. Every variant says what is wrong, where, and what to do;
/// none carries a patient's identifier, value or text.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Items of a modality that the model cannot read.
    #[error("modality `{modality}`: {problem}")]
    Item {
        /// Its name in recipes.
        modality: &'static str,
        /// What is wrong.
        problem: String,
    },

    /// The recipe cannot be used as it is.
    #[error(transparent)]
    Recipe(#[from] RecipeError),

    /// The cohort, its labels or its splits cannot be read.
    #[error("the cohort cannot be used")]
    Records(#[from] calor_records::RecordsError),

    /// The patients cannot be turned into sequences.
    #[error("the sequences cannot be prepared")]
    Sequence(#[from] calor_sequence::SequenceError),

    /// The checkpoint, the adapter or the model built from them is wrong.
    #[error("the model cannot be used")]
    Model(#[from] calor_model::ModelError),

    /// A metric cannot be computed.
    #[error("the predictions cannot be evaluated")]
    Evaluate(#[from] calor_evaluate::EvaluateError),

    /// The meter cannot be opened.
    #[error("the meter cannot be opened")]
    Meter(#[source] Box<calor_meter::MeterError>),

    /// The device named on the command line cannot be used by this build.
    #[error("device `{device}`: {problem}")]
    Device {
        /// As it was written, for example `cuda:0`.
        device: String,
        /// What is wrong and what to do.
        problem: String,
    },

    /// The device failed while computing.
    #[error("the device failed while {doing}: {problem}")]
    Execution {
        /// What was being computed.
        doing: &'static str,
        /// The backend's own words.
        problem: String,
    },

    /// Reading or writing a file of the run failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// `read`, `write`, `rename`, …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },

    /// A file of the run is there but does not hold what it should.
    #[error("{}: {problem}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },

    /// The run folder is not in the state that the command needs.
    #[error("{}: {problem}", path.display())]
    RunFolder {
        /// The run folder.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },

    /// The labels and the task do not fit together.
    #[error("task `{task}`: {problem}")]
    Task {
        /// The task's kind as the recipe spells it.
        task: &'static str,
        /// What does not fit, and what to do.
        problem: String,
    },

    /// The watchdog: the loss or a gradient is not a number any more.
    #[error(
        "{what} is {value} at step {step}; {}. Lower `train.learning_rate`, lengthen the warm-up or set `train.max_grad_norm`, then train again",
        last_checkpoint.as_ref().map_or("no checkpoint was written before it".to_owned(), |path| format!("the last good checkpoint is {}", path.display()))
    )]
    NonFinite {
        /// `the loss` or `the gradient norm`.
        what: &'static str,
        /// Its value: `NaN`, `inf` or `-inf`.
        value: f64,
        /// The optimizer step, counted from 1.
        step: u64,
        /// The newest checkpoint, written before this step.
        last_checkpoint: Option<PathBuf>,
    },

    /// The first update left every adapter tensor as it was.
    #[error(
        "the adapter did not move at step {step}, the first with a learning rate above zero: none of its {tensors} tensors changed. Its targets are not on the path from the input to the loss; see `adapter.targets` and `adapter.exclude`"
    )]
    AdapterDidNotMove {
        /// The optimizer step, counted from 1.
        step: u64,
        /// How many adapter tensors there are.
        tensors: usize,
    },

    /// A parameter group that cannot be used.
    #[error("`train.groups`: the pattern `{pattern}` {problem}")]
    ParameterGroup {
        /// The group's pattern.
        pattern: String,
        /// What is wrong and what to do.
        problem: String,
    },

    /// A sweep's file cannot be used.
    #[error("{}: {problem}", path.display())]
    Sweep {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },

    /// The run would need more memory than there is.
    #[error("out of memory, as predicted: {0}")]
    Memory(Box<crate::memory::MemoryPrediction>),

    /// Something that the run will do later failed when it was tried before the first step.
    #[error(
        "the preflight failed while {doing}: nothing has been trained. `train.preflight = false` leaves it out"
    )]
    Preflight {
        /// What was tried.
        doing: String,
        /// Why it failed.
        source: Box<TrainError>,
    },

    /// A benchmark's inputs do not fit.
    #[error("{}: {problem}", path.display())]
    Bench {
        /// The file with the inputs.
        path: PathBuf,
        /// What does not fit, and what to do.
        problem: String,
    },
}

impl TrainError {
    /// Wraps an error of the operating system with the file it is about.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> TrainError {
        let path = path.into();
        move |source| TrainError::Io {
            action,
            path,
            source,
        }
    }

    /// Whether the cause is the recipe or the command line, not the run: exit status 2.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            TrainError::Recipe(_)
                | TrainError::Device { .. }
                | TrainError::Task { .. }
                | TrainError::ParameterGroup { .. }
                | TrainError::Sweep { .. }
                | TrainError::RunFolder { .. }
                | TrainError::Sequence(calor_sequence::SequenceError::Option { .. })
        )
    }
}
