//! Compares a model with stored results of Transformers, tensor by tensor.
//!
//! A reference file is safetensors with `input_ids` `[batch, seq]`, optionally `attention_mask`
//! (where it is 0 nothing is compared), and `logits` (`[batch, seq, vocab]`, or `[batch, labels]`
//! of a sequence classifier) or `last_hidden_state`; optionally `loss` `[1]`, the mean next-token
//! cross-entropy of `input_ids` against themselves, shifted, and `grad.<tensor name>` of that loss.
//! Beside `last_hidden_state`, `hidden_weights` of its shape make `grad.<tensor name>` those of the
//! states' sum weighted by them, so that encoders have gradients too.
//! `scripts/export_reference.py` writes such files (without `hidden_weights`).

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use serde::Serialize;

use crate::attention::Masking;
use crate::checkpoint::Checkpoint;
use crate::config::{Family, ModelConfig, ModelType};
use crate::error::ModelError;
use crate::head::{HeadOptions, Pooling, Problem};
use crate::model::{Model, ModelOptions};
use crate::parity_gradients::{Gather, Track};
use crate::run::{Mode, ModelInput, SampleSpan};
use crate::weights::TensorFile;

/// How far one tensor of ours is from the reference's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The tensor's name in the reference file.
    pub name: String,
    /// Its shape there.
    pub shape: Vec<usize>,
    /// Numbers compared; masked positions are left out.
    pub compared: usize,
    /// The largest absolute difference; NaN where one side is not finite.
    pub max_abs: f64,
    /// `max_abs` over the reference's largest magnitude.
    pub max_rel: f64,
    /// The largest magnitude among the reference's compared numbers.
    pub reference_max: f64,
    /// Whether `max_abs` is at most the tolerance times `reference_max`.
    pub within: bool,
}

/// Runs the checkpoint in `model_dir`, with a PEFT adapter on it where one is given, on the
/// reference's input and compares every result the reference holds, in f32.
///
/// `tolerance` is a fraction of each reference tensor's largest magnitude.
///
/// # Errors
/// A checkpoint, adapter or reference that cannot be read or that do not belong together.
pub fn compare(
    model_dir: &Path,
    adapter: Option<&Path>,
    reference: &Path,
    tolerance: f64,
    device: &Device,
) -> Result<Vec<Comparison>, ModelError> {
    let checkpoint = Checkpoint::open(model_dir)?;
    let reference = Reference::open(reference)?;
    let model = reference.model(&checkpoint, adapter, device)?;
    let input = reference.input(&model)?;
    let measure = Measure {
        reference: &reference,
        tolerance,
    };
    let mut comparisons = Vec::new();
    let inference = model.for_inference();
    if let Some(shape) = reference.shape("logits") {
        let logits = match shape.len() {
            3 => inference.logits(&input, Mode::Infer).into_data(),
            _ => inference
                .classify(&input, Mode::Infer, reference.masking())
                .into_data(),
        };
        comparisons.push(measure.compare("logits", logits)?);
    }
    if reference.shape("last_hidden_state").is_some() {
        let hidden = inference.hidden(&input, Mode::Infer).into_data();
        comparisons.push(measure.compare("last_hidden_state", hidden)?);
    }
    drop(inference);
    if reference.loss_wanted() {
        comparisons.extend(measure.loss_and_gradients(model, &input)?);
    } else if reference.gradients().next().is_some() {
        comparisons.extend(measure.hidden_gradients(model, &input)?);
    }
    Ok(comparisons)
}

/// An opened reference file.
struct Reference {
    file: TensorFile,
    batch: usize,
    seq: usize,
    input_ids: Vec<i64>,
    /// 1 where a token is, 0 where padding is.
    mask: Vec<i64>,
}

