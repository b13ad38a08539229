//! Several adapters of one checkpoint as one: side by side, which is exact; cut to a rank by its
//! singular values; or as PEFT's `linear` adds them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::adapter_config::AdapterConfig;
use crate::adapter_file::{self, HostTensor, OWN_CONFIG, OWN_WEIGHTS, WEIGHTS};
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::lora::{BiasMode, LoraOptions, Pair, PairInit, Plan, Targets};
use crate::matching::Patterned;
use crate::parameter::peft_key;
use crate::singular;
use crate::weights::TensorFile;

/// How the pairs of several adapters become one pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combination {
    /// One behind the other: exactly the weighted sum, of the sum of the ranks. PEFT's `cat`.
    Concatenate,
    /// The sum, cut to the nearest of a rank. PEFT's `svd`, without forming the sum.
    Svd,
    /// Weighted sums of all `A` and of all `B`, of one rank: what two adapters have in common counts
    /// twice over, which makes it an approximation. PEFT's `linear`.
    Linear,
}

/// An adapter and what it counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    /// Its folder.
    pub adapter: PathBuf,
    /// Its factor.
    pub weight: f64,
}

/// Adapters that are read: what describes each, and its tensors.
struct Opened {
    config: AdapterConfig,
    lora: LoraOptions,
    plan: Plan,
    file: TensorFile,
    weight: f64,
}

/// One adapter's part of a module: `scaling · b · a`.
struct Part {
    a: Vec<f32>,
    b: Vec<f32>,
    rank: usize,
    scaling: f64,
}

/// Writes the combination of adapters as a folder that PEFT loads. `rank` cuts it, for
/// [`Combination::Svd`]; without it, it is that of all adapters together.
///
/// A head (`modules_to_save`, a classifier's among them) goes along where one adapter has it.
///
/// # Errors
/// Adapters of different classes, or with what cannot be added: DoRA's magnitudes, trained biases or
/// tokens, soft tokens, heads of more than one.
pub(crate) fn combine(
    checkpoint: &Checkpoint,
    adapters: &[Weighted],
    method: Combination,
    rank: Option<usize>,
    out: &Path,
) -> Result<(), ModelError> {
    let opened = adapters
        .iter()
        .map(|weighted| Opened::new(checkpoint, weighted))
        .collect::<Result<Vec<_>, _>>()?;
    let first = opened
        .first()
        .ok_or_else(|| ModelError::options("no adapter is given"))?;
    if let Some(other) = opened.iter().find(|o| o.config.class != first.config.class) {
        return Err(ModelError::options(format!(
            "{} is for {}, {} for {}: adapters of one class can be combined",
            first.config.path.display(),
            first.config.class.peft_task_type(),
            other.config.path.display(),
            other.config.class.peft_task_type(),
        )));
    }
    let mut tensors = BTreeMap::new();
    let mut plan = Plan::new();
    let paths: BTreeSet<&String> = opened
        .iter()
        .flat_map(|opened| opened.plan.keys())
        .collect();
    for path in paths {
        let mut parts = Vec::new();
        let mut names = None;
        for adapter in &opened {
            if let Some(pair) = adapter.plan.get(path) {
                let (found, part) = adapter.part(path, pair)?;
                names = Some(found);
                parts.push(part);
            }
        }
        let names = names.expect("one of the plans has it");
        let whole = together(path, parts, method, rank)?;
        let (inputs, outputs) = (whole.a.len() / whole.rank, whole.b.len() / whole.rank);
        let [a_name, b_name] = names;
        tensors.insert(a_name, HostTensor::new(vec![whole.rank, inputs], &whole.a));
        tensors.insert(b_name, HostTensor::new(vec![outputs, whole.rank], &whole.b));
        let pair = Pair {
            rank: whole.rank,
            alpha: whole.rank as f64,
            scaling: 1.0,
            dropout: 0.0,
            index: plan.len() as u64,
            dora: false,
            init: PairInit::Default,
        };
        plan.insert(path.clone(), pair);
    }
    let head = head(&opened, adapters)?;
    if let Some(index) = head {
        let opened = &opened[index];
        for (name, entry) in opened.file.entries() {
            let paired = plan
                .keys()
                .any(|path| name.starts_with(&format!("{}.", peft_key(path))));
            if !paired {
                let values = opened.file.floats(name)?;
                tensors.insert(
                    name.to_owned(),
                    HostTensor::new(entry.shape.clone(), &values),
                );
            }
        }
    }
    let most = plan.values().map(|pair| pair.rank).max().unwrap_or(1);
    let config = AdapterConfig {
        lora: (!plan.is_empty()).then(|| LoraOptions {
            r: most,
            alpha: most as f64,
            // Whatever the adapters' own words were, the module names are what they meant.
            targets: Targets::List(plan.keys().cloned().collect()),
            rank_pattern: Patterned::default(),
            alpha_pattern: Patterned::default(),
            ..LoraOptions::default()
        }),
        base_model_name_or_path: first.config.base_model_name_or_path.clone(),
        class: first.config.class,
        modules_to_save: head.map_or_else(Vec::new, |index| {
            opened[index].config.modules_to_save.clone()
        }),
        path: out.join(adapter_file::CONFIG),
    };
    let labels = adapter_file::stored_labels(&first.config, &first.file, checkpoint)?;
    let modules = first.config.class.modules(checkpoint.config(), labels);
    let text = config.write(&plan, &modules)?;
    std::fs::create_dir_all(out).map_err(ModelError::io(out))?;
    let tensors: Vec<_> = tensors.into_iter().collect();
    adapter_file::write(&out.join(WEIGHTS), &adapter_file::serialize(out, tensors)?)?;
    if let Some(index) = head {
        for name in [OWN_CONFIG, OWN_WEIGHTS] {
            let from = adapters[index].adapter.join(name);
            if from.exists() {
                std::fs::copy(&from, out.join(name)).map_err(ModelError::io(&from))?;
            }
        }
    }
    adapter_file::write(&out.join(adapter_file::CONFIG), text.as_bytes())
}

