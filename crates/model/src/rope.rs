//! Rotary position embedding (Su et al. 2021): the angles. The rotation itself is a kernel.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::config::{RopeConfig, RopeScaling};

/// Inverse frequencies, half as many as dimensions are turned.
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    inverse_frequencies: Vec<f32>,
    /// Those of longer segments (LongRoPE).
    long: Option<Long>,
    /// Multiplies cosines and sines.
    factor: f32,
}

#[derive(Debug, Clone)]
struct Long {
    inverse_frequencies: Vec<f32>,
    /// The longest segment that the others are for.
    original_positions: usize,
}

/// Cosines and sines of every token's angles, `[batch, seq, rotated]`, the second half repeating
/// the first.
#[derive(Debug, Clone)]
pub(crate) struct Angles {
    pub cos: Tensor<3>,
    pub sin: Tensor<3>,
}

impl Rope {
    /// In f32 like Transformers, whose rounding shows at large positions.
    pub fn new(config: &RopeConfig) -> Rope {
        let theta = config.theta as f32;
        let plain: Vec<f32> = (0..config.rotated)
            .step_by(2)
            .map(|i| theta.powf(i as f32 / config.rotated as f32))
            .collect();
        let divided = |factors: &[f32]| -> Vec<f32> {
            let pairs = plain.iter().zip(factors);
            pairs
                .map(|(power, factor)| 1.0 / (factor * power))
                .collect()
        };
        match &config.scaling {
            RopeScaling::Long {
                short_factors,
                long_factors,
                original_positions,
                attention_factor,
            } => Rope {
                inverse_frequencies: divided(short_factors),
                long: Some(Long {
                    inverse_frequencies: divided(long_factors),
                    original_positions: *original_positions,
                }),
                factor: *attention_factor,
            },
            scaling => Rope {
                inverse_frequencies: plain
                    .iter()
                    .map(|power| scaled(1.0 / power, scaling))
                    .collect(),
                long: None,
                factor: 1.0,
            },
        }
    }

    /// positions and segments `[batch, seq]`; the angles are computed in f32 and returned as
    /// `dtype`.
    pub fn angles(
        &self,
        positions: Tensor<2, Int>,
        segments: Tensor<2, Int>,
        dtype: DType,
        device: &Device,
    ) -> Angles {
        let [batch, seq] = positions.dims();
        let half = self.inverse_frequencies.len();
        let row = |frequencies: &[f32]| {
            let data = TensorData::new(frequencies.to_vec(), [1, 1, half]);
            Tensor::<3>::from_data(data, (device, DType::F32))
        };
        let mut frequencies = row(&self.inverse_frequencies);
        if let Some(long) = self
            .long
            .as_ref()
            .filter(|long| seq > long.original_positions)
        {
            // Transformers decides by the longest sequence of a batch. Here every segment decides
            // for itself: what a patient gets must not depend on who shares the batch.
            let last = last_position(positions.clone(), segments);
            let is_long = last
                .greater_equal_elem(long.original_positions as i64)
                .reshape([batch, seq, 1])
                .repeat_dim(2, half);
            let spread = |row: Tensor<3>| row.repeat_dim(0, batch).repeat_dim(1, seq);
            let others = spread(row(&long.inverse_frequencies));
            frequencies = spread(frequencies).mask_where(is_long, others);
        }
        let positions = positions.float().cast(DType::F32).reshape([batch, seq, 1]);
        let angles = positions.mul(frequencies);
        let twice = |half: Tensor<3>| {
            let half = match self.factor {
                1.0 => half,
                factor => half.mul_scalar(factor),
            };
            Tensor::cat(vec![half.clone(), half], 2).cast(dtype)
        };
        Angles {
            cos: twice(angles.clone().cos()),
            sin: twice(angles.sin()),
        }
    }
}

/// The largest position in each token's segment, `[batch, seq]`.
fn last_position(positions: Tensor<2, Int>, segments: Tensor<2, Int>) -> Tensor<2, Int> {
    let [batch, seq] = positions.dims();
    let rows = segments.clone().reshape([batch, seq, 1]).repeat_dim(2, seq);
    let columns = segments.reshape([batch, 1, seq]).repeat_dim(1, seq);
    positions
        .reshape([batch, 1, seq])
        .repeat_dim(1, seq)
        .mask_fill(rows.not_equal(columns), -1)
        .max_dim(2)
        .reshape([batch, seq])
}

fn scaled(frequency: f32, scaling: &RopeScaling) -> f32 {
    match *scaling {
        RopeScaling::None | RopeScaling::Long { .. } => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        // Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between
        // interpolated.
        RopeScaling::Llama3 {
            factor,
            low_frequency_factor,
            high_frequency_factor,
            original_positions,
        } => {
            let wavelength = std::f32::consts::TAU / frequency;
            let low_wavelength = (original_positions / low_frequency_factor) as f32;
            let high_wavelength = (original_positions / high_frequency_factor) as f32;
            let factor = factor as f32;
            if wavelength < high_wavelength {
                frequency
            } else if wavelength > low_wavelength {
                frequency / factor
            } else {
                let smooth = (original_positions as f32 / wavelength - low_frequency_factor as f32)
                    / (high_frequency_factor - low_frequency_factor) as f32;
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_short_and_stretches_long_wavelengths() {
        // Frequencies around the two corners 8192/4 and 8192/1 of Llama 3.1.
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_positions: 8192.0,
        };
        let at = |wavelength: f32| std::f32::consts::TAU / wavelength;
        assert_eq!(scaled(at(100.0), &scaling), at(100.0));
        assert_eq!(scaled(at(20_000.0), &scaling), at(20_000.0) / 8.0);
        // Half way in 8192/wavelength between 1 and 4: the mean of both.
        let middle = at(8192.0 / 2.5);
        let expected = 0.5 * middle / 8.0 + 0.5 * middle;
        assert!((scaled(middle, &scaling) - expected).abs() < 1e-6 * expected);
    }

    #[cfg(feature = "cpu")]
    #[test]
    fn a_segment_is_long_by_its_own_length() {
        let rope = Rope::new(&RopeConfig {
            theta: 10_000.0,
            scaling: RopeScaling::Long {
                short_factors: vec![1.0],
                long_factors: vec![2.0],
                original_positions: 3,
                attention_factor: 1.0,
            },
            rotated: 2,
        });
        let device = Device::flex();
        let integers = |values: [i32; 8]| Tensor::<2, Int>::from_ints([values], &device);
        // Three tokens, four tokens, padding.
        let angles = rope.angles(
            integers([0, 1, 2, 0, 1, 2, 3, 0]),
            integers([1, 1, 1, 2, 2, 2, 2, 0]),
            DType::F32,
            &device,
        );
        let sines: Vec<f32> = angles.sin.narrow(2, 0, 1).into_data().try_to_vec().unwrap();
        for (place, angle) in [0.0, 1.0, 2.0, 0.0, 0.5, 1.0, 1.5].into_iter().enumerate() {
            assert!((sines[place] - f32::sin(angle)).abs() < 1e-6, "{place}");
        }
    }
}
