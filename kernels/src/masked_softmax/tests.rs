use burn::tensor::{DType, Int, Tensor};

use super::*;
use crate::cpu::testing::{difference, random, weigh};

/// Every third key is hidden, and the second query of the first row sees nothing.
fn visible([batch, queries, keys]: [usize; 3]) -> Tensor<4, Bool> {
    let values: Vec<i32> = (0..batch * queries * keys)
        .map(|index| i32::from(index % 3 != 1 && index / keys != 1))
        .collect();
    let device = crate::cpu::testing::device();
    let values = burn::tensor::TensorData::new(values, [batch, 1, queries, keys]);
    Tensor::<4, Int>::from_data(values, &device).equal_elem(1)
}

#[test]
fn weights_and_gradients_match_the_reference() {
    for shape in [[1, 1, 2, 1], [2, 3, 5, 7], [1, 4, 33, 50]] {
        for soft_cap in [None, Some(1.5)] {
            let options = ScoreOptions {
                scale: 0.7,
                soft_cap,
            };
            let scores = (random(shape, 1) * 3.0).require_grad();
            let mask = visible([shape[0], shape[2], shape[3]]);
            let ours = masked_softmax(scores.clone(), mask.clone(), &options);
            let plain = reference::masked_softmax(scores.clone(), mask, &options);
            // A few roundings of f32.
            assert!(difference(ours.clone(), plain.clone()) < 1e-6);
            let [ours, plain] = [ours, plain].map(|weights| {
                let found = weigh(weights).backward();
                scores.grad(&found).unwrap()
            });
            assert!(difference(ours, plain) < 1e-6);
        }
    }
}

#[test]
fn a_query_that_sees_nothing_has_no_weights_and_no_gradient() {
    let scores = random([1, 2, 3, 4], 1).require_grad();
    let options = ScoreOptions {
        scale: 1.0,
        soft_cap: None,
    };
    let weights = masked_softmax(scores.clone(), visible([1, 3, 4]), &options);
    let gradient = scores.grad(&weigh(weights.clone()).backward()).unwrap();
    for tensor in [weights.inner(), gradient] {
        let of_query = tensor.narrow(2, 1, 1).abs().sum().into_scalar::<f32>();
        assert_eq!(of_query, 0.0);
    }
}

#[test]
fn halves_are_computed_in_f32() {
    let wide = random([2, 3, 5, 7], 1).cast(DType::BF16);
    let options = ScoreOptions {
        scale: 0.7,
        soft_cap: None,
    };
    let [half, wide] = [wide.clone(), wide.cast(DType::F32)].map(|scores| {
        let scores = scores.detach().require_grad();
        let weights = masked_softmax(scores.clone(), visible([2, 5, 7]), &options);
        assert_eq!(weights.dtype(), scores.dtype());
        let found = weigh(weights.clone().cast(DType::F32)).backward();
        [weights.inner(), scores.grad(&found).unwrap()].map(|tensor| tensor.cast(DType::F32))
    });
    for (half, wide) in half.into_iter().zip(wide) {
        // Rounded to 8 bits at most twice.
        assert!(difference(half, wide) < 1.6e-2);
    }
}
