//! The weight of a linear layer: a matrix, or a quantised one.

use burn::tensor::{DType, Tensor};
use calor_kernels::QuantizedWeight;

use crate::parameter::{Parameter, Visit};

/// `[out, in]`
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "some hundred bytes beside a matrix of megabytes"
)]
pub(crate) enum Weight {
    /// A matrix, trained or frozen.
    Dense(Parameter<2>),
    /// A frozen one in 8 or 4 bits.
    Quantized(QuantizedParameter),
}

/// A quantised tensor under its path in the Transformers class, `.weight` and all.
#[derive(Debug, Clone)]
pub(crate) struct QuantizedParameter {
    pub name: String,
    pub weight: Box<QuantizedWeight>,
}

impl Weight {
    /// `[out, in]`
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Weight::Dense(weight) => weight.tensor.dims(),
            Weight::Quantized(weight) => weight.weight.dims(),
        }
    }

    /// The matrix, where it is one.
    pub fn dense(&self) -> Option<&Parameter<2>> {
        match self {
            Weight::Dense(weight) => Some(weight),
            Weight::Quantized(_) => None,
        }
    }

    /// The values that the layer computes with, `[out, in]`: as they are stored, or dequantised.
    pub fn stored_values(&self) -> Tensor<2> {
        match self {
            Weight::Dense(weight) => weight.tensor.clone(),
            Weight::Quantized(weight) => weight.weight.dequantize(DType::F32),
        }
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        match self {
            Weight::Dense(weight) => visitor.visit(weight),
            Weight::Quantized(weight) => visitor.visit_quantized(weight),
        }
    }
}

impl From<Parameter<2>> for Weight {
    fn from(parameter: Parameter<2>) -> Weight {
        Weight::Dense(parameter)
    }
}
