//! Scores and targets as the metrics read them.

use calor_evaluate::Predictions;
use calor_sequence::{NO_TARGET, Targets};

use super::Scored;
use crate::recipe::TaskKind;

/// The columns that the metrics borrow.
pub(super) struct Owned {
    pub probabilities: Vec<f64>,
    pub flags: Vec<bool>,
    pub classes: Vec<usize>,
    pub numbers: Vec<f64>,
    pub tags: Vec<Vec<usize>>,
    pub predicted_tags: Vec<Vec<usize>>,
    pub token_counts: Vec<u64>,
}

impl Owned {
    pub fn new(scored: &Scored, rows: &[usize]) -> Owned {
        let all = scored.probabilities();
        let mut owned = Owned {
            probabilities: Vec::with_capacity(rows.len() * scored.width),
            flags: Vec::new(),
            classes: Vec::new(),
            numbers: Vec::new(),
            tags: Vec::new(),
            predicted_tags: Vec::new(),
            token_counts: Vec::new(),
        };
        for &row in rows {
            owned
                .probabilities
                .extend_from_slice(&all[row * scored.width..(row + 1) * scored.width]);
            match &scored.targets[row] {
                Targets::Class(class) if scored.task.kind == TaskKind::Binary => {
                    owned.flags.push(*class == 1)
                }
                Targets::Class(class) => owned.classes.push(*class as usize),
                Targets::Multilabel(labels) => {
                    owned.flags.extend(labels.iter().map(|label| *label > 0.5))
                }
                Targets::Real(value) => owned.numbers.push(f64::from(*value)),
                Targets::Tokens(targets) if scored.task.kind == TaskKind::Tokens => {
                    let learned = targets.iter().filter(|target| **target != NO_TARGET);
                    owned
                        .tags
                        .push(learned.map(|target| *target as usize).collect());
                    owned.predicted_tags.push(scored.tags[row].clone());
                }
                target @ Targets::Tokens(_) => {
                    owned.token_counts.push(target.supervised_count() as u64)
                }
                Targets::None | Targets::Survival { .. } => {}
            }
        }
        owned
    }

    pub fn predictions<'a>(&'a self, scored: &'a Scored) -> Predictions<'a> {
        match scored.task.kind {
            TaskKind::Binary => Predictions::Binary {
                probabilities: &self.probabilities,
                targets: &self.flags,
            },
            TaskKind::Multiclass => Predictions::Multiclass {
                classes: scored.width,
                probabilities: &self.probabilities,
                targets: &self.classes,
            },
            TaskKind::Multilabel => Predictions::Multilabel {
                labels: scored.width,
                probabilities: &self.probabilities,
                targets: &self.flags,
            },
            TaskKind::Regression => Predictions::Regression {
                predicted: &self.probabilities,
                targets: &self.numbers,
            },
            TaskKind::Tokens => Predictions::Tokens {
                tags: &scored.task.classes,
                predicted: &self.predicted_tags,
                targets: &self.tags,
            },
            TaskKind::CausalLm => Predictions::CausalLm {
                losses: &self.probabilities,
                tokens: &self.token_counts,
            },
        }
    }
}
