//! Language models and token classifiers at chosen tokens: what the last layer computes for the
//! others, nobody reads.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Int, Tensor};

use crate::attention::Masking;
use crate::head::{Classifier, Head};
#[cfg(doc)]
use crate::loss;
use crate::model::Model;
use crate::output_loss::class_cross_entropy;
use crate::run::{Mode, ModelInput, Selection};

/// Tokens whose logits over the vocabulary exist at the same time.
const TOKENS_AT_ONCE: usize = 256;

impl Model {
    /// Logits of a token classifier, `[tokens, labels]`, f32.
    ///
    /// `places` `[tokens]` are positions in `[batch · seq]`.
    ///
    /// # Panics
    /// When the model was built without [`HeadOptions::TokenClassifier`](crate::HeadOptions), or
    /// `input.soft` does not fit it.
    pub fn token_logits(
        &self,
        input: &ModelInput,
        places: Tensor<1, Int>,
        mode: Mode,
    ) -> Tensor<2> {
        let (classifier, states) = self.token_states(input, places, mode);
        classifier.forward(states, mode)
    }

    /// Cross-entropy of a token classifier, summed over chosen tokens, `[1]`: [`loss::multiclass`] of
    /// [`Model::token_logits`], of which no more than 64 MiB exist at a time however many classes there
    /// are.
    ///
    /// # Panics
    /// As [`Model::token_logits`].
    pub fn token_loss_at(
        &self,
        input: &ModelInput,
        places: Tensor<1, Int>,
        targets: Tensor<1, Int>,
        class_weights: Option<Tensor<1>>,
        mode: Mode,
    ) -> Tensor<1> {
        let (classifier, states) = self.token_states(input, places, mode);
        let states = classifier.before_output(states, mode);
        class_cross_entropy(classifier.output(), states, targets, class_weights, mode)
    }

    fn token_states(
        &self,
        input: &ModelInput,
        places: Tensor<1, Int>,
        mode: Mode,
    ) -> (&Classifier, Tensor<3>) {
        let Head::Classifier(classifier) = &self.head else {
            panic!("the model was built without a token classifier");
        };
        // ModernBERT's head; without one, the states as they are.
        let states = self.pool(self.hidden_at(input, places, mode), mode);
        (classifier, states)
    }

    /// Cross-entropy of a language model, summed over chosen tokens, `[1]`.
    ///
    /// At the positions `places` `[tokens]` in `[batch · seq]` the next token is to be `targets`
    /// `[tokens]`.
    ///
    /// # Panics
    /// When the model was built without [`HeadOptions::CausalLm`](crate::HeadOptions), or
    /// `input.soft` does not fit it.
    pub fn causal_lm_loss_at(
        &self,
        input: &ModelInput,
        places: Tensor<1, Int>,
        targets: Tensor<1, Int>,
        mode: Mode,
    ) -> Tensor<1> {
        self.causal_lm_loss_of(self.hidden_at(input, places, mode), targets, mode)
    }

    /// The terms of [`Model::causal_lm_loss_at`], `[tokens]`, f32, for evaluation: the logits exist
    /// for a few hundred tokens at a time.
    ///
    /// # Panics
    /// As [`Model::causal_lm_loss_at`].
    pub fn causal_lm_losses_at(
        &self,
        input: &ModelInput,
        places: Tensor<1, Int>,
        targets: Tensor<1, Int>,
    ) -> Tensor<1> {
        let hidden = self.hidden_at(input, places, Mode::Infer);
        let [_, tokens, _] = hidden.dims();
        let (linear, weight) = self.output_layer();
        let mut losses = Vec::new();
        for start in (0..tokens).step_by(TOKENS_AT_ONCE) {
            let count = TOKENS_AT_ONCE.min(tokens - start);
            let some = hidden.clone().narrow(1, start, count);
            let logits = self.capped(linear.forward_with(some, &weight, Mode::Infer));
            let vocab = logits.dims()[2];
            let logits = logits.cast(DType::F32).reshape([count, vocab]);
            let targets = targets.clone().narrow(0, start, count);
            let terms = log_softmax(logits, 1).gather(1, targets.reshape([count, 1]));
            losses.push(terms.reshape([count]).neg());
        }
        Tensor::cat(losses, 0)
    }

    /// Hidden states after the last norm, `[1, tokens, hidden]`.
    fn hidden_at(&self, input: &ModelInput, places: Tensor<1, Int>, mode: Mode) -> Tensor<3> {
        let selection = Selection::of_places(places);
        self.run(input, mode, Masking::Segments, Some(&selection))
    }
}
