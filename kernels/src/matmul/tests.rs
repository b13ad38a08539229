use burn::tensor::{DType, Device, DeviceType, Tensor, TensorData};

use super::*;
use crate::cpu::testing::{difference, random, weigh};

/// The first device of the kind that `CALOR_TEST_DEVICE` names, under autodiff.
fn gpu() -> Device {
    let kind = match std::env::var("CALOR_TEST_DEVICE").as_deref() {
        Ok("cuda") => DeviceType::Cuda,
        Ok("wgpu") => DeviceType::Wgpu,
        _ => panic!("CALOR_TEST_DEVICE names neither cuda nor wgpu"),
    };
    let mut devices = Device::enumerate(kind).into_vec();
    devices.swap_remove(0).autodiff()
}

/// The product on the GPU and its gradients against the same on the CPU.
fn check<const D: usize>(lhs: [usize; D], rhs: [usize; D], dtype: DType, tolerance: f32) {
    let device = gpu();
    let moved = |tensor: &Tensor<D>| {
        let data: TensorData = tensor.clone().into_data();
        Tensor::<D>::from_data(data, (&device, dtype)).require_grad()
    };
    let host = |tensor: Tensor<D>| {
        let data = tensor.into_data_dtype(DType::F32);
        Tensor::<D>::from_data(data, &Device::flex())
    };
    let (a, b) = (random(lhs, 1).require_grad(), random(rhs, 2).require_grad());
    let (x, y) = (moved(&a), moved(&b));
    let expected = a.clone().matmul(b.clone());
    let found = matmul(x.clone(), y.clone());
    assert!(difference(host(found.clone().inner()), expected.clone().inner()) < tolerance);
    let weights = moved(&random(expected.dims(), 99)).inner();
    let found = (found * Tensor::from_inner(weights)).sum().backward();
    let expected = weigh(expected).backward();
    for (ours, theirs) in [
        (x.grad(&found), a.grad(&expected)),
        (y.grad(&found), b.grad(&expected)),
    ] {
        assert!(difference(host(ours.unwrap()), theirs.unwrap()) < tolerance);
    }
}

#[test]
#[ignore = "needs a GPU, named by CALOR_TEST_DEVICE"]
fn products_of_odd_sizes_match_the_cpu() {
    // Sums of up to 130 products in another order; bf16 keeps 8 bits of fraction.
    for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::BF16, 2e-2)] {
        check([1, 1], [1, 1], dtype, tolerance);
        check([7, 33], [33, 5], dtype, tolerance);
        check([64, 130], [130, 96], dtype, tolerance);
        check([2, 3, 5, 16], [2, 3, 16, 9], dtype, tolerance);
        check([2, 3, 5, 16], [1, 3, 16, 9], dtype, tolerance);
    }
}
