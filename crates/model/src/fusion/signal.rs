//! The encoder of dense signals: patches of all leads together, then a transformer.

use burn::tensor::{FloatDType, Tensor};

use super::encoder::Encoded;
use super::new::New;
use super::options::SignalOptions;
use super::transformer::{Transformer, segments, sinusoids};
use crate::linear::Linear;
use crate::parameter::Visit;
use crate::run::Mode;

/// A convolution whose stride is its length, over the leads and over what is there of them, as one
/// product a patch; sinusoidal positions; a transformer.
#[derive(Debug, Clone)]
pub(super) struct Signal {
    patch: Linear,
    transformer: Transformer,
    patch_samples: usize,
    width: usize,
}

impl Signal {
    pub fn new(new: &New, options: &SignalOptions) -> Signal {
        let inputs = 2 * options.leads * options.patch_samples;
        Signal {
            patch: new.linear("patch", inputs, options.width),
            transformer: Transformer::new(new, options.width, options.depth, options.heads),
            patch_samples: options.patch_samples,
            width: options.width,
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
        let patches = Tensor::cat(vec![self.patches(values), self.patches(present)], 2);
        let [_, tokens, _] = patches.dims();
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

    /// `[items, leads, samples]` → `[items, patches, leads · patch_samples]`
    fn patches(&self, signal: Tensor<3>) -> Tensor<3> {
        let [items, leads, samples] = signal.dims();
        let tokens = samples.div_ceil(self.patch_samples);
        let rest = tokens * self.patch_samples - samples;
        let signal = match rest {
            0 => signal,
            _ => {
                let zeros = Tensor::zeros([items, leads, rest], (&signal.device(), signal.dtype()));
                Tensor::cat(vec![signal, zeros], 2)
            }
        };
        signal
            .reshape([items, leads, tokens, self.patch_samples])
            .swap_dims(1, 2)
            .reshape([items, tokens, leads * self.patch_samples])
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.patch.visit(visitor);
        self.transformer.visit(visitor);
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::parameter::ParameterGroup;

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