/// Which adapter has a head, or other modules that are trained in full.
fn head(opened: &[Opened], adapters: &[Weighted]) -> Result<Option<usize>, ModelError> {
    let mut found: Option<usize> = None;
    for (index, adapter) in adapters.iter().enumerate() {
        let has = !opened[index].config.modules_to_save.is_empty()
            || adapter.adapter.join(OWN_CONFIG).exists();
        if !has {
            continue;
        }
        if let Some(first) = found {
            return Err(ModelError::options(format!(
                "{} and {} each have a head or other modules trained in full (`modules_to_save`), and \
                 those cannot be added; combine at most one adapter that has one",
                adapters[first].adapter.display(),
                adapter.adapter.display()
            )));
        }
        found = Some(index);
    }
    Ok(found)
}

/// The pair of a module from its parts, at a scaling of 1.
fn together(
    path: &str,
    parts: Vec<Part>,
    method: Combination,
    cut: Option<usize>,
) -> Result<Part, ModelError> {
    let rank: usize = parts.iter().map(|part| part.rank).sum();
    if method == Combination::Linear {
        return linear(path, parts);
    }
    let outputs = parts[0].b.len() / parts[0].rank;
    let mut b = Vec::with_capacity(outputs * rank);
    for row in 0..outputs {
        for part in &parts {
            let row = &part.b[row * part.rank..(row + 1) * part.rank];
            b.extend(row.iter().map(|b| (f64::from(*b) * part.scaling) as f32));
        }
    }
    let a: Vec<f32> = parts.into_iter().flat_map(|part| part.a).collect();
    if method == Combination::Concatenate {
        return Ok(Part {
            a,
            b,
            rank,
            scaling: 1.0,
        });
    }
    let mut found = singular::of_product(&b, &a, rank);
    let rank = cut.unwrap_or(rank).min(rank);
    found.truncate(rank);
    let (a, b) = found.halves(1.0);
    Ok(Part {
        a,
        b,
        rank,
        scaling: 1.0,
    })
}

/// Sums of `±√|weight · scaling|` times each `A`, and of the root times each `B`.
fn linear(path: &str, parts: Vec<Part>) -> Result<Part, ModelError> {
    let rank = parts[0].rank;
    if let Some(other) = parts.iter().find(|part| part.rank != rank) {
        return Err(ModelError::options(format!(
            "the adapters' ranks for `{path}` are {rank} and {}, and only pairs of one rank can be \
             combined linearly; combine them with `cat` or `svd`",
            other.rank
        )));
    }
    let sum = |values: &dyn Fn(&Part) -> &Vec<f32>, signed: bool| {
        let mut sum = vec![0f64; values(&parts[0]).len()];
        for part in &parts {
            let root = part.scaling.abs().sqrt();
            let factor = if signed {
                root.copysign(part.scaling)
            } else {
                root
            };
            for (sum, value) in sum.iter_mut().zip(values(part)) {
                *sum += factor * f64::from(*value);
            }
        }
        sum.into_iter().map(|value| value as f32).collect()
    };
    Ok(Part {
        a: sum(&|part| &part.a, true),
        b: sum(&|part| &part.b, false),
        rank,
        scaling: 1.0,
    })
}

impl Opened {
    fn new(checkpoint: &Checkpoint, weighted: &Weighted) -> Result<Opened, ModelError> {
        let folder = &weighted.adapter;
        let config = AdapterConfig::read(folder)?;
        let file = TensorFile::open(&folder.join(WEIGHTS))?;
        let labels = adapter_file::stored_labels(&config, &file, checkpoint)?;
        let lora = config.lora.clone().unwrap_or_default();
        let refused = |what: &str| ModelError::Config {
            path: config.path.clone(),
            message: format!(
                "{what} cannot be added to those of another adapter; merge each adapter into a \
                 checkpoint of its own"
            ),
        };
        if lora.use_dora {
            return Err(refused("DoRA's magnitudes"));
        }
        if lora.bias != BiasMode::None {
            return Err(refused("trained biases"));
        }
        if !lora.trained_tokens.is_empty() {
            return Err(refused("trained tokens"));
        }
        if lora.init != PairInit::Default {
            return Err(refused("pairs whose start was not subtracted (PiSSA)"));
        }
        if adapter_file::has_soft_tokens(folder)? {
            return Err(refused("what makes soft tokens of modality items"));
        }
        let plan = match &config.lora {
            Some(_) => lora.plan(
                config.class,
                &config.class.modules(checkpoint.config(), labels),
            )?,
            None => Plan::new(),
        };
        Ok(Opened {
            config,
            lora,
            plan,
            file,
            weight: weighted.weight,
        })
    }

    /// The names of a module's pair in the file, `A` first, and its part of the sum.
    fn part(&self, path: &str, pair: &Pair) -> Result<([String; 2], Part), ModelError> {
        let names = adapter_file::pair_names(&self.file, path);
        let part = Part {
            a: self.file.floats(&names[0])?,
            b: self.file.floats(&names[1])?,
            rank: pair.rank,
            scaling: self.weight * f64::from(self.lora.scaling(pair.alpha, pair.rank)),
        };
        Ok((names, part))
    }
}
