//! From a log-mel spectrogram to tokens: two convolutions over time, position embeddings.

use burn::tensor::Tensor;
use burn::tensor::ops::PadMode;

use crate::builder::Builder;
use crate::error::ModelError;
use crate::linear::Linear;
use crate::parameter::{Parameter, Visit};
use crate::run::Mode;

use super::config::{Reads, TowerConfig};

#[derive(Debug, Clone)]
pub(super) struct WhisperStem {
    /// `[width, mel bins · 3]`
    first: Linear,
    /// `[width, width · 3]`, every other frame.
    second: Linear,
    /// `[1, tokens, width]`
    positions: Parameter<3>,
}

/// Frames that a convolution sees at once.
const KERNEL: usize = 3;

impl WhisperStem {
    pub fn build(builder: &Builder, config: &TowerConfig) -> Result<WhisperStem, ModelError> {
        let Reads::Mel { bins, positions } = config.reads else {
            unreachable!("Whisper reads mel spectrograms");
        };
        let width = config.width;
        let [first, second] = [("conv1", bins), ("conv2", width)]
            .map(|(name, input)| builder.convolution::<3>(name, [width, input * KERNEL], true));
        Ok(WhisperStem {
            first: first?,
            second: second?,
            positions: builder.loose::<2, 3>("embed_positions", "weight", [1, positions, width])?,
        })
    }

    /// mel `[items, bins, frames]`, returns `[items, tokens, width]`: a token for every second
    /// frame. Transformers takes 30 s, padded with silence; fewer frames get the first positions.
    pub fn forward(&self, mel: Tensor<3>, mode: Mode) -> Tensor<3> {
        let states = convolve(&self.first, mel.swap_dims(1, 2), 1, mode);
        let states = convolve(&self.second, states, 2, mode);
        let tokens = states.dims()[1];
        let positions = self.positions.matching(states.dtype());
        states + positions.narrow(1, 0, tokens)
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.first.visit(visitor);
        self.second.visit(visitor);
        visitor.visit(&mut self.positions);
    }
}

/// A convolution over time with one frame of padding on both sides, then GELU, whatever the
/// activation of the layers is.
///
/// # Shapes
/// - input: `[items, frames, channels]`
/// - returns: `[items, frames / stride rounded up, width]`
fn convolve(layer: &Linear, input: Tensor<3>, stride: usize, mode: Mode) -> Tensor<3> {
    calor_kernels::gelu(layer.forward(unfold(input, stride), mode))
}

/// What the convolution sees at each place, ordered as its weights: channel, then frame.
///
/// # Shapes
/// - input: `[items, frames, channels]`
/// - returns: `[items, frames / stride rounded up, channels · 3]`
fn unfold(input: Tensor<3>, stride: usize) -> Tensor<3> {
    let [items, frames, channels] = input.dims();
    let places = frames.div_ceil(stride);
    // One frame before, one behind, and what makes the last stride whole.
    let padding = (1, 1 + places * stride - frames);
    let padded = input.pad([padding, (0, 0)], PadMode::Constant(0.0));
    let shifted = (0..KERNEL)
        .map(|shift| {
            padded
                .clone()
                .narrow(1, shift, places * stride)
                .reshape([items, places, stride, channels])
                .narrow(2, 0, 1)
                .reshape([items, places, channels])
        })
        .collect();
    Tensor::stack::<4>(shifted, 3).reshape([items, places, channels * KERNEL])
}
