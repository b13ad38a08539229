//! The peak memory of a run, predicted before it: by component, against what there is, with what
//! would fit where it does not.

use std::fmt;
use std::path::Path;

use calor_meter::{Quantity, host_memory_limit, resident_host_memory};
use calor_model::{
    Checkpoint, MemoryModel, ModelOptions, PassShape, Quantization, Recompute, RecomputedBlocks,
};
use serde::Serialize;

use crate::TrainError;
use crate::device::DeviceSpec;
use crate::optimizer::OptimizerOptions;
use crate::recipe::{Dtype, Recipe, TrainSection};
use crate::session::{dtype_name, float_dtype};

/// Share of the memory there is that a run may take: allocators do not give back all that is freed,
/// and there are others on the machine.
const USABLE: f64 = 0.95;
/// Host bytes a position that is collated: token, position, segment, each twice on its way.
const COLLATED_BYTES: u64 = 24;
/// Micro-batches on the host at once.
const COLLATED: u64 = 6;

/// The peak of a run's memory, predicted.
#[derive(Clone, Debug, Serialize)]
pub struct MemoryPrediction {
    /// Rows of the largest micro-batch.
    pub rows: usize,
    /// Tokens a row, padding included.
    pub seq: usize,
    /// Blocks that are run again in the backward pass, and all blocks.
    pub recomputed_blocks: usize,
    /// Blocks of the backbone.
    pub blocks: usize,
    /// What is held where the most is held.
    pub components: Vec<Component>,
    /// Their sum, where the model is computed.
    pub peak_bytes: u64,
    /// What there is.
    pub available_bytes: Quantity,
    /// Whether it fits; none where what there is is not known.
    pub fits: Option<bool>,
    /// Changes of the recipe with which it does, the fastest first.
    pub proposals: Vec<Proposal>,
}

/// One part of the peak.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Component {
    /// What it is.
    pub name: &'static str,
    /// Bytes.
    pub bytes: u64,
}

/// Changes of a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Proposal {
    /// As `--set` takes them.
    pub set: Vec<String>,
    /// The peak with them.
    pub peak_bytes: u64,
}

impl MemoryPrediction {
    /// Refuses what does not fit.
    ///
    /// # Errors
    /// [`TrainError::Memory`].
    pub(crate) fn check(&self) -> Result<(), TrainError> {
        match self.fits {
            Some(false) => Err(TrainError::Memory(Box::new(self.clone()))),
            _ => Ok(()),
        }
    }
}

/// The prediction in words, for an error.
impl fmt::Display for MemoryPrediction {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "the largest micro-batch, {} × {} tokens, needs {} at its peak",
            self.rows,
            self.seq,
            gibibytes(self.peak_bytes as f64)
        )?;
        if let Some(available) = self.available_bytes.value() {
            write!(formatter, ", and {} are there", gibibytes(available))?;
        }
        let parts: Vec<String> = (self.components.iter())
            .map(|part| format!("{} {}", part.name, gibibytes(part.bytes as f64)))
            .collect();
        write!(formatter, " ({}).", parts.join(", "))?;
        if self.proposals.is_empty() {
            return write!(
                formatter,
                " No micro-batch fits, however much is recomputed: lower `sequence.max_tokens` or take a smaller checkpoint"
            );
        }
        write!(formatter, " What fits, the fastest first:")?;
        for proposal in &self.proposals {
            let peak = gibibytes(proposal.peak_bytes as f64);
            write!(
                formatter,
                "\n  --set {}  ({peak})",
                proposal.set.join(" --set ")
            )?;
        }
        Ok(())
    }
}

fn gibibytes(bytes: f64) -> String {
    format!("{:.2} GiB", bytes / f64::from(1 << 30))
}

/// A recipe's memory, for any micro-batch and any choice of what is recomputed.
pub(crate) struct MemoryPlan<'a> {
    recipe: &'a Recipe,
    checkpoint: &'a Checkpoint,
    options: &'a ModelOptions,
    model: MemoryModel,
    device: DeviceSpec,
    /// The largest micro-batch of the recipe.
    shape: PassShape,
    /// What the process holds already: program, cohort, tokenizer.
    process_bytes: u64,
    available: Quantity,
}

