//! The training loop. There is one, and it is read from top to bottom.

use std::path::{Path, PathBuf};

use calor_meter::{Counts, Meter, Phase, Purpose};
use calor_model::{Mode, Model};
use calor_records::Split;
use calor_sequence::{PlacedItem, PrefetchedBatch, Prefetcher, SequenceError};

use crate::TrainError;
use crate::artifacts::metrics::{EvaluationLine, MetricsFile, MetricsLine, StepLine};
use crate::artifacts::report::Report;
use crate::artifacts::tensorboard::TensorBoard;
use crate::calibration;
use crate::checkpoint::{Checkpoints, FoundCheckpoint, Session, TrainerState};
use crate::device::synchronise;
use crate::evaluation::Scoring;
use crate::finish::{Finished, finish};
use crate::loss_scale::LossScale;
use crate::memory::MemoryPlan;
use crate::observer::{Observer, Stage, StepProgress, StopFlag};
use crate::opening::Opening;
use crate::optimizer::LearningRates;
use crate::preflight::{Preflight, largest_micro_batch, shape_of};
use crate::recipe::{AdapterKind, Dtype, Metric};
use crate::run_folder::RunFolder;
use crate::seed::derive;
use crate::session::{
    Hashing, RunOptions, describe_work, fill_adapter, model_options, open_device,
    record_device_memory, save_adapter,
};
use crate::step::TrainStep;
use crate::upload;

/// Micro-batches that wait, collated, for the device.
const PREFETCH: usize = 4;
/// First steps of a process that a GPU compiles and tunes in: measured apart.
const WARM_UP_STEPS: u64 = 3;

/// How a run ended.
#[derive(Debug)]
pub enum TrainOutcome {
    /// All is done and written.
    Finished(Box<Report>),
    /// It was asked to stop; `--resume` goes on from the checkpoint.
    Stopped {
        /// Optimizer steps done.
        step: u64,
        /// Where the run goes on from.
        checkpoint: PathBuf,
    },
}

