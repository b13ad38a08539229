//! The feed-forward blocks.

use burn::tensor::{Tensor, activation};

use crate::config::Activation;
use crate::linear::{Linear, forward_each};
use crate::parameter::Visit;
use crate::run::Mode;

/// Either of the two.
#[derive(Debug, Clone)]
pub(crate) enum FeedForward {
    Plain(Box<Mlp>),
    Gated(Box<GatedMlp>),
}

impl FeedForward {
    pub fn forward(&self, input: Tensor<3>, mode: Mode) -> Tensor<3> {
        match self {
            FeedForward::Plain(mlp) => mlp.forward(input, mode),
            FeedForward::Gated(mlp) => mlp.forward(input, mode),
        }
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        match self {
            FeedForward::Plain(mlp) => mlp.visit(visitor),
            FeedForward::Gated(mlp) => mlp.visit(visitor),
        }
    }
}

/// `down(activation(gate(x)) · up(x))` (Shazeer 2020).
#[derive(Debug, Clone)]
pub(crate) struct GatedMlp {
    pub input: GateUp,
    pub down: Linear,
    pub activation: Activation,
}

/// The two branches of a gated block, or both in one layer, the gate first.
#[derive(Debug, Clone)]
pub(crate) enum GateUp {
    Split(Box<[Linear; 2]>),
    Fused(Box<Linear>),
}

impl GatedMlp {
    pub fn forward(&self, input: Tensor<3>, mode: Mode) -> Tensor<3> {
        let (gate, up) = match &self.input {
            GateUp::Split(branches) => forward_each(branches, input, mode).into(),
            GateUp::Fused(both) => {
                let both = both.forward(input, mode);
                let width = both.dims()[2] / 2;
                (
                    both.clone().narrow(2, 0, width),
                    both.narrow(2, width, width),
                )
            }
        };
        let wide = match self.activation {
            Activation::Silu => calor_kernels::swiglu(gate, up),
            Activation::Gelu => calor_kernels::geglu(gate, up),
            Activation::GeluTanh => calor_kernels::geglu_tanh(gate, up),
            activation => activation.apply(gate) * up,
        };
        self.down.forward(wide, mode)
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        match &mut self.input {
            GateUp::Split(branches) => {
                for branch in branches.iter_mut() {
                    branch.visit(visitor);
                }
            }
            GateUp::Fused(both) => both.visit(visitor),
        }
        self.down.visit(visitor);
    }
}

/// `output(activation(intermediate(x)))`.
#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    pub intermediate: Linear,
    pub output: Linear,
    pub activation: Activation,
}

impl Mlp {
    pub fn forward(&self, input: Tensor<3>, mode: Mode) -> Tensor<3> {
        let wide = self.intermediate.forward(input, mode);
        self.output.forward(self.activation.apply(wide), mode)
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.intermediate.visit(visitor);
        self.output.visit(visitor);
    }
}

impl Activation {
    pub fn apply<const D: usize>(self, input: Tensor<D>) -> Tensor<D> {
        match self {
            Activation::Gelu => calor_kernels::gelu(input),
            Activation::GeluTanh => calor_kernels::gelu_tanh(input),
            Activation::QuickGelu => input.clone() * activation::sigmoid(input * 1.702),
            Activation::Relu => activation::relu(input),
            Activation::Silu => activation::silu(input),
            Activation::Tanh => input.tanh(),
        }
    }
}
