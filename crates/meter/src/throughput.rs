//! Tokens a second and the time of steps and their phases.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use crate::Quantity;
use crate::energy::Purpose;

/// What a stretch of work went through.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Samples: one patient at one prediction time.
    pub sequences: u64,
    /// Positions of the batches, padding included.
    pub padded_tokens: u64,
    /// Positions that hold a token.
    pub tokens: u64,
    /// Tokens or labels that the loss is taken over.
    pub supervised: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.sequences += other.sequences;
        self.padded_tokens += other.padded_tokens;
        self.tokens += other.tokens;
        self.supervised += other.supervised;
    }
}

/// A part of a step. On a device that works asynchronously, a phase ends when the host goes on,
/// unless the caller waits for the device between phases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Waiting for the next batch, and its way to the device.
    Data,
    Forward,
    Backward,
    /// Clipping and the update.
    Optimizer,
    /// Measuring on other patients, between steps.
    Evaluation,
}

impl Phase {
    pub const ALL: [Phase; 5] = [
        Phase::Data,
        Phase::Forward,
        Phase::Backward,
        Phase::Optimizer,
        Phase::Evaluation,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Phase::Data => "data",
            Phase::Forward => "forward",
            Phase::Backward => "backward",
            Phase::Optimizer => "optimizer",
            Phase::Evaluation => "evaluation",
        }
    }
}

/// Throughput of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ThroughputReport {
    pub warm_up: ActivityThroughput,
    pub training: ActivityThroughput,
    pub evaluation: ActivityThroughput,
    pub steps: StepTimes,
    /// One entry a phase, in the order of a step; the time outside all phases is `other_s`.
    pub phases: Vec<PhaseReport>,
    /// Training time in none of the phases.
    pub other_s: Quantity,
}

/// What windows of one purpose went through, and how fast.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActivityThroughput {
    pub counts: Counts,
    pub elapsed_s: Quantity,
    pub sequences_per_s: Quantity,
    /// Positions a second, padding included: what the device worked on.
    pub padded_tokens_per_s: Quantity,
    /// Real tokens a second.
    pub tokens_per_s: Quantity,
    /// Supervised tokens or labels a second.
    pub supervised_per_s: Quantity,
}

/// The distribution of the wall time of an optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepTimes {
    pub steps: u64,
    pub mean_s: Quantity,
    pub median_s: Quantity,
    pub p95_s: Quantity,
    pub max_s: Quantity,
}

/// The time of one phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseReport {
    pub phase: Phase,
    pub total_s: f64,
    /// A step; for evaluation, a call.
    pub mean_s: Quantity,
    /// Of the training time; for evaluation, of training and evaluation together.
    pub share: Quantity,
}

const CLOCK: &str = "monotonic clock, device synchronised at both ends of each window";

impl ActivityThroughput {
    pub(crate) fn new(purpose: Purpose, counts: Counts, elapsed_s: f64) -> ActivityThroughput {
        let elapsed = if elapsed_s > 0.0 {
            Quantity::measured(elapsed_s, CLOCK)
        } else {
            Quantity::unavailable(format!("no {} was measured", purpose.name()))
        };
        let rate = |count: u64, unit: &str| {
            if count == 0 && elapsed.value().is_some() {
                return Quantity::unavailable(format!("no {unit} were counted"));
            }
            elapsed.map(&format!("{count} {unit}"), |seconds| count as f64 / seconds)
        };
        ActivityThroughput {
            counts,
            sequences_per_s: rate(counts.sequences, "sequences"),
            padded_tokens_per_s: rate(counts.padded_tokens, "tokens with padding"),
            tokens_per_s: rate(counts.tokens, "tokens"),
            supervised_per_s: rate(counts.supervised, "supervised tokens or labels"),
            elapsed_s: elapsed,
        }
    }
}

/// Collects the times of steps and phases.
#[derive(Debug, Default)]
pub(crate) struct StepLog {
    steps_s: Vec<f32>,
    phases_s: [f64; 5],
    evaluations: u64,
}

impl StepLog {
    pub(crate) fn add_phase(&mut self, phase: Phase, seconds: f64) {
        self.phases_s[phase as usize] += seconds;
        if phase == Phase::Evaluation {
            self.evaluations += 1;
        }
    }

    pub(crate) fn add_step(&mut self, seconds: f64) {
        self.steps_s.push(seconds as f32);
    }

    pub(crate) fn phase_s(&self, phase: Phase) -> f64 {
        self.phases_s[phase as usize]
    }

