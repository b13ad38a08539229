//! The activations on a GPU: only the inputs are kept, and the derivative is computed from them. Plain
//! tensor operations in f32, which burn fuses.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use burn::tensor::{DType, Tensor, activation};

use crate::gpu::operation::{Operation, Value, apply, input, tensor, value};

/// Applied to the gate.
#[derive(Debug, Clone, Copy)]
pub(super) enum Function {
    Silu,
    Gelu,
    GeluTanh,
}

/// `function(gate) · up`.
pub(super) fn gated<const D: usize>(
    function: Function,
    gate: Tensor<D>,
    up: Tensor<D>,
) -> Tensor<D> {
    apply(Gated::<D>(function), [input(gate), input(up)])
}

pub(super) fn alone<const D: usize>(function: Function, x: Tensor<D>) -> Tensor<D> {
    apply(Alone::<D>(function), [input(x)])
}

impl Function {
    /// What it is called by itself, and times another input.
    fn names(self) -> [&'static str; 2] {
        match self {
            Function::Silu => ["silu", "swiglu"],
            Function::Gelu => ["gelu", "geglu"],
            Function::GeluTanh => ["gelu_tanh", "geglu_tanh"],
        }
    }

    fn of<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        x.clone() * self.factor(x)
    }

    /// What the argument is multiplied with.
    fn factor<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Function::Silu => activation::sigmoid(x),
            Function::Gelu => ((x * FRAC_1_SQRT_2).erf() + 1.0) * 0.5,
            Function::GeluTanh => (inner(x).tanh() + 1.0) * 0.5,
        }
    }

    /// The derivative, from the argument and its factor.
    fn slope<const D: usize>(self, x: Tensor<D>, factor: Tensor<D>) -> Tensor<D> {
        let of_factor = match self {
            Function::Silu => factor.clone() * (factor.clone().neg() + 1.0),
            Function::Gelu => (x.clone().square() * -0.5).exp() * (2.0 * PI).sqrt().recip(),
            Function::GeluTanh => {
                let squared = (factor.clone() * 2.0 - 1.0).square();
                let steepness = (x.clone().square() * (3.0 * CUBIC) + 1.0) * (2.0 / PI).sqrt();
                (squared.neg() + 1.0) * steepness * 0.5
            }
        };
        factor + x * of_factor
    }
}

const CUBIC: f64 = 0.044_715;

fn inner<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    (x.clone() * x.clone() * x.clone() * CUBIC + x) * (2.0 / PI).sqrt()
}

fn wide<const D: usize>(value: &Value) -> Tensor<D> {
    tensor::<D>(value.clone()).cast(DType::F32)
}

/// Inputs in order: gate, up.
#[derive(Debug, Clone, Copy)]
struct Gated<const D: usize>(Function);

impl<const D: usize> Operation<2> for Gated<D> {
    fn name(&self) -> &'static str {
        self.0.names()[1]
    }

    fn forward(&self, [gate, up]: [Value; 2], _tracked: [bool; 2]) -> (Value, Vec<Value>) {
        let dtype = tensor::<D>(gate.clone()).dtype();
        let output = self.0.of(wide::<D>(&gate)) * wide(&up);
        (value(output.cast(dtype)), vec![gate, up])
    }

    fn backward(
        &self,
        saved: Vec<Value>,
        gradient: Value,
        wanted: [bool; 2],
    ) -> [Option<Value>; 2] {
        let [gate, up]: [Value; 2] = saved.try_into().expect("both inputs");
        let dtype = tensor::<D>(gradient.clone()).dtype();
        let (gate, up, gradient) = (wide::<D>(&gate), wide::<D>(&up), wide::<D>(&gradient));
        let factor = self.0.factor(gate.clone());
        let of_gate = wanted[0].then(|| {
            let slope = self.0.slope(gate.clone(), factor.clone());
            value((gradient.clone() * up * slope).cast(dtype))
        });
        let of_up = wanted[1].then(|| value((gradient * gate * factor).cast(dtype)));
        [of_gate, of_up]
    }
}

#[derive(Debug, Clone, Copy)]
struct Alone<const D: usize>(Function);

impl<const D: usize> Operation<1> for Alone<D> {
    fn name(&self) -> &'static str {
        self.0.names()[0]
    }

    fn forward(&self, [x]: [Value; 1], _tracked: [bool; 1]) -> (Value, Vec<Value>) {
        let dtype = tensor::<D>(x.clone()).dtype();
        (value(self.0.of(wide::<D>(&x)).cast(dtype)), vec![x])
    }

    fn backward(&self, saved: Vec<Value>, gradient: Value, _: [bool; 1]) -> [Option<Value>; 1] {
        let dtype = tensor::<D>(gradient.clone()).dtype();
        let x = wide::<D>(&saved[0]);
        let slope = self.0.slope(x.clone(), self.0.factor(x));
        [Some(value((wide::<D>(&gradient) * slope).cast(dtype)))]
    }
}
