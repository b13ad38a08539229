//! The norm on the CPU: squares are read and added up in one pass.

use burn::backend::Flex;
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::cpu::elementary::{dot, vectorized};
use crate::cpu::operation::{contiguous, tensor, values};

/// Elements whose squares one task adds up in f32: however many threads there are, so that the sum
/// is always the same.
const BLOCK: usize = 1 << 14;

pub(super) fn global_norm(tensors: Vec<Tensor<1>>) -> Tensor<1> {
    let sum: f64 = tensors
        .into_iter()
        .map(|tensor| {
            let tensor = tensor.try_into_primitive::<Flex>();
            let tensor = contiguous(tensor.expect("a Flex float tensor outside autodiff"));
            let blocks: Vec<f32> = values(&tensor)
                .par_chunks(BLOCK)
                .map(|block| {
                    vectorized(
                        #[inline(always)]
                        || dot(block, block),
                    )
                })
                .collect();
            blocks.into_iter().map(f64::from).sum::<f64>()
        })
        .sum();
    Tensor::from_primitive::<Flex>(tensor(vec![sum.sqrt() as f32], [1]))
}
