//! AdamW on the CPU: one pass over values, gradient and moments, all tensors in parallel.

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{AdamWTensor, Factors};
use crate::cpu::elementary::{block_length, vectorized};
use crate::cpu::operation::{contiguous, owned, values};

pub(super) fn adamw(tensors: Vec<AdamWTensor>, scale: f32) -> Vec<[Tensor<1>; 3]> {
    let flex = |tensor: Tensor<1>| {
        let tensor = tensor.try_into_primitive::<Flex>();
        contiguous(tensor.expect("a Flex float tensor outside autodiff"))
    };
    let tensors: Vec<_> = tensors
        .into_iter()
        .map(|tensor| {
            let parts = [tensor.values, tensor.gradient, tensor.first, tensor.second].map(flex);
            (parts, tensor.update.factors())
        })
        .collect();
    let found: Vec<_> = tensors
        .into_par_iter()
        .map(|(parts, factors)| updated(parts, factors, scale))
        .collect();
    let tensor = |tensor| Tensor::from_primitive::<Flex>(tensor);
    found.into_iter().map(|parts| parts.map(tensor)).collect()
}

/// The new values lie where the gradient was.
fn updated(
    [old, gradient, first, second]: [FlexTensor; 4],
    factors: Factors,
    scale: f32,
) -> [FlexTensor; 3] {
    let [mut moving, mut first, mut second] = [gradient, first, second].map(owned);
    let old_values = values(&old);
    let block = block_length(old_values.len());
    moving
        .storage_mut::<f32>()
        .par_chunks_mut(block)
        .zip(first.storage_mut::<f32>().par_chunks_mut(block))
        .zip(second.storage_mut::<f32>().par_chunks_mut(block))
        .zip(old_values.par_chunks(block))
        .for_each(|(((moving, first), second), old)| {
            vectorized(
                #[inline(always)]
                || update_block(old, moving, first, second, factors, scale),
            );
        });
    [moving, first, second]
}

/// In the order of the reference, without fused products and sums: the same to the bit.
#[inline(always)]
fn update_block(
    old: &[f32],
    moving: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    factors: Factors,
    scale: f32,
) {
    let moments = first.iter_mut().zip(second);
    for ((moving, (first, second)), &old) in moving.iter_mut().zip(moments).zip(old) {
        let gradient = *moving * scale;
        *first = *first * factors.beta_1 + gradient * factors.rest_1;
        *second = *second * factors.beta_2 + gradient * gradient * factors.rest_2;
        let denominator = second.sqrt() / factors.correction + factors.epsilon;
        *moving = old * factors.decay - *first / denominator * factors.rate;
    }
}
