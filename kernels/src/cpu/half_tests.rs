//! Kernels on bf16 and f16: the f32 results of the same numbers, rounded.

use burn::tensor::{DType, Int, Tensor};

use super::testing::{device, difference, random, weigh};
use crate::{AttentionOptions, Lora};

/// The values as the type holds them, in f32 and in the type.
fn stored<const D: usize>(tensor: Tensor<D>, dtype: DType) -> [Tensor<D>; 2] {
    let half = tensor.cast(dtype);
    let wide = half.clone().cast(DType::F32);
    [wide, half].map(|tensor| tensor.detach().require_grad())
}

/// Compares results and every input's gradient.
fn compare<const D: usize, const R: usize>(
    inputs: Vec<[Tensor<D>; 2]>,
    dtype: DType,
    operation: impl Fn(Vec<Tensor<D>>) -> Tensor<R>,
) {
    // One rounding of the result; in gradients one of each result that they pass.
    let close = if dtype == DType::BF16 { 1.6e-2 } else { 2e-3 };
    let [wide, half] = [0, 1].map(|which| {
        let inputs: Vec<_> = inputs.iter().map(|pair| pair[which].clone()).collect();
        let output = operation(inputs.clone());
        let gradients = weigh(output.clone().cast(DType::F32)).backward();
        let gradients = inputs.iter().map(|input| input.grad(&gradients).unwrap());
        (output, gradients.collect::<Vec<_>>())
    });
    assert_eq!(half.0.dtype(), dtype);
    assert!(difference(half.0.cast(DType::F32), wide.0) < close);
    for (half, wide) in half.1.into_iter().zip(wide.1) {
        assert_eq!(half.dtype(), dtype);
        assert!(difference(half.cast(DType::F32), wide) < close);
    }
}

const TYPES: [DType; 2] = [DType::BF16, DType::F16];

#[test]
fn half_precision_rounds_results_and_nothing_else() {
    for dtype in TYPES {
        let one = |seed| stored(random([2, 5, 16], seed), dtype);
        let weight = random([16], 9).detach().cast(dtype);
        compare(vec![one(1)], dtype, |x| {
            let weight = weight.clone().cast(x[0].dtype());
            crate::rms_norm(x[0].clone(), weight, 1e-5)
        });
        compare(vec![one(1)], dtype, |x| {
            let weight = weight.clone().cast(x[0].dtype());
            crate::layer_norm(x[0].clone(), weight.clone(), weight, 1e-5)
        });
        compare(vec![one(1)], dtype, |x| crate::gelu(x[0].clone()));
        compare(vec![one(1), one(2)], dtype, |x| {
            crate::swiglu(x[0].clone(), x[1].clone())
        });

        let heads = |seed| stored(random([2, 7, 2, 8], seed), dtype);
        let segments = Tensor::<2, Int>::from_ints([[1, 1, 1, 2, 2, 2, 0]; 2], &device());
        let options = AttentionOptions {
            soft_cap: None,
            causal: true,
            window: None,
            scale: 0.3,
        };
        compare(vec![heads(1), heads(2), heads(3)], dtype, |x| {
            let [q, k, v] = [x[0].clone(), x[1].clone(), x[2].clone()];
            crate::attention(q, k, v, segments.clone(), &options)
        });

        // The pair is f32 beside half activations, and so are its gradients.
        let weight = random([12, 16], 4).detach().cast(dtype);
        let pair = [random([4, 16], 5), random([12, 4], 6)].map(|t| t.detach().require_grad());
        let lora = Lora {
            a: pair[0].clone(),
            b: pair[1].clone(),
            scaling: 0.5,
            dropout: 0.2,
            dropout_seed: 3,
        };
        let run = |x: Tensor<3>| {
            let weight = weight.clone().cast(x.dtype());
            crate::lora_linear(x, weight, None, Some(&lora))
        };
        compare(vec![one(1)], dtype, |x| run(x[0].clone()));
        let [wide, half] = one(1).map(|x| {
            let found = weigh(run(x).cast(DType::F32)).backward();
            pair.each_ref().map(|tensor| tensor.grad(&found).unwrap())
        });
        for (half, wide) in half.into_iter().zip(wide) {
            assert_eq!(half.dtype(), DType::F32);
            assert!(difference(half, wide) < 1.6e-2);
        }
    }
}

#[test]
fn the_loss_is_f32() {
    for dtype in TYPES {
        let [wide, half] = stored(random([6, 8], 1), dtype);
        let targets = Tensor::<1, Int>::from_ints([0, 4, -100, 2, 2, 1], &device());
        let weight = random([5, 8], 2).detach().cast(dtype);
        let [wide, half] = [wide, half].map(|hidden| {
            let weight = weight.clone().cast(hidden.dtype());
            let loss = crate::linear_cross_entropy(hidden.clone(), weight, targets.clone(), None);
            let found = loss.backward();
            (loss, hidden.grad(&found).unwrap())
        });
        assert_eq!((half.0.dtype(), half.1.dtype()), (DType::F32, dtype));
        assert!(difference(half.0, wide.0) < 1e-6);
        assert!(difference(half.1.cast(DType::F32), wide.1) < 1.6e-2);
    }
}