impl Reference {
    fn open(path: &Path) -> Result<Reference, ModelError> {
        let file = TensorFile::open(path)?;
        let wrong = |message: String| ModelError::Reference {
            path: path.to_owned(),
            message,
        };
        let known = |name: &str| {
            [
                "input_ids",
                "attention_mask",
                "logits",
                "last_hidden_state",
                "hidden_weights",
                "loss",
            ]
            .contains(&name)
                || name.starts_with("grad.")
        };
        if let Some((name, _)) = file.entries().find(|(name, _)| !known(name)) {
            return Err(wrong(format!(
                "has a tensor `{name}` that no comparison uses"
            )));
        }
        let Some(&[batch, seq]) = file.entry("input_ids").map(|entry| entry.shape.as_slice())
        else {
            return Err(wrong("has no `input_ids` of shape [batch, seq]".to_owned()));
        };
        if batch == 0 || seq == 0 {
            return Err(wrong("`input_ids` is empty".to_owned()));
        }
        let input_ids = file.integers("input_ids")?;
        let mask = match file.entry("attention_mask") {
            None => vec![1; batch * seq],
            Some(entry) if entry.shape == [batch, seq] => file.integers("attention_mask")?,
            Some(_) => {
                return Err(wrong(
                    "`attention_mask` has not the shape of `input_ids`".to_owned(),
                ));
            }
        };
        let reference = Reference {
            file,
            batch,
            seq,
            input_ids,
            mask,
        };
        let results = ["logits", "last_hidden_state", "loss"];
        if !results.iter().any(|name| reference.shape(name).is_some()) {
            return Err(wrong(
                "has neither `logits` nor `last_hidden_state` nor `loss`: nothing to compare"
                    .to_owned(),
            ));
        }
        Ok(reference)
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.file.entry(name).map(|entry| entry.shape.as_slice())
    }

    fn gradients(&self) -> impl Iterator<Item = &str> {
        self.file
            .entries()
            .filter_map(|(name, _)| name.strip_prefix("grad."))
    }

    fn loss_wanted(&self) -> bool {
        let gradients = self.gradients().next().is_some();
        self.shape("loss").is_some() || (gradients && self.shape("hidden_weights").is_none())
    }

    /// Whether results depend on what padding sees, which is a matter of Transformers' masks.
    fn masking(&self) -> Masking {
        match self.mask.iter().all(|&token| token != 0) {
            true => Masking::Segments,
            false => Masking::Transformers,
        }
    }

    fn wrong(&self, message: impl Into<String>) -> ModelError {
        ModelError::Reference {
            path: self.file.path().to_owned(),
            message: message.into(),
        }
    }

    fn model(
        &self,
        checkpoint: &Checkpoint,
        adapter: Option<&Path>,
        device: &Device,
    ) -> Result<Model, ModelError> {
        let labels = self
            .shape("logits")
            .filter(|shape| shape.len() == 2)
            .map(|shape| shape[1]);
        let language = self.loss_wanted() || (self.shape("logits").is_some() && labels.is_none());
        if labels.is_some() && self.loss_wanted() {
            return Err(self.wrong("`loss` and `grad.*` are those of a language model"));
        }
        if let Some(adapter) = adapter {
            let model = Model::load_with_adapter(checkpoint, adapter, FloatDType::F32, device)?;
            let fits = match model.options().head {
                HeadOptions::CausalLm => labels.is_none(),
                HeadOptions::Classifier { labels: ours, .. } => {
                    !language && labels.is_none_or(|labels| labels == ours)
                }
                HeadOptions::TokenClassifier { .. } => {
                    return Err(self.wrong("a token classifier's results are not compared"));
                }
                HeadOptions::None => !language && labels.is_none(),
            };
            return match fits {
                true => Ok(model),
                false => Err(self.wrong("its results are not those of the adapter's head")),
            };
        }
        let config = checkpoint.config();
        let head = match labels {
            Some(labels) => {
                let names = [
                    "score.weight",
                    "classifier.weight",
                    "classifier.out_proj.weight",
                ];
                let stored = names.iter().find_map(|name| checkpoint.shape(name));
                if stored.and_then(|shape| shape.first()) != Some(&labels) {
                    return Err(self.wrong(format!(
                        "has logits of {labels} labels, but the checkpoint has no such classifier; \
                         name the adapter that has it"
                    )));
                }
                HeadOptions::Classifier {
                    labels,
                    pooling: Pooling::default_for(config.family()),
                    // Nothing here depends on what the logits mean.
                    problem: Problem::Regression,
                }
            }
            None if language => HeadOptions::CausalLm,
            None => HeadOptions::None,
        };
        let options = ModelOptions {
            head,
            ..ModelOptions::default()
        };
        Model::load(checkpoint, &options, device)
    }

