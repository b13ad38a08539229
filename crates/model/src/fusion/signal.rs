//! The encoder of dense signals: patches of all leads together, then a transformer.

use burn::tensor::{FloatDType, Tensor};

use super::encoder::Encoded;
use super::new::New;
use super::options::SignalOptions;
use super::transformer::{Transformer, segments, sinusoids};
use crate::linear::Linear;
use crate::parameter::Visit;
use crate::run::Mode;

/// Two convolutions with a GELU between them, each as one product a place: short filters that overlap,
/// over the leads and over what is there of them, then patches whose stride is their length. Sinusoidal
/// positions; a transformer.
///
/// What a peak is worth should not depend on where in a patch it falls. A linear patch cannot see it
/// otherwise; filters that bend before they are summed can (they are what makes random convolutions
/// good features, Dempster et al. 2020).
#[derive(Debug, Clone)]
pub(super) struct Signal {
    filters: Linear,
    patch: Linear,
    transformer: Transformer,
    patch_samples: usize,
    stride_samples: usize,
    /// Strides that a filter sees.
    taps: usize,
    width: usize,
}

impl Signal {
    pub fn new(new: &New, options: &SignalOptions) -> Signal {
        let SignalOptions {
            width,
            patch_samples,
            stride_samples,
            kernel_samples,
            ..
        } = *options;
        Signal {
            filters: new.linear("filters", 2 * options.leads * kernel_samples, width),
            patch: new.linear("patch", patch_samples / stride_samples * width, width),
            transformer: Transformer::new(new, width, options.depth, options.heads),
            patch_samples,
            stride_samples,
            taps: kernel_samples / stride_samples,
            width,
        }
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// values, present `[items, leads, samples]`, lengths in samples; returns
    /// `[items, ⌈samples / patch_samples⌉, width]`. A patch counts where its first sample does.
    pub fn forward(
        &self,
        values: Tensor<3>,
        present: Tensor<3>,
        lengths: &[usize],
        mode: Mode,
    ) -> Encoded {
        let device = values.device();
        let frames = Tensor::cat(vec![self.frames(values), self.frames(present)], 2);
        let filtered = calor_kernels::gelu(self.filters.forward(frames, mode));
        let [items, frames, _] = filtered.dims();
        let a_patch = self.patch_samples / self.stride_samples;
        let tokens = frames / a_patch;
        let patches = filtered.reshape([items, tokens, a_patch * self.width]);
        let positions = sinusoids(tokens, self.width, &device).unsqueeze::<3>();
        let embedded = self.patch.forward(patches, mode) + positions;
        let lengths: Vec<usize> = lengths
            .iter()
            .map(|length| length.div_ceil(self.patch_samples))
            .collect();
        let segments = segments(&lengths, tokens, &device);
        let whole = lengths.iter().all(|&length| length == tokens);
        Encoded {
            tokens: self.transformer.forward(embedded, &segments, mode),
            mask: (!whole).then(|| segments.cast(FloatDType::F32)),
        }
    }

    /// What each filter sees, up to the end of the last patch, with zeros where there is no signal:
    /// `[items, leads, samples]` → `[items, strides, taps · leads · stride_samples]`.
    fn frames(&self, signal: Tensor<3>) -> Tensor<3> {
        let [items, leads, samples] = signal.dims();
        let a_patch = self.patch_samples / self.stride_samples;
        let count = samples.div_ceil(self.patch_samples) * a_patch;
        // A filter's first tap lies so many strides before its place.
        let before = (self.taps - 1) / 2;
        let after = self.taps - 1 - before;
        let end = (count + after) * self.stride_samples - samples;
        let zeros = |samples: usize| {
            let options = (&signal.device(), signal.dtype());
            (samples > 0).then(|| Tensor::zeros([items, leads, samples], options))
        };
        let parts = [
            zeros(before * self.stride_samples),
            Some(signal.clone()),
            zeros(end),
        ];
        let strides = Tensor::cat(parts.into_iter().flatten().collect(), 2)
            .reshape([items, leads, count + self.taps - 1, self.stride_samples])
            .swap_dims(1, 2)
            .reshape([items, count + self.taps - 1, leads * self.stride_samples]);
        let taps = (0..self.taps).map(|tap| strides.clone().narrow(1, tap, count));
        Tensor::cat(taps.collect(), 2)
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.filters.visit(visitor);
        self.patch.visit(visitor);
        self.transformer.visit(visitor);
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::parameter::ParameterGroup;

    /// A peak is worth the same wherever it falls: filters see across strides and patches.
    #[test]
    fn filters_see_their_neighbourhood() {
        let device = Device::flex();
        let new = New {
            seed: 1,
            device: &device,
            group: ParameterGroup::Encoder,
            path: "signal".to_owned(),
        };
        let options = SignalOptions {
            leads: 1,
            patch_samples: 4,
            kernel_samples: 6,
            stride_samples: 2,
            width: 8,
            depth: 0,
            heads: 1,
        };
        let signal = Signal::new(&new, &options);
        // Six samples: two patches of two strides, the last stride behind the end.
        let numbered = (0..6).map(|sample| sample as f32 + 1.0).collect::<Vec<_>>();
        let tensor = Tensor::<3>::from_data(TensorData::new(numbered, [1, 1, 6]), &device);
        let frames = signal.frames(tensor);
        assert_eq!(frames.dims(), [1, 4, 6]);
        let frames: Vec<f32> = frames.into_data().try_to_vec().expect("f32");
        let expected = [
            [0.0, 0.0, 1.0, 2.0, 3.0, 4.0],
            [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            [3.0, 4.0, 5.0, 6.0, 0.0, 0.0],
            [5.0, 6.0, 0.0, 0.0, 0.0, 0.0],
        ];
        assert_eq!(frames, expected.concat());
    }

    #[test]
    fn a_sample_is_in_the_patch_of_its_time_whatever_the_lead() {
        let device = Device::flex();
        let new = New {
            seed: 1,
            device: &device,
            group: ParameterGroup::Encoder,
            path: "signal".to_owned(),
        };
        let options = SignalOptions {
            leads: 2,
            patch_samples: 3,
            kernel_samples: 1,
            stride_samples: 1,
            width: 8,
            depth: 0,
            heads: 1,
        };
        let signal = Signal::new(&new, &options);
        // Seven samples: three patches, the last of one sample.
        let encode = |touched: Option<usize>, missing: Option<usize>, length: usize| {
            let mut values = vec![0f32; 14];
            let mut present = vec![1f32; 14];
            touched.into_iter().for_each(|place| values[place] = 1.0);
            missing.into_iter().for_each(|place| present[place] = 0.0);
            let tensor = |numbers: Vec<f32>| {
                Tensor::<3>::from_data(TensorData::new(numbers, [1, 2, 7]), &device)
            };
            signal.forward(tensor(values), tensor(present), &[length], Mode::Infer)
        };
        let numbers = |tensor: Tensor<3>| -> Vec<f32> {
            tensor.inner().into_data().try_to_vec().expect("f32")
        };
        let flat = numbers(encode(None, None, 7).tokens);
        let changed = |other: Encoded| -> Vec<usize> {
            let other = numbers(other.tokens);
            (0..3)
                .filter(|token| other[token * 8..][..8] != flat[token * 8..][..8])
                .collect()
        };
        for (place, patch) in [(0, 0), (5, 1), (6, 2), (7, 0), (10, 1), (13, 2)] {
            assert_eq!(changed(encode(Some(place), None, 7)), [patch]);
            assert_eq!(changed(encode(None, Some(place), 7)), [patch]);
        }
        let mask = |length: usize| {
            let mask = encode(None, None, length).mask;
            mask.map(|mask| mask.into_data().try_to_vec::<f32>().expect("f32"))
        };
        assert_eq!(mask(7), None);
        assert_eq!(mask(6), Some(vec![1.0, 1.0, 0.0]));
        assert_eq!(mask(4), Some(vec![1.0, 1.0, 0.0]));
        assert_eq!(mask(0), Some(vec![0.0, 0.0, 0.0]));
    }
}
