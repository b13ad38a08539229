//! What a run will do, tried before its first step: the largest batch, an evaluation, a save. A run
//! that would die at step 900 dies at once, and nothing that is computed later changes.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use calor_meter::{Meter, Purpose};
use calor_model::{Mode, Model, PassShape};
use calor_sequence::{PrefetchedBatch, SampleSet, Step, collate};

use crate::TrainError;
use crate::checkpoint::{Checkpoints, TrainerState};
use crate::data::{Data, TaskFile};
use crate::device::{DeviceSpec, synchronise};
use crate::evaluation::Scoring;
use crate::files::remove;
use crate::objective::Objective;
use crate::observer::StopFlag;
use crate::plan::RunPlan;
use crate::session::fill_adapter;
use crate::step::{TrainStep, read_loss_and_norm};
use crate::upload;

/// Where the checkpoint goes that is only tried, in the run's folder.
const FOLDER: &str = ".preflight";

/// What a preflight needs of a run.
pub(crate) struct Preflight<'a> {
    pub data: &'a Data,
    pub plan: &'a RunPlan,
    pub task: &'a TaskFile,
    pub objective: &'a Objective,
    pub scoring: &'a Scoring<'a>,
    /// The patients that the loop evaluates.
    pub tuning: &'a SampleSet,
    pub device: DeviceSpec,
    /// The run's folder.
    pub folder: &'a Path,
    /// The checkpoint's name in the recipe.
    pub base: &'a str,
}

impl Preflight<'_> {
    /// Goes through all of it, metered as warm-up. Model, optimizer and state are as before.
    ///
    /// # Errors
    /// [`TrainError::Preflight`] with what failed and why.
    pub fn run(
        &self,
        model: &mut Model,
        train_step: &TrainStep,
        state: &TrainerState,
        meter: &mut Meter,
    ) -> Result<(), TrainError> {
        let failed = |doing: String| {
            move |source: TrainError| TrainError::Preflight {
                doing,
                source: Box::new(source),
            }
        };
        let largest = largest_micro_batch(self.plan, self.data, self.device.seq_multiple())?;
        let tried = format!(
            "computing the largest micro-batch, {} × {} tokens, forward and backward",
            largest.batch.rows, largest.batch.seq
        );
        let device = model.device().clone();
        synchronise(&device, "trying a step")?;
        meter.begin(Purpose::WarmUp);
        self.backward(model, train_step, largest, meter)
            .map_err(failed(tried))?;
        self.evaluate(model, meter)
            .map_err(failed("scoring patients as an evaluation does".to_owned()))?;
        self.save(model, train_step, state).map_err(failed(
            "writing a checkpoint and reading it again".to_owned(),
        ))?;
        synchronise(&device, "trying a step")?;
        meter.end();
        Ok(())
    }

    fn backward(
        &self,
        model: &mut Model,
        train_step: &TrainStep,
        largest: PrefetchedBatch,
        meter: &mut Meter,
    ) -> Result<(), TrainError> {
        let supervised = largest.batch.supervised_count.max(1) as f64;
        let device = model.device().clone();
        let mut forward = |model: &Model, batch: PrefetchedBatch, _: &mut Meter| {
            training_loss(model, &batch, self.objective, &device)
        };
        let batches = std::iter::once(largest);
        let (gradients, losses) =
            train_step.gradients(model, batches, &mut forward, supervised, meter)?;
        let (loss, _) = read_loss_and_norm(losses, &gradients)?;
        if !loss.is_finite() {
            return Err(TrainError::NonFinite {
                what: "the loss",
                value: loss,
                step: 0,
                last_checkpoint: None,
            });
        }
        Ok(())
    }

    /// Scores the longest patients of the evaluation, one micro-batch of them.
    fn evaluate(&self, model: &Model, meter: &mut Meter) -> Result<(), TrainError> {
        let mut samples = self.tuning.samples().to_vec();
        samples
            .sort_by_key(|&sample| std::cmp::Reverse(self.data.prepared.length(sample as usize)));
        samples.truncate(self.scoring.micro_batch);
        if samples.is_empty() {
            return Ok(());
        }
        let set = SampleSet::from_samples(samples);
        let never = StopFlag::new();
        let scoring = Scoring {
            purpose: Purpose::WarmUp,
            ..*self.scoring
        };
        let scored = scoring.score(model, self.data, &set, meter, &mut (), &never)?;
        if let Some(scored) = scored {
            scored.quick_metrics()?;
        }
        Ok(())
    }

    fn save(
        &self,
        model: &mut Model,
        train_step: &TrainStep,
        state: &TrainerState,
    ) -> Result<(), TrainError> {
        let folder: PathBuf = self.folder.join(FOLDER);
        remove(&folder)?;
        let checkpoints = Checkpoints::new(&folder, 1);
        let evaluated = train_step.evaluated(&*model);
        let written = checkpoints
            .write(model, &train_step.save(), state, |folder| {
                fill_adapter(&evaluated, self.task, self.base, folder)
            })
            .and_then(|path| match checkpoints.latest()? {
                (Some(found), _) if found.state == *state => Ok(()),
                _ => Err(TrainError::Corrupt {
                    path,
                    problem: "does not read as it was written".to_owned(),
                }),
            });
        remove(&folder)?;
        written
    }
}

/// The loss of a micro-batch with nothing withheld, as in training.
pub(crate) fn training_loss(
    model: &Model,
    batch: &PrefetchedBatch,
    objective: &Objective,
    device: &Device,
) -> Result<Tensor<1>, TrainError> {
    let fusion = model.options().fusion.as_ref();
    let input = upload::input(&batch.batch, fusion, |_| false, device)?;
    model.check_soft(&input)?;
    let mode = Mode::Train { dropout_seed: 0 };
    Ok(objective.loss_of(model, &input, &batch.batch, mode, device))
}

/// Sizes of a collated micro-batch.
pub(crate) fn shape_of(batch: &PrefetchedBatch) -> PassShape {
    PassShape {
        rows: batch.batch.rows,
        seq: batch.batch.seq,
        samples: batch.batch.samples.len(),
    }
}

/// The micro-batch of the first epoch with the most positions, padding included.
pub(crate) fn largest_micro_batch(
    plan: &RunPlan,
    data: &Data,
    seq_multiple: usize,
) -> Result<PrefetchedBatch, TrainError> {
    let row_length = |row: &Vec<u32>| -> usize {
        let lengths = row
            .iter()
            .map(|sample| data.prepared.length(*sample as usize));
        lengths.sum()
    };
    let positions = |rows: &[Vec<u32>]| {
        let longest = rows.iter().map(row_length).max().unwrap_or(0);
        rows.len() * longest
    };
    let steps = plan.steps_from(0).take(plan.steps_per_epoch as usize);
    let largest = steps
        .flat_map(|step: Step| step.micro_batches)
        .max_by_key(|micro| positions(&micro.rows))
        .expect("a plan has a step, and a step a micro-batch");
    let mut batch = collate(&data.prepared, &largest, data.pad_id, seq_multiple);
    data.items.fill(&mut batch)?;
    Ok(PrefetchedBatch {
        step: 0,
        micro: 0,
        micro_count: 1,
        step_supervised_count: batch.supervised_count,
        batch,
    })
}
