//! The numbers that a recipe can name to decide by.

use serde::{Deserialize, Serialize};

use super::TaskKind;

/// A number that says how good predictions are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Area under the receiver operating characteristic curve.
    Auroc,
    /// Average precision.
    Auprc,
    /// Mean squared difference of probability and outcome.
    Brier,
    /// Expected calibration error.
    Ece,
    /// Mean negative log likelihood.
    LogLoss,
    /// Share of patients whose most probable class is right.
    Accuracy,
    /// Mean over classes of the F1 score.
    MacroF1,
    /// Root mean squared error.
    Rmse,
    /// Share of the variance that is explained.
    R2,
    /// Harmonic mean of precision and recall over entities.
    F1,
    /// Share of the predicted entities that are right.
    Precision,
    /// Share of the entities that are found.
    Recall,
    /// Exponential of the loss of a token.
    Perplexity,
    /// The training loss, without class weights.
    Loss,
}

impl Metric {
    /// As recipes and reports spell it.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Auroc => "auroc",
            Metric::Auprc => "auprc",
            Metric::Brier => "brier",
            Metric::Ece => "ece",
            Metric::LogLoss => "log_loss",
            Metric::Accuracy => "accuracy",
            Metric::MacroF1 => "macro_f1",
            Metric::Rmse => "rmse",
            Metric::R2 => "r2",
            Metric::F1 => "f1",
            Metric::Precision => "precision",
            Metric::Recall => "recall",
            Metric::Perplexity => "perplexity",
            Metric::Loss => "loss",
        }
    }

    /// As people write it.
    pub fn title(self) -> &'static str {
        match self {
            Metric::Auroc => "AUROC",
            Metric::Auprc => "AUPRC",
            Metric::Brier => "Brier score",
            Metric::Ece => "Calibration error (ECE)",
            Metric::LogLoss => "Log loss",
            Metric::Accuracy => "Accuracy",
            Metric::MacroF1 => "Macro F1",
            Metric::Rmse => "RMSE",
            Metric::R2 => "R²",
            Metric::F1 => "F1",
            Metric::Precision => "Precision",
            Metric::Recall => "Recall",
            Metric::Perplexity => "Perplexity",
            Metric::Loss => "Loss",
        }
    }

    /// Whether more is better.
    pub fn higher_is_better(self) -> bool {
        matches!(
            self,
            Metric::Auroc
                | Metric::Auprc
                | Metric::Accuracy
                | Metric::MacroF1
                | Metric::R2
                | Metric::F1
                | Metric::Precision
                | Metric::Recall
        )
    }

    /// Whether predictions of a task have the metric.
    pub fn fits(self, task: TaskKind) -> bool {
        self == Metric::Loss || calor_evaluate::metric_names(task.into()).contains(&self.name())
    }

    /// All metrics that a recipe can name.
    pub const ALL: [Metric; 14] = [
        Metric::Auroc,
        Metric::Auprc,
        Metric::Brier,
        Metric::Ece,
        Metric::LogLoss,
        Metric::Accuracy,
        Metric::MacroF1,
        Metric::Rmse,
        Metric::R2,
        Metric::F1,
        Metric::Precision,
        Metric::Recall,
        Metric::Perplexity,
        Metric::Loss,
    ];

    /// What decides on the best model when the recipe does not say.
    pub fn default_of(task: TaskKind) -> Metric {
        match task {
            TaskKind::Binary | TaskKind::Multilabel => Metric::Auroc,
            TaskKind::Multiclass => Metric::LogLoss,
            TaskKind::Regression => Metric::Rmse,
            TaskKind::Tokens => Metric::F1,
            TaskKind::CausalLm => Metric::Loss,
        }
    }
}
