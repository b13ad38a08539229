//! Holding a kernel against its reference: the same inputs, the outputs and every gradient compared.

use burn::tensor::{Device, Tensor, TensorData};

/// A device under autodiff.
pub(crate) fn device() -> Device {
    Device::flex().autodiff()
}

/// Values of about unit size that depend on `seed` alone.
pub(crate) fn random<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    let elements: usize = shape.iter().product();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f32> = (0..elements)
        .map(|_| {
            // Three draws added up: bell-shaped enough.
            (0..3)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
                })
                .sum::<f32>()
                * 2.0
        })
        .collect();
    Tensor::from_data(TensorData::new(values, shape), &device())
}

/// Largest difference of two tensors, relative to the larger tensor's largest magnitude.
pub(crate) fn difference<const D: usize>(left: Tensor<D>, right: Tensor<D>) -> f32 {
    assert_eq!(left.dims(), right.dims());
    let left = left.into_data().try_into_vec::<f32>().expect("f32");
    let right = right.into_data().try_into_vec::<f32>().expect("f32");
    let magnitude = right.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    left.iter()
        .zip(&right)
        .map(|(l, r)| {
            assert!(l.is_finite() && r.is_finite(), "{l} against {r}");
            (l - r).abs() / magnitude
        })
        .fold(0.0, f32::max)
}

/// A scalar that weighs every element of the output differently.
pub(crate) fn weigh<const D: usize>(output: Tensor<D>) -> Tensor<1> {
    let weights = random(output.dims(), 99);
    (output * weights).sum()
}

/// The same values as a constant of the graph.
pub(crate) fn frozen<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    Tensor::from_inner(tensor.inner())
}