impl<'a> MemoryPlan<'a> {
    /// Looks at the process and the device; call it before the weights are read.
    ///
    /// # Errors
    /// Options that do not fit the checkpoint.
    pub fn new(
        recipe: &'a Recipe,
        checkpoint: &'a Checkpoint,
        options: &'a ModelOptions,
        device: DeviceSpec,
        shape: PassShape,
        device_memory: Quantity,
    ) -> Result<MemoryPlan<'a>, TrainError> {
        let proc_root = Path::new("/proc");
        let process = resident_host_memory(proc_root).value().unwrap_or(0.0);
        let available = match device.is_asynchronous() {
            false => host_memory_limit(proc_root, Path::new("/sys/fs/cgroup")),
            true => device_memory,
        };
        Ok(MemoryPlan {
            recipe,
            checkpoint,
            options,
            model: MemoryModel::new(checkpoint, options)?,
            device,
            shape,
            process_bytes: process as u64,
            available,
        })
    }

    /// What the recipe's choice comes to: `auto` is as few blocks as fit, or all where none do.
    pub fn recompute(&self) -> Recompute {
        self.recipe.train.recompute().unwrap_or_else(|| {
            let layers = self.model.layers();
            let first = |count| Recompute {
                blocks: RecomputedBlocks::First(count),
                offload: self.recipe.train.offload,
            };
            (0..=layers)
                .map(first)
                .find(|&recompute| {
                    self.fits(self.peak(&self.model, self.shape, recompute)) != Some(false)
                })
                .unwrap_or_else(|| first(layers))
        })
    }

    /// The prediction for the recipe as it is.
    pub fn predict(&self) -> Result<MemoryPrediction, TrainError> {
        let recompute = self.recompute();
        let components = self.components(&self.model, self.shape, recompute);
        let peak_bytes = components.iter().map(|component| component.bytes).sum();
        let fits = self.fits(peak_bytes);
        let layers = self.model.layers();
        Ok(MemoryPrediction {
            rows: self.shape.rows,
            seq: self.shape.seq,
            recomputed_blocks: recompute.blocks.count(layers),
            blocks: layers,
            components,
            peak_bytes,
            available_bytes: self.available.clone(),
            fits,
            proposals: match fits {
                Some(false) => self.proposals()?,
                _ => Vec::new(),
            },
        })
    }

    fn fits(&self, peak_bytes: u64) -> Option<bool> {
        let available = self.available.value()?;
        Some(peak_bytes as f64 <= USABLE * available)
    }

    fn peak(&self, model: &MemoryModel, shape: PassShape, recompute: Recompute) -> u64 {
        let components = self.components(model, shape, recompute);
        components.iter().map(|component| component.bytes).sum()
    }

    fn components(
        &self,
        model: &MemoryModel,
        shape: PassShape,
        recompute: Recompute,
    ) -> Vec<Component> {
        let on_host = !self.device.is_asynchronous();
        let training = model.training(shape, recompute, self.device.pass());
        let mut components = vec![
            Component {
                name: "frozen weights",
                bytes: training.weights_bytes,
            },
            Component {
                name: "adapter and head",
                bytes: training.trained_bytes,
            },
            Component {
                name: "gradients",
                bytes: training.gradients_bytes,
            },
            Component {
                name: "optimizer",
                bytes: state_bytes(&self.recipe.train, training.trained_bytes),
            },
            Component {
                name: "activations",
                bytes: training.activations_bytes,
            },
            Component {
                name: "workspace",
                bytes: training.working_bytes,
            },
        ];
        if on_host {
            let positions = (shape.rows * shape.seq) as u64;
            components.push(Component {
                name: "batches ahead and offloaded states",
                bytes: COLLATED * COLLATED_BYTES * positions + training.offloaded_bytes,
            });
            components.push(Component {
                name: "program and cohort",
                bytes: self.process_bytes,
            });
        }
        components
    }

    /// The largest micro-batch that fits without and with recomputation, with the weights as the
    /// recipe stores them and as it might.
    fn proposals(&self) -> Result<Vec<Proposal>, TrainError> {
        let mut proposals = Vec::new();
        for (stored, options) in self.storages() {
            let model = MemoryModel::new(self.checkpoint, &options)?;
            for (blocks, name) in [
                (RecomputedBlocks::None, "none"),
                (RecomputedBlocks::All, "all"),
            ] {
                let recompute = Recompute {
                    blocks,
                    offload: self.recipe.train.offload && blocks == RecomputedBlocks::All,
                };
                let Some((micro_batch, peak_bytes)) = self.largest(&model, recompute) else {
                    continue;
                };
                let mut set = Vec::new();
                if micro_batch != self.recipe.train.micro_batch {
                    set.push(format!("train.micro_batch={micro_batch}"));
                }
                if self.recipe.train.recompute() != Some(recompute) {
                    set.push(format!("train.recompute={name}"));
                }
                if self.recipe.train.offload != recompute.offload {
                    set.push(format!("train.offload={}", recompute.offload));
                }
                set.extend(stored.clone());
                proposals.push(Proposal { set, peak_bytes });
            }
        }
        Ok(proposals)
    }

    /// How the frozen weights may be stored, the recipe's own way first: what to set, and the
    /// options with it.
    fn storages(&self) -> Vec<(Option<String>, ModelOptions)> {
        let mut storages = vec![(None, self.options.clone())];
        if self.recipe.model.dtype == Dtype::F32 {
            let mut options = self.options.clone();
            options.dtype = float_dtype(Dtype::Bf16);
            let set = format!("model.dtype={}", dtype_name(Dtype::Bf16));
            storages.push((Some(set), options));
        }
        let stored = self.checkpoint.config().stored_quantization();
        if self.options.quantization.or(stored).is_none() {
            let mut options = self.options.clone();
            options.quantization = Some(Quantization::Nf4 { double: true });
            storages.push((Some("model.quantization=nf4".to_owned()), options));
        }
        storages
    }

    /// The most rows that fit, up to the recipe's, and the peak with them.
    fn largest(&self, model: &MemoryModel, recompute: Recompute) -> Option<(usize, u64)> {
        let samples_a_row = self.shape.samples.div_ceil(self.shape.rows.max(1));
        (1..=self.shape.rows).rev().find_map(|rows| {
            let shape = PassShape {
                rows,
                samples: rows * samples_a_row,
                ..self.shape
            };
            let peak = self.peak(model, shape, recompute);
            let micro_batch = match rows == self.shape.rows {
                true => self.recipe.train.micro_batch,
                false => rows,
            };
            (self.fits(peak) == Some(true)).then_some((micro_batch, peak))
        })
    }
}

