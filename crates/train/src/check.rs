//! Everything that can fail, found before a run is started.

use std::collections::BTreeMap;

use calor_meter::{Meter, Purpose, Quantity};
use calor_model::{Model, ModelSize, Restriction};
use calor_records::Split;
use calor_sequence::{PrefetchedBatch, PrepareReport};
use serde::Serialize;

use crate::TrainError;
use crate::artifacts::report::SplitCounts;
use crate::device::{describe_with_products, synchronise};
use crate::loss_scale::LossScale;
use crate::memory::{MemoryPlan, MemoryPrediction};
use crate::observer::{Observer, Stage};
use crate::opening::Opening;
use crate::preflight::{largest_micro_batch, shape_of, training_loss};
use crate::recipe::{AdapterKind, Dtype};
use crate::session::{RunOptions, model_options, open_device, record_device_memory};
use crate::step::TrainStep;

/// What a recipe would do, tried in part.
#[derive(Clone, Debug, Serialize)]
pub struct CheckReport {
    /// The recipe's name.
    pub name: String,
    /// The device.
    pub device: String,
    /// What the device is.
    pub device_description: String,
    /// What each split holds.
    pub splits: BTreeMap<String, SplitCounts>,
    /// What became of the patients on the way to tokens.
    pub sequences: PrepareReport,
    /// Numbers of parameters.
    pub model: ModelSize,
    /// How many modules the adapter has a pair on.
    pub adapted_modules: usize,
    /// Bytes of the optimizer's state, and of averages where there are some.
    pub optimizer_bytes: u64,
    /// Optimizer steps an epoch.
    pub steps_per_epoch: u64,
    /// Optimizer steps of the run.
    pub total_steps: u64,
    /// The peak memory by component, predicted.
    pub memory: MemoryPrediction,
    /// The step that needs the most memory, tried once.
    pub trial: Trial,
    /// What vLLM and mistral.rs would not load of the adapter.
    pub restrictions: Vec<Restriction>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// One optimizer step of the largest micro-batch, with all that belongs to it.
#[derive(Clone, Debug, Serialize)]
pub struct Trial {
    /// Rows of the micro-batch.
    pub rows: usize,
    /// Tokens a row, padding included.
    pub seq: usize,
    /// Wall time, everything the device does at its first step included.
    pub elapsed_s: f64,
    /// The loss, of an untrained head.
    pub loss: f64,
    /// Norm of the gradients; none where they overflow at the first loss scale of f16.
    pub grad_norm: Option<f64>,
    /// Peak memory of the process.
    pub host_peak_bytes: Quantity,
    /// Peak memory of the device, where it has its own.
    pub device_peak_bytes: Quantity,
}

/// Opens all that a run needs, prepares its sequences (they are kept for the run), loads the
/// model and tries the optimizer step that needs the most memory. Writes nothing but the cache.
///
/// # Errors
/// Whatever would make the run fail.
pub fn check(options: &RunOptions, observer: &mut dyn Observer) -> Result<CheckReport, TrainError> {
    let recipe = &options.recipe;
    recipe.train.kernels.take();
    let device = open_device(options.device, recipe.model.dtype)?;
    let Opening {
        checkpoint,
        data,
        plan,
        task,
        objective,
        prior,
        fusion,
    } = Opening::new(options, observer)?;

    // Refused before a weight is read.
    let options_of_model = model_options(recipe, &checkpoint, task.classes.len(), fusion)?;
    let mut meter = Meter::open(&recipe.energy, &options.device.metered(&device))
        .map_err(|error| TrainError::Meter(Box::new(error)))?;
    let largest = largest_micro_batch(&plan, &data, options.device.seq_multiple())?;
    let memory_plan = MemoryPlan::new(
        recipe,
        &checkpoint,
        &options_of_model,
        options.device,
        shape_of(&largest),
        meter.report().memory.device_total_bytes,
    )?;
    let predicted = memory_plan.predict()?;
    predicted.check()?;

    observer.stage(Stage::Load);
    let mut model = Model::load(&checkpoint, &options_of_model, &device)?;
    if let Some(prior) = prior {
        model.start_from(&prior);
    }
    model.set_recompute(memory_plan.recompute());
    let model_size = model.size();
    let adapted_modules = model.lora_modules().len();

    observer.stage(Stage::Train);
    let (rows, seq) = (largest.batch.rows, largest.batch.seq);
    let supervised = largest.batch.supervised_count.max(1) as f64;
    let mut step = TrainStep::from_recipe(
        &recipe.train,
        &mut model,
        recipe.adapter.kind == AdapterKind::Lora,
    )?;
    step.loss_scale = (recipe.model.dtype == Dtype::F16).then(LossScale::default);
    synchronise(&device, "trying a step")?;
    meter.begin(Purpose::WarmUp);
    let started = std::time::Instant::now();
    let result = step.run(
        &mut model,
        std::iter::once(largest),
        |model: &Model, batch: PrefetchedBatch, _: &mut Meter| {
            training_loss(model, &batch, &objective, &device)
        },
        supervised,
        1.0,
        1,
        &mut meter,
    )?;
    synchronise(&device, "trying a step")?;
    let elapsed_s = started.elapsed().as_secs_f64();
    record_device_memory(&mut meter, options.device, &device);
    meter.end();
    let memory = meter.report().memory;

    let mut warnings = Vec::new();
    for split in [Split::Tuning, Split::HeldOut] {
        if data.set(split).is_empty() {
            let name = split.name();
            warnings.push(format!("no labelled patient is in the split `{name}`"));
        }
    }
    if !result.unmoved.is_empty() {
        warnings.push(format!(
            "{} adapter tensors have no gradient, among them {}",
            result.unmoved.len(),
            result.unmoved[0]
        ));
    }
    let splits = Split::ALL.map(|split| {
        let counts = data.split_counts(recipe.task.kind, &data.set(split));
        (split.name().to_owned(), counts)
    });
    Ok(CheckReport {
        name: recipe.name.clone(),
        device: options.device.to_string(),
        device_description: describe_with_products(&device),
        splits: splits.into_iter().collect(),
        sequences: data.prepared.report().clone(),
        model: model_size,
        adapted_modules,
        optimizer_bytes: step.state_bytes(),
        steps_per_epoch: plan.steps_per_epoch,
        total_steps: plan.total_steps,
        memory: predicted,
        trial: Trial {
            rows,
            seq,
            elapsed_s,
            loss: result.loss,
            grad_norm: result.grad_norm,
            host_peak_bytes: memory.host_peak_bytes,
            device_peak_bytes: memory.device_peak_bytes,
        },
        restrictions: model.restrictions(),
        warnings,
    })
}
