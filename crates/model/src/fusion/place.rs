//! Soft tokens take the place of token embeddings.

use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};

use super::{Fusion, FusionOptions, SoftInput};
use crate::error::ModelError;
use crate::model::Model;
use crate::run::{Mode, ModelInput};

impl Model {
    /// Checks that the items of a batch and their places fit the model and the batch; without items
    /// everything does. Touches no device.
    ///
    /// # Errors
    /// [`ModelError::Stream`] or [`ModelError::Options`] naming the stream and the numbers.
    pub fn check_soft(&self, input: &ModelInput) -> Result<(), ModelError> {
        let Some(soft) = &input.soft else {
            return Ok(());
        };
        let (options, _) = self.fusion_for(soft)?;
        let [rows, seq] = input.input_ids.dims();
        soft.check_places(options, rows, seq)
    }

    /// The soft tokens of all placements, K each, stream by stream and within a stream in the order
    /// of the placements: `[slots, hidden]`, f32. `None` where nothing is placed.
    ///
    /// # Errors
    /// Items that do not fit the model, as from [`Model::check_soft`].
    pub fn soft_tokens(
        &self,
        soft: &SoftInput,
        mode: Mode,
    ) -> Result<Option<Tensor<2>>, ModelError> {
        let (_, fusion) = self.fusion_for(soft)?;
        Ok(fusion.soft_tokens(soft, mode))
    }

    /// The fused part and its options, where they fit the items.
    fn fusion_for(&self, soft: &SoftInput) -> Result<(&FusionOptions, &Fusion), ModelError> {
        let (Some(options), Some(fusion)) = (&self.options.fusion, &self.fusion) else {
            return Err(ModelError::options(
                "a batch has modality items, and the model was built without a stream for them",
            ));
        };
        soft.check_items(options)?;
        fusion.check(soft)?;
        Ok((options, fusion))
    }

    /// The soft tokens of a batch; `None` where there are none.
    ///
    /// # Panics
    /// When they do not fit the model; see [`Model::check_soft`].
    pub(crate) fn replacement(&self, input: &ModelInput, mode: Mode) -> Option<Replacement> {
        let soft = input.soft.as_ref()?;
        if let Err(error) = self.check_soft(input) {
            panic!("a batch's items do not fit the model: {error}");
        }
        let [_, seq] = input.input_ids.dims();
        Replacement::new(self.fusion.as_ref()?, soft, seq, mode)
    }
}

/// The soft tokens of a batch and where they go.
pub(crate) struct Replacement {
    /// `[slots, hidden]`
    tokens: Tensor<2>,
    /// In `[batch · seq]`.
    places: Vec<usize>,
}

impl Replacement {
    /// `None` where nothing is placed. `seq` is the batch's.
    pub fn new(fusion: &Fusion, soft: &SoftInput, seq: usize, mode: Mode) -> Option<Replacement> {
        Some(Replacement {
            tokens: fusion.soft_tokens(soft, mode)?,
            places: fusion.places(soft, seq),
        })
    }

    /// embeddings `[batch, seq, hidden]`; returns the same with the slots replaced.
    ///
    /// Slots are scattered into zeros and added to what is left of the embeddings: backwards that
    /// is a plain gather, without a gradient of the size of the batch for the embeddings.
    pub fn apply(&self, embeddings: Tensor<3>) -> Tensor<3> {
        let [batch, seq, hidden] = embeddings.dims();
        let (device, dtype) = (embeddings.device().inner(), embeddings.dtype());
        let mut kept = vec![1f32; batch * seq];
        for &place in &self.places {
            kept[place] = 0.0;
        }
        let kept = TensorData::new(kept, [batch, seq, 1]);
        let kept = Tensor::<3>::from_data(kept, (&device, DType::F32)).cast(dtype);
        let places: Vec<i32> = self.places.iter().map(|&place| place as i32).collect();
        let places = TensorData::new(places, [self.places.len()]);
        let places = Tensor::<1, Int>::from_data(places, &device);
        let soft = Tensor::<2>::zeros([batch * seq, hidden], (&device, dtype))
            .select_assign(
                0,
                places,
                self.tokens.clone().cast(dtype),
                IndexingUpdateOp::Add,
            )
            .reshape([batch, seq, hidden]);
        embeddings * kept + soft
    }
}
