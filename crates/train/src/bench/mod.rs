//! One optimizer step again and again: the code of the training loop, on a batch from a file
//! or of random tokens, for comparison with other engines.

mod batch;
mod options;
mod profile;
mod report;

use burn::tensor::Device;
use calor_meter::{Meter, MeterReport, PeakFlops, Purpose, Quantity};
use calor_model::{
    Checkpoint, FrozenWeights, HeadOptions, MemoryModel, Mode, Model, ModelInput, ModelOptions,
    PassShape, Pooling, Problem, Recompute,
};

use crate::TrainError;
use crate::device::{describe_with_products, synchronise};
use crate::loss_scale::LossScale;
use crate::memory::MemoryPlan;
use crate::objective::{ClassCounts, Objective};
use crate::optimizer::{OptimizerOptions, TensorRules};
use crate::recipe::{AdapterKind, ClassWeighting, ClassWeights, Dtype, TaskKind};
use crate::seed::derive;
use crate::session::{
    LARGE_PRODUCTS, QUICK_PRODUCT, describe_model, fastest_product, float_dtype, model_options,
    open_device, peak_flops, record_device_memory,
};
use crate::step::{StepResult, TrainStep};
use crate::upload;

use batch::Batch;
use options::CLASSES;
pub use options::{BenchTask, StepBenchOptions};
pub use profile::{OperationProfile, OtherTimes, PhaseTimes, StepProfile};
pub use report::{Spread, StepBenchReport, WindowReport};

/// Runs the steps.
///
/// # Errors
/// A checkpoint, an adapter or a batch that does not fit; a loss that is not finite.
pub fn step_bench(options: &StepBenchOptions) -> Result<StepBenchReport, TrainError> {
    let mut bench = Bench::open(options)?;
    let mut meter = Meter::open(&options.energy, &options.device.metered(&bench.device))
        .map_err(|error| TrainError::Meter(Box::new(error)))?;
    let (recompute, predicted) = bench.memory(meter.report().memory.device_total_bytes)?;
    bench.model.set_recompute(recompute);
    meter.measure_idle();
    describe_model(&mut meter, &bench.model, options.device);

    let mut report = Found::default();
    synchronise(&bench.device, "benchmarking")?;
    meter.begin(Purpose::WarmUp);
    for _ in 0..options.warmup {
        bench.metered(Purpose::WarmUp, &mut meter, &mut report)?;
    }
    meter.end();
    let tokens = bench.batch.counts().tokens * options.steps as u64;
    for _ in 0..options.windows {
        meter.begin(Purpose::Training);
        let started = std::time::Instant::now();
        for _ in 0..options.steps {
            let elapsed_s = bench.metered(Purpose::Training, &mut meter, &mut report)?;
            report.step_s.push(elapsed_s);
        }
        let elapsed_s = started.elapsed().as_secs_f64();
        meter.end();
        let energy_j = meter.last_window_j();
        report.windows.push(WindowReport {
            elapsed_s,
            tokens_per_s: tokens as f64 / elapsed_s,
            energy_j_per_token: energy_j.per(tokens, "tokens"),
            energy_j,
        });
    }
    record_device_memory(&mut meter, options.device, &bench.device);
    // Neither the product that the device is measured with nor what follows is the steps' memory.
    let memory = meter.report().memory;
    let (peak, fastest_product) = bench.peak()?;
    meter.set_peak(peak.clone());
    let metered = MeterReport {
        memory,
        ..meter.report()
    };
    let profile = match options.profiled_steps {
        0 => None,
        steps => Some(profile::profile(&mut bench, &mut meter, steps)?),
    };
    let windows = report.windows;
    let joules = windows
        .iter()
        .map(|window| window.energy_j_per_token.value());
    let joules: Option<Vec<f64>> = joules.collect();
    let step = Spread::of(report.step_s.iter().copied());
    Ok(StepBenchReport {
        model: options.model.display().to_string(),
        recipe: options.recipe.as_ref().map(|recipe| recipe.name.clone()),
        task: options.task,
        device: options.device.to_string(),
        device_description: describe_with_products(&bench.device),
        dtype: options.dtype,
        kernels: options.kernels,
        notes: options.notes(&bench.batch),
        batch: bench.batch.0.rows,
        seq: bench.batch.0.seq,
        frozen_bytes: bench.model.size().frozen_bytes,
        losses: report.losses,
        gradient_norms: report.gradient_norms,
        step_s: report.step_s,
        tokens_per_s: bench.batch.0.token_count as f64 / step.median,
        window_tokens_per_s: Spread::of(windows.iter().map(|window| window.tokens_per_s)),
        window_energy_j_per_token: joules.map(|joules| Spread::of(joules.into_iter())),
        windows,
        energy_j: metered.energy.training.gross_j.clone(),
        energy_j_per_token: metered.energy.training.gross_j_per_token.clone(),
        mfu: metered.utilisation.mfu.clone(),
        hfu: metered.utilisation.hfu.clone(),
        peak,
        fastest_product,
        peak_memory_bytes: metered.memory.host_peak_bytes.clone(),
        device_peak_bytes: metered.memory.device_peak_bytes.clone(),
        predicted_peak_bytes: predicted,
        profile,
        meter: metered,
    })
}

