use burn::tensor::{DType, TensorData};

use super::*;
use crate::cpu::halves::Engine;
use crate::cpu::testing::{device, difference, random};

fn targets(values: Vec<i64>) -> Tensor<1, Int> {
    let length = values.len();
    Tensor::from_data(TensorData::new(values, [length]), &device())
}

#[test]
fn loss_and_gradients_match_the_reference() {
    for (tokens, width, vocab, cap) in [
        (1, 4, 3, None),
        (37, 24, 101, None),
        (37, 24, 101, Some(2.0)),
        (37, 24, 101, Some(30.0)),
        (40, 16, 200_003, None),
    ] {
        let hidden = random([tokens, width], 1).require_grad();
        let weight = random([vocab, width], 2).require_grad();
        let wanted: Vec<i64> = (0..tokens as i64)
            .map(|i| {
                if i % 5 == 3 {
                    IGNORED_TARGET
                } else {
                    (i * 7919) % vocab as i64
                }
            })
            .collect();
        let ours =
            linear_cross_entropy(hidden.clone(), weight.clone(), targets(wanted.clone()), cap);
        let plain =
            reference::linear_cross_entropy(hidden.clone(), weight.clone(), targets(wanted), cap);
        // 1e-5: sums of 200,000 exponentials in another order.
        assert!(difference(ours.clone(), plain.clone()) < 1e-5);
        let ours = (ours * 0.25).sum().backward();
        let plain = (plain * 0.25).sum().backward();
        for tensor in [&hidden, &weight] {
            let (ours, plain) = (tensor.grad(&ours).unwrap(), tensor.grad(&plain).unwrap());
            assert!(difference(ours, plain) < 1e-5);
        }
    }
}

#[test]
fn a_weight_that_is_made_of_a_leaf_passes_its_gradient_on() {
    let hidden = random([7, 4], 1).require_grad();
    let table = random([5, 4], 2);
    let leaf = random([5, 4], 3).require_grad();
    let weight = || table.clone() + leaf.clone();
    let wanted = vec![0, 4, 2, IGNORED_TARGET, 1, 1, 3];
    let ours =
        linear_cross_entropy(hidden.clone(), weight(), targets(wanted.clone()), None).backward();
    let plain = reference::linear_cross_entropy(hidden, weight(), targets(wanted), None).backward();
    let (ours, plain) = (leaf.grad(&ours).unwrap(), leaf.grad(&plain).unwrap());
    // f32: sums of seven terms in another order.
    assert!(difference(ours, plain) < 1e-6);
}

#[test]
fn all_targets_ignored_is_no_loss_and_no_gradient() {
    let hidden = random([3, 4], 1).require_grad();
    let weight = random([5, 4], 2);
    let loss = linear_cross_entropy(
        hidden.clone(),
        weight,
        targets(vec![IGNORED_TARGET; 3]),
        None,
    );
    assert_eq!(loss.clone().into_scalar::<f32>(), 0.0);
    let gradient = hidden.grad(&loss.backward()).unwrap();
    assert_eq!(gradient.abs().sum().into_scalar::<f32>(), 0.0);
}

/// Multiplied as stored, in f32 from the same numbers, for every engine of this machine.
#[test]
fn halves_are_multiplied_as_wide_numbers_are() {
    for engine in Engine::all() {
        let hidden = random([37, 24], 1).cast(DType::BF16);
        let weight = random([101, 24], 2).detach().cast(DType::BF16);
        let wanted: Vec<i64> = (0..37)
            .map(|i| if i % 5 == 3 { IGNORED_TARGET } else { i * 2 })
            .collect();
        let [wide, half] = [DType::F32, DType::BF16].map(|dtype| {
            let hidden = hidden.clone().cast(dtype).detach().require_grad();
            let engine = (dtype == DType::BF16).then_some(engine);
            let (weight, targets) = (weight.clone().cast(dtype), targets(wanted.clone()));
            let loss = cpu::dispatch_to(engine, hidden.clone(), weight, targets, Some(3.0));
            let gradient = hidden.grad(&loss.clone().backward()).unwrap();
            assert_eq!((loss.dtype(), gradient.dtype()), (DType::F32, dtype));
            (loss.inner(), gradient.cast(DType::F32))
        });
        assert!(difference(half.0, wide.0) < 1e-5, "{engine:?}");
        // The slopes of the logits are rounded to 8 bits, and the result.
        assert!(difference(half.1, wide.1) < 8e-3, "{engine:?}");
    }
}
