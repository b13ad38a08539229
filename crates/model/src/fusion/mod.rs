//! Modality items as soft tokens of the backbone.
//!
//! An item goes through its stream's encoder, K learned queries attend to what that gives (the
//! resampler), a projector makes K embeddings of the backbone of them, and type, site and time
//! embeddings are added. These replace the token embeddings at the item's slots, before anything
//! else that the backbone adds to them. A missing item has K learned tokens instead.
//!
//! Soft tokens are trained in units of the token embeddings: their mean and their spread. At the start
//! each is the mean, so that training starts from the unmodified model. All that is trained is f32, is drawn from the seed and its name alone, and is
//! called `fusion.<stream>.…`.

mod calibrate;
mod check;
mod embed;
mod encoder;
mod input;
mod new;
mod omics;
mod options;
mod patches;
mod place;
mod projector;
mod resampler;
mod series;
mod signal;
#[cfg(test)]
mod tests;
mod transformer;

pub use check::StreamDemand;
pub use input::{ItemTensors, Placement, SoftInput};
pub use options::{
    EncoderSpec, FusionOptions, ModalityKind, OmicsEncoderOptions, PatchOptions, ResamplerOptions,
    SeriesOptions, SignalOptions, StreamSpec, WindowsOptions,
};
pub(crate) use place::Replacement;

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};

use crate::error::ModelError;
use crate::parameter::{Parameter, ParameterGroup, Visit};
use crate::run::Mode;
use embed::Shared;
use encoder::Encoder;
use new::New;
use projector::{Embeddings, Projector};
use resampler::Resampler;

/// Names of all tensors here begin with this.
pub(crate) const PREFIX: &str = "fusion.";
/// Of an image.
const CHANNELS: usize = 3;

/// Everything between items and the backbone.
#[derive(Debug, Clone)]
pub(crate) struct Fusion {
    streams: Vec<Stream>,
    shared: Shared,
    embeddings: Embeddings,
}

#[derive(Debug, Clone)]
struct Stream {
    encoder: Encoder,
    resampler: Resampler,
    projector: Projector,
    /// Added to every token of the stream, `[hidden]`.
    kind: Parameter<1>,
    /// Stands for an item that is not there, `[K, hidden]`; zero at first, as all that is in units of
    /// the backbone's embeddings.
    missing: Parameter<2>,
}

impl Fusion {
    /// New weights beside a backbone with this token embedding, `[vocab, hidden]`, which it
    /// multiplies by `scale`; `dtype` is that of frozen weights.
    ///
    /// # Errors
    /// A tower that cannot be read, or that reads something else than the stream's items.
    pub fn new(
        options: &FusionOptions,
        embedding: &Tensor<2>,
        scale: f64,
        dtype: FloatDType,
        device: &Device,
    ) -> Result<Fusion, ModelError> {
        let embeddings = match scale {
            1.0 => Embeddings::of(embedding),
            scale => Embeddings::of(embedding).scaled(scale),
        };
        let [_, hidden] = embedding.dims();
        let new = |name: &str| New {
            seed: options.seed,
            device,
            group: ParameterGroup::Projector,
            path: format!("{PREFIX}{name}"),
        };
        Ok(Fusion {
            streams: options
                .streams
                .iter()
                .map(|stream| Stream::new(&new(&stream.name), stream, hidden, dtype))
                .collect::<Result<_, _>>()?,
            shared: Shared::new(&new(check::SHARED), options.sites, hidden),
            embeddings,
        })
    }

    /// Checks what only the towers know of the items they read; the rest is checked by
    /// [`SoftInput::check_items`].
    pub fn check(&self, soft: &SoftInput) -> Result<(), ModelError> {
        let mut pairs = self.streams.iter().zip(&soft.streams);
        pairs.try_for_each(|(stream, items)| match items {
            Some(items) => stream.encoder.check(items),
            None => Ok(()),
        })
    }

