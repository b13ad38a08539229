//! What a run leaves in its folder: metrics, TensorBoard's files, predictions, reports.

pub mod html;
pub mod metrics;
mod plot;
pub mod predictions;
pub mod report;
pub mod tensorboard;
