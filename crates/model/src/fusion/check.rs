//! Whether streams of items, the backbone and the data go together, before anything runs.

use std::collections::BTreeSet;

use super::CHANNELS;
use super::options::{EncoderSpec, FusionOptions, ModalityKind, StreamSpec};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::towers::{ItemShape, TowerConfig};

/// What the data asks of one stream, as far as it is known before training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamDemand {
    /// The most items that one sample has.
    pub items: usize,
    /// Channels, leads, variables, features or mel bins of an item; `None` where not known. Whole
    /// shapes are checked by [`StreamSpec::check_item`].
    pub features: Option<usize>,
}

/// What all streams share; no stream may be called so.
pub(super) const SHARED: &str = "shared";

impl FusionOptions {
    /// Checks the options on their own, against the backbone, and against what the data asks of each
    /// stream, in the order of `streams`. Of pretrained towers only `config.json` is read.
    ///
    /// # Errors
    /// [`ModelError::Stream`] or [`ModelError::Options`] with the key and the numbers that do not
    /// go together.
    pub fn check(&self, config: &ModelConfig, demand: &[StreamDemand]) -> Result<(), ModelError> {
        self.check_numbers(config)?;
        if demand.len() != self.streams.len() {
            return Err(ModelError::options(format!(
                "the data has {} streams of items, the options describe {}",
                demand.len(),
                self.streams.len()
            )));
        }
        for (stream, demand) in self.streams.iter().zip(demand) {
            if let Some(features) = demand.features {
                stream.check_features(features, stream.tower()?.as_ref())?;
            }
        }
        let items: Vec<usize> = demand.iter().map(|demand| demand.items).collect();
        let slots = self.slots(&items);
        let positions = config.max_positions();
        // One position is left for text: an encoder's first token, a decoder's last.
        if slots >= positions {
            return Err(ModelError::options(format!(
                "a sample may have {} items and they take {slots} soft tokens, but the backbone \
                 has positions for {positions} tokens, text included; lower `tokens` of the \
                 streams or keep fewer items a sample",
                items.iter().sum::<usize>()
            )));
        }
        Ok(())
    }

    /// What can be wrong whatever the data is.
    pub(crate) fn check_numbers(&self, config: &ModelConfig) -> Result<(), ModelError> {
        if self.streams.is_empty() {
            return Err(ModelError::options(
                "fusion without a stream; name one or leave fusion out",
            ));
        }
        let mut names = BTreeSet::new();
        for stream in &self.streams {
            if !names.insert(&stream.name) {
                return Err(stream.wrong("two streams have this name"));
            }
            stream.check()?;
            if stream.tokens >= config.max_positions() {
                return Err(stream.wrong(format!(
                    "`tokens` is {}, but the backbone has positions for {} tokens, text included",
                    stream.tokens,
                    config.max_positions()
                )));
            }
        }
        Ok(())
    }
}

impl StreamSpec {
    pub(super) fn wrong(&self, message: impl Into<String>) -> ModelError {
        ModelError::Stream {
            stream: self.name.clone(),
            message: message.into(),
        }
    }

    /// Checks the shape of a decoded item: image `[channels, height, width]`, waveform
    /// `[leads, samples]`, series `[variables]`, omics `[features]`, speech `[mel_bins, frames]`. Of
    /// a pretrained tower only `config.json` is read.
    ///
    /// # Errors
    /// [`ModelError::Stream`] with the sizes that do not go together; a tower that cannot be read.
    pub fn check_item(&self, shape: &[usize]) -> Result<(), ModelError> {
        self.check_shape(shape, self.tower()?.as_ref())
    }

