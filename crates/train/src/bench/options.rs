//! What is benchmarked.

use std::path::PathBuf;

use calor_meter::EnergyOptions;
use calor_model::{LoraOptions, Quantization, Recompute};
use serde::{Deserialize, Serialize};

use super::batch::Batch;
use crate::device::DeviceSpec;
use crate::recipe::{Dtype, KernelChoice, Recipe, TaskKind};
use crate::session::frozen_weights;

/// Classes of a head whose number a recipe leaves to the cohort.
pub(super) const CLASSES: usize = 2;

/// What a benchmarked step minimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BenchTask {
    /// Mean next-token cross-entropy.
    CausalLm,
    /// Mean cross-entropy of two classes, a label a row.
    SequenceClassification,
    /// What a recipe's task minimises.
    #[serde(untagged)]
    Recipe(TaskKind),
}

impl BenchTask {
    pub(super) fn kind(self) -> TaskKind {
        match self {
            BenchTask::CausalLm => TaskKind::CausalLm,
            BenchTask::SequenceClassification => TaskKind::Multiclass,
            BenchTask::Recipe(kind) => kind,
        }
    }
}

/// What is benchmarked.
#[derive(Clone, Debug)]
pub struct StepBenchOptions {
    /// The checkpoint's folder.
    pub model: PathBuf,
    /// What is minimised.
    pub task: BenchTask,
    /// A PEFT adapter to start from; without one, the recipe's or `lora` is drawn anew.
    pub adapter: Option<PathBuf>,
    /// The adapter where neither that nor a recipe is given.
    pub lora: LoraOptions,
    /// A safetensors file with `input_ids` and `labels`, and `attention_mask` where there is
    /// padding; without one, rows of `seq` random tokens.
    pub data: Option<PathBuf>,
    /// Puts rows of the file one behind the other, as far as they fit into its row length.
    pub pack: bool,
    /// Rows, where no file is given.
    pub batch: usize,
    /// Tokens a row, where no file is given.
    pub seq: usize,
    /// Windows, each timed and metered by itself.
    pub windows: usize,
    /// Steps of a window.
    pub steps: usize,
    /// Steps before them that are not timed.
    pub warmup: usize,
    /// Steps after them that are taken apart; 0 for none.
    pub profiled_steps: usize,
    /// Whether the peak is measured with products as large as show it; else with those that a run's
    /// start waits for.
    pub large_products: bool,
    /// The learning rate, the same at every step; a recipe has its own.
    pub learning_rate: f64,
    /// Norm that gradients are clipped to; 0 for no clipping.
    pub max_grad_norm: f64,
    /// Seed of what is drawn.
    pub seed: u64,
    /// Where to compute.
    pub device: DeviceSpec,
    /// Type of the frozen weights.
    pub dtype: Dtype,
    /// Blocks that are run again in the backward pass.
    pub recompute: Recompute,
    /// Bits of the backbone's frozen linear layers.
    pub quantization: Option<Quantization>,
    /// What operations are computed with.
    pub kernels: KernelChoice,
    /// How energy is measured.
    pub energy: EnergyOptions,
    /// The recipe whose model, adapter and optimizer these are.
    pub recipe: Option<Box<Recipe>>,
}

impl StepBenchOptions {
    /// A micro-batch of a recipe as one step: its rows, all of them full, on its model with its
    /// adapter and its optimizer at the peak of the learning rate. `checkpoint` is the folder that
    /// `recipe.model.id` names.
    pub fn of_recipe(recipe: Recipe, checkpoint: PathBuf, device: DeviceSpec) -> StepBenchOptions {
        let train = &recipe.train;
        let frozen = frozen_weights(&recipe.model);
        StepBenchOptions {
            model: checkpoint,
            task: BenchTask::Recipe(recipe.task.kind),
            adapter: None,
            lora: LoraOptions::default(),
            data: None,
            pack: false,
            batch: train.micro_batch,
            seq: recipe.sequence.max_tokens,
            windows: 3,
            steps: 8,
            warmup: 2,
            profiled_steps: 1,
            large_products: true,
            learning_rate: train.learning_rate,
            max_grad_norm: train.max_grad_norm,
            seed: train.seed,
            device,
            dtype: recipe.model.dtype,
            // `auto` is resolved when the shapes are known.
            recompute: train.recompute().unwrap_or_default(),
            quantization: frozen.quantization,
            kernels: train.kernels,
            energy: recipe.energy.clone(),
            recipe: Some(Box::new(recipe)),
        }
    }

    /// What a reader has to know to see what is measured.
    pub(super) fn notes(&self, batch: &Batch) -> Vec<String> {
        let mut notes = Vec::new();
        match &self.data {
            None => notes.push(format!(
                "the tokens are random: {} rows of {} tokens, all full; no cohort and no text is read",
                self.batch, self.seq
            )),
            Some(_) if self.pack => notes.push(format!(
                "{} sequences of the file, packed into {} rows",
                batch.0.spans.len(),
                batch.0.rows
            )),
            Some(_) => {}
        }
        if self.kernels == KernelChoice::Reference {
            notes.push(
                "every operation in plain tensor operations, to measure what the kernels gain; memory is predicted for those"
                    .to_owned(),
            );
        }
        let Some(recipe) = &self.recipe else {
            return notes;
        };
        let train = &recipe.train;
        if train.global_batch > train.micro_batch {
            notes.push(format!(
                "a step is one micro-batch of {}, where the recipe's has {} patients: the update is a larger share of it",
                train.micro_batch, train.global_batch
            ));
        }
        if matches!(
            recipe.task.kind,
            TaskKind::Multiclass | TaskKind::Multilabel | TaskKind::Tokens
        ) {
            notes.push(format!(
                "the head has {CLASSES} outputs: how many the task has is known from its cohort"
            ));
        }
        let streams = recipe.modality.streams();
        if !streams.is_empty() {
            let names: Vec<&str> = streams
                .iter()
                .map(|stream| stream.options.modality.name())
                .collect();
            notes.push(format!(
                "the backbone alone: the recipe's encoders of {} are left out",
                names.join(", ")
            ));
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_written_as_recipes_and_the_command_line_spell_it() {
        let written = |task| serde_json::to_value(task).unwrap();
        assert_eq!(written(BenchTask::CausalLm), "causal_lm");
        assert_eq!(written(BenchTask::Recipe(TaskKind::Binary)), "binary");
    }
}
