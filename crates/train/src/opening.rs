//! What a run starts from: checkpoint, patients, plan and loss, checked against each other.

use calor_model::{Checkpoint, EncoderSpec, FusionOptions, StreamDemand};
use calor_records::{Split, ensure_synthetic, omics_features};
use calor_sequence::SampleSet;

use crate::TrainError;
use crate::data::{Data, Source, TASK_FORMAT, TaskFile};
use crate::objective::Objective;
use crate::observer::{Observer, Stage};
use crate::plan::RunPlan;
use crate::recipe::modality::fusion;
use crate::recipe::{Recipe, TaskKind};
use crate::seed::derive;
use crate::session::{RunOptions, misfit};

/// All that a recipe names, opened; no weight has been read yet.
pub(crate) struct Opening {
    pub checkpoint: Checkpoint,
    pub data: Data,
    pub plan: RunPlan,
    pub task: TaskFile,
    pub objective: Objective,
    /// What a new head says of everyone before training; none where it is drawn as Transformers' is.
    pub prior: Option<Vec<f32>>,
    /// What the model makes of modality items.
    pub fusion: Option<FusionOptions>,
}

impl Opening {
    /// Opens the checkpoint, prepares the sequences (or finds them in the cache) and plans the
    /// steps.
    ///
    /// # Errors
    /// Whatever is wrong with checkpoint, cohort, labels or recipe, and where they do not fit
    /// together.
    pub fn new(options: &RunOptions, observer: &mut dyn Observer) -> Result<Opening, TrainError> {
        let recipe = &options.recipe;
        let does_not_fit = |problem| TrainError::Task {
            task: recipe.task.kind.name(),
            problem,
        };
        let checkpoint = Checkpoint::open(&options.checkpoint)?;
        if let Some(synth) = &recipe.cohort.synth {
            if !recipe.cohort.path.exists() {
                observer.stage(Stage::Synthesize);
            }
            // Told when it is done: the progress comes from other threads, and it takes seconds.
            ensure_synthetic(&recipe.cohort.path, synth, &|_| {})?;
        }
        let data = Data::load(&source(options), observer)?;
        if let Some(problem) = misfit(recipe, &checkpoint, &data) {
            return Err(does_not_fit(problem));
        }
        let training = data.set(Split::Train);
        let plan = RunPlan::new(recipe, &data, &training)?;
        let task = task_file(recipe, &data, &training);
        let counts = data.class_counts(recipe.task.kind, &training);
        let objective = Objective::new(
            recipe.task.kind,
            &recipe.task.class_weights,
            &counts,
            task.scale,
        )
        .map_err(does_not_fit)?;
        let prior = match recipe.task.start_from_prior {
            true => objective.prior(&counts),
            false => None,
        };
        let fusion = fused(recipe, &checkpoint, &data, observer)?;
        Ok(Opening {
            checkpoint,
            data,
            plan,
            task,
            objective,
            prior,
            fusion,
        })
    }
}

/// What the model makes of modality items, checked against the items there are.
fn fused(
    recipe: &Recipe,
    checkpoint: &Checkpoint,
    data: &Data,
    observer: &mut dyn Observer,
) -> Result<Option<FusionOptions>, TrainError> {
    let streams = recipe.modality.streams();
    let shapes = data.shapes()?;
    let widths: Vec<Option<usize>> = shapes
        .iter()
        .map(|item| item.as_ref().and_then(|item| item.shape.first().copied()))
        .collect();
    let sites = data.prepared.statistics().sites.len();
    let seed = derive(recipe.train.seed, "new encoders", &[]);
    let Some(mut fusion) = fusion(&streams, &widths, sites, seed) else {
        return Ok(None);
    };
    let mut demand = Vec::new();
    for ((stream, spec), (shape, width)) in streams
        .iter()
        .zip(&mut fusion.streams)
        .zip(shapes.iter().zip(widths))
    {
        if let (Some(omics), Some(item), EncoderSpec::Omics(options)) =
            (&recipe.modality.omics, shape, &mut spec.encoder)
            && let (Some(grouping), Some(file)) = (&omics.groups, &item.file)
        {
            let features = match &omics.decode.features {
                Some(features) => features.clone(),
                None => omics_features(file)?,
            };
            options.groups = grouping.groups(&features)?;
        }
        demand.push(StreamDemand {
            items: stream.options.max_items,
            features: width,
        });
        match shape {
            Some(item) => spec.check_item(&item.shape)?,
            None => observer.warning(&format!(
                "no training patient has an item of the modality `{}`",
                stream.options.modality.name()
            )),
        }
    }
    fusion.check(checkpoint.config(), &demand)?;
    Ok(Some(fusion))
}

/// Where the patients of a run come from.
fn source(options: &RunOptions) -> Source<'_> {
    let recipe = &options.recipe;
    Source {
        cohort: &recipe.cohort.path,
        text: &recipe.text,
        kind: recipe.task.kind,
        loss: recipe.task.loss,
        notes: &recipe.task.notes,
        labels: recipe.task.labels.names(),
        sequence: recipe.modality.sequence(&recipe.sequence),
        modality: &recipe.modality,
        checkpoint: &options.checkpoint,
        cache: &options.cache,
        trained: None,
    }
}

/// What other patients have to be treated with as those of the training were.
fn task_file(recipe: &Recipe, data: &Data, training: &SampleSet) -> TaskFile {
    TaskFile {
        format: TASK_FORMAT,
        kind: recipe.task.kind,
        labels: recipe
            .task
            .labels
            .names()
            .into_iter()
            .map(str::to_owned)
            .collect(),
        classes: data.prepared.classes().to_vec(),
        scale: (recipe.task.kind == TaskKind::Regression).then(|| data.target_scale(training)),
        sequence: recipe.modality.sequence(&recipe.sequence),
        statistics: data.prepared.statistics().clone(),
        scalings: data.items.scalings().to_vec(),
    }
}
