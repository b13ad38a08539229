//! After the last step: the best model, its evaluation, the reports.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use calor_meter::{Meter, Phase, Purpose};
use calor_model::Model;
use calor_records::Split;

use crate::TrainError;
use crate::artifacts::html;
use crate::artifacts::metrics::{self, MetricsLine};
use crate::artifacts::report::{
    BestEvaluation, DataReport, ModelReport, Outcome, REPORT_SCHEMA, Report, TaskReport,
    TrainingReport,
};
use crate::checkpoint::TrainerState;
use crate::data::{Data, TaskFile};
use crate::device::synchronise;
use crate::evaluation::{Scored, Scoring};
use crate::files::{read_json, write_json, write_whole};
use crate::objective::Objective;
use crate::observer::{Observer, Stage, StopFlag};
use crate::plan::RunPlan;
use crate::run_folder::RunFolder;
use crate::seed::derive;
use crate::session::{
    self, Hashing, RunOptions, dtype_name, pooling_name, provenance, save_adapter,
};

/// A run whose steps are done.
pub(crate) struct Finished<'a> {
    pub options: &'a RunOptions,
    pub folder: &'a RunFolder,
    pub data: &'a Data,
    pub task: &'a TaskFile,
    pub objective: &'a Objective,
    pub plan: &'a RunPlan,
    pub state: &'a TrainerState,
    pub lines: &'a [MetricsLine],
    pub scoring: &'a Scoring<'a>,
}