/// Runs a recipe, from the cohort to the report.
///
/// # Errors
/// Whatever is wrong with recipe, cohort, checkpoint, device or disk; a loss that is not
/// finite; an adapter that does not move.
pub fn train(
    options: &RunOptions,
    observer: &mut dyn Observer,
    stop: &StopFlag,
) -> Result<TrainOutcome, TrainError> {
    let recipe = &options.recipe;
    let seed = recipe.train.seed;

    // Seeds come first. What the loop itself draws (order, dropout) follows by hashing from
    // the seed and the step; the device's own generator is used by nothing of ours.
    recipe.train.kernels.take();
    let device = open_device(options.device, recipe.model.dtype)?;
    device.seed(derive(seed, "device", &[]));

    // The run's folder is ours from here on.
    let folder = RunFolder::open(&options.out, recipe, options.resume)?;
    let checkpoints = Checkpoints::new(folder.path(), recipe.train.keep_checkpoints);

    // Patients and checkpoint, checked before a weight is read.
    let Opening {
        checkpoint,
        data,
        plan,
        task,
        objective,
        prior,
        fusion,
    } = Opening::new(options, observer)?;
    let tuning = data.set(Split::Tuning);
    if tuning.is_empty() {
        observer.warning("no labelled patient is in the split `tuning`: nothing decides on the best model, the last one is kept");
    }

    // What it needs is known before a weight is read.
    let model_options = model_options(recipe, &checkpoint, task.classes.len(), fusion)?;
    let mut meter = Meter::open(&recipe.energy, &options.device.metered(&device))
        .map_err(|error| TrainError::Meter(Box::new(error)))?;
    let memory = MemoryPlan::new(
        recipe,
        &checkpoint,
        &model_options,
        options.device,
        shape_of(&largest_micro_batch(
            &plan,
            &data,
            options.device.seq_multiple(),
        )?),
        meter.report().memory.device_total_bytes,
    )?;
    if recipe.train.preflight {
        memory.predict()?.check()?;
    }

    // The model: frozen backbone, adapter, head.
    observer.stage(Stage::Load);
    let hashing = Hashing::start(&options.checkpoint);
    let (found, broken) = checkpoints.latest()?;
    let mut model = Model::load_again(
        &checkpoint,
        &model_options,
        found.as_ref().map(FoundCheckpoint::adapter).as_deref(),
        &device,
    )?;
    model.set_recompute(memory.recompute());
    let mut train_step = TrainStep::from_recipe(
        &recipe.train,
        &mut model,
        recipe.adapter.kind == AdapterKind::Lora,
    )?;
    train_step.loss_scale = (recipe.model.dtype == Dtype::F16).then(LossScale::default);
    let peak = LearningRates::from_recipe(&recipe.train);
    let schedule = plan.schedule(recipe);
    if schedule.warmup_steps() >= plan.total_steps && plan.total_steps > 1 {
        observer.warning(&format!(
            "the warm-up of {} steps is as long as the run: the learning rate never gets to its peak",
            schedule.warmup_steps()
        ));
    }

    // Where the run stands: at its beginning, or at its newest complete checkpoint.
    let data_hash = data.prepared.report().hash.clone();
    let mut state = TrainerState::new(data_hash.clone());
    let mut last_checkpoint = None;
    for path in broken {
        observer.warning(&format!(
            "{} is not complete and is passed over",
            path.display()
        ));
    }
    if let Some(found) = found {
        if found.state.data_hash != data_hash {
            return Err(TrainError::RunFolder { path: options.out.clone(), problem: "the cohort, its labels or the tokenizer changed since the run was started; start it anew with another --out".to_owned() });
        }
        let kept = Checkpoints::restore(&found, &mut model, &device)?;
        train_step
            .restore(kept, &device)
            .map_err(|problem| TrainError::Corrupt {
                path: found.path.clone(),
                problem,
            })?;
        if found.state.loss_scale.is_some() {
            train_step.loss_scale = found.state.loss_scale;
        }
        observer.resumed(&found.path, found.state.step);
        state = found.state;
        last_checkpoint = Some(found.path);
    } else {
        if let Some(prior) = prior {
            model.start_from(&prior);
        }
        calibration::calibrate(&mut model, &data, recipe.train.micro_batch)?;
    }
    let first_step = state.step + 1;
    let (mut metrics, mut lines) = MetricsFile::open(folder.path(), state.step)?;
    let mut board = TensorBoard::open(folder.path(), first_step)?;

    // The meter watches the machine at rest, then in windows.
    observer.stage(Stage::Idle);
    meter.measure_idle();
    describe_work(&mut meter, &model, options.device, recipe.model.dtype)?;

    let watched = recipe
        .evaluate
        .metric
        .unwrap_or(Metric::default_of(recipe.task.kind));
    let scoring = Scoring {
        task: &task,
        sequence: &recipe.sequence,
        micro_batch: recipe
            .evaluate
            .micro_batch
            .unwrap_or(recipe.train.micro_batch),
        device: options.device,
        withheld: &[],
        purpose: Purpose::Evaluation,
    };

    // What the run will do later, tried now; on a run that goes on as well: the machine may be
    // another.
    if recipe.train.preflight && state.step < plan.total_steps && !state.stopped_early {
        observer.stage(Stage::Preflight);
        let preflight = Preflight {
            data: &data,
            plan: &plan,
            task: &task,
            objective: &objective,
            scoring: &scoring,
            tuning: &tuning,
            device: options.device,
            folder: folder.path(),
            base: &recipe.model.id,
        };
        preflight.run(&mut model, &train_step, &state, &mut meter)?;
    }

    // The loop.
    observer.stage(Stage::Train);
    let mut batches = Prefetcher::new(
        data.prepared.clone(),
        data.items.clone(),
        plan.steps_from(state.step),
        data.pad_id,
        options.device.seq_multiple(),
        PREFETCH,
    )
    .map_err(TrainError::io("start a thread for", "collating batches"))?;
    let mut seconds_a_step = None;
    let mut window = None;
    loop {
        // An evaluation that is due, or that a signal cut off before the run was resumed.
        let due = state.step > 0
            && (state.step.is_multiple_of(recipe.evaluate.every_steps)
                || state.step == plan.total_steps
                || stop.pauses(state.step, false));
        if due && !tuning.is_empty() && state.evaluated_step != Some(state.step) && !stop.is_set() {
            let started = std::time::Instant::now();
            let device = model.device().clone();
            let evaluated = train_step.evaluated(&model);
            let scored = meter.within(
                Purpose::Evaluation,
                || drop(device.sync()),
                |meter| {
                    let started = std::time::Instant::now();
                    let scored = scoring.score(&evaluated, &data, &tuning, meter, observer, stop);
                    meter.add_phase(Phase::Evaluation, started.elapsed().as_secs_f64());
                    scored
                },
            )?;
            if let Some(scored) = scored {
                let values = scored.quick_metrics()?;
                let value = values
                    .get(watched.name())
                    .copied()
                    .flatten()
                    .unwrap_or(f64::NAN);
                let best = state.evaluated(watched, value, recipe.evaluate.patience);
                if best {
                    save_adapter(&evaluated, &task, &recipe.model.id, &folder.adapter())?;
                }
                let line = EvaluationLine {
                    step: state.step,
                    epoch: plan.epochs(state.step),
                    elapsed_s: started.elapsed().as_secs_f64(),
                    metrics: values,
                    best,
                };
                for (name, value) in line
                    .metrics
                    .iter()
                    .filter_map(|(name, value)| value.map(|value| (name, value)))
                {
                    board.scalar(&format!("tuning/{name}"), value, state.step)?;
                }
                board.flush()?;
                observer.evaluated(&line, watched);
                let line = MetricsLine::Evaluation(line);
                metrics.write(&line)?;
                lines.push(line);
            }
            observer.stage(Stage::Train);
        }

        // A checkpoint: regularly, at the end, and when the run is asked to stop.
        let done = state.step >= plan.total_steps || state.stopped_early;
        let regular = state.step.is_multiple_of(
            recipe
                .train
                .checkpoint_every_steps
                .unwrap_or(recipe.evaluate.every_steps),
        );
        let paused = stop.pauses(state.step, done);
        let written = last_checkpoint.as_deref() == Some(checkpoints.path_of(state.step).as_path())
            && state.step < first_step;
        if !written && (done || paused || stop.is_set() || (regular && state.step >= first_step)) {
            synchronise(&device, "writing a checkpoint")?;
            record_device_memory(&mut meter, options.device, &device);
            meter.end();
            window = None;
            let mut saved = state.clone();
            if state.step >= first_step {
                saved.earlier_sessions.push(Session {
                    first_step,
                    last_step: state.step,
                    meter: meter.report(),
                });
            }
            let evaluated = train_step.evaluated(&model);
            let path = checkpoints.write(&mut model, &train_step.save(), &saved, |folder| {
                fill_adapter(&evaluated, &task, &recipe.model.id, folder)
            })?;
            observer.checkpoint(&path);
            last_checkpoint = Some(path);
        }
        if done && !paused {
            break;
        }
        if paused || stop.is_set() {
            return Ok(TrainOutcome::Stopped {
                step: state.step,
                checkpoint: checkpoints.path_of(state.step),
            });
        }

        // One optimizer step.
        let step = state.step + 1;
        let warm_up = options.device.is_asynchronous() && step < first_step + WARM_UP_STEPS;
        let purpose = if warm_up {
            Purpose::WarmUp
        } else {
            Purpose::Training
        };
        if window != Some(purpose) {
            synchronise(&device, "training")?;
            meter.begin(purpose);
            window = Some(purpose);
        }
        let loss_scale = train_step.loss_scale.map(|scale| scale.factor());
        let factor = schedule.factor(state.step);
        let Some(first) = meter.time(Phase::Data, || batches.next()) else {
            unreachable!("the plan has a batch for every step");
        };
        let first = first?;
        let supervised = first.step_supervised_count.max(1) as f64;
        let others = first.micro_count - 1;
        let micro_batches = std::iter::once(Ok(first)).chain(batches.by_ref().take(others));
        let forward =
            |model: &Model, batch: Result<PrefetchedBatch, SequenceError>, meter: &mut Meter| {
                let batch = batch?;
                count(meter, purpose, &batch);
                let dropout_seed = derive(seed, "dropout", &[step, batch.micro as u64]);
                let withheld = |item: &PlacedItem| {
                    let sample = batch.batch.samples[item.span];
                    let drawn = derive(
                        seed,
                        "modality dropout",
                        &[step, sample, item.stream as u64],
                    );
                    (drawn as f64) < recipe.modality.dropout * 2f64.powi(64)
                };
                let input = upload::input(
                    &batch.batch,
                    model.options().fusion.as_ref(),
                    withheld,
                    &device,
                )?;
                model.check_soft(&input)?;
                let mode = Mode::Train { dropout_seed };
                Ok(objective.loss_of(model, &input, &batch.batch, mode, &device))
            };
        let result = train_step
            .run(
                &mut model,
                micro_batches,
                forward,
                supervised,
                factor,
                step,
                &mut meter,
            )
            .map_err(|error| after(error, last_checkpoint.as_deref()))?;
        state.step = step;
        state.loss_scale = train_step.loss_scale;
        if !result.unmoved.is_empty() {
            observer.warning(&format!(
                "{} adapter tensors did not move at the first update, among them {}",
                result.unmoved.len(),
                result.unmoved[0]
            ));
        }

        // What the step was, for people and files.
        let reading = meter.finish_step();
        let live = meter.live();
        seconds_a_step = Some(seconds_a_step.map_or(reading.elapsed_s, |before: f64| {
            0.9 * before + 0.1 * reading.elapsed_s
        }));
        let line = StepLine {
            step,
            epoch: plan.epochs(step),
            loss: result.loss,
            grad_norm: result.grad_norm,
            loss_scale,
            learning_rate: peak.adapter * factor,
            head_learning_rate: peak.head * factor,
            elapsed_s: reading.elapsed_s,
            data_s: reading.data_s,
            forward_s: reading.forward_s,
            backward_s: reading.backward_s,
            optimizer_s: reading.optimizer_s,
            tokens: reading.counts.tokens,
            padded_tokens: reading.counts.padded_tokens,
            supervised: reading.counts.supervised,
            tokens_per_s: reading.tokens_per_s,
            watts: live.watts.value(),
        };
        for (tag, value) in [
            ("train/loss", line.loss),
            ("train/learning_rate", line.learning_rate),
        ] {
            board.scalar(tag, value, step)?;
        }
        for (tag, value) in [
            ("train/grad_norm", line.grad_norm),
            ("train/loss_scale", line.loss_scale),
            ("speed/tokens_per_s", line.tokens_per_s),
            ("energy/watts", line.watts),
        ] {
            if let Some(value) = value {
                board.scalar(tag, value, step)?;
            }
        }
        board.flush()?;
        observer.step(&StepProgress {
            step,
            total_steps: plan.total_steps,
            epoch: line.epoch,
            loss: line.loss,
            learning_rate: line.learning_rate,
            tokens_per_s: live.tokens_per_s,
            watts: live.watts,
            remaining_s: seconds_a_step.map(|seconds| seconds * (plan.total_steps - step) as f64),
        });
        let line = MetricsLine::Step(line);
        metrics.write(&line)?;
        lines.push(line);
    }
    drop(batches);

    // The best model is kept, evaluated on patients that nothing was decided on, and reported.
    let finished = Finished {
        options,
        folder: &folder,
        data: &data,
        task: &task,
        objective: &objective,
        plan: &plan,
        state: &state,
        lines: &lines,
        scoring: &scoring,
    };
    let mut model = train_step.evaluated(&model);
    match finish(&finished, &mut model, &mut meter, hashing, observer, stop)? {
        Some(report) => Ok(TrainOutcome::Finished(Box::new(report))),
        None => Ok(TrainOutcome::Stopped {
            step: state.step,
            checkpoint: checkpoints.path_of(state.step),
        }),
    }
}

/// Tells the meter what a micro-batch holds.
pub(crate) fn count(meter: &mut Meter, purpose: Purpose, batch: &PrefetchedBatch) {
    let batch = &batch.batch;
    let counts = Counts {
        sequences: batch.spans.len() as u64,
        padded_tokens: batch.padded_token_count as u64,
        tokens: batch.token_count as u64,
        supervised: batch.supervised_count as u64,
    };
    let lengths: Vec<usize> = batch.spans.iter().map(|span| span.length).collect();
    meter.count(purpose, counts, &lengths);
}

/// Names the last good checkpoint in the watchdog's error.
fn after(error: TrainError, checkpoint: Option<&Path>) -> TrainError {
    match error {
        TrainError::NonFinite {
            what, value, step, ..
        } => TrainError::NonFinite {
            what,
            value,
            step,
            last_checkpoint: checkpoint.map(Path::to_owned),
        },
        other => other,
    }
}
