//! Mean and deviation of the channels of decoded items, from training patients alone.

use calor_records::Decoded;
use serde::{Deserialize, Serialize};

/// What standardises the channels of a modality: the leads of a waveform, the features of an omics
/// vector. A run keeps it beside its adapter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scaling {
    pub mean: Vec<f32>,
    /// 1 where all values are alike or none was seen.
    pub deviation: Vec<f32>,
    /// [`Decoded::layout`] of the training items.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub layout: u64,
}

fn is_zero(layout: &u64) -> bool {
    *layout == 0
}

/// What is said of an item whose channels have the wrong names.
const OTHER_LAYOUT: &str = "its features are not those of the training items in their order; list \
    the names in `modality.omics.decode.features`, and every file is read in that order";

impl Scaling {
    /// `(x − mean) / deviation`, channel by channel; missing values (NaN) stay missing.
    ///
    /// # Errors
    /// The item has another number of channels than the training items, or others.
    pub fn apply(&self, decoded: &mut Decoded) -> Result<(), String> {
        let channels = decoded.shape.first().copied().unwrap_or(0);
        if channels != self.mean.len() {
            return Err(format!(
                "it has {channels} channels, and the training items have {}",
                self.mean.len()
            ));
        }
        if decoded.layout != self.layout {
            return Err(OTHER_LAYOUT.to_string());
        }
        let length = decoded.values.len() / channels.max(1);
        for (channel, values) in decoded.values.chunks_mut(length.max(1)).enumerate() {
            let (mean, deviation) = (self.mean[channel], self.deviation[channel]);
            for value in values {
                *value = (*value - mean) / deviation;
            }
        }
        Ok(())
    }
}

/// Sums behind a [`Scaling`]: Welford's running mean and squared deviation of each channel.
#[derive(Clone, Debug, Default)]
pub(crate) struct ScalingBuilder {
    channels: Vec<Running>,
    layout: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Running {
    count: u64,
    mean: f64,
    squares: f64,
}

impl ScalingBuilder {
    /// Adds an item's values.
    ///
    /// # Errors
    /// The item has another number of channels than the ones before, or others.
    pub fn add(&mut self, decoded: &Decoded) -> Result<(), String> {
        let channels = decoded.shape.first().copied().unwrap_or(0);
        if self.channels.is_empty() {
            self.channels = vec![Running::default(); channels];
            self.layout = decoded.layout;
        }
        if channels != self.channels.len() {
            return Err(format!(
                "it has {channels} channels, and the items before it have {}",
                self.channels.len()
            ));
        }
        if decoded.layout != self.layout {
            return Err(OTHER_LAYOUT.to_string());
        }
        let length = decoded.values.len() / channels.max(1);
        let parts = decoded.values.chunks(length.max(1));
        for (running, values) in self.channels.iter_mut().zip(parts) {
            for value in values.iter().filter(|value| value.is_finite()) {
                running.count += 1;
                let before = f64::from(*value) - running.mean;
                running.mean += before / running.count as f64;
                running.squares += before * (f64::from(*value) - running.mean);
            }
        }
        Ok(())
    }

    /// `None` where nothing was added; mean 0 and deviation 1 if not to `standardise`.
    pub fn finish(self, standardise: bool) -> Option<Scaling> {
        if self.channels.is_empty() {
            return None;
        }
        let deviation = |running: &Running| {
            let deviation = (running.squares / running.count.max(1) as f64).sqrt();
            if deviation > 0.0 {
                deviation as f32
            } else {
                1.0
            }
        };
        if !standardise {
            return Some(Scaling {
                mean: vec![0.0; self.channels.len()],
                deviation: vec![1.0; self.channels.len()],
                layout: self.layout,
            });
        }
        Some(Scaling {
            layout: self.layout,
            mean: self.channels.iter().map(|c| c.mean as f32).collect(),
            deviation: self.channels.iter().map(deviation).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(shape: &[usize], values: &[f32]) -> Decoded {
        Decoded {
            shape: shape.to_vec(),
            values: values.to_vec(),
            cut_s: 0.0,
            layout: 0,
        }
    }

    #[test]
    fn each_channel_gets_mean_zero_and_deviation_one() {
        let mut builder = ScalingBuilder::default();
        let mut items = [
            decoded(&[2, 3], &[1.0, 2.0, 3.0, 100.0, 100.0, f32::NAN]),
            decoded(&[2, 2], &[4.0, 5.0, 300.0, 300.0]),
        ];
        for item in &items {
            builder.add(item).unwrap();
        }
        let scaling = builder.finish(true).unwrap();
        assert_eq!(scaling.mean, [3.0, 200.0]);
        assert!((scaling.deviation[0] - 2f32.sqrt()).abs() < 1e-6);
        assert_eq!(scaling.deviation[1], 100.0);
        for item in &mut items {
            scaling.apply(item).unwrap();
        }
        assert_eq!(items[0].values[3..5], [-1.0, -1.0]);
        assert!(items[0].values[5].is_nan(), "missing stays missing");
        assert_eq!(items[1].values[2..], [1.0, 1.0]);
        let total: f32 = items[0].values[..3]
            .iter()
            .chain(&items[1].values[..2])
            .sum();
        assert!(total.abs() < 1e-5);
    }

    #[test]
    fn channels_without_spread_are_only_shifted_and_a_misfit_is_told() {
        let mut builder = ScalingBuilder::default();
        builder.add(&decoded(&[2], &[5.0, f32::NAN])).unwrap();
        assert!(builder.add(&decoded(&[3], &[0.0; 3])).is_err());
        let scaling = builder.finish(true).unwrap();
        assert_eq!(scaling.deviation, [1.0, 1.0]);
        let mut item = decoded(&[2], &[6.0, 1.0]);
        scaling.apply(&mut item).unwrap();
        assert_eq!(item.values, [1.0, 1.0]);
        assert!(scaling.apply(&mut decoded(&[1], &[0.0])).is_err());
    }

    #[test]
    fn channels_of_other_names_are_refused_whether_or_not_they_are_standardised() {
        let named = |layout| Decoded {
            layout,
            ..decoded(&[2], &[3.0, 4.0])
        };
        for standardise in [true, false] {
            let mut builder = ScalingBuilder::default();
            builder.add(&named(7)).unwrap();
            assert_eq!(builder.add(&named(8)), Err(OTHER_LAYOUT.to_string()));
            let scaling = builder.finish(standardise).unwrap();
            let mut item = named(7);
            scaling.apply(&mut item).unwrap();
            let expected = if standardise { [0.0, 0.0] } else { [3.0, 4.0] };
            assert_eq!(item.values, expected);
            assert_eq!(scaling.apply(&mut named(8)), Err(OTHER_LAYOUT.to_string()));
        }
    }
}
