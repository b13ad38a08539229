//! Centres what the projectors' last layers read, before the first step.

use burn::tensor::Tensor;

use super::projector::Projector;
use super::{Fusion, SoftInput};
use crate::affine::Sums;
use crate::error::ModelError;
use crate::model::Model;
use crate::run::Mode;

/// Of a coordinate, as a share of what all of them are; one that does not vary stays small.
const SMALLEST_DEVIATION: f64 = 0.01;

impl Model {
    /// Gives each coordinate that goes into the projectors, and each inside them, mean 0 and deviation 1
    /// over these items: a data-dependent initialisation in the manner of Salimans and Kingma 2016.
    ///
    /// New encoders say nearly the same of every item. To a last layer that starts at zero what they all
    /// share is noise, which moves it further than what tells items apart; and what is small has to be
    /// made large before the layers that learn from it, or their own steps drown it. Scales and shifts are
    /// trained and saved like the rest; nothing changes before the projector's last layer, so that
    /// training still starts from the unmodified model.
    ///
    /// `batches` is called twice: what is inside a projector depends on what goes in.
    ///
    /// # Errors
    /// Those of the iterators, and items that do not fit the model.
    pub fn calibrate<E, I>(&mut self, batches: impl Fn() -> I) -> Result<(), E>
    where
        E: From<ModelError>,
        I: IntoIterator<Item = Result<SoftInput, E>>,
    {
        let Some(fusion) = &mut self.fusion else {
            return Ok(());
        };
        let sums = fusion.sums(batches(), |_, resampled| resampled)?;
        for (stream, sums) in fusion.streams.iter_mut().zip(sums) {
            stream.projector.input.calibrate(&sums, SMALLEST_DEVIATION);
        }
        let sums = fusion.sums(batches(), |projector, resampled| {
            projector.wide(resampled, Mode::Infer)
        })?;
        for (stream, sums) in fusion.streams.iter_mut().zip(sums) {
            stream.projector.inside.calibrate(&sums, SMALLEST_DEVIATION);
        }
        Ok(())
    }
}

impl Fusion {
    /// Sums of what `of` makes of each stream's resampled items.
    fn sums<E: From<ModelError>>(
        &self,
        batches: impl IntoIterator<Item = Result<SoftInput, E>>,
        of: impl Fn(&Projector, Tensor<3>) -> Tensor<3>,
    ) -> Result<Vec<Sums>, E> {
        let mut sums: Vec<Sums> = self.streams.iter().map(|_| Sums::default()).collect();
        for soft in batches {
            let soft = soft?;
            self.check(&soft)?;
            let items = soft.streams.iter();
            for ((stream, items), sums) in self.streams.iter().zip(items).zip(&mut sums) {
                if let Some(items) = items {
                    let encoded = stream.encoder.forward(items, Mode::Infer);
                    let resampled = stream.resampler.forward(encoded, Mode::Infer);
                    sums.add(of(&stream.projector, resampled));
                }
            }
        }
        Ok(sums)
    }
}
