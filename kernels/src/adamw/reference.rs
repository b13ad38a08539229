//! AdamW in plain tensor operations.

use burn::tensor::Tensor;

use super::{AdamWTensor, AdamWUpdate};

/// See [`adamw`](crate::adamw).
pub fn adamw(tensors: Vec<AdamWTensor>, scale: f32) -> Vec<[Tensor<1>; 3]> {
    let one = |tensor: AdamWTensor| {
        let AdamWTensor {
            values,
            gradient,
            first,
            second,
            update,
        } = tensor;
        let gradient = gradient.mul_scalar(scale);
        let [first, second] = moments(first, second, gradient, update.beta_1, update.beta_2);
        let values = moved(values, first.clone(), second.clone(), &update);
        [values, first, second]
    };
    tensors.into_iter().map(one).collect()
}

/// The moments with one more gradient in them.
pub fn moments(
    first: Tensor<1>,
    second: Tensor<1>,
    gradient: Tensor<1>,
    beta_1: f64,
    beta_2: f64,
) -> [Tensor<1>; 2] {
    [
        first.mul_scalar(beta_1) + gradient.clone().mul_scalar(1.0 - beta_1),
        second.mul_scalar(beta_2) + gradient.square().mul_scalar(1.0 - beta_2),
    ]
}

/// The values after an update, with moments that hold its gradient.
pub fn moved(
    values: Tensor<1>,
    first: Tensor<1>,
    second: Tensor<1>,
    update: &AdamWUpdate,
) -> Tensor<1> {
    let [correction_1, correction_2] = update.corrections();
    let denominator = second
        .sqrt()
        .div_scalar(correction_2.sqrt())
        .add_scalar(update.epsilon);
    let change = (first / denominator).mul_scalar(update.learning_rate / correction_1);
    values.mul_scalar(1.0 - update.learning_rate * update.weight_decay) - change
}
