//! Activations on the CPU: one pass forward, one backward, nothing kept but the inputs.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::cpu::elementary::{block_length, erf, exp, map, map2, sigmoid, tanh, vectorized};
use crate::cpu::operation::{Operation, apply, dims, input, tensor, values};

pub(super) fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    apply(Swiglu, [input(gate), input(up)])
}

pub(super) fn gelu<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    apply(Gelu, [input(tensor)])
}

pub(super) fn gelu_tanh<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    apply(GeluTanh, [input(tensor)])
}

#[derive(Clone, Debug)]
struct Swiglu;

impl Operation<2> for Swiglu {
    fn forward(&self, inputs: [FlexTensor; 2], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let [gate, up] = inputs;
        let output = map2(
            values(&gate),
            values(&up),
            #[inline(always)]
            |gate, up| gate * sigmoid(gate) * up,
        );
        let output = tensor(output, dims(&gate));
        (output, if tracked { vec![gate, up] } else { vec![] })
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        mut gradient: FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [gate, up] = <[FlexTensor; 2]>::try_from(saved).expect("gate and up");
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
                                let s = sigmoid(gate);
                                let silu = gate * s;
                                *up_gradient = *gradient * silu;
                                *gradient = *gradient * up * (s + silu * (1.0 - s));
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
                |gate, up| {
                    let s = sigmoid(gate);
                    up * (s + gate * s * (1.0 - s))
                },
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
                |gradient, gate| gradient * gate * sigmoid(gate),
            );
            tensor(product, shape.clone())
        });
        [for_gate, for_up]
    }
}

#[derive(Clone, Debug)]
struct Gelu;

impl Operation<1> for Gelu {
    fn forward(&self, inputs: [FlexTensor; 1], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let [input] = inputs;
        let output = map(
            values(&input),
            #[inline(always)]
            |x| 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
        );
        let output = tensor(output, dims(&input));
        (output, if tracked { vec![input] } else { vec![] })
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradient: FlexTensor,
        wanted: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        const DENSITY_AT_ZERO: f32 = 0.398_942_3; // 1 / √(2π)
        [wanted[0].then(|| {
            let product = map2(
                values(&gradient),
                values(&saved[0]),
                #[inline(always)]
                |gradient, x| {
                    let distribution = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
                    gradient * (distribution + x * DENSITY_AT_ZERO * exp(-0.5 * x * x))
                },
            );
            tensor(product, dims(&gradient))
        })]
    }
}

#[derive(Clone, Debug)]
struct GeluTanh;

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

impl Operation<1> for GeluTanh {
    fn forward(&self, inputs: [FlexTensor; 1], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let [input] = inputs;
        let output = map(
            values(&input),
            #[inline(always)]
            |x| 0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x))),
        );
        let output = tensor(output, dims(&input));
        (output, if tracked { vec![input] } else { vec![] })
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradient: FlexTensor,
        wanted: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        [wanted[0].then(|| {
            let product = map2(
                values(&gradient),
                values(&saved[0]),
                #[inline(always)]
                |gradient, x| {
                    let t = tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
                    let inner = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
                    gradient * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
                },
            );
            tensor(product, dims(&gradient))
        })]
    }
}
