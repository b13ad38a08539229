//! Blocks that keep nothing but their input for the backward pass, which runs them a second time.

use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::{Gradients, Tensor};
use calor_kernels::{AnyTensor, KeptOn, Segment, SegmentGradients, Wanted};

use crate::attention::Masking;
use crate::parameter::{Parameter, Visit};
use crate::run::{Mode, ModelInput, Run, Selection};

/// Which blocks of the backbone are run again in the backward pass, and where their inputs wait.
///
/// Losses and gradients are the same to the bit on the CPU: dropout masks follow from seed and
/// position, and every sum is taken in the same order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recompute {
    /// Which blocks.
    pub blocks: RecomputedBlocks,
    /// Whether their inputs wait in the host's memory rather than the device's.
    pub offload: bool,
}

/// Which blocks of the backbone are run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RecomputedBlocks {
    /// None: everything is kept.
    #[default]
    None,
    /// All of them.
    All,
    /// The first and every n-th after it.
    Every(usize),
    /// So many from the first on: what the others keep is given back before these are run again,
    /// so no other choice of as many blocks has a lower peak.
    First(usize),
}

impl RecomputedBlocks {
    /// Whether this block is run again; counted from 0.
    pub fn contains(self, block: usize) -> bool {
        match self {
            RecomputedBlocks::None => false,
            RecomputedBlocks::All => true,
            RecomputedBlocks::Every(step) => block.is_multiple_of(step.max(1)),
            RecomputedBlocks::First(count) => block < count,
        }
    }

    /// How many of `blocks` are run again.
    pub fn count(self, blocks: usize) -> usize {
        (0..blocks).filter(|&block| self.contains(block)).count()
    }
}

/// A transformer block, as the backbones loop over it.
pub(crate) trait Block: Clone + Debug + Send + Sync + 'static {
    /// What the blocks of a pass share beside the run, such as rotary angles; constants.
    type Context: Clone + Debug + Send + Sync + 'static;

    /// states `[batch, seq, hidden]`; returns the same, or `[1, samples, hidden]` of the tokens
    /// that `run` selects.
    fn forward(&self, states: Tensor<3>, context: &Self::Context, run: &Run) -> Tensor<3>;

    fn visit<V: Visit>(&mut self, visitor: &mut V);
}

impl Run<'_> {
    /// Runs block `index` of `blocks`, recorded as the run says.
    pub fn block<B: Block>(
        &self,
        block: &B,
        index: usize,
        blocks: usize,
        states: Tensor<3>,
        context: &B::Context,
    ) -> Tensor<3> {
        let run = self.layer(index + 1 == blocks);
        let Some(recompute) = self
            .recompute
            .filter(|recompute| recompute.blocks.contains(index))
        else {
            return block.forward(states, context, &run);
        };
        let part = BlockRun {
            block: block.clone(),
            context: context.clone(),
            pass: Pass::of(&run),
        };
        rerun(part, states, recompute.offload)
    }
}

/// A run that lives until the backward pass.
#[derive(Debug, Clone)]
struct Pass {
    input: ModelInput,
    mode: Mode,
    masking: Masking,
    selection: Option<Selection>,
}

impl Pass {
    fn of(run: &Run) -> Pass {
        let ModelInput {
            input_ids,
            positions,
            segments,
            samples,
            // Blocks read the states, where soft tokens already have their places.
            soft: _,
        } = run.input;
        Pass {
            input: ModelInput {
                input_ids: input_ids.clone(),
                positions: positions.clone(),
                segments: segments.clone(),
                samples: samples.clone(),
                soft: None,
            },
            mode: run.mode,
            masking: run.masking,
            selection: run.selection.cloned(),
        }
    }

    fn run(&self) -> Run<'_> {
        Run {
            input: &self.input,
            mode: self.mode,
            masking: self.masking,
            selection: self.selection.as_ref(),
            replacement: None,
            recompute: None,
            cache: None,
        }
    }
}

