//! Learning-rate schedules.
//!
//! The factors are those of Transformers' `get_constant_schedule_with_warmup`,
//! `get_linear_schedule_with_warmup` and `get_cosine_schedule_with_warmup`: the
//! update with index `step` (from 0) uses `learning_rate · factor(step)`.

use serde::{Deserialize, Serialize};

/// The shape of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Stays at the learning rate.
    Constant,
    /// Falls in a straight line to zero at the last step.
    Linear,
    /// Falls along half a cosine to zero at the last step.
    Cosine,
}

impl ScheduleKind {
    /// As recipes spell it.
    pub fn name(self) -> &'static str {
        match self {
            ScheduleKind::Constant => "constant",
            ScheduleKind::Linear => "linear",
            ScheduleKind::Cosine => "cosine",
        }
    }
}

/// A schedule whose length is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    kind: ScheduleKind,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// `warmup_steps` updates from zero up to the learning rate, then `kind` until `total_steps`.
    pub fn new(kind: ScheduleKind, warmup_steps: u64, total_steps: u64) -> Schedule {
        Schedule {
            kind,
            warmup_steps,
            total_steps,
        }
    }

    /// The warm-up given as a share of all steps, rounded up as Transformers does.
    pub fn warmup_from_fraction(fraction: f64, total_steps: u64) -> u64 {
        (fraction * total_steps as f64).ceil() as u64
    }

    /// Steps of the warm-up.
    pub fn warmup_steps(&self) -> u64 {
        self.warmup_steps
    }

    /// Multiplier of the learning rate at the update with index `step`, counted from 0; in 0..=1.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps.max(1) as f64;
        }
        let after_warmup = step as f64 - self.warmup_steps as f64;
        let length = (self.total_steps as f64 - self.warmup_steps as f64).max(1.0);
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => ((self.total_steps as f64 - step as f64) / length).max(0.0),
            ScheduleKind::Cosine => {
                let progress = after_warmup / length;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Case {
        kind: ScheduleKind,
        warmup_steps: u64,
        total_steps: u64,
        factors: Vec<f64>,
    }

    #[derive(Deserialize)]
    struct Fixture {
        schedules: Vec<Case>,
    }

    #[test]
    fn factors_equal_those_of_transformers() {
        let fixture: Fixture =
            serde_json::from_str(include_str!("../tests/fixtures/optimizer.json")).unwrap();
        assert!(fixture.schedules.len() >= 6);
        for case in fixture.schedules {
            let schedule = Schedule::new(case.kind, case.warmup_steps, case.total_steps);
            for (step, expected) in case.factors.iter().enumerate() {
                let factor = schedule.factor(step as u64);
                assert!(
                    (factor - expected).abs() <= 1e-12,
                    "{:?} with {} of {} steps of warm-up, step {step}: {factor} instead of {expected}",
                    case.kind,
                    case.warmup_steps,
                    case.total_steps
                );
            }
        }
    }

    #[test]
    fn a_fraction_of_the_steps_is_rounded_up() {
        assert_eq!(Schedule::warmup_from_fraction(0.03, 100), 3);
        assert_eq!(Schedule::warmup_from_fraction(0.03, 101), 4);
        assert_eq!(Schedule::warmup_from_fraction(0.0, 100), 0);
    }
}
