//! The points of ROC, precision-recall and calibration curves, for a report to draw.

use serde::{Deserialize, Serialize};

use crate::calibration::{
    CALIBRATION_BINS, CalibrationPoint, calibration_points, equal_width_edges, quantile_edges,
};
use crate::error::EvaluateError;
use crate::evaluate::Predictions;
use crate::ranking::{Ranking, one_class};

/// How many points to keep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CurveOptions {
    /// Points a curve at most, at least 2. Default 200.
    pub most_points: usize,
    /// Bins of the calibration curve by quantiles. Default 10.
    pub quantile_bins: usize,
    /// Names of the classes or labels; empty for their numbers.
    pub class_names: Vec<String>,
}

impl Default for CurveOptions {
    fn default() -> CurveOptions {
        CurveOptions {
            most_points: 200,
            quantile_bins: 10,
            class_names: Vec::new(),
        }
    }
}

/// The curves of one class or label against the rest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curves {
    pub name: String,
    /// From (0, 0) to (1, 1); empty when only one class occurs.
    pub roc: Vec<RocPoint>,
    /// From the highest threshold down to full recall; empty when only one class occurs.
    pub precision_recall: Vec<PrecisionRecallPoint>,
    /// Why the two are empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undefined: Option<String>,
    /// Over 15 bins of equal width, those of the expected calibration error.
    pub calibration: Vec<CalibrationPoint>,
    /// Over bins of about equal numbers of rows.
    pub calibration_by_quantile: Vec<CalibrationPoint>,
}

/// A point of the ROC curve: the rates when a case counts as positive at `threshold` and above.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RocPoint {
    pub false_positive_rate: f64,
    pub true_positive_rate: f64,
    /// `None` for the first point, above every score.
    pub threshold: Option<f64>,
}

/// A point of the precision-recall curve, at `threshold` and above.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PrecisionRecallPoint {
    pub recall: f64,
    pub precision: f64,
    pub threshold: f64,
}

/// The curves of each class or label; one entry for a binary task, none for regression.
///
/// # Errors
///
/// Those of [`evaluate`](crate::evaluate) on broken input, and options that mean nothing.
pub fn curves(
    predictions: &Predictions<'_>,
    options: &CurveOptions,
) -> Result<Vec<Curves>, EvaluateError> {
    if options.most_points < 2 {
        return Err(EvaluateError::InvalidOption {
            key: "most_points",
            reason: "must be at least 2",
        });
    }
    if options.quantile_bins == 0 {
        return Err(EvaluateError::InvalidOption {
            key: "quantile_bins",
            reason: "must be at least 1",
        });
    }
    let checked = predictions.check()?;
    let names = predictions.names(&options.class_names)?;
    let columns = names.len().max(1);
    let of_class = |class: usize, happened: &dyn Fn(usize) -> bool| -> Vec<(f64, bool)> {
        let column = checked.probabilities.iter().skip(class).step_by(columns);
        column
            .enumerate()
            .map(|(row, &p)| (p, happened(row)))
            .collect()
    };
    let curves_of = |(class, name): (usize, String)| {
        let cases = match *predictions {
            Predictions::Binary { targets, .. } => of_class(class, &|row| targets[row]),
            Predictions::Multiclass { targets, .. } => {
                of_class(class, &|row| targets[row] == class)
            }
            Predictions::Multilabel { targets, .. } => {
                of_class(class, &|row| targets[row * columns + class])
            }
            Predictions::Regression { .. }
            | Predictions::Tokens { .. }
            | Predictions::CausalLm { .. } => Vec::new(),
        };
        curves_of_cases(name, &cases, options)
    };
    Ok(names.into_iter().enumerate().map(curves_of).collect())
}

fn curves_of_cases(name: String, cases: &[(f64, bool)], options: &CurveOptions) -> Curves {
    let numbered = cases.iter().enumerate();
    let cuts = Ranking::new(numbered.map(|(row, &(p, happened))| (p, happened, row)))
        .cuts(|row| cases[row].0);
    let positives = cuts.last().map_or(0, |cut| cut.true_positives);
    let negatives = cuts.last().map_or(0, |cut| cut.false_positives);
    let undefined = one_class(positives, negatives).map(|reason| reason.into_owned());
    let (mut roc, mut precision_recall) = (Vec::new(), Vec::new());
    if undefined.is_none() {
        roc.push(RocPoint {
            false_positive_rate: 0.0,
            true_positive_rate: 0.0,
            threshold: None,
        });
        for cut in &cuts {
            let true_positives = cut.true_positives as f64;
            let recall = true_positives / positives as f64;
            roc.push(RocPoint {
                false_positive_rate: cut.false_positives as f64 / negatives as f64,
                true_positive_rate: recall,
                threshold: Some(cut.threshold),
            });
            precision_recall.push(PrecisionRecallPoint {
                recall,
                precision: true_positives / (cut.true_positives + cut.false_positives) as f64,
                threshold: cut.threshold,
            });
        }
    }
    let most = options.most_points;
    Curves {
        name,
        roc: thin(roc, most, |point| {
            (point.false_positive_rate, point.true_positive_rate)
        }),
        precision_recall: thin(precision_recall, most, |point| {
            (point.recall, point.precision)
        }),
        undefined,
        calibration: calibration_points(cases, &equal_width_edges(CALIBRATION_BINS)),
        calibration_by_quantile: calibration_points(
            cases,
            &quantile_edges(cases, options.quantile_bins),
        ),
    }
}

