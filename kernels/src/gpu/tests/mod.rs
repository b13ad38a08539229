//! Every operation on a GPU against the same on the CPU: output and gradients.
//!
//! CALOR_TEST_DEVICE names the kind of device, `cuda` or `wgpu`; CALOR_TEST_DTYPES what is tried, by
//! default f32 and bf16. One test, because a device compiles one kernel at a time anyway.

use std::time::Instant;

use burn::tensor::{DType, Device, DeviceType, Int, Tensor, TensorData};

use crate::cpu::testing::random;
use crate::{matmul, rms_norm, swiglu};

mod cases;

use cases::CASES;

/// Where an operation runs.
struct Side {
    device: Device,
    /// What its inputs are computed in.
    dtype: DType,
    /// What their values were rounded to.
    rounded: DType,
}

/// An output and the gradients of the inputs.
type Found = Vec<(&'static str, TensorData)>;

impl Side {
    fn leaf<const D: usize>(&self, shape: [usize; D], seed: u64) -> Tensor<D> {
        self.of(random(shape, seed), self.rounded, self.dtype)
            .require_grad()
    }

    /// In f32 whatever the activations are.
    fn wide<const D: usize>(&self, shape: [usize; D], seed: u64) -> Tensor<D> {
        self.of(random(shape, seed), DType::F32, DType::F32)
            .require_grad()
    }

    /// Likewise, outside autodiff.
    fn flat(&self, length: usize, seed: u64) -> Tensor<1> {
        self.wide([length], seed).inner()
    }

    fn of<const D: usize>(&self, tensor: Tensor<D>, rounded: DType, dtype: DType) -> Tensor<D> {
        let data = tensor.cast(rounded).into_data_dtype(DType::F32);
        Tensor::from_data(data, (&self.device, dtype))
    }

    fn integers<const D: usize>(&self, values: Vec<i32>, shape: [usize; D]) -> Tensor<D, Int> {
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    /// Backward from a sum that weighs every element of the output differently.
    fn backward<const D: usize>(&self, output: Tensor<D>) -> (TensorData, burn::tensor::Gradients) {
        let weights = self.of(random(output.dims(), 99), DType::F32, DType::F32);
        let found = output.clone().inner().into_data_dtype(DType::F32);
        // Read now: until the bytes are looked at, what comes next may write over them.
        let _ = found.as_bytes().len();
        (found, (output.cast(DType::F32) * weights).sum().backward())
    }
}

/// The norm of the difference over the norm of what is expected.
fn difference(found: &TensorData, expected: &TensorData) -> f64 {
    let values = |data: &TensorData| data.clone().try_into_vec::<f32>().expect("f32");
    let (mut difference, mut size) = (0.0, 0.0);
    let (found, expected) = (values(found), values(expected));
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.into_iter().zip(expected) {
        difference += f64::from(found - expected).powi(2);
        size += f64::from(expected).powi(2);
    }
    let relative = (difference / size).sqrt();
    if relative.is_nan() {
        f64::INFINITY
    } else {
        relative
    }
}

/// The first device of the kind that CALOR_TEST_DEVICE names, under autodiff.
fn gpu() -> Device {
    let kind = match std::env::var("CALOR_TEST_DEVICE").as_deref() {
        #[cfg(feature = "cuda")]
        Ok("cuda") => DeviceType::Cuda,
        #[cfg(feature = "wgpu")]
        Ok("wgpu") => DeviceType::Wgpu,
        _ => panic!("CALOR_TEST_DEVICE names no kind of device that this build has"),
    };
    Device::enumerate(kind).into_vec().swap_remove(0).autodiff()
}

#[test]
#[ignore = "needs a GPU, named by CALOR_TEST_DEVICE"]
fn every_operation_matches_the_cpu() {
    let device = gpu();
    let dtypes = std::env::var("CALOR_TEST_DTYPES").unwrap_or("f32,bf16".to_string());
    let only = std::env::var("CALOR_TEST_ONLY").unwrap_or_default();
    let mut wrong = vec![];
    for dtype in dtypes.split(',') {
        // Sums in another order; then 8 and 11 bits of fraction.
        let (dtype, tolerance) = match dtype {
            "f32" => (DType::F32, 1e-5),
            "bf16" => (DType::BF16, 1.5e-2),
            "f16" => (DType::F16, 2e-3),
            other => panic!("CALOR_TEST_DTYPES has {other}"),
        };
        let side = |device, computed| Side {
            device,
            dtype: computed,
            rounded: dtype,
        };
        let cpu = side(Device::flex().autodiff(), DType::F32);
        let gpu = side(device.clone(), dtype);
        for (name, case) in CASES.iter().filter(|(name, _)| name.contains(&only)) {
            // Values that are only looked up and scaled are rounded alike.
            let tolerance = match name.starts_with("dequantize") {
                true => 0.0,
                false => tolerance,
            };
            let started = Instant::now();
            let expected = case(&cpu);
            let found = case(&gpu);
            let elapsed_s = started.elapsed().as_secs_f64();
            print!("{dtype:?} {name} ({elapsed_s:.1} s):");
            for ((tensor, found), (_, expected)) in found.iter().zip(&expected) {
                let relative = difference(found, expected);
                print!("  {tensor} {relative:.1e}");
                if relative > tolerance {
                    wrong.push(format!("{dtype:?} {name}: {tensor} {relative:.1e}"));
                }
            }
            println!();
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Beside the test above, so that it has a device to itself: what is counted is the process's.
#[test]
#[ignore = "needs a GPU, named by CALOR_TEST_DEVICE; run it alone"]
fn a_profile_counts_operations_and_launches() {
    use crate::profile;

    let device = gpu();
    let side = Side {
        device: device.clone(),
        dtype: DType::F32,
        rounded: DType::F32,
    };
    let pass = || {
        let (x, weight) = (side.leaf([2, 9, 70], 1), side.leaf([70], 2));
        let y = swiglu(rms_norm(x.clone(), weight.clone(), 1e-5), x.clone());
        let loss = matmul(y.reshape([18, 70]), side.leaf([70, 4], 3));
        let gradients = side.backward(loss).1;
        let found = x.grad(&gradients).expect("x").into_data();
        device.sync().expect("the device goes on");
        found
    };
    let plain = pass();
    let (counted, launches) = profile::count_launches(pass);
    // Forward and backward of three operations, and not a kernel an element.
    let launches = launches.expect("a device that kernels are launched on");
    println!("{launches} launches");
    assert!((6..200).contains(&launches), "{launches}");
    assert_eq!(profile::count_launches(|| ()).1, Some(0));
    profile::start();
    let timed = pass();
    profile::stop();
    let calls = profile::take();
    println!("{calls:?}");
    for name in ["rms_norm", "swiglu", "matmul"] {
        let found = calls.iter().find(|calls| calls.name == name);
        let found = found.unwrap_or_else(|| panic!("{name} is not in {calls:?}"));
        assert_eq!(
            (found.forward_calls, found.backward_calls),
            (1, 1),
            "{name}"
        );
        assert!(found.forward_s > 0.0 && found.backward_s > 0.0);
    }
    assert_eq!(plain, counted);
    assert!(difference(&timed, &plain) < 1e-5);
}
