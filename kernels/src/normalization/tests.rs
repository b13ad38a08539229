use super::*;
use crate::cpu::testing::{difference, random, weigh};

/// A width of one is left out: its gradient is a difference of equals.
const SHAPES: [[usize; 3]; 3] = [[2, 3, 16], [2, 7, 61], [4, 50, 384]];

#[test]
fn rms_norm_matches_its_reference() {
    for shape in SHAPES {
        let x = (random(shape, 1) * 2.0 + 0.3).require_grad();
        let weight = random([shape[2]], 2).require_grad();
        let ours = rms_norm(x.clone(), weight.clone(), 1e-5);
        let plain = reference::rms_norm(x.clone(), weight.clone(), 1e-5);
        assert!(difference(ours.clone(), plain.clone()) < 2e-6);
        let ours = weigh(ours).backward();
        let plain = weigh(plain).backward();
        // 2e-5: sums over `hidden`, and for the weight over all rows, in another order.
        assert!(difference(x.grad(&ours).unwrap(), x.grad(&plain).unwrap()) < 2e-5);
        assert!(difference(weight.grad(&ours).unwrap(), weight.grad(&plain).unwrap()) < 2e-5);
    }
}

#[test]
fn layer_norm_matches_its_reference() {
    for shape in SHAPES {
        let x = (random(shape, 1) * 2.0 + 0.3).require_grad();
        let weight = random([shape[2]], 2).require_grad();
        let bias = random([shape[2]], 3).require_grad();
        let ours = layer_norm(x.clone(), weight.clone(), bias.clone(), 1e-12);
        let plain = reference::layer_norm(x.clone(), weight.clone(), bias.clone(), 1e-12);
        assert!(difference(ours.clone(), plain.clone()) < 5e-6);
        let ours = weigh(ours).backward();
        let plain = weigh(plain).backward();
        // 2e-5: as above.
        assert!(difference(x.grad(&ours).unwrap(), x.grad(&plain).unwrap()) < 2e-5);
        assert!(difference(weight.grad(&ours).unwrap(), weight.grad(&plain).unwrap()) < 2e-5);
        assert!(difference(bias.grad(&ours).unwrap(), bias.grad(&plain).unwrap()) < 2e-5);
    }
}

#[test]
fn a_frozen_norm_passes_the_gradient_on() {
    let x = random([2, 4, 32], 1).require_grad();
    let weight = random([32], 2);
    let gradients = weigh(rms_norm(x.clone(), weight.clone(), 1e-6)).backward();
    assert!(x.grad(&gradients).is_some());
    assert!(weight.grad(&gradients).is_none());
}
