use super::*;
use crate::cpu::testing::{difference, frozen, random, weigh};

/// Forward and gradient against the reference. 2e-6: a few roundings of f32.
fn check(
    kernel: impl Fn(Tensor<3>, Tensor<3>) -> Tensor<3>,
    plain: impl Fn(Tensor<3>, Tensor<3>) -> Tensor<3>,
) {
    for shape in [[1, 1, 1], [2, 3, 17], [3, 40, 200]] {
        let x = (random(shape, 1) * 3.0).require_grad();
        let y = random(shape, 2).require_grad();
        let ours = kernel(x.clone(), y.clone());
        let theirs = plain(x.clone(), y.clone());
        assert!(difference(ours.clone(), theirs.clone()) < 2e-6);
        let ours = weigh(ours).backward();
        let theirs = weigh(theirs).backward();
        for input in [x, y] {
            match (input.grad(&ours), input.grad(&theirs)) {
                (Some(ours), Some(theirs)) => assert!(difference(ours, theirs) < 2e-6),
                (None, None) => {}
                _ => panic!("one side has a gradient that the other lacks"),
            }
        }
    }
}

#[test]
fn swiglu_matches_its_reference() {
    check(swiglu, reference::swiglu);
}

#[test]
fn swiglu_with_one_frozen_input() {
    check(
        |x, y| swiglu(x, frozen(y)),
        |x, y| reference::swiglu(x, frozen(y)),
    );
    check(
        |x, y| swiglu(frozen(x), y),
        |x, y| reference::swiglu(frozen(x), y),
    );
}

#[test]
fn geglu_matches_its_reference() {
    check(geglu, reference::geglu);
    check(geglu_tanh, reference::geglu_tanh);
    check(
        |x, y| geglu(x, frozen(y)),
        |x, y| reference::geglu(x, frozen(y)),
    );
}

#[test]
fn gelu_matches_its_reference() {
    check(|x, _| gelu(x), |x, _| reference::gelu(x));
    check(|x, _| gelu_tanh(x), |x, _| reference::gelu_tanh(x));
}
