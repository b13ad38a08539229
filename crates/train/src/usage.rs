//! What a finished run is used for: evaluation on a split or another cohort, prediction.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use calor_meter::{Meter, MeterReport, Phase, Purpose};
use calor_model::{Checkpoint, Model};
use calor_records::Split;
use calor_sequence::{SampleSet, SequenceOptions};

use crate::TrainError;
use crate::artifacts::report::{FileHash, Report, SplitEvaluation};
use crate::data::{Data, Source, TaskFile, label_folder};
use crate::device::{DeviceSpec, synchronise};
use crate::evaluation::{Scored, Scoring};
use crate::files::{hash_file, read_json};
use crate::observer::{Observer, Stage, StopFlag};
use crate::recipe::{Recipe, TextSection};
use crate::seed::derive;
use crate::session::{frozen_weights, open_device, read_task};

/// A file up to this length is hashed again to see whether it is the one of the run.
const HASHED_AGAIN_BYTES: u64 = 1 << 20;

/// How a run is used.
#[derive(Clone, Debug)]
pub struct UseOptions {
    /// The run's folder.
    pub run: PathBuf,
    /// The folder of the checkpoint that the run's recipe names.
    pub checkpoint: PathBuf,
    /// Where prepared sequences are kept.
    pub cache: PathBuf,
    /// Where to compute.
    pub device: DeviceSpec,
    /// Another cohort than the run's own.
    pub cohort: Option<PathBuf>,
    /// At most so many patients of the split: a sample of them, always the same.
    pub patients: Option<usize>,
}

/// Patients with what a run's model says about them, and what is known.
#[derive(Clone, Debug)]
pub struct Evaluated {
    /// The split, or none for all patients.
    pub split: Option<Split>,
    /// Metrics and curves.
    pub evaluation: SplitEvaluation,
    /// The scores themselves.
    pub scored: Scored,
    /// What scoring cost.
    pub meter: MeterReport,
}

/// The resolved recipe of a run.
///
/// # Errors
/// A folder that holds no run.
pub fn run_recipe(run: &Path) -> Result<Recipe, TrainError> {
    let path = run.join("recipe.toml");
    if !path.exists() {
        let problem = "holds no run: there is no recipe.toml".to_owned();
        return Err(TrainError::RunFolder {
            path: run.to_owned(),
            problem,
        });
    }
    Ok(Recipe::load(&path, &[])?)
}

/// Evaluates a run's model on the labelled patients of a split, or on all of them.
/// None when `stop` was set before the end.
///
/// # Errors
/// An unfinished run, another checkpoint, a cohort without the task's labels or without
/// patients in the split.
pub fn evaluate(
    options: &UseOptions,
    split: Option<Split>,
    observer: &mut dyn Observer,
    stop: &StopFlag,
) -> Result<Option<Evaluated>, TrainError> {
    let using = Using::open(options)?;
    let Some((scored, meter)) = using.score(split, true, observer, stop)? else {
        return Ok(None);
    };
    observer.stage(Stage::Report);
    let recipe = &using.recipe;
    let seed = derive(recipe.train.seed, "bootstrap", &[]);
    let Some(evaluation) = scored.evaluation(recipe.evaluate.resamples, seed)? else {
        return Err(TrainError::Task {
            task: recipe.task.kind.name(),
            problem: "no patient has all labels, so there is nothing to evaluate".to_owned(),
        });
    };
    Ok(Some(Evaluated {
        split,
        evaluation,
        scored,
        meter,
    }))
}

/// Scores patients with a run's model: at the prediction times of the task's label set
/// where the cohort has one, else every subject at its last event. None when `stop` was
/// set before the end.
///
/// # Errors
/// An unfinished run, another checkpoint, a cohort that cannot be read.
pub fn predict(
    options: &UseOptions,
    observer: &mut dyn Observer,
    stop: &StopFlag,
) -> Result<Option<Scored>, TrainError> {
    let using = Using::open(options)?;
    let cohort = using.cohort();
    let names = using.recipe.task.labels.names();
    let labelled = names.iter().all(|name| label_folder(cohort, name).exists());
    if !labelled {
        observer.warning(
            "the cohort has no labels of this task: every subject is predicted at its last event",
        );
    }
    let scored = using.score(None, labelled, observer, stop)?;
    Ok(scored.map(|(scored, _)| scored))
}

