use serde::{Deserialize, Serialize};

use crate::SequenceError;
use crate::pack::pack;
use crate::prepared::{Prepared, SampleSet};
use crate::random::SplitMix64;

/// How an epoch is cut into steps and micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanOptions {
    pub order: Order,
    /// Samples an optimizer step.
    pub global_batch: usize,
    /// Rows a micro-batch at most.
    pub micro_batch: usize,
    /// Tokens a packed row at most.
    pub max_tokens: usize,
    /// Several samples a row, instead of one.
    pub packing: bool,
}

/// In which order samples come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// A permutation that follows from these two numbers alone: for training.
    Shuffled { seed: u64, epoch: u64 },
    /// The longest first, so that rows of a batch are alike: for evaluation.
    ByLength,
}

/// The batches of one epoch. Every sample of the set comes exactly once; what a step holds is a
/// function of the set, the options and the step's number, so a run can go on from any step.
#[derive(Clone, Debug)]
pub struct BatchPlan {
    options: PlanOptions,
    samples: Vec<u32>,
    /// Tokens of each of `samples`.
    lengths: Vec<u32>,
}

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub index: usize,
    pub micro_batches: Vec<MicroBatch>,
}

/// Rows that are computed at once, each with the samples in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    pub rows: Vec<Vec<u32>>,
}

impl BatchPlan {
    /// # Errors
    /// A batch size of 0; a sample longer than `max_tokens` where rows are packed.
    pub fn new(
        prepared: &Prepared,
        set: &SampleSet,
        options: PlanOptions,
    ) -> Result<BatchPlan, SequenceError> {
        Self::of_lengths(set, |sample| prepared.length(sample as usize), options)
    }

    fn of_lengths(
        set: &SampleSet,
        length: impl Fn(u32) -> usize,
        options: PlanOptions,
    ) -> Result<BatchPlan, SequenceError> {
        for (what, size) in [
            ("global_batch", options.global_batch),
            ("micro_batch", options.micro_batch),
        ] {
            if size == 0 {
                return Err(SequenceError::Zero { what });
            }
        }
        let mut samples = set.samples().to_vec();
        match options.order {
            Order::Shuffled { seed, epoch } => SplitMix64::of(seed, epoch).shuffle(&mut samples),
            Order::ByLength => samples.sort_by_key(|&sample| std::cmp::Reverse(length(sample))),
        }
        let lengths: Vec<u32> = samples
            .iter()
            .map(|&sample| length(sample) as u32)
            .collect();
        if options.packing
            && let Some(position) = lengths
                .iter()
                .position(|&length| length as usize > options.max_tokens)
        {
            return Err(SequenceError::DoesNotPack {
                position,
                length: lengths[position] as usize,
                capacity: options.max_tokens,
            });
        }
        Ok(BatchPlan {
            options,
            samples,
            lengths,
        })
    }

    /// Number of optimizer steps; the last one may be smaller.
    pub fn steps(&self) -> usize {
        self.samples.len().div_ceil(self.options.global_batch)
    }

    /// Number of samples of the epoch.
    pub fn samples(&self) -> usize {
        self.samples.len()
    }

    /// Tokens of the epoch, padding not counted.
    pub fn tokens(&self) -> u64 {
        self.lengths.iter().map(|&length| u64::from(length)).sum()
    }

    /// # Panics
    /// When `step` is not below `steps()`.
    pub fn step(&self, step: usize) -> Step {
        assert!(step < self.steps(), "no step {step}");
        let start = step * self.options.global_batch;
        let end = (start + self.options.global_batch).min(self.samples.len());
        let samples = &self.samples[start..end];
        let lengths: Vec<usize> = self.lengths[start..end]
            .iter()
            .map(|&length| length as usize)
            .collect();
        let rows: Vec<Vec<u32>> = if self.options.packing {
            pack(&lengths, self.options.max_tokens)
                .expect("lengths were checked when the plan was made")
                .into_iter()
                .map(|row| row.into_iter().map(|position| samples[position]).collect())
                .collect()
        } else {
            let mut order: Vec<usize> = (0..samples.len()).collect();
            order.sort_by_key(|&position| std::cmp::Reverse(lengths[position]));
            order
                .into_iter()
                .map(|position| vec![samples[position]])
                .collect()
        };
        let mut rows = rows.into_iter();
        let mut micro_batches = Vec::new();
        loop {
            let rows: Vec<Vec<u32>> = rows.by_ref().take(self.options.micro_batch).collect();
            if rows.is_empty() {
                break;
            }
            micro_batches.push(MicroBatch { rows });
        }
        Step {
            index: step,
            micro_batches,
        }
    }
}

