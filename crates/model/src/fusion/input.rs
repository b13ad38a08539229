//! Items on the device and where their soft tokens go, checked before anything runs.

use burn::tensor::{Int, Tensor};

use super::options::{EncoderSpec, FusionOptions, StreamSpec};
use crate::error::ModelError;

/// The modality items of one micro-batch and their places in it.
#[derive(Debug, Clone)]
pub struct SoftInput {
    /// One entry a stream, in the order of [`FusionOptions::streams`]; `None` where the batch has no
    /// item of it.
    pub streams: Vec<Option<ItemTensors>>,
    /// Every placed item, in any order; no two overlap.
    pub placements: Vec<Placement>,
}

/// The items of one stream. All tensors are f32 without autodiff; an item that no placement names is
/// padding and reaches nothing.
// One a stream of a batch: their size costs nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone)]
pub enum ItemTensors {
    /// Images, normalised: `[items, 3, height, width]`.
    Image(Tensor<4>),
    /// Dense signals.
    Dense {
        /// `[items, leads, samples]`, 0 where a value is missing and behind a signal's end.
        values: Tensor<3>,
        /// The same shape, 1 where there is a value and 0 where there is none.
        present: Tensor<3>,
        /// Samples of each item, at most `samples`.
        lengths: Vec<usize>,
    },
    /// Speech as log-mel frames: `[items, mel_bins, frames]`.
    Mel(Tensor<3>),
    /// Irregular series, `n` observations each; those that are not there come last.
    Series {
        /// Days before the prediction, `[items, n]`.
        time_days: Tensor<2>,
        /// Variable numbers from 0, `[items, n]`.
        variable: Tensor<2, Int>,
        /// Standardised values, `[items, n]`.
        value: Tensor<2>,
        /// 1 for an observation, 0 for padding, `[items, n]`.
        present: Tensor<2>,
    },
    /// Statistics of windows of irregular series, variable by variable, window by window.
    Windows {
        /// 0 where missing, `[items, variables · windows · statistics]`.
        values: Tensor<2>,
        /// 1 where there is one and 0 where there is none, of the same shape.
        present: Tensor<2>,
    },
    /// Feature vectors.
    Omics {
        /// Standardised, 0 where missing, `[items, features]`.
        values: Tensor<2>,
        /// 1 where there is a value and 0 where there is none, `[items, features]`.
        present: Tensor<2>,
    },
}

/// One placed item: its K slots are the positions `start..start + K` of row `row`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placement {
    /// Number of the stream.
    pub stream: usize,
    /// Number of the item in the stream's tensors; `None`: the stream's learned missing token.
    pub item: Option<usize>,
    /// Row of the batch.
    pub row: usize,
    /// First slot.
    pub start: usize,
    /// Days between the item and the prediction; `None` where the item has no time.
    pub days_before: Option<f32>,
    /// Where the item comes from, from 0 to [`FusionOptions::sites`]; `None` where not known.
    pub site: Option<usize>,
}

impl SoftInput {
    /// Checks that the tensors are what the streams' encoders read and that every placement names an
    /// item and a site that there are. Touches no device.
    ///
    /// # Errors
    /// [`ModelError::Stream`] or [`ModelError::Options`] naming the stream and the numbers.
    pub fn check_items(&self, options: &FusionOptions) -> Result<(), ModelError> {
        if self.streams.len() != options.streams.len() {
            return Err(ModelError::options(format!(
                "a batch has {} streams of items, the model {}",
                self.streams.len(),
                options.streams.len()
            )));
        }
        for (items, stream) in self.streams.iter().zip(&options.streams) {
            if let Some(items) = items {
                items.check(stream)?;
            }
        }
        for placement in &self.placements {
            let Some(stream) = options.streams.get(placement.stream) else {
                return Err(ModelError::options(format!(
                    "an item is placed for stream {}, the model has {}",
                    placement.stream,
                    options.streams.len()
                )));
            };
            let count = self.count(placement.stream);
            if let Some(item) = placement.item
                && item >= count
            {
                return Err(stream.wrong(format!(
                    "item {item} is placed, counted from 0, and the batch has {count}"
                )));
            }
            if let Some(site) = placement.site
                && site >= options.sites
            {
                return Err(stream.wrong(format!(
                    "an item comes from site {site}, counted from 0, and the model knows {}",
                    options.sites
                )));
            }
            if placement.days_before.is_some_and(|days| !days.is_finite()) {
                return Err(stream.wrong("the time of an item is not a finite number"));
            }
        }
        Ok(())
    }

