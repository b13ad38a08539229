//! What stands on the backbone: the output layer of a language model, or a classifier.

use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::affine::{self, Affine, Sums};
use crate::architecture::{self, ModuleSpec, TaskClass};
use crate::builder::Builder;
use crate::checkpoint::Checkpoint;
use crate::config::{Activation, Family, ModelConfig};
use crate::error::ModelError;
use crate::linear::Linear;
use crate::parameter::{ParameterGroup, ParameterKind, Visit};
use crate::run::Mode;

/// What the model predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum HeadOptions {
    /// Nothing: hidden states only.
    #[default]
    None,
    /// The next token; decoders only.
    CausalLm,
    /// `labels` numbers a sample.
    Classifier {
        /// Logits a sample: 1 for [`Problem::Binary`], the number of classes, of labels or of
        /// targets for the others.
        labels: usize,
        /// Which hidden state of the sample is read.
        pooling: Pooling,
        /// What the logits mean.
        problem: Problem,
    },
    /// `labels` logits a token, one a class.
    TokenClassifier {
        /// The number of classes.
        labels: usize,
    },
}

/// Which hidden state stands for a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// That of the last token: what decoders use, as Transformers' sequence classifiers do.
    Last,
    /// That of the first token, through what the Transformers class puts behind it: BERT's pooler,
    /// RoBERTa's dense layer. For ModernBERT the mean instead, where its `config.json` says so.
    Cls,
    /// The mean over the sample's tokens (encoders); no Transformers class does this, so the head
    /// is saved in `calor.safetensors`.
    Mean,
}

impl Pooling {
    /// What Transformers' sequence classifier of the family does.
    pub fn default_for(family: Family) -> Pooling {
        match family {
            Family::Decoder => Pooling::Last,
            Family::Encoder => Pooling::Cls,
        }
    }
}

/// What a classifier's logits mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Problem {
    /// One logit; its sigmoid is the probability of the positive class. The adapter loads in
    /// Transformers with `num_labels=1`.
    Binary,
    /// One logit a class; their softmax are the probabilities.
    Multiclass,
    /// One logit a label; each label's probability is its sigmoid.
    Multilabel,
    /// One number a target, as it is.
    Regression,
}

impl HeadOptions {
    /// Checks that the head fits the model; which Transformers class its adapter is saved for.
    pub(crate) fn class(&self, config: &ModelConfig) -> Result<TaskClass, ModelError> {
        let family = config.family();
        match *self {
            HeadOptions::None => Ok(TaskClass::Backbone),
            HeadOptions::CausalLm if family == Family::Decoder => Ok(TaskClass::CausalLm),
            HeadOptions::CausalLm => Err(ModelError::options(format!(
                "{}: an encoder does not predict the next token; use a decoder checkpoint",
                config.path.display()
            ))),
            HeadOptions::TokenClassifier { labels: 0 | 1 } => Err(ModelError::options(
                "a token classifier needs at least two classes",
            )),
            HeadOptions::TokenClassifier { .. } => Ok(TaskClass::TokenClassifier),
            HeadOptions::Classifier {
                labels,
                pooling,
                problem,
            } => {
                match (problem, labels) {
                    (_, 0) => return Err(ModelError::options("a classifier needs a label")),
                    (Problem::Binary, 2..) => {
                        return Err(ModelError::options(format!(
                            "a binary head has one logit, {labels} are asked for; use multiclass \
                             for two logits"
                        )));
                    }
                    (Problem::Multiclass, 1) => {
                        return Err(ModelError::options(
                            "a multiclass head needs at least two classes; use binary for one logit",
                        ));
                    }
                    _ => {}
                }
                match (family, pooling) {
                    (Family::Decoder, Pooling::Last) => Ok(TaskClass::SequenceClassifier),
                    (Family::Encoder, Pooling::Cls) => Ok(TaskClass::SequenceClassifier),
                    (Family::Encoder, Pooling::Mean) => Ok(TaskClass::Backbone),
                    (Family::Decoder, _) => Err(ModelError::options(
                        "a decoder's classifier reads the last token: pooling has to be `last`",
                    )),
                    (Family::Encoder, Pooling::Last) => Err(ModelError::options(
                        "an encoder's classifier reads the first token or the mean: pooling has to \
                         be `cls` or `mean`",
                    )),
                }
            }
        }
    }

    pub(crate) fn labels(&self) -> usize {
        match self {
            HeadOptions::Classifier { labels, .. } | HeadOptions::TokenClassifier { labels } => {
                *labels
            }
            _ => 0,
        }
    }

