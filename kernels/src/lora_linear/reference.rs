//! The LoRA linear in plain tensor operations.

use burn::tensor::Tensor;

use super::{FrozenWeight, LinearPart, Lora, mask};
use crate::matmul;
use crate::quantized::reference::quantized_linear;

/// See [`lora_linear`](crate::lora_linear); `mask` is 1 where an input of the low-rank part is kept.
pub fn lora_linear(
    input: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    lora: Option<&Lora>,
    mask: Option<Tensor<3>>,
) -> Tensor<3> {
    let [batch, seq, inputs] = input.dims();
    let outputs = weight.dims()[0];
    let flat = input.reshape([batch * seq, inputs]);
    let mut output = matmul(flat.clone(), weight.transpose());
    if let Some(bias) = bias {
        output = output + bias.unsqueeze::<2>();
    }
    if let Some(lora) = lora {
        let dropped = match mask {
            Some(mask) => {
                let shape = flat.dims();
                flat * mask.reshape(shape) / f64::from(1.0 - lora.dropout)
            }
            None => flat,
        };
        // Adapters are f32 whatever the activations are.
        let dtype = output.dtype();
        let (a, b) = (lora.a.clone().cast(dtype), lora.b.clone().cast(dtype));
        let low = matmul(dropped, a.transpose());
        output = output + matmul(low, b.transpose()) * lora.scaling;
    }
    output.reshape([batch, seq, outputs])
}

/// See [`lora_linears`](crate::lora_linears).
pub fn lora_linears(input: Tensor<3>, parts: Vec<LinearPart<'_>>) -> Vec<Tensor<3>> {
    let one = |part: LinearPart<'_>| {
        let (input, lora) = (input.clone(), part.lora.as_ref());
        let mask = lora.and_then(|lora| mask(&input, lora));
        match part.weight {
            FrozenWeight::Dense(weight) => {
                lora_linear(input, weight.clone(), part.bias, lora, mask)
            }
            FrozenWeight::Quantized(weight) => {
                quantized_linear(input, weight, part.bias, lora, mask)
            }
        }
    };
    parts.into_iter().map(one).collect()
}
