//! What reads an item.

use burn::tensor::{FloatDType, Tensor};

use super::input::ItemTensors;
use super::new::New;
use super::omics::Omics;
use super::options::{EncoderSpec, StreamSpec};
use super::patches::Patches;
use super::series::Series;
use super::signal::Signal;
use crate::error::ModelError;
use crate::parameter::Visit;
use crate::run::Mode;
use crate::towers::{Tower, TowerInput, TowerOptions};

/// An encoder's output.
pub(super) struct Encoded {
    /// `[items, tokens, width]`
    pub tokens: Tensor<3>,
    /// 1 for a token, 0 for padding, `[items, tokens]`; none where all are tokens.
    pub mask: Option<Tensor<2>>,
}

#[derive(Debug, Clone)]
pub(super) enum Encoder {
    Tower(Box<Tower>),
    Signal(Box<Signal>),
    Series(Box<Series>),
    Omics(Box<Omics>),
    Patches(Box<Patches>),
}

impl Encoder {
    /// `dtype` is that of a tower's frozen weights and of its activations.
    ///
    /// # Errors
    /// A tower that cannot be read, or that reads something else than the stream's items.
    pub fn new(new: &New, stream: &StreamSpec, dtype: FloatDType) -> Result<Encoder, ModelError> {
        Ok(match &stream.encoder {
            EncoderSpec::Vision { folder, lora } | EncoderSpec::Whisper { folder, lora } => {
                let checkpoint = Tower::open(folder)?;
                let images = checkpoint.config().image_size().is_some();
                if images != matches!(stream.encoder, EncoderSpec::Vision { .. }) {
                    return Err(stream.wrong(format!(
                        "{} holds a tower that reads {}",
                        folder.display(),
                        if images { "images" } else { "speech" }
                    )));
                }
                let options = TowerOptions {
                    lora: lora.clone(),
                    dtype,
                    seed: new.seed,
                    name_prefix: format!("{}.", new.path),
                };
                Encoder::Tower(Box::new(Tower::build(&checkpoint, &options, new.device)?))
            }
            EncoderSpec::Signal(options) => Encoder::Signal(Box::new(Signal::new(new, options))),
            EncoderSpec::Series(options) => Encoder::Series(Box::new(Series::new(new, options))),
            EncoderSpec::Omics(options) => Encoder::Omics(Box::new(Omics::new(new, options))),
            EncoderSpec::Windows(options) => {
                Encoder::Omics(Box::new(Omics::new(new, &options.groups())))
            }
            EncoderSpec::Patches(options) => Encoder::Patches(Box::new(Patches::new(new, options))),
        })
    }

    /// Checks what only a tower's own configuration says: the size of images, the length of speech.
    pub fn check(&self, items: &ItemTensors) -> Result<(), ModelError> {
        match (self, items) {
            (Encoder::Tower(tower), ItemTensors::Image(pixels)) => {
                let shape = TowerInput::Image(pixels.clone()).shape();
                tower.token_count(shape).map(|_| ())
            }
            (Encoder::Tower(tower), ItemTensors::Mel(frames)) => {
                let shape = TowerInput::Mel(frames.clone()).shape();
                tower.token_count(shape).map(|_| ())
            }
            _ => Ok(()),
        }
    }

    /// Width of the output.
    pub fn width(&self) -> usize {
        match self {
            Encoder::Tower(tower) => tower.width(),
            Encoder::Signal(encoder) => encoder.width(),
            Encoder::Series(encoder) => encoder.width(),
            Encoder::Omics(encoder) => encoder.width(),
            Encoder::Patches(encoder) => encoder.width(),
        }
    }

    /// # Panics
    /// When the items are of another kind than the encoder; see
    /// [`Model::check_soft`](crate::Model::check_soft).
    pub fn forward(&self, items: &ItemTensors, mode: Mode) -> Encoded {
        let whole = |tokens| Encoded { tokens, mask: None };
        match (self, items.clone()) {
            (Encoder::Tower(tower), ItemTensors::Image(pixels)) => {
                whole(tower.forward(TowerInput::Image(pixels), mode))
            }
            (Encoder::Tower(tower), ItemTensors::Mel(frames)) => {
                whole(tower.forward(TowerInput::Mel(frames), mode))
            }
            (
                Encoder::Signal(signal),
                ItemTensors::Dense {
                    values,
                    present,
                    lengths,
                },
            ) => signal.forward(values, present, &lengths, mode),
            (Encoder::Signal(signal), ItemTensors::Mel(frames)) => {
                let [items, _, length] = frames.dims();
                let present = frames.ones_like();
                signal.forward(frames, present, &vec![length; items], mode)
            }
            (
                Encoder::Series(series),
                ItemTensors::Series {
                    time_days,
                    variable,
                    value,
                    present,
                },
            ) => series.forward(time_days, variable, value, present, mode),
            (
                Encoder::Omics(omics),
                ItemTensors::Omics { values, present } | ItemTensors::Windows { values, present },
            ) => omics.forward(values, present, mode),
            (Encoder::Patches(patches), ItemTensors::Image(pixels)) => {
                patches.forward(pixels, mode)
            }
            _ => panic!("the items are of another kind than the encoder reads"),
        }
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        match self {
            Encoder::Tower(tower) => tower.visit(visitor),
            Encoder::Signal(encoder) => encoder.visit(visitor),
            Encoder::Series(encoder) => encoder.visit(visitor),
            Encoder::Omics(encoder) => encoder.visit(visitor),
            Encoder::Patches(encoder) => encoder.visit(visitor),
        }
    }
}
