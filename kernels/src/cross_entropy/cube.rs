//! Output projection and cross-entropy on a GPU, chunk of tokens by chunk of tokens: the gradient by
//! the hidden states is computed with the loss, so the logits of a chunk live no longer than it.

use burn::backend::Cube;
use burn::tensor::{DType, Int, IntDType, Tensor};

use super::rows::CrossEntropyRows;
use crate::gpu::operation::{Operation, Value, apply, input, tensor, value};
use crate::matmul::cube::{product, wide_product};

/// Logits of a chunk, in f32; their derivative is alive beside them.
const CHUNK_BYTES: usize = 256 << 20;

pub(super) fn linear_cross_entropy(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    soft_cap: Option<f32>,
) -> Tensor<1> {
    let targets = targets.cast(IntDType::I32);
    let targets = match targets.device().is_autodiff() {
        true => targets.inner(),
        false => targets,
    };
    let loss = Loss { targets, soft_cap };
    apply(loss, [input(hidden), input(weight)])
}

/// Inputs in order: hidden, weight.
#[derive(Debug, Clone)]
struct Loss {
    targets: Tensor<1, Int>,
    soft_cap: Option<f32>,
}

impl Operation<2> for Loss {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn forward(&self, [hidden, weight]: [Value; 2], tracked: [bool; 2]) -> (Value, Vec<Value>) {
        let (hidden, weight) = (tensor::<2>(hidden), tensor::<2>(weight));
        let [tokens, _] = hidden.dims();
        let [vocab, _] = weight.dims();
        let chunk = (CHUNK_BYTES / (4 * vocab)).clamp(1, tokens);
        let device = hidden.device();
        let mut loss = Tensor::<1>::zeros([1], (&device, DType::F32));
        let (mut of_hidden, mut of_weight) = (vec![], None);
        for start in (0..tokens).step_by(chunk) {
            let length = chunk.min(tokens - start);
            let hidden = hidden.clone().narrow(0, start, length);
            let targets = self.targets.clone().narrow(0, start, length);
            let (sum, gradient) = self.chunk(hidden.clone(), weight.clone(), targets);
            loss = loss + sum;
            if tracked[0] {
                of_hidden.push(product(gradient.clone(), weight.clone()));
            }
            if tracked[1] {
                let found = wide_product(gradient.transpose(), hidden, 1.0);
                of_weight = Some(match of_weight {
                    Some(sum) => sum + found,
                    None => found,
                });
            }
        }
        let mut saved = vec![];
        if tracked[0] {
            saved.push(value(Tensor::cat(of_hidden, 0)));
        }
        if let Some(of_weight) = of_weight {
            saved.push(value(of_weight.cast(weight.dtype())));
        }
        (value(loss), saved)
    }

    fn backward(
        &self,
        saved: Vec<Value>,
        gradient: Value,
        wanted: [bool; 2],
    ) -> [Option<Value>; 2] {
        let mut saved = saved.into_iter();
        let factor = tensor::<1>(gradient).reshape([1, 1]);
        wanted.map(|wanted| {
            wanted.then(|| {
                let found = tensor::<2>(saved.next().expect("kept for what is tracked"));
                let dtype = found.dtype();
                value((found.cast(DType::F32) * factor.clone()).cast(dtype))
            })
        })
    }
}

impl Loss {
    /// The sum of the losses of some tokens, `[1]`, and its derivative by their logits in the type of
    /// the hidden states, `[tokens, vocab]`.
    fn chunk(
        &self,
        hidden: Tensor<2>,
        weight: Tensor<2>,
        targets: Tensor<1, Int>,
    ) -> (Tensor<1>, Tensor<2>) {
        let dtype = hidden.dtype();
        let logits = wide_product(hidden, weight.transpose(), 1.0);
        let targets = targets
            .try_into_primitive::<Cube>()
            .expect("an integer tensor of this device outside autodiff");
        let cap = self.soft_cap.unwrap_or(0.0);
        let (losses, gradient) = Cube::cross_entropy_rows(value(logits), targets, cap, dtype);
        (tensor::<1>(losses).sum(), tensor(gradient))
    }
}
