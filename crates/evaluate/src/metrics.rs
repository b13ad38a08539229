//! Single metrics of plain arrays, for a caller that wants one number.

use crate::calibration::Calibration;
use crate::classification::{Confusion, log_loss_of, weighted_mean};
use crate::error::EvaluateError;
use crate::evaluate::{Checked, Predictions};
use crate::ranking::{Ranking, RankingScores};
use crate::regression::Residuals;
use crate::score::Value;

/// The probability that a positive case scores above a negative one, ties counting a half
/// (`sklearn.metrics.roc_auc_score`). Scores are any finite numbers.
pub fn auroc(scores: &[f64], targets: &[bool]) -> Result<f64, EvaluateError> {
    defined("AUROC", rank(scores, targets)?.auroc)
}

/// Average precision: `Σ (Rₙ − Rₙ₋₁) · Pₙ` over the distinct thresholds
/// (`sklearn.metrics.average_precision_score`). Scores are any finite numbers.
pub fn auprc(scores: &[f64], targets: &[bool]) -> Result<f64, EvaluateError> {
    defined("AUPRC", rank(scores, targets)?.auprc)
}

/// The mean squared error of the positive class's probability (`sklearn.metrics.brier_score_loss`).
pub fn brier(probabilities: &[f64], targets: &[bool]) -> Result<f64, EvaluateError> {
    let checked = binary(probabilities, targets)?;
    let errors: Vec<f64> = checked
        .probabilities
        .iter()
        .zip(targets)
        .map(|(p, &y)| (p - f64::from(u8::from(y))).powi(2))
        .collect();
    defined(
        "the Brier score",
        weighted_mean(&errors, &once(targets.len())),
    )
}

/// Expected calibration error of the positive class's probability: 15 bins of equal width, each
/// `(low, high]` and the first with its lower end, weighted by their rows.
pub fn ece(probabilities: &[f64], targets: &[bool]) -> Result<f64, EvaluateError> {
    let checked = binary(probabilities, targets)?;
    let cases = checked.probabilities.iter().zip(targets).enumerate();
    let calibration = Calibration::new(cases.map(|(row, (&p, &y))| (p, y, row)));
    defined("ECE", calibration.error(&once(targets.len())))
}

/// The mean negative log likelihood in nats of `probabilities` `[rows, classes]`
/// (`sklearn.metrics.log_loss`).
pub fn log_loss(
    classes: usize,
    probabilities: &[f64],
    targets: &[usize],
) -> Result<f64, EvaluateError> {
    let checked = Predictions::Multiclass {
        classes,
        probabilities,
        targets,
    }
    .check()?;
    let losses: Vec<f64> = checked
        .probabilities
        .chunks_exact(classes)
        .zip(targets)
        .map(|(p, &target)| log_loss_of(p[target]))
        .collect();
    defined("the log loss", weighted_mean(&losses, &once(targets.len())))
}

/// The share of rows predicted right (`sklearn.metrics.accuracy_score`).
pub fn accuracy(
    classes: usize,
    predicted: &[usize],
    targets: &[usize],
) -> Result<f64, EvaluateError> {
    let confusion = confusion(classes, predicted, targets)?;
    defined("the accuracy", confusion.scores(&once(targets.len())).0)
}

/// The plain mean of the F1 of the classes that occur or are predicted
/// (`sklearn.metrics.f1_score(average="macro")`); undefined when one class alone occurs.
pub fn macro_f1(
    classes: usize,
    predicted: &[usize],
    targets: &[usize],
) -> Result<f64, EvaluateError> {
    let confusion = confusion(classes, predicted, targets)?;
    defined("macro F1", confusion.scores(&once(targets.len())).1)
}

/// The root of the mean squared error (`sklearn.metrics.root_mean_squared_error`).
pub fn rmse(predicted: &[f64], targets: &[f64]) -> Result<f64, EvaluateError> {
    Predictions::Regression { predicted, targets }.check()?;
    let residuals = Residuals::new(predicted, targets);
    defined("RMSE", residuals.scores(&once(targets.len())).0)
}

/// The coefficient of determination (`sklearn.metrics.r2_score`); undefined when the target does
/// not vary.
pub fn r2(predicted: &[f64], targets: &[f64]) -> Result<f64, EvaluateError> {
    Predictions::Regression { predicted, targets }.check()?;
    let residuals = Residuals::new(predicted, targets);
    defined("R²", residuals.scores(&once(targets.len())).1)
}

