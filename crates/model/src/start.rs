//! What a new head starts from: what is known of the classes and of the patients before training.

use crate::affine::Sums;
use crate::attention::Masking;
use crate::error::ModelError;
use crate::head::Head;
use crate::model::Model;
use crate::run::{Mode, ModelInput};

impl Model {
    /// Makes these logits, one a label, what a new head says of everyone before training: its bias.
    /// With the log-odds of the classes, the first steps need not move every weight to learn them, which
    /// is where they move furthest (Lin et al. 2017 start a detector so). A head that was read from the
    /// checkpoint, one without a bias (a decoder's) and other heads stay as they are.
    pub fn start_from(&mut self, logits: &[f32]) {
        if let Head::Classifier(classifier) = &mut self.head {
            classifier.start_from(logits);
        }
    }

    /// Gives each coordinate that a head over the mean reads mean 0 and deviation 1 over these samples.
    /// What all patients have in common is most of a sentence's embedding, and nothing to a classifier
    /// but a bias that swings with every step. Other heads stay as they are: Transformers' classes have
    /// no place for it.
    ///
    /// # Errors
    /// Those of the iterator, and items that do not fit the model.
    pub fn calibrate_head<E: From<ModelError>>(
        &mut self,
        batches: impl IntoIterator<Item = Result<ModelInput, E>>,
    ) -> Result<(), E> {
        if !matches!(&self.head, Head::Classifier(classifier) if classifier.standardises()) {
            return Ok(());
        }
        let model = self.for_inference();
        let mut sums = Sums::default();
        for input in batches {
            let input = input?;
            model.check_soft(&input)?;
            let pooled = model.pooled(&input, Mode::Infer, Masking::Segments);
            sums.add(pooled.swap_dims(0, 1));
        }
        if let Head::Classifier(classifier) = &mut self.head {
            classifier.calibrate(&sums);
        }
        Ok(())
    }
}
