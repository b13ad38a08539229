use burn::tensor::TensorData;
use proptest::prelude::*;

use super::*;
use crate::cpu::testing::{device, difference, frozen, random, weigh};
use crate::{HostWeight, Quantization};

struct Case {
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Tensor<1>,
    lora: Lora,
}

fn case([batch, seq, inputs, outputs, rank]: [usize; 5], dropout: f32) -> Case {
    Case {
        x: random([batch, seq, inputs], 1).require_grad(),
        weight: random([outputs, inputs], 2).require_grad(),
        bias: random([outputs], 3).require_grad(),
        lora: Lora {
            a: random([rank, inputs], 4).require_grad(),
            b: random([outputs, rank], 5).require_grad(),
            scaling: 1.5,
            dropout,
            dropout_seed: 0x1234_5678_9ABC,
        },
    }
}

/// The mask that the kernel hashes, as a tensor.
fn mask(case: &Case) -> Option<Tensor<3>> {
    let Lora {
        dropout,
        dropout_seed,
        ..
    } = case.lora;
    (dropout > 0.0).then(|| {
        let shape = case.x.dims();
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|i| f32::from(u8::from(dropout_keeps(dropout_seed, i, dropout))))
            .collect();
        Tensor::from_data(TensorData::new(values, shape), &device())
    })
}

#[test]
fn every_gradient_matches_the_reference() {
    for shape in [[1, 1, 1, 1, 1], [2, 5, 7, 9, 3], [2, 64, 96, 160, 8]] {
        for dropout in [0.0, 0.4] {
            let case = case(shape, dropout);
            let Case {
                x,
                weight,
                bias,
                lora,
            } = &case;
            let ours = lora_linear(x.clone(), weight.clone(), Some(bias.clone()), Some(lora));
            let plain = reference::lora_linear(
                x.clone(),
                weight.clone(),
                Some(bias.clone()),
                Some(lora),
                mask(&case),
            );
            // 1e-5: sums of up to 160 products in another order.
            assert!(difference(ours.clone(), plain.clone()) < 1e-5);
            let ours = weigh(ours).backward();
            let plain = weigh(plain).backward();
            assert!(difference(x.grad(&ours).unwrap(), x.grad(&plain).unwrap()) < 1e-5);
            assert!(difference(bias.grad(&ours).unwrap(), bias.grad(&plain).unwrap()) < 1e-5);
            for tensor in [weight, &lora.a, &lora.b] {
                let (ours, plain) = (tensor.grad(&ours).unwrap(), tensor.grad(&plain).unwrap());
                assert!(difference(ours, plain) < 1e-5);
            }
        }
    }
}