#[derive(Default)]
struct Found {
    losses: Vec<f64>,
    gradient_norms: Vec<f64>,
    step_s: Vec<f64>,
    windows: Vec<WindowReport>,
}

/// A model, a batch that every step sees, and how many steps there were.
struct Bench<'a> {
    options: &'a StepBenchOptions,
    device: Device,
    checkpoint: Checkpoint,
    model: Model,
    step: TrainStep,
    objective: Objective,
    batch: Batch,
    input: ModelInput,
    number: u64,
}

impl<'a> Bench<'a> {
    fn open(options: &'a StepBenchOptions) -> Result<Bench<'a>, TrainError> {
        options.kernels.take();
        let device = open_device(options.device, options.dtype)?;
        device.seed(derive(options.seed, "device", &[]));
        let checkpoint = Checkpoint::open(&options.model)?;
        let mut model = load(options, &checkpoint, &device)?;
        let kind = options.task.kind();
        let vocab = checkpoint.config().vocab_size();
        let batch = match &options.data {
            Some(path) => Batch::read(path, kind, vocab, options.pack)?,
            None => Batch::random(
                [options.batch, options.seq],
                kind,
                &model.options().head,
                vocab,
                options.seed,
            ),
        };
        if let Some(limit) = checkpoint.config().position_limit()
            && batch.lengths().into_iter().any(|length| length > limit)
        {
            return Err(TrainError::Bench {
                path: options.model.clone(),
                problem: format!("has positions for {limit} tokens, and a row has more"),
            });
        }
        let mut step = match &options.recipe {
            Some(recipe) => {
                let has_adapter = recipe.adapter.kind == AdapterKind::Lora;
                TrainStep::from_recipe(&recipe.train, &mut model, has_adapter)?
            }
            None => TrainStep::new(
                OptimizerOptions::default(),
                TensorRules::uniform(options.learning_rate),
                options.max_grad_norm,
                true,
            ),
        };
        step.loss_scale = (options.dtype == Dtype::F16).then(LossScale::default);
        let unweighted = ClassWeights::Named(ClassWeighting::None);
        let objective = Objective::new(kind, &unweighted, &ClassCounts::None, None)
            .expect("nothing is weighted");
        Ok(Bench {
            input: upload::input(&batch.0, None, |_| false, &device)?,
            options,
            device,
            checkpoint,
            model,
            step,
            objective,
            batch,
            number: 0,
        })
    }

    /// Which blocks are recomputed, and the bytes that a step is predicted to hold.
    fn memory(&self, device_memory: Quantity) -> Result<(Recompute, u64), TrainError> {
        let options = self.options;
        let shape = PassShape {
            rows: self.batch.0.rows,
            seq: self.batch.0.seq,
            samples: self.batch.0.spans.len(),
        };
        let (checkpoint, of_model) = (&self.checkpoint, self.model.options());
        let recompute = match &options.recipe {
            Some(recipe) => {
                let device = options.device;
                let plan =
                    MemoryPlan::new(recipe, checkpoint, of_model, device, shape, device_memory)?;
                plan.recompute()
            }
            None => options.recompute,
        };
        let memory = MemoryModel::new(checkpoint, of_model)?;
        let memory = memory.training(shape, recompute, options.device.pass());
        Ok((recompute, memory.device_bytes()))
    }

    /// What the device could do, and the fastest product that was measured.
    fn peak(&self) -> Result<(PeakFlops, PeakFlops), TrainError> {
        let (spec, dtype) = (self.options.device, self.options.dtype);
        let sides = match self.options.large_products {
            true => &LARGE_PRODUCTS[..],
            false => &QUICK_PRODUCT[..],
        };
        let peak = peak_flops(&self.device, spec, dtype, sides)?;
        let fastest = match &peak {
            PeakFlops::Measured { .. } => peak.clone(),
            PeakFlops::Stated { .. } => fastest_product(&self.device, dtype, sides)?,
        };
        Ok((peak, fastest))
    }

    /// A step that is counted; its wall time, the device's work done at its end.
    fn metered(
        &mut self,
        purpose: Purpose,
        meter: &mut Meter,
        found: &mut Found,
    ) -> Result<f64, TrainError> {
        meter.count(purpose, self.batch.counts(), &self.batch.lengths());
        let started = std::time::Instant::now();
        let result = self.one(meter)?;
        synchronise(&self.device, "benchmarking")?;
        let elapsed_s = started.elapsed().as_secs_f64();
        meter.finish_step();
        found.losses.push(result.loss);
        let norm = result.grad_norm.unwrap_or(f64::NAN);
        found.gradient_norms.push(norm);
        Ok(elapsed_s)
    }

    /// A step.
    fn one(&mut self, meter: &mut Meter) -> Result<StepResult, TrainError> {
        self.number += 1;
        let mode = Mode::Train {
            dropout_seed: derive(self.options.seed, "dropout", &[self.number]),
        };
        let (objective, batch, device) = (&self.objective, &self.batch.0, &self.device);
        self.step.run(
            &mut self.model,
            std::iter::once(self.input.clone()),
            |model: &Model, input: ModelInput, _: &mut Meter| {
                Ok(objective.loss_of(model, &input, batch, mode, device))
            },
            batch.supervised_count as f64,
            1.0,
            self.number,
            meter,
        )
    }
}

fn load(
    options: &StepBenchOptions,
    checkpoint: &Checkpoint,
    device: &Device,
) -> Result<Model, TrainError> {
    let frozen = FrozenWeights {
        dtype: float_dtype(options.dtype),
        quantization: options.quantization,
    };
    if let Some(adapter) = &options.adapter {
        let model = Model::load_with_adapter(checkpoint, adapter, frozen, device)?;
        let head = &model.options().head;
        let fits = match (options.task.kind(), head) {
            (TaskKind::CausalLm, HeadOptions::CausalLm) => true,
            (TaskKind::Tokens, HeadOptions::TokenClassifier { .. }) => true,
            (TaskKind::Binary, HeadOptions::Classifier { labels, .. }) => *labels == 1,
            (TaskKind::Multiclass, HeadOptions::Classifier { labels, .. }) => *labels >= 2,
            (TaskKind::Multilabel | TaskKind::Regression, HeadOptions::Classifier { .. }) => true,
            _ => false,
        };
        if !fits {
            let problem = format!(
                "its head is {head:?}; name the task it was made for (causal_lm or \
                 sequence_classification)"
            );
            let path = adapter.clone();
            return Err(TrainError::Bench { path, problem });
        }
        return Ok(model);
    }
    let of_model = match &options.recipe {
        Some(recipe) => model_options(recipe, checkpoint, CLASSES, None)?,
        None => ModelOptions {
            lora: Some(options.lora.clone()),
            head: match options.task.kind() {
                TaskKind::CausalLm => HeadOptions::CausalLm,
                _ => HeadOptions::Classifier {
                    labels: CLASSES,
                    pooling: Pooling::default_for(checkpoint.config().family()),
                    problem: Problem::Multiclass,
                },
            },
            head_hidden: 0,
            fusion: None,
            seed: derive(options.seed, "new weights", &[]),
            dtype: frozen.dtype,
            quantization: frozen.quantization,
        },
    };
    Ok(Model::load(checkpoint, &of_model, device)?)
}
