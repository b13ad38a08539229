use burn::tensor::TensorData;
use proptest::prelude::*;

use super::*;
use crate::cpu::testing::{device, difference, random, weigh};

fn segments(rows: Vec<Vec<i32>>) -> Tensor<2, Int> {
    let shape = [rows.len(), rows[0].len()];
    let values: Vec<i32> = rows.into_iter().flatten().collect();
    Tensor::from_data(TensorData::new(values, shape), &device())
}

/// Two rows of `seq`: one segment filling its row, and two with padding behind.
fn packed(seq: usize) -> Tensor<2, Int> {
    let (first, second) = (seq * 2 / 5, seq * 4 / 5);
    let row = |i: usize| match i {
        i if i < first => 1,
        i if i < second => 2,
        _ => 0,
    };
    segments(vec![vec![1; seq], (0..seq).map(row).collect()])
}

fn check(seq: usize, heads: usize, kv_heads: usize, head_dim: usize, options: AttentionOptions) {
    let query = random([2, seq, heads, head_dim], 1).require_grad();
    let key = random([2, seq, kv_heads, head_dim], 2).require_grad();
    let value = random([2, seq, kv_heads, head_dim], 3).require_grad();
    let run =
        |f: fn(Tensor<4>, Tensor<4>, Tensor<4>, Tensor<2, Int>, &AttentionOptions) -> Tensor<4>| {
            f(
                query.clone(),
                key.clone(),
                value.clone(),
                packed(seq),
                &options,
            )
        };
    let (ours, plain) = (run(attention), run(reference::attention));
    // 1e-5: softmax over up to 200 keys, products summed in another order.
    assert!(
        difference(ours.clone(), plain.clone()) < 1e-5,
        "{options:?}"
    );
    let (ours, plain) = (weigh(ours).backward(), weigh(plain).backward());
    for tensor in [&query, &key, &value] {
        let (ours, plain) = (tensor.grad(&ours).unwrap(), tensor.grad(&plain).unwrap());
        assert!(difference(ours, plain) < 1e-5, "{options:?}");
    }
}

#[test]
fn every_kind_of_mask_matches_the_reference() {
    for (causal, window) in [
        (false, None),
        (true, None),
        (true, Some(7)),
        (false, Some(5)),
    ] {
        let options = AttentionOptions {
            causal,
            window,
            scale: 0.25,
            soft_cap: None,
        };
        for (seq, heads, kv_heads, head_dim) in [(1, 1, 1, 4), (20, 4, 2, 8), (150, 3, 1, 16)] {
            check(seq, heads, kv_heads, head_dim, options);
        }
    }
}

#[test]
fn capped_scores_match_the_reference() {
    for (causal, window) in [(true, None), (true, Some(7)), (false, None)] {
        // Scores here are up to 3: a cap of 1 bends nearly all of them, one of 50 hardly any.
        for cap in [1.0, 50.0] {
            let options = AttentionOptions {
                causal,
                window,
                scale: 0.5,
                soft_cap: Some(cap),
            };
            for (seq, heads, kv_heads, head_dim) in [(1, 1, 1, 4), (20, 4, 2, 8), (150, 3, 1, 16)] {
                check(seq, heads, kv_heads, head_dim, options);
            }
        }
    }
}

#[test]
fn padding_gives_zero_and_takes_nothing() {
    let options = AttentionOptions {
        causal: false,
        window: None,
        scale: 1.0,
        soft_cap: None,
    };
    let value = random([1, 4, 1, 2], 3).require_grad();
    let output = attention(
        random([1, 4, 1, 2], 1),
        random([1, 4, 1, 2], 2),
        value.clone(),
        segments(vec![vec![1, 1, 0, 0]]),
        &options,
    );
    let gradient = value.grad(&output.clone().sum().backward()).unwrap();
    let tail = |tensor: Tensor<4>| tensor.slice([0..1, 2..4]).abs().sum().into_scalar::<f32>();
    assert_eq!(tail(output), 0.0);
    assert_eq!(tail(gradient), 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// A packed patient gets what it would get alone, bit for bit.
    #[test]
    fn packed_segments_never_see_each_other(first in 1usize..40, second in 1usize..40, causal: bool) {
        let options = AttentionOptions { causal, window: None, scale: 0.3, soft_cap: None };
        let seq = first + second;
        let make = |seed| random([1, seq, 2, 8], seed);
        let (query, key, value) = (make(1), make(2), make(3));
        let both = segments(vec![[vec![1; first], vec![2; second]].concat()]);
        let together = attention(query.clone(), key.clone(), value.clone(), both, &options);
        let part = |tensor: Tensor<4>| tensor.slice([0..1, first..seq]);
        let alone = attention(part(query), part(key), part(value), segments(vec![vec![1; second]]), &options);
        part(together).into_data().assert_eq(&alone.into_data(), true);
    }
}

/// The tiles of `flash.cu`, run on the CPU; see scripts/emulate_cuda.
#[test]
fn the_cuda_kernels_match_plain_sums() {
    let compiler = std::env::var("CXX").unwrap_or("g++".to_string());
    if std::process::Command::new(&compiler)
        .arg("--version")
        .output()
        .is_err()
    {
        println!("not checked: there is no C++ compiler ({compiler})");
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/emulate_cuda/run");
    let output = std::process::Command::new(script)
        .output()
        .expect("a script of this repository");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