    fn input(&self, model: &Model) -> Result<ModelInput, ModelError> {
        let config = model.config();
        let vocab = config.vocab_size();
        if let Some(id) = self
            .input_ids
            .iter()
            .find(|&&id| usize::try_from(id).map_or(true, |id| id >= vocab))
        {
            return Err(self.wrong(format!(
                "`input_ids` holds {id}, the model's vocabulary has {vocab} entries"
            )));
        }
        if let Some(limit) = config.position_limit().filter(|limit| self.seq > *limit) {
            return Err(self.wrong(format!(
                "its sequences have {} tokens, the model takes {limit}",
                self.seq
            )));
        }
        let device = model.device();
        let tensor = |values: Vec<i32>| -> Tensor<2, Int> {
            Tensor::from_data(TensorData::new(values, [self.batch, self.seq]), device)
        };
        let narrow = |values: &[i64]| values.iter().map(|&value| value as i32).collect();
        let segments = self.mask.iter().map(|&token| i32::from(token != 0));
        Ok(ModelInput {
            input_ids: tensor(narrow(&self.input_ids)),
            positions: tensor(self.positions(config)),
            segments: tensor(segments.collect()),
            samples: (0..self.batch)
                .map(|row| self.pooled_token(row, config))
                .collect(),
            soft: None,
        })
    }

    /// Positions as Transformers gives them when it is not told: by place in the row, whatever the
    /// mask; RoBERTa's count the tokens that are not padding by their number, and padding stays
    /// at its own position, one before the first.
    fn positions(&self, config: &ModelConfig) -> Vec<i32> {
        let padding = match config.model_type {
            ModelType::Roberta => config.pad_token_id.map(i64::from),
            _ => None,
        };
        let mut positions = Vec::with_capacity(self.batch * self.seq);
        for row in self.input_ids.chunks_exact(self.seq) {
            let mut next = 0;
            for &id in row {
                if padding == Some(id) {
                    positions.push(-1);
                } else {
                    positions.push(next);
                    next += 1;
                }
            }
        }
        positions
    }

    /// The token whose state Transformers' classifier reads: the first for encoders, for decoders
    /// the last whose number is not that of padding; all tokens where it reads their mean.
    fn pooled_token(&self, row: usize, config: &ModelConfig) -> SampleSpan {
        let places = row * self.seq..(row + 1) * self.seq;
        if config.family() == Family::Encoder && config.design.classifier.mean {
            let mask = &self.mask[places];
            return SampleSpan {
                row,
                start: mask.iter().position(|&token| token != 0).unwrap_or(0),
                length: mask.iter().filter(|&&token| token != 0).count().max(1),
            };
        }
        let ids = &self.input_ids[places];
        let start = match (config.family(), config.pad_token_id) {
            (Family::Encoder, _) => 0,
            (Family::Decoder, None) => self.seq - 1,
            (Family::Decoder, Some(padding)) => ids
                .iter()
                .rposition(|&id| id != i64::from(padding))
                .unwrap_or(0),
        };
        SampleSpan {
            row,
            start,
            length: 1,
        }
    }
}

/// Compares with one reference file.
struct Measure<'a> {
    reference: &'a Reference,
    tolerance: f64,
}

