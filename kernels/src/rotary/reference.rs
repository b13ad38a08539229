//! Rotary embedding in plain tensor operations.

use burn::tensor::Tensor;

/// See [`rotary`](crate::rotary).
pub fn rotary(input: Tensor<4>, cos: Tensor<3>, sin: Tensor<3>) -> Tensor<4> {
    let [batch, seq, heads, head_dim] = input.dims();
    let rotated = cos.dims()[2];
    if rotated < head_dim {
        let rest = input.clone().narrow(3, rotated, head_dim - rotated);
        return Tensor::cat(vec![rotary(input.narrow(3, 0, rotated), cos, sin), rest], 3);
    }
    let half = head_dim / 2;
    let first = input.clone().slice([0..batch, 0..seq, 0..heads, 0..half]);
    let second = input
        .clone()
        .slice([0..batch, 0..seq, 0..heads, half..head_dim]);
    let rotated = Tensor::cat(vec![second.neg(), first], 3);
    input * cos.reshape([batch, seq, 1, head_dim])
        + rotated * sin.reshape([batch, seq, 1, head_dim])
}
