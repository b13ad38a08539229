//! The two normalisations, over the last dimension.

use burn::tensor::Tensor;

use crate::parameter::{Parameter, Visit};

/// RMS norm (Zhang and Sennrich 2019), of decoders.
#[derive(Debug, Clone)]
pub(crate) struct RmsNorm {
    pub weight: Parameter<1>,
    pub epsilon: f64,
}

impl RmsNorm {
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let weight = self.weight.matching(input.dtype());
        calor_kernels::rms_norm(input, weight, self.epsilon)
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        visitor.visit(&mut self.weight);
    }
}

/// Layer norm (Ba et al. 2016), of encoders.
#[derive(Debug, Clone)]
pub(crate) struct LayerNorm {
    pub weight: Parameter<1>,
    pub bias: Parameter<1>,
    pub epsilon: f64,
}

impl LayerNorm {
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let dtype = input.dtype();
        let (weight, bias) = (self.weight.matching(dtype), self.bias.matching(dtype));
        calor_kernels::layer_norm(input, weight, bias, self.epsilon)
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        visitor.visit(&mut self.weight);
        visitor.visit(&mut self.bias);
    }
}