#[test]
fn several_linears_of_one_input_are_each_for_itself() {
    let [batch, seq, inputs] = [2, 33, 40];
    let x = random([batch, seq, inputs], 1).require_grad();
    let weights = [24, 56, 8].map(|outputs| random([outputs, inputs], outputs as u64));
    let quantized = {
        let values = weights[1]
            .clone()
            .into_data()
            .try_into_vec::<f32>()
            .unwrap();
        let host = HostWeight::quantize(&values, inputs, Quantization::Nf4 { double: false });
        QuantizedWeight::new(host, [56, inputs], &device())
    };
    let bias = random([24], 7).require_grad();
    let pair = |outputs, rank, dropout| Lora {
        a: random([rank, inputs], outputs as u64 + 1).require_grad(),
        b: random([outputs, rank], outputs as u64 + 2).require_grad(),
        scaling: 1.5,
        dropout,
        dropout_seed: outputs as u64,
    };
    // All with a pair; then of other ranks, without, and of a quantised weight; then dropping.
    for (ranks, second, dropout) in [
        (
            [Some(4), Some(4), Some(4)],
            FrozenWeight::Dense(&weights[1]),
            [0.0; 3],
        ),
        (
            [Some(3), None, Some(5)],
            FrozenWeight::Dense(&weights[1]),
            [0.0; 3],
        ),
        (
            [Some(2), Some(6), None],
            FrozenWeight::Quantized(&quantized),
            [0.0; 3],
        ),
        (
            [Some(4), Some(3), Some(2)],
            FrozenWeight::Dense(&weights[1]),
            [0.0, 0.4, 0.3],
        ),
    ] {
        let first = FrozenWeight::Dense(&weights[0]);
        let third = FrozenWeight::Dense(&weights[2]);
        let parts: Vec<LinearPart<'_>> = [(first, 24), (second, 56), (third, 8)]
            .into_iter()
            .zip(ranks.into_iter().zip(dropout))
            .map(|((weight, outputs), (rank, dropout))| LinearPart {
                weight,
                bias: (outputs == 24).then(|| bias.clone()),
                lora: rank.map(|rank| pair(outputs, rank, dropout)),
            })
            .collect();
        let all = |parts: &[LinearPart<'_>]| lora_linears(x.clone(), parts.to_vec());
        let each = |parts: &[LinearPart<'_>]| -> Vec<Tensor<3>> {
            let one = |part: &LinearPart<'_>| lora_linears(x.clone(), vec![part.clone()]).remove(0);
            parts.iter().map(one).collect()
        };
        // All results, or the second is left over.
        for used in [vec![0, 1, 2], vec![0, 2]] {
            let run = |outputs: Vec<Tensor<3>>| {
                let used = used.iter().map(|&index| outputs[index].clone());
                let sum = Tensor::cat(used.collect(), 2);
                let found = sum.clone().inner();
                (found, weigh(sum).backward())
            };
            let (together, apart) = (run(all(&parts)), run(each(&parts)));
            assert!(difference(together.0, apart.0) < 1e-6);
            let [of_x, of_x_apart] = [&together.1, &apart.1].map(|found| x.grad(found).unwrap());
            // Sums over three linears in another order.
            assert!(difference(of_x, of_x_apart) < 2e-6);
            let [of_bias, of_bias_apart] = [&together.1, &apart.1].map(|found| bias.grad(found));
            assert!(difference(of_bias.unwrap(), of_bias_apart.unwrap()) < 1e-6);
            for (index, part) in parts.iter().enumerate() {
                for factor in part.lora.iter().flat_map(|lora| [&lora.a, &lora.b]) {
                    let [together, apart] = [&together.1, &apart.1].map(|found| factor.grad(found));
                    match (together, apart) {
                        (Some(together), Some(apart)) => {
                            assert!(difference(together, apart) < 1e-6);
                        }
                        // A result that is left over gives nothing, or zeros beside the others'.
                        (together, None) => {
                            assert!(!used.contains(&index));
                            let zero = |found: Tensor<2>| found.abs().max().into_scalar::<f32>();
                            assert!(together.is_none_or(|together| zero(together) == 0.0));
                        }
                        (None, Some(_)) => panic!("no gradient of part {index}"),
                    }
                }
            }
        }
    }
}

#[test]
fn dropout_alone_drops_what_the_linear_drops() {
    let case = case([2, 5, 7, 9, 3], 0.4);
    let Lora {
        dropout,
        dropout_seed,
        ..
    } = case.lora;
    let alone = super::dropout(case.x.clone(), dropout, dropout_seed);
    let masked = case.x.clone() * mask(&case).unwrap() / f64::from(1.0 - dropout);
    assert!(difference(alone, masked) == 0.0);
    assert!(difference(super::dropout(case.x.clone(), 0.0, 1), case.x) == 0.0);
}

#[test]
fn a_frozen_weight_gets_no_gradient() {
    let Case {
        x, weight, lora, ..
    } = case([1, 4, 8, 8, 2], 0.0);
    let weight = frozen(weight);
    let output = lora_linear(x.clone(), weight.clone(), None, Some(&lora));
    let gradients = weigh(output).backward();
    assert!(weight.grad(&gradients).is_none());
    assert!(lora.a.grad(&gradients).is_some());
}

#[test]
fn a_constant_made_outside_autodiff_is_accepted() {
    let Case { x, weight, .. } = case([1, 4, 8, 8, 2], 0.0);
    let plain = weight.clone().inner();
    let ours = lora_linear(x.clone(), plain, None, None);
    let tracked = lora_linear(x, weight, None, None);
    assert!(difference(ours, tracked) == 0.0);
}

#[test]
fn dropout_keeps_the_stated_share() {
    for probability in [0.05f32, 0.5, 0.9] {
        let kept = (0..100_000)
            .filter(|&i| dropout_keeps(7, i, probability))
            .count();
        // Four standard deviations of a binomial of 100,000.
        assert!((kept as f32 / 1e5 - (1.0 - probability)).abs() < 0.0065);
    }
    let same = (0..10_000)
        .filter(|&i| dropout_keeps(1, i, 0.5) == dropout_keeps(2, i, 0.5))
        .count();
    assert!((4_700..5_300).contains(&same), "seeds give unrelated masks");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn lora_with_zero_b_equals_the_base(
        batch in 1usize..3, seq in 1usize..9, inputs in 1usize..33, outputs in 1usize..33, rank in 1usize..9,
    ) {
        let Case { x, weight, mut lora, .. } = case([batch, seq, inputs, outputs, rank], 0.3);
        lora.b = lora.b.zeros_like();
        let base = lora_linear(x.clone(), weight.clone(), None, None);
        let adapted = lora_linear(x, weight, None, Some(&lora));
        adapted.into_data().assert_eq(&base.into_data(), true);
    }
}
