//! New weights of the fused part: each a pure function of the seed and its name.

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::config::Activation;
use crate::linear::Linear;
use crate::mlp::Mlp;
use crate::norm::LayerNorm;
use crate::parameter::{Parameter, ParameterGroup, ParameterKind};
use crate::random::Stream;

/// Of every layer norm here, as in PyTorch.
const EPSILON: f64 = 1e-5;

/// Where new weights come from and what they are called.
#[derive(Clone)]
pub(super) struct New<'a> {
    pub seed: u64,
    pub device: &'a Device,
    pub group: ParameterGroup,
    pub path: String,
}

impl New<'_> {
    /// The same for a part of this part.
    pub fn at(&self, name: &str) -> Self {
        New {
            path: format!("{}.{name}", self.path),
            ..self.clone()
        }
    }

    pub fn group(&self, group: ParameterGroup) -> Self {
        New {
            group,
            ..self.clone()
        }
    }

    /// A linear layer: weights uniform in ±√(6 / (in + out)) (Glorot and Bengio 2010), biases zero.
    pub fn linear(&self, name: &str, input: usize, output: usize) -> Linear {
        let inside = self.at(name);
        Linear {
            weight: inside
                .uniform("weight", [output, input], glorot(input, output))
                .into(),
            bias: Some(inside.zeros("bias", [output])),
            lora: None,
        }
    }

    /// Linear, GELU, linear; four times as wide in the middle.
    pub fn mlp(&self, name: &str, width: usize) -> Mlp {
        let inside = self.at(name);
        Mlp {
            intermediate: inside.linear("first", width, 4 * width),
            output: inside.linear("second", 4 * width, width),
            activation: Activation::Gelu,
        }
    }

    pub fn norm(&self, name: &str, width: usize) -> LayerNorm {
        let ones = Tensor::ones([width], (self.device, DType::F32));
        LayerNorm {
            weight: self.parameter(&format!("{name}.weight"), ones),
            bias: Some(self.zeros(&format!("{name}.bias"), [width])),
            epsilon: EPSILON,
        }
    }

    pub fn zeros<const D: usize>(&self, name: &str, shape: [usize; D]) -> Parameter<D> {
        self.parameter(name, Tensor::zeros(shape, (self.device, DType::F32)))
    }

    /// Normal with mean 0.
    pub fn normal<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        deviation: f64,
    ) -> Parameter<D> {
        let count = shape.iter().product();
        let values = self.stream(name).normal(count, deviation);
        self.parameter(name, self.tensor(values, shape))
    }

    pub fn uniform<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        bound: f64,
    ) -> Parameter<D> {
        let count = shape.iter().product();
        let values = self.stream(name).uniform(count, bound);
        self.parameter(name, self.tensor(values, shape))
    }

    /// A trained tensor of given values.
    pub fn parameter<const D: usize>(&self, name: &str, value: Tensor<D>) -> Parameter<D> {
        let kind = ParameterKind::Own(self.group);
        Parameter::new(format!("{}.{name}", self.path), value, kind)
    }

    pub fn tensor<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        floats(values, shape, self.device)
    }

    /// The numbers that belong to a name.
    pub fn stream(&self, name: &str) -> Stream {
        Stream::new(self.seed, &format!("{}.{name}", self.path))
    }
}

/// Bound of uniform weights between layers of these widths.
pub(super) fn glorot(input: usize, output: usize) -> f64 {
    (6.0 / (input + output) as f64).sqrt()
}

/// An f32 tensor outside autodiff.
pub(super) fn floats<const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    device: &Device,
) -> Tensor<D> {
    let device = device.clone().inner();
    Tensor::from_data(TensorData::new(values, shape), (&device, DType::F32))
}