impl Measure<'_> {
    fn compare(&self, name: &str, ours: TensorData) -> Result<Comparison, ModelError> {
        let reference = self.reference;
        let shape = reference.shape(name).expect("asked for by name").to_vec();
        if ours.shape().as_slice() != shape {
            return Err(reference.wrong(format!(
                "`{name}` has shape {shape:?}, the model gives {:?}",
                ours.shape().as_slice()
            )));
        }
        let theirs = reference.file.floats(name)?;
        let ours: Vec<f32> = ours
            .try_to_vec()
            .map_err(|error| reference.wrong(format!("`{name}`: {error}")))?;
        // Per-token results are not compared where padding is.
        let per_token = shape.len() == 3 && !name.starts_with("grad.");
        let width = if per_token { shape[2] } else { 1 };
        let compared = |index: usize| !per_token || reference.mask[index / width] != 0;
        let mut comparison = Comparison {
            name: name.to_owned(),
            shape,
            compared: 0,
            max_abs: 0.0,
            max_rel: 0.0,
            reference_max: 0.0,
            within: false,
        };
        for (index, (&ours, &theirs)) in ours.iter().zip(&theirs).enumerate() {
            if !compared(index) {
                continue;
            }
            comparison.compared += 1;
            let difference = (f64::from(ours) - f64::from(theirs)).abs();
            // `max` drops NaN, which must not pass for agreement.
            if difference.is_nan() || comparison.max_abs.is_nan() {
                comparison.max_abs = f64::NAN;
            } else {
                comparison.max_abs = comparison.max_abs.max(difference);
            }
            comparison.reference_max = comparison.reference_max.max(f64::from(theirs).abs());
        }
        comparison.max_rel = match comparison.max_abs {
            0.0 => 0.0,
            max_abs => max_abs / comparison.reference_max,
        };
        comparison.within = comparison.max_abs <= self.tolerance * comparison.reference_max;
        Ok(comparison)
    }

    fn loss_and_gradients(
        &self,
        mut model: Model,
        input: &ModelInput,
    ) -> Result<Vec<Comparison>, ModelError> {
        let reference = self.reference;
        self.track(&mut model);
        let hidden = model.hidden_masked(input, Mode::Infer, reference.masking());
        let targets = self.targets();
        let supervised = reference.batch * (reference.seq - 1);
        let loss = model.causal_lm_loss_of(
            hidden,
            crate::weights::integer_tensor(targets, model.device()),
            Mode::Infer,
        ) / supervised as f32;
        let mut comparisons = Vec::new();
        if reference.shape("loss").is_some() {
            comparisons.push(self.compare("loss", loss.clone().inner().into_data())?);
        }
        if reference.gradients().next().is_some() {
            comparisons.extend(self.gradients(&mut model, loss)?);
        }
        Ok(comparisons)
    }

    /// Gradients of the hidden states' weighted sum.
    fn hidden_gradients(
        &self,
        mut model: Model,
        input: &ModelInput,
    ) -> Result<Vec<Comparison>, ModelError> {
        let reference = self.reference;
        self.track(&mut model);
        let hidden = model.hidden(input, Mode::Infer);
        let weights = reference.file.floats("hidden_weights")?;
        let shape = hidden.dims();
        if reference.shape("hidden_weights") != Some(&shape) {
            return Err(reference.wrong(format!(
                "`hidden_weights` has not the shape {shape:?} of the model's hidden states"
            )));
        }
        let weights = Tensor::<3>::from_data(TensorData::new(weights, shape), model.device());
        self.gradients(&mut model, (hidden * weights).sum())
    }

    /// Makes leaves of the tensors whose gradients the reference has.
    fn track(&self, model: &mut Model) {
        model.visit(&mut Track {
            names: self.reference.gradients().collect(),
        });
    }

    fn gradients(&self, model: &mut Model, loss: Tensor<1>) -> Result<Vec<Comparison>, ModelError> {
        let reference = self.reference;
        let mut wanted: BTreeMap<String, Option<TensorData>> = reference
            .gradients()
            .map(|name| (name.to_owned(), None))
            .collect();
        if !loss.is_tracked() {
            let names: Vec<&str> = wanted.keys().map(String::as_str).collect();
            return Err(reference.wrong(format!(
                "the model has no tensor called {}",
                names.join(", ")
            )));
        }
        let mut comparisons = Vec::new();
        let gradients = loss.backward();
        model.visit(&mut Gather {
            gradients: &gradients,
            wanted: &mut wanted,
        });
        for (name, gradient) in wanted {
            let gradient = gradient.ok_or_else(|| {
                reference.wrong(format!(
                    "the model has no tensor called `{name}` that its loss depends on"
                ))
            })?;
            comparisons.push(self.compare(&format!("grad.{name}"), gradient)?);
        }
        Ok(comparisons)
    }

    /// Transformers' shift: every token but the first of its row is a target, padding included.
    fn targets(&self) -> Vec<i32> {
        let mut targets = Vec::with_capacity(self.reference.input_ids.len());
        for row in self.reference.input_ids.chunks_exact(self.reference.seq) {
            targets.extend(row[1..].iter().map(|&id| id as i32));
            targets.push(calor_kernels::IGNORED_TARGET as i32);
        }
        targets
    }
}