fn rank(scores: &[f64], targets: &[bool]) -> Result<RankingScores, EvaluateError> {
    if targets.is_empty() {
        return Err(EvaluateError::Empty);
    }
    if scores.len() != targets.len() {
        return Err(EvaluateError::LengthMismatch {
            what: "the list of scores",
            expected: targets.len(),
            found: scores.len(),
        });
    }
    if u32::try_from(targets.len()).is_err() {
        return Err(EvaluateError::TooManyRows {
            rows: targets.len(),
        });
    }
    if let Some(row) = scores.iter().position(|score| !score.is_finite()) {
        return Err(EvaluateError::NotFinite {
            what: "the score",
            row,
            column: None,
        });
    }
    let cases = scores.iter().zip(targets).enumerate();
    let ranking = Ranking::new(cases.map(|(row, (&score, &target))| (score, target, row)));
    Ok(ranking.scores(&once(targets.len())))
}

fn binary(probabilities: &[f64], targets: &[bool]) -> Result<Checked, EvaluateError> {
    Predictions::Binary {
        probabilities,
        targets,
    }
    .check()
}

fn confusion(
    classes: usize,
    predicted: &[usize],
    targets: &[usize],
) -> Result<Confusion, EvaluateError> {
    if targets.is_empty() {
        return Err(EvaluateError::Empty);
    }
    if predicted.len() != targets.len() {
        return Err(EvaluateError::LengthMismatch {
            what: "the list of predictions",
            expected: targets.len(),
            found: predicted.len(),
        });
    }
    let out_of_range = |&(a, b): &(&usize, &usize)| *a >= classes || *b >= classes;
    if let Some(row) = targets
        .iter()
        .zip(predicted)
        .position(|pair| out_of_range(&pair))
    {
        return Err(EvaluateError::ClassOutOfRange { row, classes });
    }
    let cases = targets.iter().copied().zip(predicted.iter().copied());
    Ok(Confusion::new(classes, cases))
}

fn once(rows: usize) -> Vec<u32> {
    vec![1; rows]
}

fn defined(metric: &'static str, value: Value) -> Result<f64, EvaluateError> {
    value.map_err(|reason| EvaluateError::Undefined {
        metric,
        reason: reason.into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_class_is_undefined_and_says_so() {
        let error = auroc(&[0.1, 0.2], &[true, true]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "AUROC is undefined: only one class occurs: every case is positive"
        );
        assert!(auprc(&[0.1, 0.2], &[false, false]).is_err());
        assert!(macro_f1(2, &[0, 1], &[1, 1]).is_err());
        assert!(r2(&[1.0, 2.0], &[3.0, 3.0]).is_err());
        assert_eq!(brier(&[1.0, 0.5], &[true, true]), Ok(0.125));
        assert_eq!(accuracy(2, &[0, 1], &[1, 1]), Ok(0.5));
    }

    #[test]
    fn broken_input_is_an_error_that_names_the_row() {
        let nan = f64::NAN;
        assert_eq!(auroc(&[], &[]), Err(EvaluateError::Empty));
        assert_eq!(rmse(&[], &[]), Err(EvaluateError::Empty));
        assert_eq!(accuracy(2, &[], &[]), Err(EvaluateError::Empty));
        let error = auroc(&[0.1, nan], &[true, false]).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("the score in row 1 is not a finite number")
        );
        let error = brier(&[0.1, nan], &[true, false]).unwrap_err();
        assert!(error.to_string().contains("row 1"), "{error}");
        let error = ece(&[0.1, 1.5], &[true, false]).unwrap_err();
        assert_eq!(
            error,
            EvaluateError::NotAProbability {
                row: 1,
                column: None
            }
        );
        let error = r2(&[0.1, 1.5], &[nan, 0.0]).unwrap_err();
        assert!(
            error.to_string().starts_with("the target in row 0"),
            "{error}"
        );
        let error = log_loss(2, &[0.5, 0.5, 0.9, 0.9], &[0, 1]).unwrap_err();
        assert_eq!(error, EvaluateError::RowSum { row: 1 });
        let error = macro_f1(2, &[0, 2], &[1, 1]).unwrap_err();
        assert_eq!(error, EvaluateError::ClassOutOfRange { row: 1, classes: 2 });
        assert!(matches!(
            auroc(&[0.1], &[true, false]),
            Err(EvaluateError::LengthMismatch {
                expected: 2,
                found: 1,
                ..
            })
        ));
    }
}