    /// Checks that every placement lies inside a batch of `rows` rows of `seq` tokens, on no other's
    /// slots. The streams were checked before.
    ///
    /// # Errors
    /// [`ModelError::Stream`] naming the stream and the place.
    pub fn check_places(
        &self,
        options: &FusionOptions,
        rows: usize,
        seq: usize,
    ) -> Result<(), ModelError> {
        let mut taken = vec![false; rows * seq];
        for placement in &self.placements {
            let stream = &options.streams[placement.stream];
            let end = placement.start + stream.tokens;
            if placement.row >= rows || end > seq {
                return Err(stream.wrong(format!(
                    "an item is placed at tokens {}..{end} of row {}, outside a batch of {rows} \
                     rows of {seq} tokens",
                    placement.start, placement.row
                )));
            }
            let row = placement.row * seq;
            let slots = &mut taken[row + placement.start..row + end];
            if slots.contains(&true) {
                return Err(stream.wrong(format!(
                    "two items are placed on the same tokens of row {}",
                    placement.row
                )));
            }
            slots.fill(true);
        }
        Ok(())
    }

    fn count(&self, stream: usize) -> usize {
        self.streams[stream].as_ref().map_or(0, ItemTensors::count)
    }
}

impl ItemTensors {
    /// Number of items, padding included.
    pub fn count(&self) -> usize {
        match self {
            ItemTensors::Image(pixels) => pixels.dims()[0],
            ItemTensors::Dense { values, .. } | ItemTensors::Mel(values) => values.dims()[0],
            ItemTensors::Series { value, .. } => value.dims()[0],
            ItemTensors::Windows { values, .. } => values.dims()[0],
            ItemTensors::Omics { values, .. } => values.dims()[0],
        }
    }

    /// Shape of one item, as in [`StreamSpec::check_item`]; a series does not show how many
    /// variables there are.
    fn shape(&self) -> Option<Vec<usize>> {
        match self {
            ItemTensors::Image(pixels) => Some(pixels.dims()[1..].to_vec()),
            ItemTensors::Dense { values, .. } | ItemTensors::Mel(values) => {
                Some(values.dims()[1..].to_vec())
            }
            ItemTensors::Series { .. } | ItemTensors::Windows { .. } => None,
            ItemTensors::Omics { values, .. } => Some(values.dims()[1..].to_vec()),
        }
    }

    fn check(&self, stream: &StreamSpec) -> Result<(), ModelError> {
        let read = match self {
            ItemTensors::Image(_) => {
                matches!(
                    stream.encoder,
                    EncoderSpec::Vision { .. } | EncoderSpec::Patches(_)
                )
            }
            ItemTensors::Dense { .. } => matches!(stream.encoder, EncoderSpec::Signal(_)),
            ItemTensors::Mel(_) => {
                matches!(
                    stream.encoder,
                    EncoderSpec::Whisper { .. } | EncoderSpec::Signal(_)
                )
            }
            ItemTensors::Series { .. } => matches!(stream.encoder, EncoderSpec::Series(_)),
            ItemTensors::Windows { .. } => matches!(stream.encoder, EncoderSpec::Windows(_)),
            ItemTensors::Omics { .. } => matches!(stream.encoder, EncoderSpec::Omics(_)),
        };
        if !read {
            return Err(stream.wrong(format!(
                "the batch's items are not what an encoder of the kind `{}` reads",
                stream.encoder.name()
            )));
        }
        // A tower's own sizes are checked by the tower.
        if let Some(shape) = self.shape() {
            stream.check_shape(&shape, None)?;
        }
        let misfit = match self {
            ItemTensors::Dense {
                values,
                present,
                lengths,
            } => {
                let [items, _, samples] = values.dims();
                let longest = lengths.iter().copied().max().unwrap_or(0);
                let fits =
                    present.dims() == values.dims() && lengths.len() == items && longest <= samples;
                (!fits).then(|| {
                    format!(
                        "signals of {:?}, presence of {:?} and {} lengths up to {longest}",
                        values.dims(),
                        present.dims(),
                        lengths.len()
                    )
                })
            }
            ItemTensors::Series {
                time_days,
                variable,
                value,
                present,
            } => {
                let shapes = [time_days.dims(), variable.dims(), present.dims()];
                let fits = shapes.iter().all(|shape| *shape == value.dims()) && value.dims()[1] > 0;
                (!fits).then(|| {
                    format!(
                        "values of {:?} and times, variables and presence of {shapes:?}",
                        value.dims()
                    )
                })
            }
            ItemTensors::Windows { values, present } => {
                let expected = match &stream.encoder {
                    EncoderSpec::Windows(options) => options.groups().features,
                    _ => 0,
                };
                let fits = values.dims() == present.dims() && values.dims()[1] == expected;
                (!fits).then(|| {
                    format!(
                        "statistics of {:?}, presence of {:?} and an encoder that reads {expected}",
                        values.dims(),
                        present.dims()
                    )
                })
            }
            ItemTensors::Omics { values, present } => {
                (values.dims() != present.dims()).then(|| {
                    format!(
                        "values of {:?} and presence of {:?}",
                        values.dims(),
                        present.dims()
                    )
                })
            }
            ItemTensors::Image(_) | ItemTensors::Mel(_) => None,
        };
        match misfit {
            Some(misfit) => Err(stream.wrong(format!("{misfit} do not go together"))),
            None => Ok(()),
        }
    }
}
