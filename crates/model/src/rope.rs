//! Rotary position embedding (Su et al. 2021): the angles. The rotation itself is a kernel.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::config::{DecoderConfig, RopeScaling};

/// Inverse frequencies of one model, `head_dim / 2` of them.
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    inverse_frequencies: Vec<f32>,
}

/// Cosines and sines of every token's angles, `[batch, seq, head_dim]`, the second half repeating
/// the first.
#[derive(Debug, Clone)]
pub(crate) struct Angles {
    pub cos: Tensor<3>,
    pub sin: Tensor<3>,
}

impl Rope {
    /// In f32 like Transformers, whose rounding shows at large positions.
    pub fn new(config: &DecoderConfig) -> Rope {
        let theta = config.rope_theta as f32;
        let inverse_frequencies = (0..config.head_dim)
            .step_by(2)
            .map(|i| 1.0 / theta.powf(i as f32 / config.head_dim as f32))
            .map(|frequency| scaled(frequency, config.rope_scaling))
            .collect();
        Rope {
            inverse_frequencies,
        }
    }

    /// positions `[batch, seq]`; the angles are computed in f32 and returned as `dtype`.
    pub fn angles(&self, positions: Tensor<2, Int>, dtype: DType, device: &Device) -> Angles {
        let [batch, seq] = positions.dims();
        let half = self.inverse_frequencies.len();
        let frequencies = Tensor::<3>::from_data(
            TensorData::new(self.inverse_frequencies.clone(), [1, 1, half]),
            (device, DType::F32),
        );
        let positions = positions.float().cast(DType::F32).reshape([batch, seq, 1]);
        let angles = positions.mul(frequencies);
        let twice = |half: Tensor<3>| Tensor::cat(vec![half.clone(), half], 2).cast(dtype);
        Angles {
            cos: twice(angles.clone().cos()),
            sin: twice(angles.sin()),
        }
    }
}

fn scaled(frequency: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::None => frequency,
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
        assert_eq!(scaled(at(100.0), scaling), at(100.0));
        assert_eq!(scaled(at(20_000.0), scaling), at(20_000.0) / 8.0);
        // Half way in 8192/wavelength between 1 and 4: the mean of both.
        let middle = at(8192.0 / 2.5);
        let expected = 0.5 * middle / 8.0 + 0.5 * middle;
        assert!((scaled(middle, scaling) - expected).abs() < 1e-6 * expected);
    }
}
