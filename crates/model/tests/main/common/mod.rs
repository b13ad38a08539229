//! What the tests of this crate share: where the fixtures are, and inputs on the CPU.

#![allow(dead_code)]

pub mod copy;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use calor_model::{Model, ModelInput, ParameterGroup, ParameterVisitor, SampleSpan};

/// A folder that `scripts/references/models.py` or `towers.py` made.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// The CPU, or the first device of the kind that `CALOR_TEST_DEVICE` names, in a build that has it.
pub fn device() -> Device {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    {
        use burn::tensor::DeviceType;

        let kind = match std::env::var("CALOR_TEST_DEVICE").as_deref() {
            #[cfg(feature = "cuda")]
            Ok("cuda") => Some(DeviceType::Cuda),
            #[cfg(feature = "wgpu")]
            Ok("wgpu") => Some(DeviceType::Wgpu),
            Ok(other) => panic!("CALOR_TEST_DEVICE is {other}, which this build does not have"),
            Err(_) => None,
        };
        if let Some(kind) = kind {
            let mut devices = Device::enumerate(kind).into_vec();
            return devices.swap_remove(0);
        }
    }
    Device::flex()
}

/// Moves every `lora_B` away from 0, where the adapter would not show and nothing would reach `A`.
pub fn fill_b(model: &mut Model) {
    struct FillB;
    impl ParameterVisitor for FillB {
        fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
            if name.contains("lora_B") {
                *tensor = Tensor::from_inner(tensor.clone().inner() + 0.02).require_grad();
            }
        }
    }
    model.visit_trainable(&mut FillB);
}

pub fn integers(values: Vec<i32>, shape: [usize; 2]) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(values, shape), &device())
}

/// Rows of samples packed one behind the other, padded to `seq`.
pub fn packed(rows: &[Vec<Vec<i32>>], seq: usize) -> ModelInput {
    let shape = [rows.len(), seq];
    let mut ids = vec![0; rows.len() * seq];
    let mut positions = vec![0; rows.len() * seq];
    let mut segments = vec![0; rows.len() * seq];
    let mut samples = Vec::new();
    for (row, sequences) in rows.iter().enumerate() {
        let mut start = 0;
        for (segment, tokens) in sequences.iter().enumerate() {
            samples.push(SampleSpan {
                row,
                start,
                length: tokens.len(),
            });
            for (position, &token) in tokens.iter().enumerate() {
                let place = row * seq + start + position;
                ids[place] = token;
                positions[place] = position as i32;
                segments[place] = segment as i32 + 1;
            }
            start += tokens.len();
        }
        assert!(start <= seq, "the samples do not fit");
    }
    ModelInput {
        input_ids: integers(ids, shape),
        positions: integers(positions, shape),
        segments: integers(segments, shape),
        samples,
        soft: None,
    }
}

/// Some sequences of different lengths, token numbers above the special ones.
pub fn sequences() -> Vec<Vec<i32>> {
    [7, 3, 11, 5]
        .iter()
        .enumerate()
        .map(|(index, &length)| {
            (0..length)
                .map(|token| 3 + (index as i32 * 37 + token * 11) % 100)
                .collect()
        })
        .collect()
}

pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.inner().into_data().try_to_vec().expect("f32")
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}