/// At most `most` points, spread evenly along the curve's length (steps across plus steps up), the
/// ends always among them. What is drawn stays within one spacing of the whole curve.
fn thin<P: Copy>(points: Vec<P>, most: usize, position: impl Fn(&P) -> (f64, f64)) -> Vec<P> {
    if points.len() <= most {
        return points;
    }
    let mut lengths = vec![0.0];
    for pair in points.windows(2) {
        let ((x, y), (next_x, next_y)) = (position(&pair[0]), position(&pair[1]));
        let step = (next_x - x).abs() + (next_y - y).abs();
        lengths.push(lengths[lengths.len() - 1] + step);
    }
    let spacing = lengths[lengths.len() - 1] / (most - 1) as f64;
    let last = points.len() - 1;
    let mut kept = vec![points[0]];
    let mut mark = 1;
    for index in 1..last {
        if kept.len() + 1 < most && lengths[index] >= mark as f64 * spacing {
            kept.push(points[index]);
            while lengths[index] >= mark as f64 * spacing {
                mark += 1;
            }
        }
    }
    kept.push(points[last]);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn many(rows: usize) -> (Vec<f64>, Vec<bool>) {
        let probabilities: Vec<f64> = (0..rows)
            .map(|i| (i * 7919 % rows) as f64 / rows as f64)
            .collect();
        let targets = probabilities
            .iter()
            .enumerate()
            .map(|(i, p)| (i * 104_729 % 1_000) as f64 / 1_000.0 < p * p)
            .collect();
        (probabilities, targets)
    }

    /// The area under the points by trapezoids.
    fn area(points: &[RocPoint]) -> f64 {
        points
            .windows(2)
            .map(|pair| {
                let width = pair[1].false_positive_rate - pair[0].false_positive_rate;
                0.5 * width * (pair[0].true_positive_rate + pair[1].true_positive_rate)
            })
            .sum()
    }

    #[test]
    fn thinned_curves_keep_their_ends_and_their_area() {
        let (probabilities, targets) = many(5_003);
        let predictions = Predictions::Binary {
            probabilities: &probabilities,
            targets: &targets,
        };
        let all = CurveOptions {
            most_points: usize::MAX,
            ..CurveOptions::default()
        };
        let whole = &curves(&predictions, &all).unwrap()[0];
        let thinned = &curves(&predictions, &CurveOptions::default()).unwrap()[0];
        assert!(whole.roc.len() > 5_000 && thinned.roc.len() <= 200 && thinned.roc.len() > 150);
        assert!(thinned.precision_recall.len() <= 200);
        assert_eq!(thinned.roc.first(), whole.roc.first());
        assert_eq!(thinned.roc.last(), whole.roc.last());
        assert_eq!(
            thinned.precision_recall.last(),
            whole.precision_recall.last()
        );
        let exact = crate::auroc(&probabilities, &targets).unwrap();
        assert!((area(&whole.roc) - exact).abs() < 1e-12);
        assert!((area(&thinned.roc) - exact).abs() < 2e-3);
    }

    #[test]
    fn thresholds_fall_and_rates_rise() {
        let (probabilities, targets) = many(301);
        let predictions = Predictions::Binary {
            probabilities: &probabilities,
            targets: &targets,
        };
        let curve = &curves(&predictions, &CurveOptions::default()).unwrap()[0];
        assert!(curve.roc.windows(2).all(|pair| {
            pair[0].false_positive_rate <= pair[1].false_positive_rate
                && pair[0].true_positive_rate <= pair[1].true_positive_rate
                && pair[0]
                    .threshold
                    .is_none_or(|above| Some(above) > pair[1].threshold)
        }));
        let last = curve.roc.last().unwrap();
        assert_eq!(
            (last.false_positive_rate, last.true_positive_rate),
            (1.0, 1.0)
        );
        let rows: usize = curve.calibration.iter().map(|point| point.rows).sum();
        assert_eq!(rows, 301);
        assert!(!serde_json::to_string(curve).unwrap().contains("NaN"));
    }

    #[test]
    fn one_class_has_a_calibration_and_no_other_curve() {
        let predictions = Predictions::Binary {
            probabilities: &[0.2, 0.4],
            targets: &[false, false],
        };
        let curve = &curves(&predictions, &CurveOptions::default()).unwrap()[0];
        assert!(curve.roc.is_empty() && curve.precision_recall.is_empty());
        assert!(curve.undefined.as_ref().unwrap().contains("only one class"));
        assert_eq!(curve.calibration.len(), 2);
    }

    #[test]
    fn each_class_has_its_own_curves_and_a_number_none() {
        let predictions = Predictions::Multiclass {
            classes: 3,
            probabilities: &[0.6, 0.3, 0.1, 0.2, 0.7, 0.1, 0.1, 0.1, 0.8],
            targets: &[0, 1, 2],
        };
        let by_class = curves(&predictions, &CurveOptions::default()).unwrap();
        let names: Vec<&str> = by_class.iter().map(|curves| curves.name.as_str()).collect();
        assert_eq!(names, ["class 0", "class 1", "class 2"]);
        assert!(by_class.iter().all(|curves| area(&curves.roc) == 1.0));
        let labels = Predictions::Multilabel {
            labels: 2,
            probabilities: &[0.9, 0.1, 0.2, 0.8],
            targets: &[true, true, false, false],
        };
        let by_label = curves(&labels, &CurveOptions::default()).unwrap();
        assert_eq!((area(&by_label[0].roc), area(&by_label[1].roc)), (1.0, 0.0));
        let numbers = Predictions::Regression {
            predicted: &[1.0],
            targets: &[1.0],
        };
        assert!(
            curves(&numbers, &CurveOptions::default())
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn options_without_meaning_are_refused() {
        let predictions = Predictions::Regression {
            predicted: &[1.0],
            targets: &[1.0],
        };
        let options = CurveOptions {
            most_points: 1,
            ..CurveOptions::default()
        };
        assert!(curves(&predictions, &options).is_err());
    }
}