    /// The configuration of the stream's pretrained tower.
    fn tower(&self) -> Result<Option<TowerConfig>, ModelError> {
        match &self.encoder {
            EncoderSpec::Vision { folder, .. } | EncoderSpec::Whisper { folder, .. } => {
                TowerConfig::read(folder).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// As [`StreamSpec::check_item`]; a tower's own sizes only where its configuration is given.
    pub(super) fn check_shape(
        &self,
        shape: &[usize],
        tower: Option<&TowerConfig>,
    ) -> Result<(), ModelError> {
        let tower_reads = |item: ItemShape| match tower.map(|tower| tower.token_count(item)) {
            Some(Err(error)) => Err(self.wrong(error.to_string())),
            _ => Ok(()),
        };
        match (&self.encoder, shape) {
            (EncoderSpec::Vision { .. }, &[channels, height, width]) => {
                tower_reads(ItemShape::Image {
                    channels,
                    height,
                    width,
                })
            }
            (EncoderSpec::Whisper { .. }, &[bins, frames]) => {
                tower_reads(ItemShape::Mel { bins, frames })
            }
            (EncoderSpec::Signal(_), &[_, 0]) => Err(self.wrong("an item has no samples")),
            (EncoderSpec::Signal(_), &[leads, _]) => self.check_features(leads, None),
            (EncoderSpec::Series(_) | EncoderSpec::Windows(_), &[variables]) => {
                self.check_features(variables, None)
            }
            (EncoderSpec::Omics(_), &[features]) => self.check_features(features, None),
            (EncoderSpec::Patches(options), &[channels, height, width]) => {
                self.check_features(channels, None)?;
                let whole = |side: usize| side > 0 && side.is_multiple_of(options.patch);
                match whole(height) && whole(width) {
                    true => Ok(()),
                    false => Err(self.wrong(format!(
                        "an image has {height} × {width} pixels, which patches of {} do not \
                         cover evenly",
                        options.patch
                    ))),
                }
            }
            _ => Err(self.wrong(format!(
                "an item has {} dimensions, which an encoder of the kind `{}` does not read",
                shape.len(),
                self.encoder.name()
            ))),
        }
    }

    fn check_features(&self, found: usize, tower: Option<&TowerConfig>) -> Result<(), ModelError> {
        let expected = match &self.encoder {
            EncoderSpec::Vision { .. } | EncoderSpec::Patches(_) => Some(CHANNELS),
            EncoderSpec::Whisper { .. } => {
                tower.and_then(TowerConfig::mel_size).map(|(bins, _)| bins)
            }
            EncoderSpec::Signal(options) => Some(options.leads),
            EncoderSpec::Series(options) => Some(options.variables),
            EncoderSpec::Windows(options) => Some(options.variables),
            EncoderSpec::Omics(options) => Some(options.features),
        };
        match expected {
            Some(expected) if expected != found => Err(self.wrong(format!(
                "an item has {found} {}, the encoder reads {expected}",
                self.modality.features()
            ))),
            _ => Ok(()),
        }
    }

    fn check(&self) -> Result<(), ModelError> {
        let legal = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if self.name.is_empty() || !self.name.chars().all(legal) || self.name == SHARED {
            return Err(self.wrong(format!(
                "a stream's name is made of letters, digits, `_` and `-`, and is not `{SHARED}`: \
                 its tensors are saved under it"
            )));
        }
        if self.tokens == 0 {
            return Err(self.wrong("`tokens` is 0; an item needs at least one soft token"));
        }
        let resampler = &self.resampler;
        self.heads("resampler", resampler.width, resampler.heads)?;
        if resampler.depth == 0 {
            return Err(self.wrong("`resampler.depth` is 0; it has to be at least 1"));
        }
        let fits = match self.encoder {
            EncoderSpec::Vision { .. } | EncoderSpec::Patches(_) => {
                self.modality == ModalityKind::Image
            }
            EncoderSpec::Whisper { .. } => self.modality == ModalityKind::Speech,
            EncoderSpec::Signal(_) => {
                matches!(self.modality, ModalityKind::Waveform | ModalityKind::Speech)
            }
            EncoderSpec::Series(_) | EncoderSpec::Windows(_) => {
                self.modality == ModalityKind::Series
            }
            EncoderSpec::Omics(_) => self.modality == ModalityKind::Omics,
        };
        if !fits {
            return Err(self.wrong(format!(
                "its items are {}, which an encoder of the kind `{}` does not read",
                self.modality.name(),
                self.encoder.name()
            )));
        }
        self.check_encoder()
    }

    fn check_encoder(&self) -> Result<(), ModelError> {
        let positive = |key: &str, value: usize| match value {
            0 => Err(self.wrong(format!("`encoder.{key}` is 0; it has to be at least 1"))),
            _ => Ok(()),
        };
        match &self.encoder {
            EncoderSpec::Vision { .. } | EncoderSpec::Whisper { .. } => Ok(()),
            EncoderSpec::Signal(options) => {
                positive("leads", options.leads)?;
                positive("patch_samples", options.patch_samples)?;
                positive("kernel_samples", options.kernel_samples)?;
                positive("stride_samples", options.stride_samples)?;
                for (key, samples) in [
                    ("patch_samples", options.patch_samples),
                    ("kernel_samples", options.kernel_samples),
                ] {
                    if !samples.is_multiple_of(options.stride_samples) {
                        return Err(self.wrong(format!(
                            "`encoder.{key}` is {samples}; it has to be a multiple of \
                             `encoder.stride_samples`, which is {}",
                            options.stride_samples
                        )));
                    }
                }
                self.even(options.width, 2)?;
                self.heads("encoder", options.width, options.heads)
            }
            EncoderSpec::Series(options) => {
                positive("variables", options.variables)?;
                positive("hidden", options.hidden)?;
                self.above_zero("time_scale_days", options.time_scale_days)?;
                self.heads("encoder", options.width, options.heads)
            }
            EncoderSpec::Windows(options) => {
                positive("variables", options.variables)?;
                positive("windows", options.windows)?;
                self.above_zero("span_days", options.span_days)?;
                self.share("dropout", options.dropout)?;
                self.heads("encoder", options.width, options.heads)
            }
            EncoderSpec::Omics(options) => {
                positive("features", options.features)?;
                positive("chunk", options.chunk)?;
                self.share("dropout", options.dropout)?;
                for (number, group) in options.groups.iter().enumerate() {
                    if group.is_empty() {
                        return Err(self.wrong(format!("`encoder.groups[{number}]` is empty")));
                    }
                    if let Some(feature) = group.iter().find(|&&f| f >= options.features) {
                        return Err(self.wrong(format!(
                            "`encoder.groups[{number}]` has feature {feature}, but there are {} \
                             features, counted from 0",
                            options.features
                        )));
                    }
                }
                self.heads("encoder", options.width, options.heads)
            }
            EncoderSpec::Patches(options) => {
                positive("patch", options.patch)?;
                self.even(options.width, 4)?;
                self.heads("encoder", options.width, options.heads)
            }
        }
    }

    fn above_zero(&self, key: &str, value: f64) -> Result<(), ModelError> {
        if !(value.is_finite() && value > 0.0) {
            let problem = format!("`encoder.{key}` is {value}; it has to be above 0");
            return Err(self.wrong(problem));
        }
        Ok(())
    }

    fn share(&self, key: &str, value: f64) -> Result<(), ModelError> {
        if !(0.0..1.0).contains(&value) {
            let problem = format!("`encoder.{key}` is {value}; it is a share: 0 to below 1");
            return Err(self.wrong(problem));
        }
        Ok(())
    }

    fn heads(&self, part: &str, width: usize, heads: usize) -> Result<(), ModelError> {
        if width == 0 || heads == 0 || !width.is_multiple_of(heads) {
            return Err(self.wrong(format!(
                "`{part}.heads` is {heads} and `{part}.width` {width}; the heads have to share \
                 the width evenly"
            )));
        }
        Ok(())
    }

    /// Sinusoidal positions come in pairs.
    fn even(&self, width: usize, multiple: usize) -> Result<(), ModelError> {
        if !width.is_multiple_of(multiple) {
            return Err(self.wrong(format!(
                "`encoder.width` is {width}; it has to be a multiple of {multiple}"
            )));
        }
        Ok(())
    }
}
