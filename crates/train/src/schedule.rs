//! Learning-rate schedules.
//!
//! The factors are those of Transformers' `get_constant_schedule_with_warmup`,
//! `get_linear_schedule_with_warmup`, `get_cosine_schedule_with_warmup` and
//! `get_wsd_schedule`: the update with index `step` (from 0) uses `learning_rate · factor(step)`.
//! With a minimum, what is above it falls as the whole does without: `m + (1 − m)·factor`, after the
//! warm-up, which starts at zero.

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
    /// Warm-up, stable, decay: stays, and falls over the last steps alone (Hu et al. 2024).
    Wsd,
}

/// How the learning rate of [`ScheduleKind::Wsd`] falls over the steps of its decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayShape {
    /// `1 − progress`.
    Linear,
    /// Half a cosine.
    Cosine,
    /// `1 − √progress` (Hägele et al. 2024).
    OneMinusSqrt,
}

impl ScheduleKind {
    /// As recipes spell it.
    pub fn name(self) -> &'static str {
        match self {
            ScheduleKind::Constant => "constant",
            ScheduleKind::Linear => "linear",
            ScheduleKind::Cosine => "cosine",
            ScheduleKind::Wsd => "wsd",
        }
    }
}

/// A schedule whose length is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    kind: ScheduleKind,
    warmup_steps: u64,
    total_steps: u64,
    decay_steps: u64,
    decay_shape: DecayShape,
    minimum: f64,
}

impl Schedule {
    /// `warmup_steps` updates from zero up to the learning rate, then `kind` until `total_steps`.
    pub fn new(kind: ScheduleKind, warmup_steps: u64, total_steps: u64) -> Schedule {
        Schedule {
            kind,
            warmup_steps,
            total_steps,
            decay_steps: 0,
            decay_shape: DecayShape::OneMinusSqrt,
            minimum: 0.0,
        }
    }

    /// With so many steps of decay at the end, for [`ScheduleKind::Wsd`]. A decay that does not fit
    /// beside the warm-up begins after it.
    pub fn with_decay(self, decay_steps: u64, decay_shape: DecayShape) -> Schedule {
        Schedule {
            decay_steps: decay_steps.min(self.total_steps.saturating_sub(self.warmup_steps)),
            decay_shape,
            ..self
        }
    }

    /// Falling to this share of the learning rate instead of zero.
    pub fn with_minimum(self, minimum: f64) -> Schedule {
        Schedule { minimum, ..self }
    }

    /// A share of all steps, rounded up as Transformers does for the warm-up.
    pub fn steps_of(fraction: f64, total_steps: u64) -> u64 {
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
        self.minimum + (1.0 - self.minimum) * self.after_warmup(step)
    }

    /// Without a minimum.
    fn after_warmup(&self, step: u64) -> f64 {
        let length = (self.total_steps as f64 - self.warmup_steps as f64).max(1.0);
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => ((self.total_steps as f64 - step as f64) / length).max(0.0),
            ScheduleKind::Cosine => {
                half_cosine((step - self.warmup_steps) as f64 / length).max(0.0)
            }
            ScheduleKind::Wsd => {
                let decay_start = self.total_steps.saturating_sub(self.decay_steps);
                if step < decay_start {
                    return 1.0;
                }
                if step >= self.total_steps {
                    return 0.0;
                }
                let progress = (step - decay_start) as f64 / self.decay_steps.max(1) as f64;
                match self.decay_shape {
                    DecayShape::Linear => 1.0 - progress,
                    DecayShape::Cosine => half_cosine(progress),
                    DecayShape::OneMinusSqrt => 1.0 - progress.sqrt(),
                }
            }
        }
    }
}

fn half_cosine(progress: f64) -> f64 {
    0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Case {
        kind: ScheduleKind,
        warmup_steps: u64,
        total_steps: u64,
        decay_steps: u64,
        decay_shape: DecayShape,
        minimum: f64,
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
        assert!(fixture.schedules.len() >= 18);
        for case in fixture.schedules {
            let schedule = Schedule::new(case.kind, case.warmup_steps, case.total_steps)
                .with_decay(case.decay_steps, case.decay_shape)
                .with_minimum(case.minimum);
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
    fn a_minimum_is_reached_at_the_end_and_not_undercut() {
        for kind in [
            ScheduleKind::Linear,
            ScheduleKind::Cosine,
            ScheduleKind::Wsd,
        ] {
            let plain = Schedule::new(kind, 2, 12).with_decay(5, DecayShape::Linear);
            let schedule = plain.with_minimum(0.1);
            assert_eq!(schedule.factor(1), 0.5, "the warm-up starts at zero");
            for step in 2..15 {
                let expected = 0.1 + 0.9 * plain.factor(step);
                assert!((schedule.factor(step) - expected).abs() < 1e-12);
            }
            assert!((schedule.factor(12) - 0.1).abs() < 1e-12);
        }
    }

    #[test]
    fn a_decay_as_long_as_the_run_begins_after_the_warmup() {
        let schedule = Schedule::new(ScheduleKind::Wsd, 4, 10).with_decay(10, DecayShape::Linear);
        assert_eq!(schedule.factor(4), 1.0);
        assert_eq!(schedule.factor(7), 0.5);
        assert_eq!(schedule.factor(10), 0.0);
    }

    #[test]
    fn a_fraction_of_the_steps_is_rounded_up() {
        assert_eq!(Schedule::steps_of(0.03, 100), 3);
        assert_eq!(Schedule::steps_of(0.03, 101), 4);
        assert_eq!(Schedule::steps_of(0.0, 100), 0);
    }
}
