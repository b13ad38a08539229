//! What each modality, or each site, is worth to a run's model.

use std::collections::BTreeSet;

use calor_evaluate::{Ablation, BootstrapOptions, MOST_SOURCES, ablate as shares};
use calor_records::{Modality, Split};
use calor_sequence::SequenceOptions;

use crate::TrainError;
use crate::evaluation::Scored;
use crate::observer::{Observer, Stage, StopFlag};
use crate::recipe::modality::TEXT;
use crate::recipe::{Metric, Recipe};
use crate::seed::derive;
use crate::usage::{UseOptions, Using};

/// What is withheld to see what it is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sources {
    /// The text and each modality of items; one that is withheld is missing for every patient.
    Modality,
    /// The sites that training patients' rows come from; rows and items of one that is withheld are
    /// not seen, birth and sex included.
    Site,
}

/// Scores the patients of a split with every subset of the sources, and gives the metric with each
/// source withheld, each alone, and exact Shapley values, with intervals from paired resamples of
/// the patients. None when `stop` was set before the end.
///
/// # Errors
/// As [`evaluate`](crate::evaluate()); a model with fewer than two sources, or with too many.
pub fn ablate(
    options: &UseOptions,
    split: Option<Split>,
    sources: Sources,
    observer: &mut dyn Observer,
    stop: &StopFlag,
) -> Result<Option<Ablation>, TrainError> {
    let using = Using::open(options)?;
    using.needs_samples()?;
    let trained = &using.task.sequence;
    let names = match sources {
        Sources::Modality => {
            let text = trained.text.then(|| TEXT.to_owned());
            let streams = trained.streams.iter().map(|stream| stream.modality);
            let streams = streams.map(|modality| modality.name().to_owned());
            text.into_iter().chain(streams).collect::<Vec<String>>()
        }
        Sources::Site => {
            let seen = |site: &&String| !trained.exclude_sites.contains(site);
            using
                .task
                .statistics
                .sites
                .iter()
                .filter(seen)
                .cloned()
                .collect()
        }
    };
    let what = match sources {
        Sources::Modality => "modalities",
        Sources::Site => "sites",
    };
    if !(2..=MOST_SOURCES).contains(&names.len()) {
        return Err(using.problem(format!(
            "the run knows {} {what}; an ablation compares 2 to {MOST_SOURCES}",
            names.len()
        )));
    }

    let mut model = None;
    let mut outputs = Vec::with_capacity(1 << names.len());
    let mut first: Option<Scored> = None;
    let mut part = Part {
        whole: observer,
        subset: 0,
        subsets: 1 << names.len(),
    };
    for subset in 0..1usize << names.len() {
        let there = |source: usize| subset >> source & 1 == 1;
        let absent: BTreeSet<&str> = (0..names.len())
            .filter(|source| !there(*source))
            .map(|source| names[source].as_str())
            .collect();
        let (sequence, withheld) = view(trained, sources, &absent);
        part.subset = subset;
        let data = using.data(sequence, true, &mut part)?;
        let set = using.set(&data, split)?;
        let model = match &model {
            Some(model) => model,
            None => {
                part.stage(Stage::Load);
                model.insert(using.model()?)
            }
        };
        part.stage(Stage::Evaluate);
        let scored = using.scored(model, &data, &set, &withheld, &mut part, stop)?;
        let Some((scored, _)) = scored else {
            return Ok(None);
        };
        outputs.push(scored.complete_probabilities());
        if let Some(first) = &first
            && first.subject_ids != scored.subject_ids
        {
            return Err(using.problem(format!(
                "without some {what} other patients are left; every patient of the split needs a row"
            )));
        }
        first.get_or_insert(scored);
    }
    let Some(first) = first else {
        return Ok(None);
    };
    observer.stage(Stage::Report);
    let recipe = &using.recipe;
    let outputs: Vec<&[f64]> = outputs.iter().map(Vec::as_slice).collect();
    let found = first.with_targets(|targets, patients| {
        shares(
            &names,
            &outputs,
            targets,
            patients,
            metric(recipe).name(),
            &bootstrap(recipe),
        )
    })?;
    Ok(Some(found))
}

/// Tells how far all subsets together are, and what is done first of each only once.
struct Part<'a> {
    whole: &'a mut dyn Observer,
    subset: usize,
    subsets: usize,
}

impl Observer for Part<'_> {
    fn stage(&mut self, stage: Stage) {
        if self.subset == 0 {
            self.whole.stage(stage);
        }
    }

    fn scoring(&mut self, done: usize, total: usize) {
        self.whole
            .scoring(self.subset * total + done, self.subsets * total);
    }

    fn warning(&mut self, message: &str) {
        if self.subset == 0 {
            self.whole.warning(message);
        }
    }
}

/// The metric that a run was decided by.
pub(crate) fn metric(recipe: &Recipe) -> Metric {
    match recipe.evaluate.metric {
        // The loss is no metric of predictions; the default of the task stands in.
        None | Some(Metric::Loss) => Metric::default_of(recipe.task.kind),
        Some(metric) => metric,
    }
}

/// The resamples of a run's intervals.
pub(crate) fn bootstrap(recipe: &Recipe) -> BootstrapOptions {
    BootstrapOptions {
        resamples: recipe.evaluate.resamples,
        seed: derive(recipe.train.seed, "bootstrap", &[]),
        ..BootstrapOptions::default()
    }
}

/// How patients are read without some sources: the options of their sequences, and the streams whose
/// items count as missing.
fn view(
    trained: &SequenceOptions,
    sources: Sources,
    absent: &BTreeSet<&str>,
) -> (SequenceOptions, Vec<usize>) {
    let mut sequence = trained.clone();
    let mut withheld = Vec::new();
    match sources {
        Sources::Modality => {
            sequence.text &= !absent.contains(TEXT);
            for (stream, options) in trained.streams.iter().enumerate() {
                if absent.contains(Modality::name(options.modality)) {
                    withheld.push(stream);
                }
            }
        }
        Sources::Site => {
            let sites = absent.iter().map(|site| (*site).to_owned());
            sequence.exclude_sites.extend(sites);
        }
    }
    (sequence, withheld)
}