    pub(crate) fn step_times(&self) -> StepTimes {
        let mut sorted = self.steps_s.clone();
        sorted.sort_by(f32::total_cmp);
        let count = sorted.len();
        let at = |share: f64| {
            // The smallest step time that at least this share of the steps did not exceed.
            let rank = ((share * count as f64).ceil() as usize).clamp(1, count.max(1));
            match sorted.get(rank - 1) {
                Some(&seconds) => Quantity::measured(f64::from(seconds), "monotonic clock"),
                None => Quantity::unavailable("no step was finished"),
            }
        };
        let total_s: f64 = sorted.iter().map(|&seconds| f64::from(seconds)).sum();
        let mean_s = if count == 0 {
            Quantity::unavailable("no step was finished")
        } else {
            Quantity::measured(total_s / count as f64, "monotonic clock")
        };
        StepTimes {
            steps: count as u64,
            mean_s,
            median_s: at(0.5),
            p95_s: at(0.95),
            max_s: at(1.0),
        }
    }

    pub(crate) fn phases(&self, training_s: f64, evaluation_s: f64) -> Vec<PhaseReport> {
        let steps = self.steps_s.len() as u64;
        let phase_report = |phase: Phase| {
            let total_s = self.phase_s(phase);
            let (count, unit, whole_s) = match phase {
                Phase::Evaluation => (self.evaluations, "evaluations", training_s + evaluation_s),
                _ => (steps, "steps", training_s),
            };
            let total = Quantity::measured(total_s, "monotonic clock");
            let share = if whole_s > 0.0 {
                total.map("share of the wall time", |seconds| seconds / whole_s)
            } else {
                Quantity::unavailable("no training was measured")
            };
            PhaseReport {
                phase,
                total_s,
                mean_s: total.per(count, unit),
                share,
            }
        };
        Phase::ALL.map(phase_report).into()
    }

    pub(crate) fn other_s(&self, training_s: f64) -> Quantity {
        if training_s <= 0.0 {
            return Quantity::unavailable("no training was measured");
        }
        let in_phases_s: f64 = Phase::ALL
            .iter()
            .filter(|phase| **phase != Phase::Evaluation)
            .map(|&phase| self.phase_s(phase))
            .sum();
        Quantity::measured(
            training_s - in_phases_s,
            "training time less the four phases of a step",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_counts_over_seconds() {
        let counts = Counts {
            sequences: 8,
            padded_tokens: 1024,
            tokens: 900,
            supervised: 16,
        };
        let throughput = ActivityThroughput::new(Purpose::Training, counts, 2.0);
        assert_eq!(throughput.padded_tokens_per_s.value(), Some(512.0));
        assert_eq!(throughput.tokens_per_s.value(), Some(450.0));
        assert_eq!(throughput.supervised_per_s.value(), Some(8.0));
        assert_eq!(throughput.sequences_per_s.value(), Some(4.0));
    }

    #[test]
    fn nothing_measured_gives_reasons() {
        let nothing = ActivityThroughput::new(Purpose::Evaluation, Counts::default(), 0.0);
        assert_eq!(
            nothing.tokens_per_s,
            Quantity::unavailable("no evaluation was measured")
        );
        let idle = ActivityThroughput::new(Purpose::Training, Counts::default(), 1.0);
        assert_eq!(
            idle.tokens_per_s,
            Quantity::unavailable("no tokens were counted")
        );
        assert_eq!(StepLog::default().step_times().median_s.value(), None);
        assert_eq!(StepLog::default().other_s(0.0).value(), None);
    }

    #[test]
    fn step_times_are_ranked() {
        let mut log = StepLog::default();
        for tenths in (1..=20).rev() {
            log.add_step(f64::from(tenths) * 0.25);
        }
        let times = log.step_times();
        assert_eq!(times.steps, 20);
        assert_eq!(times.median_s.value(), Some(2.5));
        assert_eq!(times.p95_s.value(), Some(4.75));
        assert_eq!(times.max_s.value(), Some(5.0));
        assert_eq!(times.mean_s.value(), Some(2.625));
    }

    #[test]
    fn phases_are_summed_and_the_rest_is_shown() {
        let mut log = StepLog::default();
        for _ in 0..2 {
            log.add_phase(Phase::Data, 0.5);
            log.add_phase(Phase::Forward, 1.0);
            log.add_phase(Phase::Forward, 1.0);
            log.add_phase(Phase::Backward, 4.0);
            log.add_phase(Phase::Optimizer, 0.25);
            log.add_step(7.0);
        }
        log.add_phase(Phase::Evaluation, 6.0);
        let phases = log.phases(14.0, 6.0);
        let totals: Vec<f64> = phases.iter().map(|phase| phase.total_s).collect();
        assert_eq!(totals, [1.0, 4.0, 8.0, 0.5, 6.0]);
        assert_eq!(phases[1].mean_s.value(), Some(2.0));
        assert_eq!(phases[4].mean_s.value(), Some(6.0));
        assert_eq!(phases[4].share.value(), Some(0.3));
        assert_eq!(log.other_s(14.0).value(), Some(0.5));
    }
}
