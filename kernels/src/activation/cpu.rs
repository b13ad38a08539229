//! Activations on the CPU: one pass forward, one backward, nothing kept but the inputs.

use std::fmt::Debug;
use std::marker::PhantomData;

use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::cpu::elementary::{block_length, erf, exp, map, map2, sigmoid, tanh, vectorized};
use crate::cpu::operation::{Operation, apply, dims, input, tensor, values};
use crate::cpu::stored::map_halves;

pub(super) fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    apply(Gated::<Silu>(PhantomData), [input(gate), input(up)])
}

pub(super) fn geglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    apply(Gated::<Gelu>(PhantomData), [input(gate), input(up)])
}

pub(super) fn geglu_tanh<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    apply(Gated::<GeluTanh>(PhantomData), [input(gate), input(up)])
}

pub(super) fn gelu<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    apply(Alone::<Gelu>(PhantomData), [input(tensor)])
}

pub(super) fn gelu_tanh<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    apply(Alone::<GeluTanh>(PhantomData), [input(tensor)])
}

fn is_wide(tensor: &FlexTensor) -> bool {
    tensor.dtype() == DType::F32
}

/// A function of one number.
trait Curve: Clone + Debug + Send + Sync + 'static {
    /// What it is called by itself, and times another input.
    const NAMES: [&'static str; 2];

    fn value(x: f32) -> f32;

    /// The value and its derivative.
    fn with_slope(x: f32) -> (f32, f32);
}

#[derive(Clone, Debug)]
struct Silu;

impl Curve for Silu {
    const NAMES: [&'static str; 2] = ["silu", "swiglu"];

    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(x)
    }

    #[inline(always)]
    fn with_slope(x: f32) -> (f32, f32) {
        let s = sigmoid(x);
        let value = x * s;
        (value, s + value * (1.0 - s))
    }
}

#[derive(Clone, Debug)]
struct Gelu;

impl Curve for Gelu {
    const NAMES: [&'static str; 2] = ["gelu", "geglu"];

    #[inline(always)]
    fn value(x: f32) -> f32 {
        0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
    }

    #[inline(always)]
    fn with_slope(x: f32) -> (f32, f32) {
        const DENSITY_AT_ZERO: f32 = 0.398_942_3; // 1 / √(2π)
        let distribution = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
        let slope = distribution + x * DENSITY_AT_ZERO * exp(-0.5 * x * x);
        (x * distribution, slope)
    }
}

#[derive(Clone, Debug)]
struct GeluTanh;

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

impl Curve for GeluTanh {
    const NAMES: [&'static str; 2] = ["gelu_tanh", "geglu_tanh"];

    #[inline(always)]
    fn value(x: f32) -> f32 {
        0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x)))
    }

    #[inline(always)]
    fn with_slope(x: f32) -> (f32, f32) {
        let t = tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
        let inner = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
        let half = 0.5 * (1.0 + t);
        (x * half, half + 0.5 * x * (1.0 - t * t) * inner)
    }
}

/// The function of its input.
#[derive(Clone, Debug)]
struct Alone<C>(PhantomData<C>);

impl<C: Curve> Operation<1> for Alone<C> {
    const AS_STORED: bool = true;

    fn name(&self) -> &'static str {
        C::NAMES[0]
    }

    fn forward(&self, inputs: [FlexTensor; 1], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let [input] = inputs;
        let output = if is_wide(&input) {
            let output = map(
                values(&input),
                #[inline(always)]
                |x| C::value(x),
            );
            tensor(output, dims(&input))
        } else {
            let [output] = map_halves(
                [&input],
                #[inline(always)]
                |[x]| [C::value(x)],
            );
            output
        };
        (output, if tracked { vec![input] } else { vec![] })
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradient: FlexTensor,
        wanted: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        if !is_wide(&gradient) {
            return map_halves(
                [&gradient, &saved[0]],
                #[inline(always)]
                |[gradient, x]| [gradient * C::with_slope(x).1],
            )
            .map(|product| wanted[0].then_some(product));
        }
        [wanted[0].then(|| {
            let product = map2(
                values(&gradient),
                values(&saved[0]),
                #[inline(always)]
                |gradient, x| gradient * C::with_slope(x).1,
            );
            tensor(product, dims(&gradient))
        })]
    }
}

/// The function of its first input, times the second.
#[derive(Clone, Debug)]
struct Gated<C>(PhantomData<C>);

impl<C: Curve> Operation<2> for Gated<C> {
    const AS_STORED: bool = true;

    fn name(&self) -> &'static str {
        C::NAMES[1]
    }

    fn forward(&self, inputs: [FlexTensor; 2], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let [gate, up] = inputs;
        let output = if is_wide(&gate) {
            let output = map2(
                values(&gate),
                values(&up),
                #[inline(always)]
                |gate, up| C::value(gate) * up,
            );
            tensor(output, dims(&gate))
        } else {
            let [output] = map_halves(
                [&gate, &up],
                #[inline(always)]
                |[gate, up]| [C::value(gate) * up],
            );
            output
        };
        (output, if tracked { vec![gate, up] } else { vec![] })
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        mut gradient: FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [gate, up] = <[FlexTensor; 2]>::try_from(saved).expect("gate and up");
        if !is_wide(&gradient) {
            let [of_gate, of_up] = map_halves(
                [&gradient, &gate, &up],
                #[inline(always)]
                |[gradient, gate, up]| {
                    let (value, slope) = C::with_slope(gate);
                    [gradient * up * slope, gradient * value]
                },
            );
            return [wanted[0].then_some(of_gate), wanted[1].then_some(of_up)];
        }
        let shape = dims(&gate);
        if wanted == [true, true] {
            // One pass gives both: the incoming gradient's buffer becomes the gate's gradient.
            let mut up_gradient = vec![0.0; values(&gate).len()];
            let (gate, up) = (values(&gate), values(&up));
            let gate_gradient = gradient.storage_mut::<f32>();
            let block = block_length(gate.len());
            gate_gradient
                .par_chunks_mut(block)
                .zip(up_gradient.par_chunks_mut(block))
                .zip(gate.par_chunks(block).zip(up.par_chunks(block)))
                .for_each(|((gradient, up_gradient), (gate, up))| {
                    vectorized(
                        #[inline(always)]
                        || {
                            for (((gradient, up_gradient), &gate), &up) in
                                gradient.iter_mut().zip(up_gradient).zip(gate).zip(up)
                            {
                                let (value, slope) = C::with_slope(gate);
                                *up_gradient = *gradient * value;
                                *gradient = *gradient * up * slope;
                            }
                        },
                    );
                });
            return [Some(gradient), Some(tensor(up_gradient, shape))];
        }
        let for_gate = wanted[0].then(|| {
            let slope = map2(
                values(&gate),
                values(&up),
                #[inline(always)]
                |gate, up| up * C::with_slope(gate).1,
            );
            let product = map2(
                values(&gradient),
                &slope,
                #[inline(always)]
                |g, s| g * s,
            );
            tensor(product, shape.clone())
        });
        let for_up = wanted[1].then(|| {
            let product = map2(
                values(&gradient),
                values(&gate),
                #[inline(always)]
                |gradient, gate| gradient * C::value(gate),
            );
            tensor(product, shape.clone())
        });
        [for_gate, for_up]
    }
}
