//! The normalisations, over the last dimension.

use burn::tensor::{DType, Tensor};

use crate::parameter::{Parameter, Visit};

/// Either of the two.
#[derive(Debug, Clone)]
pub(crate) enum Norm {
    Rms(Box<RmsNorm>),
    Layer(Box<LayerNorm>),
}

impl Norm {
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        match self {
            Norm::Rms(norm) => norm.forward(input),
            Norm::Layer(norm) => norm.forward(input),
        }
    }

    /// What is normalised, and the norm of it: `input`, or the sum with what a block adds to it.
    pub fn of_residual(
        &self,
        input: Tensor<3>,
        update: Option<Tensor<3>>,
    ) -> (Tensor<3>, Tensor<3>) {
        let norm = self.parameters(input.dtype());
        calor_kernels::residual_norm(input, update, norm)
    }

    fn parameters(&self, dtype: DType) -> calor_kernels::Norm {
        match self {
            Norm::Rms(norm) => norm.parameters(dtype),
            Norm::Layer(norm) => norm.parameters(dtype),
        }
    }

    /// Length of what it normalises.
    pub fn width(&self) -> usize {
        let [width] = match self {
            Norm::Rms(norm) => norm.weight.tensor.dims(),
            Norm::Layer(norm) => norm.weight.tensor.dims(),
        };
        width
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        match self {
            Norm::Rms(norm) => norm.visit(visitor),
            Norm::Layer(norm) => norm.visit(visitor),
        }
    }
}

/// RMS norm (Zhang and Sennrich 2019).
#[derive(Debug, Clone)]
pub(crate) struct RmsNorm {
    pub weight: Parameter<1>,
    pub epsilon: f64,
    /// Multiplies by `1 + weight` (Gemma).
    pub offset: bool,
}

impl RmsNorm {
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let norm = self.parameters(input.dtype());
        calor_kernels::rms_norm(input, norm.weight, norm.epsilon)
    }

    fn parameters(&self, dtype: DType) -> calor_kernels::Norm {
        calor_kernels::Norm {
            weight: match self.offset {
                // In f32: in half precision 1 + weight would lose the weight.
                true => self.weight.matching(DType::F32).add_scalar(1.0),
                false => self.weight.matching(dtype),
            },
            bias: None,
            epsilon: self.epsilon,
        }
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        visitor.visit(&mut self.weight);
    }
}

/// Layer norm (Ba et al. 2016).
#[derive(Debug, Clone)]
pub(crate) struct LayerNorm {
    pub weight: Parameter<1>,
    pub bias: Option<Parameter<1>>,
    pub epsilon: f64,
}

impl LayerNorm {
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let (weight, bias) = self.tensors(input.dtype());
        calor_kernels::layer_norm(input, weight, bias, self.epsilon)
    }

    fn parameters(&self, dtype: DType) -> calor_kernels::Norm {
        let (weight, bias) = self.tensors(dtype);
        calor_kernels::Norm {
            weight,
            bias: Some(bias),
            epsilon: self.epsilon,
        }
    }

    fn tensors(&self, dtype: DType) -> (Tensor<1>, Tensor<1>) {
        let weight = self.weight.matching(dtype);
        let bias = match &self.bias {
            Some(bias) => bias.matching(dtype),
            None => Tensor::zeros(weight.dims(), (&weight.device().inner(), dtype)),
        };
        (weight, bias)
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        visitor.visit(&mut self.weight);
        if let Some(bias) = &mut self.bias {
            visitor.visit(bias);
        }
    }
}
