//! How far an operation is from its reference.

use burn::tensor::{DType, Gradients, Tensor, TensorData};
use serde::Serialize;

/// How far one tensor is from the reference's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorError {
    /// `output`, or the input whose gradient it is.
    pub name: &'static str,
    /// Norm of the difference over the norm of the reference's.
    pub relative: f64,
}

impl TensorError {
    pub(super) fn of<const D: usize>(
        name: &'static str,
        found: Tensor<D>,
        expected: Tensor<D>,
    ) -> TensorError {
        let relative = relative(&values(found), &values(expected));
        TensorError { name, relative }
    }
}

/// An input whose gradient is compared.
pub(super) struct Leaf {
    name: &'static str,
    gradient: Box<OfGradients>,
}

type OfGradients = dyn Fn(&Gradients) -> Option<Vec<f32>>;

impl Leaf {
    pub fn new<const D: usize>(name: &'static str, tensor: &Tensor<D>) -> Leaf {
        let tensor = tensor.clone();
        Leaf {
            name,
            gradient: Box::new(move |gradients| tensor.grad(gradients).map(values)),
        }
    }
}

/// Of the output, and of the gradients of a sum that weighs every element of it differently.
///
/// # Panics
/// When an input has no gradient.
pub(super) fn errors<const D: usize>(
    inputs: &[Leaf],
    kernel: impl Fn() -> Tensor<D>,
    plain: impl Fn() -> Tensor<D>,
) -> Vec<TensorError> {
    let all = |run: &dyn Fn() -> Tensor<D>| {
        let output = run();
        let shape = output.dims();
        let weights = (0..shape.iter().product()).map(|index: usize| weight(index));
        let weights = TensorData::new(weights.collect::<Vec<f32>>(), shape);
        let device = output.device();
        let weights = Tensor::<D>::from_data(weights, (&device, DType::F32));
        let found = values(output.clone());
        let gradients = (output.cast(DType::F32) * weights).sum().backward();
        let of_inputs = inputs.iter().map(|leaf| {
            let gradient = (leaf.gradient)(&gradients);
            (leaf.name, gradient.expect("the output depends on it"))
        });
        std::iter::once(("output", found))
            .chain(of_inputs)
            .collect::<Vec<_>>()
    };
    let (found, expected) = (all(&kernel), all(&plain));
    let pairs = found.into_iter().zip(expected);
    pairs
        .map(|((name, found), (_, expected))| TensorError {
            name,
            relative: relative(&found, &expected),
        })
        .collect()
}

/// From -1 to 1, another one for each element.
fn weight(index: usize) -> f32 {
    let mixed = (index as u32).wrapping_mul(0x9E37_79B1);
    (mixed >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// Read at once: what CubeCL hands out is copied when it is looked at first.
fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.into_data_dtype(DType::F32);
    data.try_into_vec::<f32>().expect("f32")
}

/// Norm of the difference over the norm of what is expected.
fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len(), "two shapes of one operation");
    let square = |value: f64| value * value;
    let pairs = found.iter().zip(expected);
    let difference: f64 = pairs
        .map(|(found, expected)| square(f64::from(*found) - f64::from(*expected)))
        .sum();
    let size: f64 = expected.iter().map(|value| square(f64::from(*value))).sum();
    match difference == 0.0 {
        true => 0.0,
        false => (difference / size).sqrt(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_error_is_of_norms() {
        assert_eq!(relative(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(relative(&[3.0, 5.0], &[3.0, 4.0]), 0.2);
        assert_eq!(relative(&[0.0], &[0.0]), 0.0);
        assert_eq!(relative(&[1.0], &[0.0]), f64::INFINITY);
    }

    #[test]
    fn weights_differ_and_are_small() {
        let weights: Vec<f32> = (0..1000).map(weight).collect();
        assert!(weights.iter().all(|weight| weight.abs() <= 1.0));
        let mut sorted = weights.clone();
        sorted.sort_by(f32::total_cmp);
        assert!(sorted.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(weights.iter().sum::<f32>().abs() < 50.0);
    }
}