/// A block with all that its forward pass reads.
#[derive(Debug, Clone)]
struct BlockRun<B: Block> {
    block: B,
    context: B::Context,
    pass: Pass,
}

impl<B: Block> Rerun for BlockRun<B> {
    fn forward(&self, input: Tensor<3>) -> Tensor<3> {
        self.block.forward(input, &self.context, &self.pass.run())
    }

    fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.block.visit(visitor);
    }
}

/// Parameters and all else that a part of the model reads, its input apart.
pub(crate) trait Rerun: Clone + Debug + Send + Sync + 'static {
    fn forward(&self, input: Tensor<3>) -> Tensor<3>;

    fn visit<V: Visit>(&mut self, visitor: &mut V);
}

/// Runs a part of the model so that only its input is kept for the backward pass.
pub(crate) fn rerun<R: Rerun>(part: R, input: Tensor<3>, offload: bool) -> Tensor<3> {
    let kept = match offload {
        true => KeptOn::Host,
        false => KeptOn::Device,
    };
    calor_kernels::recompute(input, Arc::new(Again(part)), kept)
}

#[derive(Debug)]
struct Again<R: Rerun>(R);

impl<R: Rerun> Segment for Again<R> {
    fn forward(&self, input: Tensor<3>) -> Tensor<3> {
        struct Inner;
        impl Visit for Inner {
            fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
                parameter.tensor = parameter.tensor.clone().inner();
            }
        }
        let mut part = self.0.clone();
        part.visit(&mut Inner);
        part.forward(input)
    }

    fn parameters(&self) -> Vec<AnyTensor> {
        struct Collect(Vec<AnyTensor>);
        impl Visit for Collect {
            fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
                if parameter.tensor.is_require_grad() {
                    self.0.push(parameter.tensor.clone().into());
                }
            }
        }
        let mut collect = Collect(Vec::new());
        self.0.clone().visit(&mut collect);
        collect.0
    }

    fn backward(&self, input: Tensor<3>, gradient: Tensor<3>, wanted: Wanted) -> SegmentGradients {
        struct NewLeaves;
        impl Visit for NewLeaves {
            fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
                if parameter.tensor.is_require_grad() {
                    let value = parameter.tensor.clone().inner();
                    parameter.tensor = value.autodiff().require_grad();
                }
            }
        }
        struct Collect {
            gradients: Gradients,
            found: Vec<Option<AnyTensor>>,
        }
        impl Visit for Collect {
            fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
                if parameter.tensor.is_require_grad() {
                    let gradient = parameter.tensor.grad_remove(&mut self.gradients);
                    self.found.push(gradient.map(AnyTensor::from));
                }
            }
        }
        let mut part = self.0.clone();
        part.visit(&mut NewLeaves);
        let input = match wanted {
            Wanted::InputAndParameters => input.autodiff().require_grad(),
            Wanted::Parameters => input,
        };
        let output = part.forward(input.clone());
        // The gradient of this sum at the output is the gradient itself.
        let gradients = (output * gradient).sum().backward();
        let mut collect = Collect {
            gradients,
            found: Vec::new(),
        };
        part.visit(&mut collect);
        SegmentGradients {
            input: input.grad_remove(&mut collect.gradients),
            parameters: collect.found,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_chosen_as_asked() {
        let chosen = |blocks: RecomputedBlocks| -> Vec<usize> {
            (0..5).filter(|&block| blocks.contains(block)).collect()
        };
        assert!(chosen(RecomputedBlocks::None).is_empty());
        assert_eq!(chosen(RecomputedBlocks::All), [0, 1, 2, 3, 4]);
        assert_eq!(chosen(RecomputedBlocks::Every(1)), [0, 1, 2, 3, 4]);
        assert_eq!(chosen(RecomputedBlocks::Every(2)), [0, 2, 4]);
        assert_eq!(chosen(RecomputedBlocks::First(2)), [0, 1]);
        assert_eq!(RecomputedBlocks::Every(3).count(5), 2);
    }
}