    /// The soft tokens of all placements, K each, stream by stream and within a stream in the order
    /// of the placements: `[slots, hidden]`, f32; `None` where nothing is placed.
    ///
    /// A stream whose items nobody placed is not computed, and a missing token that nobody needs is
    /// not read: such weights have no gradient, rather than one of zeros.
    pub fn soft_tokens(&self, soft: &SoftInput, mode: Mode) -> Option<Tensor<2>> {
        let mut tokens = Vec::new();
        for (number, (stream, items)) in self.streams.iter().zip(&soft.streams).enumerate() {
            let placed = placed(soft, number);
            if placed.is_empty() {
                continue;
            }
            let mut of_stream = stream.forward(items.as_ref(), &placed, mode);
            if let Some(shared) = self.shared.of(&placed) {
                of_stream = of_stream + shared;
            }
            let of_stream = self.embeddings.place(of_stream);
            let [count, length, hidden] = of_stream.dims();
            tokens.push(of_stream.reshape([count * length, hidden]));
        }
        (!tokens.is_empty()).then(|| Tensor::cat(tokens, 0))
    }

    /// Where each soft token goes, in the order of [`Fusion::soft_tokens`]: places in
    /// `[batch · seq]`.
    pub fn places(&self, soft: &SoftInput, seq: usize) -> Vec<usize> {
        let mut places = Vec::new();
        for (number, stream) in self.streams.iter().enumerate() {
            let [length, _] = stream.missing.tensor.dims();
            for placement in placed(soft, number) {
                let first = placement.row * seq + placement.start;
                places.extend(first..first + length);
            }
        }
        places
    }

    /// Stream by stream, then what they share.
    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        for stream in &mut self.streams {
            stream.encoder.visit(visitor);
            stream.resampler.visit(visitor);
            stream.projector.visit(visitor);
            visitor.visit(&mut stream.kind);
            visitor.visit(&mut stream.missing);
        }
        self.shared.visit(visitor);
    }
}

/// The placements of one stream.
fn placed(soft: &SoftInput, stream: usize) -> Vec<&Placement> {
    let placements = soft.placements.iter();
    placements
        .filter(|placement| placement.stream == stream)
        .collect()
}

impl Stream {
    fn new(
        new: &New,
        spec: &StreamSpec,
        hidden: usize,
        dtype: FloatDType,
    ) -> Result<Stream, ModelError> {
        let inside = new.at("encoder").group(ParameterGroup::Encoder);
        let encoder = Encoder::new(&inside, spec, dtype)?;
        Ok(Stream {
            resampler: Resampler::new(
                &new.at("resampler"),
                spec.tokens,
                encoder.width(),
                &spec.resampler,
            ),
            encoder,
            projector: Projector::new(
                &new.at("projector"),
                spec.tokens,
                spec.resampler.width,
                hidden,
            ),
            kind: new.zeros("type", [hidden]),
            missing: new.zeros("missing", [spec.tokens, hidden]),
        })
    }

    /// `[placements, K, hidden]`
    fn forward(
        &self,
        items: Option<&ItemTensors>,
        placements: &[&Placement],
        mode: Mode,
    ) -> Tensor<3> {
        let used = placements.iter().any(|placement| placement.item.is_some());
        let absent = placements.iter().any(|placement| placement.item.is_none());
        let encoded = items.filter(|_| used).map(|items| {
            let resampled = self
                .resampler
                .forward(self.encoder.forward(items, mode), mode);
            self.projector.forward(resampled, mode)
        });
        let missing = absent.then(|| self.missing.tensor.clone().unsqueeze::<3>());
        let encoded_count = encoded.as_ref().map_or(0, |encoded| encoded.dims()[0]);
        // The missing tokens lie behind the items.
        let table: Vec<Tensor<3>> = encoded.into_iter().chain(missing).collect();
        let table = Tensor::cat(table, 0);
        let rows: Vec<i32> = placements
            .iter()
            .map(|placement| placement.item.unwrap_or(encoded_count) as i32)
            .collect();
        let device = self.kind.tensor.device().inner();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [placements.len()]), &device);
        table.select(0, rows) + self.kind.tensor.clone().unsqueeze::<3>()
    }
}
