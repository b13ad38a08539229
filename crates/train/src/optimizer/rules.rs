//! Learning rate and weight decay of each trainable tensor. Nothing else decides them.

use std::fmt::Display;

use burn::tensor::Tensor;
use calor_model::{ParameterGroup, ParameterVisitor};
use regex::Regex;

use super::Parameters;
use crate::TrainError;
use crate::recipe::TrainSection;

/// PyTorch's `AdamW` decays by this where nothing is said.
const WEIGHT_DECAY: f64 = 0.01;

/// Peak learning rates by what a tensor belongs to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRates {
    /// Of adapter tensors.
    pub adapter: f64,
    /// Of the head and other tensors trained in full.
    pub head: f64,
    /// Of modality encoders.
    pub encoder: f64,
    /// Of what makes soft tokens of their output.
    pub projector: f64,
    /// Other rates for one half of each low-rank pair.
    pub lora_plus: Option<LoraPlus>,
}

/// LoRA+ (Hayou et al. 2024): `lora_B` learns faster than `lora_A`. As PEFT's
/// `create_loraplus_optimizer` groups an adapter: what has one dimension, trained biases and DoRA's
/// magnitudes, learns as `lora_B`, and both halves of a pair on an embedding at a rate of their own.
/// Heads keep theirs, where PEFT gives their biases the rate of `lora_B`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraPlus {
    /// What the rate of the tensor's group is multiplied with.
    pub ratio: f64,
    /// The rate of pairs on embeddings.
    pub embedding: f64,
}

impl LoraPlus {
    fn rate(self, name: &str, rate: f64) -> f64 {
        let name = name.strip_suffix(".weight").unwrap_or(name);
        if name.contains(".lora_embedding_") {
            self.embedding
        } else if [".lora_B", ".bias", ".lora_magnitude_vector"]
            .iter()
            .any(|end| name.ends_with(end))
        {
            rate * self.ratio
        } else {
            rate
        }
    }
}

impl LearningRates {
    /// One rate for all.
    pub fn uniform(rate: f64) -> LearningRates {
        LearningRates {
            adapter: rate,
            head: rate,
            encoder: rate,
            projector: rate,
            lora_plus: None,
        }
    }

    /// What a recipe's keys say.
    pub fn from_recipe(train: &TrainSection) -> LearningRates {
        let head = train.head_learning_rate.unwrap_or(train.learning_rate);
        LearningRates {
            adapter: train.learning_rate,
            head,
            encoder: train.encoder_learning_rate.unwrap_or(head),
            projector: train.projector_learning_rate.unwrap_or(head),
            lora_plus: train.lora_plus_ratio.map(|ratio| LoraPlus {
                ratio,
                embedding: train.lora_plus_embedding_learning_rate,
            }),
        }
    }

    /// Of one tensor, by its key in the adapter file.
    pub fn of(self, name: &str, group: ParameterGroup) -> f64 {
        match group {
            ParameterGroup::Adapter => match self.lora_plus {
                Some(lora_plus) => lora_plus.rate(name, self.adapter),
                None => self.adapter,
            },
            ParameterGroup::Head => self.head,
            ParameterGroup::Encoder => self.encoder,
            ParameterGroup::Projector => self.projector,
        }
    }
}

/// What one tensor is updated with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorRule {
    /// The learning rate, at its peak or of a step.
    pub learning_rate: f64,
    /// The weight decay.
    pub weight_decay: f64,
}

impl TensorRule {
    /// The rule of a step whose schedule stands at `factor`.
    pub fn at(self, factor: f64) -> TensorRule {
        TensorRule {
            learning_rate: self.learning_rate * factor,
            ..self
        }
    }
}

/// The rule of every tensor.
#[derive(Clone, Debug)]
pub struct TensorRules {
    rates: LearningRates,
    weight_decay: f64,
    /// Whether tensors of one dimension are decayed.
    decay_vectors: bool,
    groups: Vec<Group>,
}

/// `[[train.groups]]`.
#[derive(Clone, Debug)]
struct Group {
    pattern: Regex,
    learning_rate: Option<f64>,
    weight_decay: Option<f64>,
}

impl TensorRules {
    /// One rate for all, with PyTorch's weight decay.
    pub fn uniform(rate: f64) -> TensorRules {
        TensorRules::new(LearningRates::uniform(rate), WEIGHT_DECAY)
    }

    /// Rates and a weight decay for all.
    pub fn new(rates: LearningRates, weight_decay: f64) -> TensorRules {
        TensorRules {
            rates,
            weight_decay,
            decay_vectors: true,
            groups: Vec::new(),
        }
    }

    /// What a recipe asks for.
    ///
    /// # Errors
    /// A pattern that is no regular expression.
    pub fn from_recipe(train: &TrainSection) -> Result<TensorRules, TrainError> {
        let groups = train.groups.iter().map(|group| {
            Ok(Group {
                pattern: Regex::new(&group.pattern)
                    .map_err(|error| wrong(&group.pattern, error))?,
                learning_rate: group.learning_rate,
                weight_decay: group.weight_decay,
            })
        });
        Ok(TensorRules {
            decay_vectors: train.decay_vectors,
            groups: groups.collect::<Result<_, TrainError>>()?,
            ..TensorRules::new(LearningRates::from_recipe(train), train.weight_decay)
        })
    }

    /// The rule of a tensor, its learning rate at the peak. The first group whose pattern is found in
    /// the name counts; what the group does not say is as without it.
    pub fn of(&self, name: &str, group: ParameterGroup, dimensions: usize) -> TensorRule {
        let given = self
            .groups
            .iter()
            .find(|group| group.pattern.is_match(name));
        let weight_decay = match dimensions {
            0 | 1 if !self.decay_vectors => 0.0,
            _ => self.weight_decay,
        };
        TensorRule {
            learning_rate: given
                .and_then(|group| group.learning_rate)
                .unwrap_or_else(|| self.rates.of(name, group)),
            weight_decay: given
                .and_then(|group| group.weight_decay)
                .unwrap_or(weight_decay),
        }
    }

    /// Whether every group has a tensor.
    ///
    /// # Errors
    /// The pattern of a group that decides about no tensor.
    pub fn check<P: Parameters>(&self, parameters: &mut P) -> Result<(), TrainError> {
        struct Names(Vec<String>);
        impl ParameterVisitor for Names {
            fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, _: &mut Tensor<D>) {
                self.0.push(name.to_owned());
            }
        }
        let mut names = Names(Vec::new());
        parameters.visit_parameters(&mut names);
        let names = names.0;
        for (index, group) in self.groups.iter().enumerate() {
            let mut matched = names.iter().filter(|name| group.pattern.is_match(name));
            let Some(first) = matched.clone().next() else {
                let example = names.first().map_or("", String::as_str);
                return Err(wrong(
                    group.pattern.as_str(),
                    format_args!("matches no trained tensor; they have names like `{example}`"),
                ));
            };
            let earlier = |name: &String| {
                self.groups[..index]
                    .iter()
                    .any(|group| group.pattern.is_match(name))
            };
            if matched.all(earlier) {
                return Err(wrong(
                    group.pattern.as_str(),
                    format_args!(
                        "decides about no tensor: `{first}` and what else it matches belong to groups above it; put it first"
                    ),
                ));
            }
        }
        Ok(())
    }
}

fn wrong(pattern: &str, problem: impl Display) -> TrainError {
    TrainError::ParameterGroup {
        pattern: pattern.to_owned(),
        problem: problem.to_string(),
    }
}
