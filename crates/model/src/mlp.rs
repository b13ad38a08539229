//! The feed-forward blocks of both families.

use burn::tensor::{Tensor, activation};

use crate::config::Activation;
use crate::linear::Linear;
use crate::parameter::Visit;
use crate::run::Mode;

/// `down(silu(gate(x)) · up(x))` (Shazeer 2020), of decoders.
#[derive(Debug, Clone)]
pub(crate) struct GatedMlp {
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

impl GatedMlp {
    pub fn forward(&self, input: Tensor<3>, mode: Mode) -> Tensor<3> {
        let gate = self.gate.forward(input.clone(), mode);
        let up = self.up.forward(input, mode);
        self.down.forward(calor_kernels::swiglu(gate, up), mode)
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.gate.visit(visitor);
        self.up.visit(visitor);
        self.down.visit(visitor);
    }
}

/// `output(activation(intermediate(x)))`, of encoders.
#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    pub intermediate: Linear,
    pub output: Linear,
    pub activation: Activation,
}

impl Mlp {
    pub fn forward(&self, input: Tensor<3>, mode: Mode) -> Tensor<3> {
        let wide = self.intermediate.forward(input, mode);
        let wide = match self.activation {
            Activation::Gelu => calor_kernels::gelu(wide),
            Activation::GeluTanh => calor_kernels::gelu_tanh(wide),
            Activation::QuickGelu => wide.clone() * activation::sigmoid(wide * 1.702),
            Activation::Relu => activation::relu(wide),
        };
        self.output.forward(wide, mode)
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.intermediate.visit(visitor);
        self.output.visit(visitor);
    }
}
