//! Metrics of order: sorted once, then each resample is one sweep with integer weights.

use std::borrow::Cow;

use crate::score::Value;

/// Cases in descending order of their score, with ties marked.
#[derive(Debug, Clone)]
pub(crate) struct Ranking {
    cases: Vec<Case>,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    /// Whose weight counts.
    row: u32,
    positive: bool,
    /// Whether the next case has a lower score, or there is none.
    ends_tie: bool,
}

/// AUROC and average precision of one sweep.
pub(crate) struct RankingScores {
    pub auroc: Value,
    pub auprc: Value,
}

/// Weighted counts of the cases at or above a threshold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    pub threshold: f64,
    pub true_positives: u64,
    pub false_positives: u64,
}

impl Ranking {
    /// Sorts cases `(score, positive, row)`. Scores are finite.
    pub(crate) fn new(cases: impl IntoIterator<Item = (f64, bool, usize)>) -> Ranking {
        let mut sorted: Vec<(f64, bool, usize)> = cases.into_iter().collect();
        sorted.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.2.cmp(&b.2)));
        let cases = (0..sorted.len())
            .map(|i| Case {
                row: u32::try_from(sorted[i].2).expect("rows are counted before"),
                positive: sorted[i].1,
                ends_tie: sorted.get(i + 1).is_none_or(|next| next.0 != sorted[i].0),
            })
            .collect();
        Ranking { cases }
    }

    /// AUROC and average precision where case `i` occurs `weights[row of i]` times.
    ///
    /// AUROC is the probability that a positive case scores above a negative one, ties counting a
    /// half (the area under the trapezoids of the ROC curve). Average precision is
    /// `Σ (Rₙ − Rₙ₋₁) · Pₙ` over the distinct thresholds, without interpolation. All counts are
    /// integers: a sum of at most rows²/2 fits 64 bits for up to 2³² rows.
    pub(crate) fn scores(&self, weights: &[u32]) -> RankingScores {
        let (mut above_positive, mut above_negative) = (0_u64, 0_u64);
        let (mut tie_positive, mut tie_negative) = (0_u64, 0_u64);
        let mut twice_area = 0_u64;
        let mut precision_sum = 0.0;
        for case in &self.cases {
            let weight = u64::from(weights[case.row as usize]);
            if case.positive {
                tie_positive += weight;
            } else {
                tie_negative += weight;
            }
            if case.ends_tie {
                twice_area += tie_negative * (2 * above_positive + tie_positive);
                above_positive += tie_positive;
                above_negative += tie_negative;
                if tie_positive > 0 {
                    let precision =
                        above_positive as f64 / (above_positive + above_negative) as f64;
                    precision_sum += tie_positive as f64 * precision;
                }
                (tie_positive, tie_negative) = (0, 0);
            }
        }
        if let Some(reason) = one_class(above_positive, above_negative) {
            return RankingScores {
                auroc: Err(reason.clone()),
                auprc: Err(reason),
            };
        }
        let pairs = above_positive as f64 * above_negative as f64;
        RankingScores {
            auroc: Ok(0.5 * twice_area as f64 / pairs),
            auprc: Ok(precision_sum / above_positive as f64),
        }
    }

    /// The counts at each distinct score, from the highest down; `scores` are those given to
    /// [`Ranking::new`] by row, each case of weight 1.
    pub(crate) fn cuts(&self, score_of_row: impl Fn(usize) -> f64) -> Vec<Cut> {
        let (mut true_positives, mut false_positives) = (0, 0);
        let mut cuts = Vec::new();
        for case in &self.cases {
            true_positives += u64::from(case.positive);
            false_positives += u64::from(!case.positive);
            if case.ends_tie {
                cuts.push(Cut {
                    threshold: score_of_row(case.row as usize),
                    true_positives,
                    false_positives,
                });
            }
        }
        cuts
    }
}

/// Why nothing can be ranked, if all cases are of one class.
pub(crate) fn one_class(positives: u64, negatives: u64) -> Option<Cow<'static, str>> {
    match (positives, negatives) {
        (0, 0) => Some(Cow::Borrowed("there are no cases")),
        (0, _) => Some(Cow::Borrowed("only one class occurs: no case is positive")),
        (_, 0) => Some(Cow::Borrowed(
            "only one class occurs: every case is positive",
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranking(cases: &[(u8, bool)]) -> Ranking {
        let cases = cases.iter().enumerate();
        Ranking::new(cases.map(|(row, &(score, positive))| (f64::from(score), positive, row)))
    }

    /// The definition: all pairs of a positive and a negative case, with multiplicity.
    fn auroc_by_pairs(cases: &[(u8, bool)], weights: &[u32]) -> f64 {
        let (mut won, mut pairs) = (0.0, 0.0);
        for (i, &(score, positive)) in cases.iter().enumerate() {
            for (j, &(other, other_positive)) in cases.iter().enumerate() {
                if positive && !other_positive {
                    let weight = f64::from(weights[i]) * f64::from(weights[j]);
                    pairs += weight;
                    won += weight
                        * match score.cmp(&other) {
                            std::cmp::Ordering::Greater => 1.0,
                            std::cmp::Ordering::Equal => 0.5,
                            std::cmp::Ordering::Less => 0.0,
                        };
                }
            }
        }
        won / pairs
    }

    proptest! {
        #[test]
        fn auroc_is_the_share_of_pairs_won(
            cases in prop::collection::vec((0_u8..6, any::<bool>()), 2..40),
            seed in any::<u64>(),
        ) {
            let weights: Vec<u32> = (0..cases.len()).map(|i| (seed >> (i % 60)) as u32 % 3).collect();
            let expected = auroc_by_pairs(&cases, &weights);
            match ranking(&cases).scores(&weights).auroc {
                Ok(auroc) => prop_assert!((auroc - expected).abs() < 1e-12),
                Err(_) => prop_assert!(expected.is_nan()),
            }
        }

        #[test]
        fn a_weight_is_a_repetition(
            cases in prop::collection::vec((0_u8..6, any::<bool>(), 0_u32..4), 2..40),
        ) {
            let plain: Vec<(u8, bool)> = cases.iter().map(|case| (case.0, case.1)).collect();
            let weights: Vec<u32> = cases.iter().map(|case| case.2).collect();
            let repeated: Vec<(u8, bool)> = cases
                .iter()
                .flat_map(|case| std::iter::repeat_n((case.0, case.1), case.2 as usize))
                .collect();
            let weighted = ranking(&plain).scores(&weights);
            let unit = ranking(&repeated).scores(&vec![1; repeated.len()]);
            prop_assert_eq!(weighted.auroc, unit.auroc);
            prop_assert_eq!(weighted.auprc, unit.auprc);
        }
    }

    #[test]
    fn ties_count_a_half() {
        let all_equal = ranking(&[(3, true), (3, false), (3, true), (3, false)]);
        let scores = all_equal.scores(&[1; 4]);
        assert_eq!(scores.auroc, Ok(0.5));
        assert_eq!(scores.auprc, Ok(0.5));
    }

    #[test]
    fn one_class_has_no_order() {
        let scores = ranking(&[(1, true), (2, true)]).scores(&[1, 1]);
        assert!(scores.auroc.unwrap_err().contains("every case is positive"));
        let scores = ranking(&[(1, true), (2, false)]).scores(&[0, 5]);
        assert!(scores.auprc.unwrap_err().contains("no case is positive"));
    }

    #[test]
    fn signed_zeros_tie() {
        let cases = [(0.0, true, 0), (-0.0, false, 1)];
        assert_eq!(Ranking::new(cases).scores(&[1, 1]).auroc, Ok(0.5));
    }
}
