//! Rotary embedding on the CPU: a rotation forward, the opposite one backward.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::cpu::elementary::{block_rows, vectorized};
use crate::cpu::operation::{
    Input, Operation, apply, contiguous, dims, input, owned, values, wide,
};

pub(super) fn dispatch(tensor: Tensor<4>, cos: Tensor<3>, sin: Tensor<3>) -> Tensor<4> {
    let rotation = Rotation {
        cos: constant(cos),
        sin: constant(sin),
    };
    apply(rotation, [input(tensor)])
}

fn constant(table: Tensor<3>) -> FlexTensor {
    match input(table) {
        Input::Plain(table) => contiguous(table),
        Input::Tracking(table) => contiguous(table.into_primitive()),
    }
}

/// Holds the tables as they are stored: every layer's backward pass has one, and they share them.
#[derive(Clone, Debug)]
struct Rotation {
    cos: FlexTensor,
    sin: FlexTensor,
}

impl Operation<1> for Rotation {
    fn in_place(&self) -> bool {
        true
    }

    fn forward(&self, inputs: [FlexTensor; 1], _tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let [input] = inputs;
        (self.rotate(input, false), vec![])
    }

    fn backward(
        &self,
        _saved: Vec<FlexTensor>,
        gradient: FlexTensor,
        wanted: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        [wanted[0].then(|| self.rotate(gradient, true))]
    }
}

impl Rotation {
    /// Rotates in place where the buffer is ours alone.
    fn rotate(&self, tensor: FlexTensor, back: bool) -> FlexTensor {
        let shape = dims(&tensor);
        let (heads, head_dim) = (shape[2], shape[3]);
        let width = heads * head_dim;
        let rotated = dims(&self.cos)[2];
        let tokens = shape[0] * shape[1];
        let mut tensor = owned(tensor);
        let rows = block_rows(tokens, width);
        let (cos, sin) = (wide(self.cos.clone()), wide(self.sin.clone()));
        let (cos, sin) = (values(&cos), values(&sin));
        tensor
            .storage_mut::<f32>()
            .par_chunks_mut(rows * width)
            .zip(cos.par_chunks(rows * rotated))
            .zip(sin.par_chunks(rows * rotated))
            .for_each(|((block, cos), sin)| {
                vectorized(
                    #[inline(always)]
                    || rotate_rows(block, cos, sin, [width, head_dim, rotated], back),
                );
            });
        tensor
    }
}

#[inline(always)]
fn rotate_rows(
    block: &mut [f32],
    cos: &[f32],
    sin: &[f32],
    [width, head_dim, rotated]: [usize; 3],
    back: bool,
) {
    let half = rotated / 2;
    for ((row, cos), sin) in block
        .chunks_exact_mut(width)
        .zip(cos.chunks_exact(rotated))
        .zip(sin.chunks_exact(rotated))
    {
        let (cos_first, cos_second) = cos.split_at(half);
        let (sin_first, sin_second) = sin.split_at(half);
        for head in row.chunks_exact_mut(head_dim) {
            let (first, second) = head[..rotated].split_at_mut(half);
            for i in 0..half {
                let (a, b) = (first[i], second[i]);
                if back {
                    // Transpose of the forward map, which also holds where the halves of the
                    // tables differ.
                    first[i] = a * cos_first[i] + b * sin_second[i];
                    second[i] = b * cos_second[i] - a * sin_first[i];
                } else {
                    first[i] = a * cos_first[i] - b * sin_first[i];
                    second[i] = b * cos_second[i] + a * sin_second[i];
                }
            }
        }
    }
}
