//! How good predictions are: clinical metrics with bootstrap intervals by patient, and the points
//! of the curves that a report draws.
//!
//! * **Definitions are scikit-learn's** where it has one, so that a number here can be compared
//!   with a number elsewhere; each is stated at its function and in [`Metrics::definitions`].
//! * **Intervals resample patients, not rows.** Rows of one patient are not independent; a row
//!   bootstrap would promise too much.
//! * **What has no value has a reason.** A metric of one class, a NaN among the predictions, an
//!   empty split: never a number that looks like one.
//! * **The same seed gives the same interval** on any number of threads.
//!
//! ```
//! use calor_evaluate::{EvaluateOptions, Predictions, evaluate};
//!
//! let predictions = Predictions::Binary {
//!     probabilities: &[0.9, 0.2, 0.6, 0.4],
//!     targets: &[true, false, true, false],
//! };
//! let patients = [1, 1, 2, 3];
//! let metrics = evaluate(&predictions, &patients, &EvaluateOptions::default())?;
//! assert_eq!(metrics.score("auroc").and_then(|score| score.value()), Some(1.0));
//! # Ok::<(), calor_evaluate::EvaluateError>(())
//! ```
#![forbid(unsafe_code)]

mod ablation;
mod bootstrap;
mod calibration;
mod classification;
mod curves;
mod error;
mod evaluate;
mod language;
mod measure;
mod metrics;
mod ranking;
mod regression;
mod score;

pub use ablation::{
    Ablation, MOST_SOURCES, SourceScores, SubsetScore, Targets, ablate, shapley_values,
};
pub use bootstrap::{BootstrapOptions, Patients, bootstrap};
pub use calibration::{CALIBRATION_BINS, CalibrationPoint};
pub use classification::{BINARY_THRESHOLD, binary_label, class_label};
pub use curves::{CurveOptions, Curves, PrecisionRecallPoint, RocPoint, curves};
pub use error::EvaluateError;
pub use evaluate::{
    ClassScores, EvaluateOptions, Metrics, Predictions, TaskKind, evaluate, higher_is_better,
    metric_names,
};
pub use language::{Entity, EntityScores, entities, entity_scores};
pub use metrics::{accuracy, auprc, auroc, brier, ece, log_loss, macro_f1, r2, rmse};
pub use score::{Interval, Score};
