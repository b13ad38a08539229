//! The switch that takes every operation to its plain reference. A test alone in its process, which
//! the switch is of.

#![cfg(feature = "cpu")]

use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use calor_kernels::{
    AttentionOptions, FrozenWeight, HostWeight, LinearPart, Lora, Norm, Quantization,
    QuantizedWeight, dropout_keeps, profile, reference, use_references,
};

fn device() -> Device {
    Device::flex().autodiff()
}

fn random<const D: usize>(shape: [usize; D], dtype: DType) -> Tensor<D> {
    Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.0), &device()).cast(dtype)
}

fn lora([inputs, outputs]: [usize; 2], dropout: f32) -> Lora {
    Lora {
        a: random([3, inputs], DType::F32),
        b: random([outputs, 3], DType::F32),
        scaling: 1.5,
        dropout,
        dropout_seed: 11,
    }
}

fn bytes<const D: usize>(tensor: Tensor<D>) -> TensorData {
    tensor.into_data()
}

/// Every operation beside its reference; the values of both.
fn pairs(dtype: DType) -> Vec<(&'static str, TensorData, TensorData)> {
    let x = random([2, 5, 7], dtype);
    let (weight, bias) = (random([7], dtype), random([7], dtype));
    let wide = random([9, 7], dtype);
    let up = random([2, 5, 7], dtype);
    let lora = lora([7, 9], 0.25);
    let kept = (0..70).map(|index| f32::from(u8::from(dropout_keeps(11, index, 0.25))));
    let mask = TensorData::new(kept.collect::<Vec<f32>>(), [2, 5, 7]);
    let mask = Tensor::<3>::from_data(mask, &Device::flex()).cast(dtype);
    let values = wide.clone().into_data_dtype(DType::F32).try_into_vec();
    let host = HostWeight::quantize(&values.unwrap(), 7, Quantization::Nf4 { double: true });
    let quantized = QuantizedWeight::new(host, [9, 7], &device());
    let [query, key, value] = [4, 2, 2].map(|heads| random([2, 5, heads, 8], dtype));
    let segments = TensorData::new(vec![1i32, 1, 2, 2, 0, 1, 1, 1, 1, 1], [2, 5]);
    let segments = Tensor::<2, Int>::from_data(segments, &device());
    let options = AttentionOptions {
        causal: true,
        window: None,
        scale: 0.3,
        soft_cap: None,
    };
    let (cos, sin) = (random([2, 5, 8], dtype), random([2, 5, 8], dtype));
    let flat = random([10, 7], dtype);
    let targets = TensorData::new(vec![0i32, 3, -100, 8, 2, 1, 0, 4, 5, 6], [10]);
    let targets = Tensor::<1, Int>::from_data(targets, &device());
    macro_rules! pair {
        ($name:ident($($argument:expr),+)) => {
            (
                stringify!($name),
                bytes(calor_kernels::$name($($argument.clone()),+)),
                bytes(reference::$name($($argument.clone()),+)),
            )
        };
    }
    let norm = Norm {
        weight: weight.clone(),
        bias: None,
        epsilon: 1e-5,
    };
    let part = || LinearPart {
        weight: FrozenWeight::Dense(&wide),
        bias: None,
        lora: Some(lora.clone()),
    };
    let side_by_side = |results: Vec<Tensor<3>>| Tensor::cat(results, 2);
    vec![
        (
            "lora_linear",
            bytes(side_by_side(calor_kernels::lora_linears(
                x.clone(),
                vec![part(), part()],
            ))),
            bytes(side_by_side(reference::lora_linears(
                x.clone(),
                vec![part(), part()],
            ))),
        ),
        (
            "rms_norm",
            bytes(calor_kernels::residual_norm(x.clone(), Some(up.clone()), norm.clone()).1),
            bytes(reference::residual_norm(x.clone(), Some(up.clone()), norm).1),
        ),
        pair!(rms_norm(x, weight, 1e-5)),
        pair!(layer_norm(x, weight, bias, 1e-5)),
        pair!(swiglu(x, up)),
        pair!(geglu(x, up)),
        pair!(geglu_tanh(x, up)),
        pair!(gelu(x)),
        pair!(gelu_tanh(x)),
        pair!(rotary(query, cos, sin)),
        pair!(linear_cross_entropy(flat, wide, targets, None)),
        (
            "attention",
            bytes(calor_kernels::attention(
                query.clone(),
                key.clone(),
                value.clone(),
                segments.clone(),
                &options,
            )),
            bytes(reference::attention(query, key, value, segments, &options)),
        ),
        (
            "lora_linear",
            bytes(calor_kernels::lora_linear(
                x.clone(),
                wide.clone(),
                None,
                Some(&lora),
            )),
            bytes(reference::lora_linear(
                x.clone(),
                wide.clone(),
                None,
                Some(&lora),
                Some(mask.clone()),
            )),
        ),
        (
            "quantized_linear",
            bytes(calor_kernels::quantized_linear(
                x.clone(),
                &quantized,
                None,
                Some(&lora),
            )),
            bytes(reference::quantized_linear(
                x,
                &quantized,
                None,
                Some(&lora),
                Some(mask),
            )),
        ),
    ]
}

#[test]
fn the_switch_takes_every_operation_to_its_reference() {
    let kernels = |dtype| {
        profile::start();
        let found = pairs(dtype);
        profile::stop();
        let names: Vec<_> = profile::take().iter().map(|calls| calls.name).collect();
        (found, names)
    };
    let (found, names) = kernels(DType::F32);
    for (name, ..) in &found {
        assert!(names.contains(name), "{name} has no kernel: {names:?}");
    }
    use_references(true);
    for dtype in [DType::F32, DType::BF16] {
        let (found, names) = kernels(dtype);
        assert!(names.is_empty(), "kernels ran: {names:?}");
        for (name, ours, plain) in found {
            assert_eq!(ours, plain, "{name} in {dtype:?}");
        }
    }
    use_references(false);
    assert!(!kernels(DType::F32).1.is_empty());
}