/// What the optimizer and averages keep of what is trained, f32 each: two moments, or the momentum
/// alone. In eight bits a moment is a byte and, for every 256, a scale; small tensors stay f32, and so
/// do the few that are not low-rank factors with Muon, neither of which is counted.
fn state_bytes(train: &TrainSection, trained_bytes: u64) -> u64 {
    let averages = match train.ema_decay {
        Some(_) => trained_bytes,
        None => 0,
    };
    averages
        + match OptimizerOptions::from_recipe(train) {
            OptimizerOptions::AdamW(_) | OptimizerOptions::ScheduleFreeAdamW(_) => {
                2 * trained_bytes
            }
            OptimizerOptions::AdamW8Bit(_) => trained_bytes / 2 + trained_bytes / 128,
            OptimizerOptions::Muon { .. } => trained_bytes,
            OptimizerOptions::Sgd(options) if options.momentum == 0.0 => 0,
            OptimizerOptions::Sgd(_) => trained_bytes,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plan for the recipe on a machine with so much memory.
    fn with_plan<R>(
        set: &[&str],
        available_bytes: f64,
        use_it: impl FnOnce(&MemoryPlan) -> R,
    ) -> R {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/llama3");
        let text = "schema = 1\nname = \"n\"\n[model]\nid = \"m\"\n[task]\nkind = \"binary\"\nlabels = \"l\"\n[cohort]\npath = \"c\"\n[train]\nmicro_batch = 8\n";
        let set: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
        let recipe = Recipe::parse(text, Path::new("n.toml"), &set).unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let options = crate::session::model_options(&recipe, &checkpoint, 2, None).unwrap();
        let shape = PassShape {
            rows: 8,
            seq: 4096,
            samples: 8,
        };
        let none = Quantity::unavailable("the device is the host");
        let mut plan =
            MemoryPlan::new(&recipe, &checkpoint, &options, DeviceSpec::Cpu, shape, none).unwrap();
        plan.process_bytes = 0;
        plan.available = Quantity::measured(available_bytes, "the test");
        use_it(&plan)
    }

    const MIB: f64 = 1048576.0;

    #[test]
    fn what_does_not_fit_is_refused_with_what_does() {
        let whole = with_plan(&[], 1e12, |plan| plan.predict().unwrap());
        assert_eq!((whole.fits, whole.proposals.len()), (Some(true), 0));
        assert!(whole.check().is_ok());
        let most = whole.peak_bytes as f64;
        let refused = with_plan(&[], 0.6 * most, |plan| plan.predict().unwrap());
        let error = refused.check().unwrap_err();
        assert!(!error.is_usage());
        let text = error.to_string();
        assert!(text.contains("8 × 4096 tokens"), "{text}");
        assert!(text.contains("--set train.micro_batch="), "{text}");
        assert!(text.contains("--set train.recompute=all"), "{text}");
        for proposal in &refused.proposals {
            // Each does fit, and is what the recipe comes to with it.
            assert!(proposal.peak_bytes as f64 <= 0.6 * most * USABLE);
            let micro = proposal
                .set
                .iter()
                .find_map(|set| set.strip_prefix("train.micro_batch="));
            assert!(micro.is_none_or(|rows| rows.parse::<usize>().unwrap() < 8));
        }
        let nothing = with_plan(&[], 0.01 * MIB, |plan| plan.predict().unwrap());
        assert!(nothing.proposals.is_empty());
        assert!(
            nothing
                .check()
                .unwrap_err()
                .to_string()
                .contains("max_tokens")
        );
    }

    #[test]
    fn each_optimizer_keeps_what_it_keeps() {
        let held = |set: &[&str]| {
            with_plan(set, 1e12, |plan| {
                let found = plan.predict().unwrap().components;
                let of = |name| found.iter().find(|part| part.name == name).unwrap().bytes;
                of("optimizer") as f64 / of("adapter and head") as f64
            })
        };
        for (set, share) in [
            (&[][..], 2.0),
            (&["train.optimizer=adamw_8bit"], 0.508),
            (
                &[
                    "train.optimizer=schedule_free_adamw",
                    "train.schedule.kind=constant",
                ],
                2.0,
            ),
            (&["train.optimizer=muon"], 1.0),
            (&["train.optimizer=sgd"], 1.0),
            (&["train.optimizer=sgd", "train.momentum=0"], 0.0),
            (&["train.ema_decay=0.9"], 3.0),
        ] {
            assert!((held(set) - share).abs() < 1e-3, "{set:?}: {}", held(set));
        }
    }

    #[test]
    fn auto_recomputes_as_few_blocks_as_fit() {
        let peak = |set: &str, available: f64| {
            with_plan(&[set], available, |plan| {
                let prediction = plan.predict().unwrap();
                (prediction.peak_bytes as f64, prediction.recomputed_blocks)
            })
        };
        let (none, _) = peak("train.recompute=none", 1e12);
        let (all, blocks) = peak("train.recompute=all", 1e12);
        assert!(blocks == 2 && all < none, "{all} {none}");
        assert_eq!(peak("train.recompute=auto", 1e12).1, 0);
        assert_eq!(peak("train.recompute=auto", 0.99 * none / USABLE).1, 1);
        assert_eq!(peak("train.recompute=auto", 0.5 * all).1, 2);
    }
}