/// A run that is opened for use.
pub(crate) struct Using<'a> {
    options: &'a UseOptions,
    pub recipe: Recipe,
    adapter: PathBuf,
    pub task: TaskFile,
    checkpoint: Checkpoint,
    device: Device,
}

impl<'a> Using<'a> {
    pub fn open(options: &'a UseOptions) -> Result<Using<'a>, TrainError> {
        let recipe = run_recipe(&options.run)?;
        let adapter = options.run.join("adapter");
        if !adapter.exists() {
            return Err(TrainError::RunFolder {
                path: options.run.clone(),
                problem: "has no adapter yet; go on with the run by `calor train … --resume`"
                    .to_owned(),
            });
        }
        let report = options.run.join("report.json");
        if report.exists() {
            let report: Report = read_json(&report)?;
            same_checkpoint(&options.checkpoint, &report.provenance.checkpoint_files)?;
        }
        Ok(Using {
            options,
            task: read_task(&adapter)?,
            device: open_device(options.device, recipe.model.dtype)?,
            checkpoint: Checkpoint::open(&options.checkpoint)?,
            recipe,
            adapter,
        })
    }

    fn cohort(&self) -> &Path {
        match &self.options.cohort {
            Some(cohort) => cohort,
            None => &self.recipe.cohort.path,
        }
    }

    /// The patients of a split, or all, with what scoring them cost.
    pub fn score(
        &self,
        split: Option<Split>,
        labelled: bool,
        observer: &mut dyn Observer,
        stop: &StopFlag,
    ) -> Result<Option<(Scored, MeterReport)>, TrainError> {
        let data = self.data(self.task.sequence.clone(), labelled, observer)?;
        let set = self.set(&data, split)?;
        observer.stage(Stage::Load);
        let model = self.model()?;
        observer.stage(Stage::Evaluate);
        self.scored(&model, &data, &set, &[], observer, stop)
    }

    /// The patients, written as `sequence` says.
    pub fn data(
        &self,
        sequence: SequenceOptions,
        labelled: bool,
        observer: &mut dyn Observer,
    ) -> Result<Data, TrainError> {
        // Of a run on files of text, another cohort is another file.
        let text = match &self.options.cohort {
            Some(file) if self.recipe.text.is_used() => TextSection {
                train: None,
                tuning: None,
                held_out: Some(file.clone()),
                ..self.recipe.text.clone()
            },
            _ => self.recipe.text.clone(),
        };
        let source = Source {
            cohort: self.cohort(),
            text: &text,
            kind: self.task.kind,
            loss: self.recipe.task.loss,
            notes: &self.recipe.task.notes,
            labels: if labelled {
                self.recipe.task.labels.names()
            } else {
                Vec::new()
            },
            sequence,
            modality: &self.recipe.modality,
            checkpoint: &self.options.checkpoint,
            cache: &self.options.cache,
            trained: Some(&self.task),
        };
        Data::load(&source, observer)
    }

    /// The samples of a split, or all; an error if there are none.
    pub fn set(&self, data: &Data, split: Option<Split>) -> Result<SampleSet, TrainError> {
        let set = match split {
            Some(split) => data.set(split),
            None => data.prepared.all(),
        };
        let set = match self.options.patients {
            Some(patients) => some_of(&set, patients, |sample| {
                data.prepared.sample(sample as usize).subject_id
            }),
            None => set,
        };
        if set.is_empty() {
            let which = split.map_or("patients".to_owned(), |split| {
                format!("patients in the split `{}`", split.name())
            });
            return Err(self.problem(format!(
                "{} has no labelled {which}",
                self.cohort().display()
            )));
        }
        Ok(set)
    }

    /// The checkpoint with the run's adapter.
    pub fn model(&self) -> Result<Model, TrainError> {
        Ok(Model::load_with_adapter(
            &self.checkpoint,
            &self.adapter,
            frozen_weights(&self.recipe.model),
            &self.device,
        )?)
    }

    /// Scores a set; items of the streams that are `withheld` count as missing.
    pub fn scored(
        &self,
        model: &Model,
        data: &Data,
        set: &SampleSet,
        withheld: &[usize],
        observer: &mut dyn Observer,
        stop: &StopFlag,
    ) -> Result<Option<(Scored, MeterReport)>, TrainError> {
        let (recipe, device) = (&self.recipe, &self.device);
        let mut meter = Meter::open(&recipe.energy, &self.options.device.metered(device))
            .map_err(|error| TrainError::Meter(Box::new(error)))?;
        let scoring = Scoring {
            task: &self.task,
            sequence: &self.task.sequence,
            micro_batch: recipe
                .evaluate
                .micro_batch
                .unwrap_or(recipe.train.micro_batch),
            device: self.options.device,
            withheld,
            purpose: Purpose::Evaluation,
        };
        synchronise(device, "scoring")?;
        meter.begin(Purpose::Evaluation);
        let started = std::time::Instant::now();
        let scored = scoring.score(model, data, set, &mut meter, observer, stop)?;
        meter.add_phase(Phase::Evaluation, started.elapsed().as_secs_f64());
        synchronise(device, "scoring")?;
        meter.end();
        Ok(scored.map(|scored| (scored, meter.report())))
    }

    /// Refuses a task of tokens, for what compares outputs of whole samples.
    pub fn needs_samples(&self) -> Result<(), TrainError> {
        match self.task.kind.per_token() {
            true => Err(self.problem(
                "only runs that predict something of a whole patient can be compared or ablated"
                    .to_owned(),
            )),
            false => Ok(()),
        }
    }

    /// Something about the run's task that does not work out.
    pub fn problem(&self, problem: String) -> TrainError {
        TrainError::Task {
            task: self.task.kind.name(),
            problem,
        }
    }
}

/// The samples of so many patients of a set. Who they are depends on their numbers alone, so that two
/// runs on a cohort are asked about the same people.
fn some_of(set: &SampleSet, patients: usize, subject: impl Fn(u32) -> i64) -> SampleSet {
    let rank = |subject: i64| derive(0, "some patients", &[subject as u64]);
    let subjects: BTreeSet<i64> = set.samples().iter().map(|&one| subject(one)).collect();
    let mut subjects: Vec<i64> = subjects.into_iter().collect();
    subjects.sort_by_key(|&subject| (rank(subject), subject));
    subjects.truncate(patients);
    let chosen: BTreeSet<i64> = subjects.into_iter().collect();
    let samples = set.samples().iter().copied();
    SampleSet::from_samples(
        samples
            .filter(|&one| chosen.contains(&subject(one)))
            .collect(),
    )
}

/// Refuses a checkpoint that is not the one a run was trained on: by the lengths of its
/// files, and the contents of the small ones.
fn same_checkpoint(folder: &Path, files: &[FileHash]) -> Result<(), TrainError> {
    for file in files {
        let path = folder.join(&file.name);
        let length = std::fs::metadata(&path)
            .map_err(TrainError::io("read", &path))?
            .len();
        let same = length == file.bytes
            && (length > HASHED_AGAIN_BYTES || hash_file(&path)?.0 == file.sha256);
        if !same {
            return Err(TrainError::Corrupt {
                path,
                problem: "is not the file that the run was trained with; name the same checkpoint \
                          and revision"
                    .to_owned(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_patients_are_whole_patients_and_the_same_in_every_set() {
        // Two samples a patient.
        let subject = |sample: u32| i64::from(sample / 2);
        let all = SampleSet::from_samples((0..200).collect());
        let some = some_of(&all, 30, subject);
        let subjects: BTreeSet<i64> = some.samples().iter().map(|&one| subject(one)).collect();
        assert_eq!((some.len(), subjects.len()), (60, 30));
        // More are asked for: the first ones stay.
        let more = some_of(&all, 40, subject);
        assert!(
            some.samples()
                .iter()
                .all(|one| more.samples().contains(one))
        );
        assert_eq!(some_of(&all, 1_000, subject).len(), 200);
    }
}
