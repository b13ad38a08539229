//! The steps of a run, through all of its epochs.

use std::sync::Arc;

use calor_sequence::{BatchPlan, Order, PlanOptions, Prepared, SampleSet, Step};

use crate::TrainError;
use crate::data::Data;
use crate::recipe::Recipe;
use crate::schedule::Schedule;
use crate::seed::derive;

/// All steps of a run: which epoch each is of, and what it holds.
pub(crate) struct RunPlan {
    prepared: Arc<Prepared>,
    set: SampleSet,
    seed: u64,
    options: PlanOptions,
    pub steps_per_epoch: u64,
    pub total_steps: u64,
}

impl RunPlan {
    pub fn new(recipe: &Recipe, data: &Data, set: &SampleSet) -> Result<RunPlan, TrainError> {
        if set.is_empty() {
            return Err(TrainError::Task { task: recipe.task.kind.name(), problem: "no labelled patient is in the split `train`; see metadata/subject_splits.parquet and the label set".to_owned() });
        }
        let seed = derive(recipe.train.seed, "order", &[]);
        let options = PlanOptions {
            order: Order::Shuffled { seed, epoch: 0 },
            global_batch: recipe.train.global_batch,
            micro_batch: recipe.train.micro_batch,
            max_tokens: recipe.sequence.max_tokens,
            packing: recipe.sequence.packing,
        };
        let steps_per_epoch = BatchPlan::new(&data.prepared, set, options)?.steps() as u64;
        let all = steps_per_epoch * recipe.train.epochs;
        let total_steps = recipe.train.max_steps.map_or(all, |most| most.min(all));
        Ok(RunPlan {
            prepared: data.prepared.clone(),
            set: set.clone(),
            seed,
            options,
            steps_per_epoch,
            total_steps,
        })
    }

    /// Epochs done after `step` steps.
    pub fn epochs(&self, step: u64) -> f64 {
        step as f64 / self.steps_per_epoch as f64
    }

    pub fn schedule(&self, recipe: &Recipe) -> Schedule {
        let section = &recipe.train.schedule;
        let share = |fraction| Schedule::steps_of(fraction, self.total_steps);
        let warmup = section
            .warmup_steps
            .unwrap_or_else(|| share(section.warmup_fraction.unwrap_or(0.0)));
        let decay = section
            .decay_steps
            .unwrap_or_else(|| share(section.decay_fraction.unwrap_or(0.0)));
        Schedule::new(section.kind, warmup, self.total_steps)
            .with_decay(decay, section.decay_shape)
            .with_minimum(section.minimum_factor)
    }

    /// The steps after the first `done`, through all epochs.
    pub fn steps_from(&self, done: u64) -> impl Iterator<Item = Step> + Send + use<> {
        let (prepared, set, seed, options) = (
            self.prepared.clone(),
            self.set.clone(),
            self.seed,
            self.options,
        );
        let (steps_per_epoch, total_steps) = (self.steps_per_epoch, self.total_steps);
        let mut plan: Option<(u64, BatchPlan)> = None;
        (done..total_steps).map(move |step| {
            let (epoch, within) = (step / steps_per_epoch, step % steps_per_epoch);
            if plan.as_ref().map(|(of, _)| *of) != Some(epoch) {
                let options = PlanOptions {
                    order: Order::Shuffled { seed, epoch },
                    ..options
                };
                plan = Some((
                    epoch,
                    BatchPlan::new(&prepared, &set, options)
                        .expect("the first epoch's plan was made of the same samples"),
                ));
            }
            let (_, plan) = plan.as_ref().expect("it was made above");
            plan.step(within as usize)
        })
    }
}
