use burn::tensor::DType;
use proptest::prelude::*;

use super::*;
use crate::cpu::testing::{device, difference, random, weigh};

const KINDS: [Quantization; 3] = [
    Quantization::Int8,
    Quantization::Nf4 { double: false },
    Quantization::Nf4 { double: true },
];

fn quantized(values: &Tensor<2>, quantization: Quantization) -> QuantizedWeight {
    let shape = values.dims();
    let values = values.clone().into_data().try_into_vec::<f32>().unwrap();
    let host = HostWeight::quantize(&values, shape[1], quantization);
    QuantizedWeight::new(host, shape, &device())
}

fn lora(rank: usize, [inputs, outputs]: [usize; 2]) -> Lora {
    Lora {
        a: random([rank, inputs], 4).require_grad(),
        b: random([outputs, rank], 5).require_grad(),
        scaling: 1.5,
        dropout: 0.0,
        dropout_seed: 0,
    }
}

#[test]
fn every_gradient_matches_the_reference() {
    // The last is more than one tile of rows, the first ones end within a block and within a byte.
    for [batch, seq, inputs, outputs, rank] in [
        [1, 1, 1, 1, 1],
        [2, 5, 7, 9, 3],
        [1, 3, 70, 33, 4],
        [2, 16, 640, 500, 8],
    ] {
        for quantization in KINDS {
            let x = random([batch, seq, inputs], 1).require_grad();
            let weight = quantized(&random([outputs, inputs], 2), quantization);
            let bias = random([outputs], 3).require_grad();
            let lora = lora(rank, [inputs, outputs]);
            let ours = quantized_linear(x.clone(), &weight, Some(bias.clone()), Some(&lora));
            let plain = reference::quantized_linear(
                x.clone(),
                &weight,
                Some(bias.clone()),
                Some(&lora),
                None,
            );
            // 1e-5: sums of up to 640 products in another order.
            assert!(difference(ours.clone(), plain.clone()) < 1e-5);
            let ours = weigh(ours).backward();
            let plain = weigh(plain).backward();
            let both =
                |tensor: &Tensor<2>| (tensor.grad(&ours).unwrap(), tensor.grad(&plain).unwrap());
            assert!(difference(x.grad(&ours).unwrap(), x.grad(&plain).unwrap()) < 1e-5);
            assert!(difference(bias.grad(&ours).unwrap(), bias.grad(&plain).unwrap()) < 1e-5);
            for tensor in [&lora.a, &lora.b] {
                let (ours, plain) = both(tensor);
                assert!(difference(ours, plain) < 1e-5);
            }
        }
    }
}

#[test]
fn what_other_backends_run_matches_the_reference_too() {
    for quantization in KINDS {
        let x = random([2, 5, 70], 1).require_grad();
        let weight = quantized(&random([33, 70], 2), quantization);
        let ours = recomputed::product(x.clone().reshape([10, 70]), &weight);
        let plain = reference::quantized_linear(x.clone(), &weight, None, None, None);
        let plain = plain.reshape([10, 33]);
        assert!(difference(ours.clone(), plain.clone()) < 1e-5);
        let (ours, plain) = (weigh(ours).backward(), weigh(plain).backward());
        assert!(difference(x.grad(&ours).unwrap(), x.grad(&plain).unwrap()) < 1e-5);
    }
}

#[test]
fn half_precision_computes_in_half_precision() {
    for quantization in KINDS {
        let x = random([2, 5, 70], 1);
        let weight = quantized(&random([33, 70], 2), quantization);
        let lora = lora(4, [70, 33]);
        let exact = quantized_linear(x.clone(), &weight, None, Some(&lora));
        // Cast anew for each graph: a backward pass uses its graph up.
        let half = || Lora {
            a: lora.a.clone().cast(DType::BF16),
            b: lora.b.clone().cast(DType::BF16),
            ..lora.clone()
        };
        let x = x.require_grad();
        let ours = quantized_linear(x.clone().cast(DType::BF16), &weight, None, Some(&half()));
        assert_eq!(ours.dtype(), DType::BF16);
        let ours = ours.cast(DType::F32);
        // 8 bits of mantissa in every factor and in the sums.
        assert!(difference(ours.clone(), exact.clone()) < 0.04);
        let gradients = weigh(ours).backward();
        assert!(x.grad(&gradients).is_some() && lora.a.grad(&gradients).is_some());
        // An input outside autodiff, as that of the first layer, leaves the pair its gradient.
        let constant = x.inner().cast(DType::BF16);
        let ours = quantized_linear(constant, &weight, None, Some(&half())).cast(DType::F32);
        assert!(lora.a.grad(&weigh(ours).backward()).is_some());
    }
}

#[test]
fn rows_are_rows_of_the_whole() {
    for quantization in KINDS {
        let weight = quantized(&random([9, 35], 2), quantization);
        let whole = weight.dequantize(DType::F32);
        let some = weight.rows(3..8, DType::F32);
        some.into_data()
            .assert_eq(&whole.narrow(0, 3, 5).into_data(), true);
    }
}

#[test]
fn memory_is_what_the_codes_take() {
    for shape in [[64, 256], [33, 71]] {
        for quantization in KINDS {
            let weight = quantized(&random(shape, 2), quantization);
            assert_eq!(weight.bytes(), quantization.bytes(shape));
        }
    }
    let bytes = |quantization: Quantization| quantization.bytes([1024, 4096]);
    assert_eq!(bytes(Quantization::Int8), 4096 * 1024 + 4 * 1024);
    // 4.5 bits a weight, and 4.13.
    let double = 4096 * 1024 / 2 + 65_536 + 4 * (256 + 256);
    assert_eq!(
        bytes(Quantization::Nf4 { double: false }),
        4096 * 1024 / 16 * 9
    );
    assert_eq!(bytes(Quantization::Nf4 { double: true }), double);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn plain_operations_dequantise_to_the_same_bits(
        outputs in 1usize..40, inputs in 1usize..80, seed in 1u64..1000, kind in 0usize..3,
    ) {
        let values = random([outputs, inputs], seed);
        let weight = quantized(&values, KINDS[kind]);
        let host = HostWeight::quantize(
            &values.into_data().try_into_vec::<f32>().unwrap(), inputs, KINDS[kind],
        );
        let host = TensorData::new(host.dequantize(outputs * inputs, inputs), [outputs, inputs]);
        weight.dequantize(DType::F32).into_data().assert_eq(&host, true);
        reference::dequantize(&weight, DType::F32).into_data().assert_eq(&host, true);
    }
}
