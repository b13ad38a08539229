//! Activations in plain tensor operations.

use burn::tensor::{Tensor, activation};

/// See [`swiglu`](crate::swiglu).
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    activation::sigmoid(gate.clone()) * gate * up
}

/// See [`geglu`](crate::geglu).
pub fn geglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    gelu(gate) * up
}

/// See [`geglu_tanh`](crate::geglu_tanh).
pub fn geglu_tanh<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    gelu_tanh(gate) * up
}

/// See [`gelu`](crate::gelu).
pub fn gelu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    let distribution = ((input.clone() * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5;
    input * distribution
}

/// See [`gelu_tanh`](crate::gelu_tanh).
pub fn gelu_tanh<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    let cubic = input.clone() * input.clone() * input.clone() * 0.044_715;
    let inner = (input.clone() + cubic) * (2.0 / std::f64::consts::PI).sqrt();
    input * (inner.tanh() + 1.0) * 0.5
}
