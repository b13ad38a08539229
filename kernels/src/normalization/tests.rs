use burn::tensor::DType;

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

#[test]
fn a_sum_and_its_norm_are_those_of_one_after_the_other() {
    for (dtype, tolerance) in [(DType::F32, 5e-6), (DType::BF16, 8e-3)] {
        for (shape, added, biased) in [
            ([2, 7, 61], true, false),
            ([2, 7, 61], true, true),
            ([4, 50, 384], false, false),
            ([4, 50, 384], false, true),
        ] {
            let leaf = |seed| random(shape, seed).cast(dtype).detach().require_grad();
            let (x, update) = (leaf(1), leaf(2));
            let weight = random([shape[2]], 3).cast(dtype).detach().require_grad();
            let bias = random([shape[2]], 4).cast(dtype).detach().require_grad();
            let norm = || Norm {
                weight: weight.clone(),
                bias: biased.then(|| bias.clone()),
                epsilon: 1e-5,
            };
            // Both results, the sum alone, the norm alone.
            for (of_sum, of_norm) in [(1.0, 0.5), (1.0, 0.0), (0.0, 1.0)] {
                let run = |found: (Tensor<3>, Tensor<3>)| {
                    let wide = |tensor: Tensor<3>| tensor.cast(DType::F32);
                    let values =
                        [found.0.clone(), found.1.clone()].map(|found| wide(found.inner()));
                    let terms = [(found.0, of_sum), (found.1, of_norm)];
                    let terms = terms.into_iter().filter(|(_, factor)| *factor > 0.0);
                    let terms = terms.map(|(found, factor)| weigh(wide(found)) * factor);
                    (
                        values,
                        terms.reduce(|sum, term| sum + term).unwrap().backward(),
                    )
                };
                let update = added.then(|| update.clone());
                let ours = run(residual_norm(x.clone(), update.clone(), norm()));
                let expected = run(reference::residual_norm(x.clone(), update.clone(), norm()));
                for (ours, expected) in ours.0.into_iter().zip(expected.0) {
                    let found = difference(ours, expected);
                    assert!(
                        found < tolerance,
                        "{dtype:?} {shape:?} {added} {biased}: {found}"
                    );
                }
                let wide = |found: Option<Tensor<3>>| found.map(|found| found.cast(DType::F32));
                for leaf in [Some(&x), update.as_ref()].into_iter().flatten() {
                    let ours = wide(leaf.grad(&ours.1)).unwrap();
                    let expected = wide(leaf.grad(&expected.1)).unwrap();
                    assert!(difference(ours, expected) < 5.0 * tolerance);
                }
                let parameters = [Some(&weight), biased.then_some(&bias)];
                for leaf in parameters.into_iter().flatten() {
                    let [ours, expected] = [&ours.1, &expected.1]
                        .map(|found| leaf.grad(found).map(|found| found.cast(DType::F32)));
                    if let (Some(ours), Some(expected)) = (ours, expected) {
                        assert!(difference(ours, expected) < 5.0 * tolerance);
                    }
                }
            }
        }
    }
}
