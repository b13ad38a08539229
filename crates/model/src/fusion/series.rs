//! The encoder of irregular series: one token an observation, made of its time, its variable and its
//! value (STraTS, Tipirneni and Reddy 2022), then a transformer.
//!
//! Nothing is binned or imputed: what was not measured is simply no token.

use burn::tensor::{Int, IntDType, Tensor};

use super::encoder::Encoded;
use super::new::{New, glorot};
use super::options::SeriesOptions;
use super::transformer::Transformer;
use crate::linear::Linear;
use crate::parameter::{Parameter, Visit};
use crate::run::Mode;

#[derive(Debug, Clone)]
pub(super) struct Series {
    time: Continuous,
    value: Continuous,
    /// `[variables, width]`
    variable: Parameter<2>,
    transformer: Transformer,
    time_scale_days: f64,
    width: usize,
}

impl Series {
    pub fn new(new: &New, options: &SeriesOptions) -> Series {
        let SeriesOptions { hidden, width, .. } = *options;
        Series {
            time: Continuous::new(&new.at("time"), 2, hidden, width),
            value: Continuous::new(&new.at("value"), 1, hidden, width),
            variable: new.normal("variable", [options.variables, width], 0.5),
            transformer: Transformer::new(new, width, options.depth, options.heads),
            time_scale_days: options.time_scale_days,
            width,
        }
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// time_days, value, present `[items, n]`, variable `[items, n]`; returns `[items, n, width]`.
    ///
    /// Time goes in twice, as `t = days / time_scale_days` and as `ln(1 + t)`: the first tells
    /// hours apart, the second years.
    pub fn forward(
        &self,
        time_days: Tensor<2>,
        variable: Tensor<2, Int>,
        value: Tensor<2>,
        present: Tensor<2>,
        mode: Mode,
    ) -> Encoded {
        let [items, observations] = value.dims();
        let time = time_days
            .div_scalar(self.time_scale_days)
            .clamp_min(0.0)
            .reshape([items, observations, 1]);
        let time = Tensor::cat(vec![time.clone(), time.log1p()], 2);
        let variables = self
            .variable
            .tensor
            .clone()
            .select(0, variable.reshape([items * observations]))
            .reshape([items, observations, self.width]);
        let tokens = self.time.forward(time, mode)
            + self
                .value
                .forward(value.reshape([items, observations, 1]), mode)
            + variables;
        let segments = present.clone().cast(IntDType::I32);
        Encoded {
            tokens: self.transformer.forward(tokens, &segments, mode),
            mask: Some(present),
        }
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.time.visit(visitor);
        self.value.visit(visitor);
        visitor.visit(&mut self.variable);
        self.transformer.visit(visitor);
    }
}

/// A vector for a number, so that near numbers have near vectors: `U tanh(W x + b)`.
#[derive(Debug, Clone)]
struct Continuous {
    first: Linear,
    /// Without a bias: the variable's embedding is one.
    second: Linear,
}

impl Continuous {
    fn new(new: &New, input: usize, hidden: usize, width: usize) -> Continuous {
        let (first, second) = (new.at("first"), new.at("second"));
        Continuous {
            first: Linear {
                weight: first
                    .uniform("weight", [hidden, input], glorot(input, hidden))
                    .into(),
                // Spread, so that the units bend at different numbers from the start.
                bias: Some(first.uniform("bias", [hidden], 1.0)),
                lora: None,
            },
            second: Linear {
                weight: second
                    .uniform("weight", [width, hidden], glorot(hidden, width))
                    .into(),
                bias: None,
                lora: None,
            },
        }
    }

    /// `[items, n, input]` → `[items, n, width]`
    fn forward(&self, input: Tensor<3>, mode: Mode) -> Tensor<3> {
        let hidden = self.first.forward(input, mode).tanh();
        self.second.forward(hidden, mode)
    }

    fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.first.visit(visitor);
        self.second.visit(visitor);
    }
}