    pub(crate) fn pooling(&self) -> Option<Pooling> {
        match self {
            HeadOptions::Classifier { pooling, .. } => Some(*pooling),
            _ => None,
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) enum Head {
    None,
    CausalLm {
        linear: Box<Linear>,
        /// The weight is the token embedding.
        tied: bool,
    },
    Classifier(Box<Classifier>),
}

/// Deviation of a coordinate of the pooled states below which it is not made larger, as a share of what
/// all of them are: where only soft tokens differ, which are all alike at first, nothing varies yet.
const SMALLEST_DEVIATION: f64 = 0.1;

/// One linear layer, or a hidden layer before it: RoBERTa's with its tanh, ELECTRA's with GELU, or one
/// of ours with GELU.
#[derive(Debug, Clone)]
pub(crate) struct Classifier {
    /// Of the mean over a sample's tokens; Transformers' heads have none.
    input: Option<Affine>,
    hidden: Option<(Linear, Activation)>,
    output: Linear,
    /// Whether the output layer was drawn, not read from the checkpoint.
    new: bool,
}

impl Classifier {
    /// `hidden`: units of the hidden layer of a head that reads the mean; 0 for none.
    pub fn build(
        builder: &Builder,
        config: &ModelConfig,
        labels: usize,
        pooling: Pooling,
        hidden: usize,
    ) -> Result<Classifier, ModelError> {
        let own = |path: &str, output, input| {
            let spec = ModuleSpec::linear(path.to_owned(), output, input, true);
            builder.head(&spec, ParameterKind::Own(ParameterGroup::Head))
        };
        let input = Affine::new(
            "classifier.input",
            [1, config.hidden],
            ParameterGroup::Head,
            builder.device,
        );
        match (pooling, hidden) {
            (Pooling::Mean, 0) => {
                let spec = ModuleSpec {
                    path: "classifier".to_owned(),
                    ..architecture::classifier(config, labels)
                        .pop()
                        .expect("a classifier has an output layer")
                };
                return Ok(Classifier {
                    input: Some(input),
                    hidden: None,
                    output: builder.head(&spec, ParameterKind::Own(ParameterGroup::Head))?,
                    new: true,
                });
            }
            (Pooling::Mean, hidden) => {
                let mut dense = own("classifier.dense", hidden, config.hidden)?;
                builder.redraw(&mut dense, (config.hidden as f64).powf(-0.5));
                return Ok(Classifier {
                    input: Some(input),
                    hidden: Some((dense, Activation::Gelu)),
                    output: own("classifier.out_proj", labels, hidden)?,
                    new: true,
                });
            }
            (Pooling::Last | Pooling::Cls, 0) => {}
            (Pooling::Last | Pooling::Cls, _) => {
                return Err(ModelError::options(
                    "a hidden layer of the head needs pooling `mean`: the heads of `last` and \
                     `cls` are those of Transformers, which have their own layers",
                ));
            }
        }
        let specs = architecture::classifier(config, labels);
        let new = !specs.last().is_some_and(|spec| builder.has_head(spec));
        let mut modules = specs
            .iter()
            .map(|spec| builder.head(spec, ParameterKind::Saved))
            .collect::<Result<Vec<_>, _>>()?;
        let output = modules.pop().expect("a classifier has an output layer");
        Ok(Classifier {
            input: None,
            hidden: modules
                .pop()
                .map(|dense| (dense, config.design.classifier.activation)),
            output,
            new,
        })
    }

    /// The head of a token classifier: what stands for a sample above stands for a token here.
    pub fn of_tokens(
        builder: &Builder,
        config: &ModelConfig,
        labels: usize,
    ) -> Result<Classifier, ModelError> {
        let spec = architecture::token_classifier(config, labels);
        Ok(Classifier {
            input: None,
            hidden: None,
            new: !builder.has_head(&spec),
            output: builder.head(&spec, ParameterKind::Saved)?,
        })
    }

    /// Makes these logits what a new output layer adds to every sample, if it adds anything.
    pub fn start_from(&mut self, logits: &[f32]) {
        let Some(bias) = self.output.bias.as_mut().filter(|_| self.new) else {
            return;
        };
        affine::set(bias, logits.to_vec());
    }

    /// Pooled states `[1, samples, hidden]` → logits `[samples, labels]`, in f32.
    pub fn forward(&self, pooled: Tensor<3>, mode: Mode) -> Tensor<2> {
        let logits = self.output.forward(self.before_output(pooled, mode), mode);
        let [_, samples, labels] = logits.dims();
        logits.reshape([samples, labels])
    }

    /// The layer whose outputs are the logits.
    pub fn output(&self) -> &Linear {
        &self.output
    }

    /// What that layer reads, in f32.
    pub fn before_output(&self, pooled: Tensor<3>, mode: Mode) -> Tensor<3> {
        let mut pooled = pooled.cast(DType::F32);
        if let Some(input) = &self.input {
            // Samples take the place of items.
            pooled = input.forward(pooled.swap_dims(0, 1)).swap_dims(0, 1);
        }
        if let Some((dense, activation)) = &self.hidden {
            pooled = activation.apply(dense.forward(pooled, mode));
        }
        pooled
    }

    /// Whether the head has something that standardises pooled states.
    pub fn standardises(&self) -> bool {
        self.input.is_some()
    }

    /// Sets it from pooled states of training samples.
    pub fn calibrate(&mut self, sums: &Sums) {
        if let Some(input) = &mut self.input {
            input.calibrate(sums, SMALLEST_DEVIATION);
        }
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        if let Some(input) = &mut self.input {
            input.visit(visitor);
        }
        if let Some((dense, _)) = &mut self.hidden {
            dense.visit(visitor);
        }
        self.output.visit(visitor);
    }
}

/// Names that PEFT always adds to `modules_to_save` of a classifier of sequences or tokens.
pub(crate) const CLASSIFIER_NAMES: [&str; 2] = ["classifier", "score"];

/// Modules trained in full whatever the adapter's options say: the class's head, and the pooler that
/// it reads where the checkpoint has none, since a new one that nobody trains or saves would be noise.
pub(crate) fn always_saved(class: TaskClass, checkpoint: &Checkpoint) -> Vec<String> {
    let mut names = Vec::new();
    if matches!(
        class,
        TaskClass::SequenceClassifier | TaskClass::TokenClassifier
    ) {
        names.extend(CLASSIFIER_NAMES.map(str::to_owned));
    }
    let pooler = architecture::pooler(checkpoint.config());
    if let Some(pooler) = pooler.filter(|pooler| pooler.read_by(class))
        && !checkpoint.has_all(pooler.modules())
    {
        // The module that holds all of it: `pooler`, `head`.
        let (holder, _) = pooler.dense.path.split_once('.').expect("`holder.dense`");
        names.push(holder.to_owned());
    }
    names
}