/// Scores the held-out patients with the model that is kept and writes what the run
/// leaves. None when it was asked to stop before the scores were there.
pub(crate) fn finish(
    run: &Finished<'_>,
    model: &mut Model,
    meter: &mut Meter,
    hashing: Hashing,
    observer: &mut dyn Observer,
    stop: &StopFlag,
) -> Result<Option<Report>, TrainError> {
    let recipe = &run.options.recipe;
    match &run.state.best {
        Some(best) if best.step != run.state.step => model.load_adapter(&run.folder.adapter())?,
        Some(_) => {}
        None => save_adapter(model, run.task, &recipe.model.id, &run.folder.adapter())?,
    }

    let mut evaluation = BTreeMap::new();
    let evaluated = [Split::HeldOut, Split::Tuning]
        .into_iter()
        .find(|split| !run.data.set(*split).is_empty());
    let mut scored: Option<(Split, Scored)> = None;
    if let Some(split) = evaluated {
        observer.stage(Stage::Evaluate);
        let device = model.device().clone();
        let found = meter.within(
            Purpose::Evaluation,
            || drop(device.sync()),
            |meter| {
                let started = std::time::Instant::now();
                let found =
                    run.scoring
                        .score(model, run.data, &run.data.set(split), meter, observer, stop);
                meter.add_phase(Phase::Evaluation, started.elapsed().as_secs_f64());
                found
            },
        )?;
        match found {
            Some(found) => scored = Some((split, found)),
            None => return Ok(None),
        }
    }
    synchronise(model.device(), "finishing")?;
    session::record_device_memory(meter, run.options.device, model.device());
    meter.end();

    observer.stage(Stage::Report);
    if let Some((split, scored)) = &scored {
        scored.write_parquet(&run.folder.path().join("predictions.parquet"))?;
        let seed = derive(recipe.train.seed, "bootstrap", &[]);
        if let Some(found) = scored.evaluation(recipe.evaluate.resamples, seed)? {
            evaluation.insert(split.name().to_owned(), found);
        }
    }
    let size = model.size();
    let config = model.config();
    let splits = Split::ALL.map(|split| {
        (
            split.name().to_owned(),
            run.data
                .split_counts(recipe.task.kind, &run.data.set(split)),
        )
    });
    let absent_items = run.data.absent_items();
    for (modality, files) in &absent_items {
        observer.warning(&format!(
            "{files} files of the modality `{modality}` could not be decoded and counted as missing"
        ));
    }
    let (cut_items, cut_s) = run.data.items.cut();
    if cut_items > 0 {
        observer.warning(&format!(
            "`max_seconds` cut {cut_items} items by {cut_s:.1} seconds in all"
        ));
    }
    let report = Report {
        schema: REPORT_SCHEMA,
        name: recipe.name.clone(),
        outcome: if run.state.stopped_early {
            Outcome::StoppedEarly
        } else {
            Outcome::Finished
        },
        written_unix_s: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        task: TaskReport {
            kind: recipe.task.kind,
            labels: run.task.labels.clone(),
            classes: run.task.classes.clone(),
            pooling: pooling_name(&model.options().head).to_owned(),
            class_weights: run
                .objective
                .weights()
                .map(|weights| weights.iter().map(|weight| f64::from(*weight)).collect()),
        },
        model: ModelReport {
            id: recipe.model.id.clone(),
            model_type: session::model_type_name(config),
            dtype: dtype_name(recipe.model.dtype).to_owned(),
            frozen_parameters: size.base_parameters
                + size.embedding_parameters
                + size.tower_parameters,
            frozen_bytes: size.frozen_bytes,
            adapter_parameters: size.adapter_parameters,
            head_parameters: size.head_parameters,
            encoder_parameters: size.encoder_parameters,
            projector_parameters: size.projector_parameters,
        },
        data: DataReport {
            cohort: match &recipe.text.train {
                Some(file) => file.display().to_string(),
                None => recipe.cohort.path.display().to_string(),
            },
            splits: splits
                .into_iter()
                .filter(|(_, counts)| counts.samples > 0)
                .collect(),
            sequences: run.data.prepared.report().clone(),
            absent_items,
            cut_items,
            cut_s,
        },
        training: TrainingReport {
            steps: run.state.step,
            steps_per_epoch: run.plan.steps_per_epoch,
            epochs: run.plan.epochs(run.state.step),
            best: run.state.best.map(|best| BestEvaluation {
                step: best.step,
                metric: best.metric,
                value: best.value,
            }),
            final_loss: final_loss(run.lines, run.plan.steps_per_epoch),
        },
        evaluation,
        meter: meter.report(),
        earlier_sessions: run.state.earlier_sessions.clone(),
        provenance: provenance(
            recipe,
            run.folder.recipe_sha256(),
            &run.state.data_hash,
            run.options.device,
            model.device(),
            hashing.finish()?,
        ),
    };
    write_json(&run.folder.path().join("report.json"), &report)?;
    write_page(run.folder.path(), &report)?;
    Ok(Some(report))
}

/// Writes `report.html` again from what a run's folder holds, and gives the report.
pub fn rewrite_report(run: &Path) -> Result<Report, TrainError> {
    let path = run.join("report.json");
    if !path.exists() {
        return Err(TrainError::RunFolder { path: run.to_owned(), problem: "has no report.json: the run is not finished; go on with it by `calor train … --resume`".to_owned() });
    }
    let report: Report = read_json(&path)?;
    write_page(run, &report)?;
    Ok(report)
}

fn write_page(run: &Path, report: &Report) -> Result<(), TrainError> {
    let lines = metrics::read(&run.join("metrics.jsonl"))?;
    let recipe_path = run.join("recipe.toml");
    let recipe =
        std::fs::read_to_string(&recipe_path).map_err(TrainError::io("read", &recipe_path))?;
    write_whole(
        &run.join("report.html"),
        html::render(report, &lines, &recipe)?.as_bytes(),
    )
}

/// Mean loss over the steps of the last epoch.
fn final_loss(lines: &[MetricsLine], steps_per_epoch: u64) -> Option<f64> {
    let losses: Vec<f64> = lines
        .iter()
        .rev()
        .filter_map(|line| match line {
            MetricsLine::Step(line) => Some(line.loss),
            MetricsLine::Evaluation(_) => None,
        })
        .take(steps_per_epoch as usize)
        .collect();
    (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64)
}
