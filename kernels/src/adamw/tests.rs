use super::*;
use crate::cpu::testing::random;

fn tensors(lengths: &[usize]) -> Vec<AdamWTensor> {
    let of = |length: usize, seed| random([length], seed).inner();
    let one = |(index, &length): (usize, &usize)| AdamWTensor {
        values: of(length, 10 * index as u64 + 1),
        gradient: of(length, 10 * index as u64 + 2),
        first: of(length, 10 * index as u64 + 3),
        second: of(length, 10 * index as u64 + 4).square(),
        update: AdamWUpdate {
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            learning_rate: 1e-2 * (1 + index % 2) as f64,
            weight_decay: 0.1,
            step: 1 + index as u64,
        },
    };
    lengths.iter().enumerate().map(one).collect()
}

fn values(found: Vec<[Tensor<1>; 3]>) -> Vec<[Vec<f32>; 3]> {
    let values = |tensor: Tensor<1>| tensor.into_data().try_into_vec::<f32>().unwrap();
    found.into_iter().map(|parts| parts.map(values)).collect()
}

#[test]
fn the_kernel_computes_the_same_as_the_reference_to_the_bit() {
    // The last takes several blocks.
    let tensors = tensors(&[1, 7, 64, 210, 100_003]);
    for scale in [1.0, 0.3] {
        let found = values(adamw(tensors.clone(), scale));
        assert_eq!(found, values(reference::adamw(tensors.clone(), scale)));
    }
    assert!(adamw(vec![], 1.0).is_empty());
}

#[test]
fn what_others_still_hold_stays() {
    let tensors = tensors(&[33]);
    let before = values(vec![[
        tensors[0].gradient.clone(),
        tensors[0].first.clone(),
        tensors[0].second.clone(),
    ]]);
    let parts = tensors[0].clone();
    // Part of a longer buffer, too.
    let longer = Tensor::cat(vec![parts.gradient.clone(), parts.gradient.clone()], 0);
    let part = AdamWTensor {
        gradient: longer.clone().narrow(0, 33, 33),
        ..parts.clone()
    };
    let [whole, narrowed] = [tensors, vec![part]].map(|tensors| values(adamw(tensors, 0.5)));
    assert_eq!(whole, narrowed);
    let after = values(vec![[parts.gradient, parts.first, longer.narrow(0, 0, 33)]]);
    assert_eq!(before[0][0], after[0][0]);
    assert_eq!(before[0][1], after[0][1]);
    assert_eq!(before[0][0], after[0][2]);
}
