use super::*;
use crate::cpu::testing::{difference, random, weigh};

#[test]
fn rotation_matches_its_reference() {
    for [batch, seq, heads, head_dim, rotated] in [
        [1, 1, 1, 2, 2],
        [2, 5, 3, 8, 8],
        [2, 33, 4, 64, 64],
        [2, 33, 4, 64, 16],
    ] {
        let x = random([batch, seq, heads, head_dim], 1).require_grad();
        let cos = random([batch, seq, rotated], 2);
        let sin = random([batch, seq, rotated], 3);
        let ours = rotary(x.clone(), cos.clone(), sin.clone());
        let plain = reference::rotary(x.clone(), cos, sin);
        // 1e-6: two products and a sum, rounded once or twice.
        assert!(difference(ours.clone(), plain.clone()) < 1e-6);
        let ours = x.grad(&weigh(ours).backward()).expect("tracked");
        let plain = x.grad(&weigh(plain).backward()).expect("tracked");
        assert!(difference(ours, plain) < 1e-6);
    }
}

#[test]
fn the_input_stays_as_it_was() {
    let x = random([1, 3, 2, 4], 1);
    let before = x.clone().into_data();
    let table = random([1, 3, 4], 2);
    let _ = rotary(x.clone(), table.clone(), table);
    x.into_data().assert_eq(&before, true);
}
