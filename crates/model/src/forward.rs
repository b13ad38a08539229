//! The model's passes: to hidden states, to a classifier's logits, to a language model's loss.

use std::cell::RefCell;

use burn::tensor::{Int, Tensor};

use crate::attention::Masking;
use crate::cache::State;
use crate::head::{Head, Pooling};
use crate::model::Model;
use crate::output_loss::chunked_cross_entropy;
use crate::run::{Mode, ModelInput, Run, Selection, mean_over_samples};

impl Model {
    /// Logits of a classifier, `[samples, labels]`, f32, in the order of `input.samples`.
    ///
    /// # Panics
    /// When the model was built without a classifier, or `input.soft` does not fit it; see
    /// [`Model::check_soft`].
    pub fn forward(&self, input: &ModelInput, mode: Mode) -> Tensor<2> {
        self.classify(input, mode, Masking::Segments)
    }

    pub(crate) fn classify(&self, input: &ModelInput, mode: Mode, masking: Masking) -> Tensor<2> {
        let Head::Classifier(classifier) = &self.head else {
            panic!("the model was built without a classifier");
        };
        classifier.forward(self.pooled(input, mode, masking), mode)
    }

    /// What the classifier reads, `[1, samples, hidden]`.
    pub(crate) fn pooled(&self, input: &ModelInput, mode: Mode, masking: Masking) -> Tensor<3> {
        let pooling = self.options.head.pooling().expect("a classifier pools");
        match pooling {
            Pooling::Mean => {
                let hidden = self.hidden_masked(input, mode, masking);
                mean_over_samples(hidden, &input.samples)
            }
            Pooling::Cls if self.config.design.classifier.mean => {
                let hidden = self.hidden_masked(input, mode, masking);
                let mean = mean_over_samples(hidden, &input.samples);
                self.backbone.pool(mean, mode)
            }
            Pooling::Last | Pooling::Cls => {
                let selection = Selection::new(input, pooling);
                let tokens = self.run(input, mode, masking, Some(&selection));
                self.backbone.pool(tokens, mode)
            }
        }
    }

    /// What the backbone's pooler makes of states, where it has one.
    pub(crate) fn pool(&self, states: Tensor<3>, mode: Mode) -> Tensor<3> {
        self.backbone.pool(states, mode)
    }

    /// Hidden states after the last norm, `[batch, seq, hidden]`.
    pub fn hidden(&self, input: &ModelInput, mode: Mode) -> Tensor<3> {
        self.hidden_masked(input, mode, Masking::Segments)
    }

    pub(crate) fn hidden_masked(
        &self,
        input: &ModelInput,
        mode: Mode,
        masking: Masking,
    ) -> Tensor<3> {
        self.run(input, mode, masking, None)
    }

    pub(crate) fn run(
        &self,
        input: &ModelInput,
        mode: Mode,
        masking: Masking,
        selection: Option<&Selection>,
    ) -> Tensor<3> {
        let replacement = self.replacement(input, mode);
        self.backbone.forward(&Run {
            input,
            mode,
            masking,
            selection,
            replacement: replacement.as_ref(),
            recompute: matches!(mode, Mode::Train { .. }).then_some(&self.recompute),
            cache: None,
        })
    }

    /// As [`Model::run`] for tokens that follow those of a cache.
    pub(crate) fn run_cached(
        &self,
        input: &ModelInput,
        selection: &Selection,
        cache: &RefCell<State>,
    ) -> Tensor<3> {
        self.backbone.forward(&Run {
            input,
            mode: Mode::Infer,
            masking: Masking::Segments,
            selection: Some(selection),
            replacement: None,
            recompute: None,
            cache: Some(cache),
        })
    }

    /// Logits of a language model, `[batch, seq, vocab]`.
    ///
    /// # Panics
    /// When the model was built without [`HeadOptions::CausalLm`].
    pub fn logits(&self, input: &ModelInput, mode: Mode) -> Tensor<3> {
        let hidden = self.hidden(input, mode);
        let (linear, weight) = self.output_layer();
        self.capped(linear.forward_with(hidden, &weight, mode))
    }

    /// Cross-entropy of a language model, summed over the tokens whose target is not −100, `[1]`.
    ///
    /// `targets` `[batch · seq]` are already shifted; see [`shifted_targets`].
    ///
    /// # Panics
    /// When the model was built without [`HeadOptions::CausalLm`].
    pub fn causal_lm_loss(
        &self,
        input: &ModelInput,
        targets: Tensor<1, Int>,
        mode: Mode,
    ) -> Tensor<1> {
        self.causal_lm_loss_of(self.hidden(input, mode), targets, mode)
    }

    pub(crate) fn causal_lm_loss_of(
        &self,
        hidden: Tensor<3>,
        targets: Tensor<1, Int>,
        mode: Mode,
    ) -> Tensor<1> {
        let [batch, seq, width] = hidden.dims();
        let (linear, weight) = self.output_layer();
        let hidden = hidden.reshape([batch * seq, width]);
        let soft_cap = self.config.design.logit_soft_cap;
        if linear.lora.is_some() || !calor_kernels::fuses_cross_entropy(&hidden) {
            return chunked_cross_entropy(linear, &weight, hidden, targets, soft_cap, mode);
        }
        let weight = weight.matching(hidden.dtype());
        calor_kernels::linear_cross_entropy(hidden, weight, targets, soft_cap)
    }

    /// Logits within the bounds that the model's logits have.
    pub(crate) fn capped(&self, logits: Tensor<3>) -> Tensor<3> {
        match self.config.design.logit_soft_cap {
            Some(cap) => calor_kernels::reference::soft_cap(logits, cap),
            None => logits,
        }
    }
}