impl Step {
    pub fn samples(&self) -> impl Iterator<Item = u32> + '_ {
        self.micro_batches
            .iter()
            .flat_map(|micro_batch| micro_batch.rows.iter().flatten().copied())
    }

    /// Labels of the step that contribute to the loss: what its sum is divided by.
    pub fn supervised_count(&self, prepared: &Prepared) -> usize {
        self.samples()
            .map(|sample| prepared.sample(sample as usize).targets.supervised_count())
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options(
        order: Order,
        global_batch: usize,
        micro_batch: usize,
        packing: bool,
    ) -> PlanOptions {
        PlanOptions {
            order,
            global_batch,
            micro_batch,
            max_tokens: 64,
            packing,
        }
    }

    fn plan(lengths: &[usize], options: PlanOptions) -> BatchPlan {
        let set = SampleSet::from_samples((0..lengths.len() as u32).collect());
        BatchPlan::of_lengths(&set, |sample| lengths[sample as usize], options).unwrap()
    }

    #[test]
    fn sizes_of_zero_and_samples_that_are_too_long_are_refused() {
        let set = SampleSet::from_samples(vec![0, 1]);
        let make = |options| {
            BatchPlan::of_lengths(&set, |_| 65, options)
                .unwrap_err()
                .to_string()
        };
        assert!(make(options(Order::ByLength, 0, 1, false)).contains("global_batch"));
        assert!(make(options(Order::ByLength, 1, 0, false)).contains("micro_batch"));
        assert!(make(options(Order::ByLength, 1, 1, true)).contains("65 tokens"));
    }

    #[test]
    fn epochs_and_seeds_give_different_orders_of_the_same_samples() {
        let lengths = vec![1; 100];
        let order = |seed, epoch| {
            let options = options(Order::Shuffled { seed, epoch }, 100, 100, false);
            plan(&lengths, options).samples
        };
        assert_eq!(order(0, 0), order(0, 0));
        assert_ne!(order(0, 0), order(0, 1));
        assert_ne!(order(0, 0), order(1, 0));
        // Seeds and epochs that add up to the same are not the same.
        assert_ne!(order(0, 1), order(1, 0));
    }

    #[test]
    fn by_length_is_longest_first_over_all_steps() {
        let lengths = [3, 9, 5, 7, 1];
        let plan = plan(&lengths, options(Order::ByLength, 2, 2, false));
        let samples: Vec<u32> = (0..plan.steps())
            .flat_map(|step| plan.step(step).samples().collect::<Vec<_>>())
            .collect();
        assert_eq!(samples, [1, 3, 2, 0, 4]);
    }

    proptest! {
        #[test]
        fn every_sample_comes_exactly_once(
            lengths in prop::collection::vec(1usize..=64, 0..200),
            global_batch in 1usize..40,
            micro_batch in 1usize..9,
            packing: bool,
            shuffled: bool,
            seed: u64,
            epoch in 0u64..5,
        ) {
            let order = if shuffled { Order::Shuffled { seed, epoch } } else { Order::ByLength };
            let plan = plan(&lengths, options(order, global_batch, micro_batch, packing));
            let mut seen = Vec::new();
            for index in 0..plan.steps() {
                let step = plan.step(index);
                prop_assert_eq!(&step, &plan.step(index));
                let samples: Vec<u32> = step.samples().collect();
                let last = index + 1 == plan.steps();
                prop_assert!(samples.len() == global_batch || last);
                for micro in &step.micro_batches {
                    prop_assert!((1..=micro_batch).contains(&micro.rows.len()));
                    for row in &micro.rows {
                        let used: usize = row.iter().map(|&s| lengths[s as usize]).sum();
                        prop_assert!(used <= 64);
                        prop_assert!(packing || row.len() == 1);
                    }
                }
                seen.extend(samples);
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len() as u32).collect::<Vec<_>>());
        }
    }
}
