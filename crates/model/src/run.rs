//! One forward pass: what goes in, and which tokens are needed.

use std::cell::RefCell;

use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::attention::Masking;
use crate::cache::State;
use crate::embedding::TokenEmbedding;
use crate::fusion::{Replacement, SoftInput};
use crate::head::Pooling;
use crate::recompute::Recompute;
use crate::weights::integer_tensor;

/// One micro-batch on the device.
#[derive(Debug, Clone)]
pub struct ModelInput {
    /// Token numbers, `[batch, seq]`.
    pub input_ids: Tensor<2, Int>,
    /// A token's place in its segment, from 0, `[batch, seq]`.
    pub positions: Tensor<2, Int>,
    /// Which segment of its row a token belongs to, from 1; 0 is padding. `[batch, seq]`.
    pub segments: Tensor<2, Int>,
    /// Where each sample lies; at least one token each.
    pub samples: Vec<SampleSpan>,
    /// Modality items and the tokens whose places they take; only where the model was built with
    /// [`ModelOptions::fusion`](crate::ModelOptions::fusion). What does not fit the model makes
    /// every pass panic: see [`Model::check_soft`](crate::Model::check_soft).
    pub soft: Option<SoftInput>,
}

/// Where a sample lies in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleSpan {
    /// Row of the batch.
    pub row: usize,
    /// First token.
    pub start: usize,
    /// Number of tokens.
    pub length: usize,
}

/// Whether dropout is active. The frozen backbone always runs as in evaluation: the only dropout is
/// that of the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Training; the seed fixes every dropout mask of this forward pass.
    Train {
        /// Different for each micro-step.
        dropout_seed: u64,
    },
    /// Evaluation and prediction.
    Infer,
}

/// One forward pass: its input, its mode, and which tokens the last layer needs.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    pub input: &'a ModelInput,
    pub mode: Mode,
    pub masking: Masking,
    pub selection: Option<&'a Selection>,
    pub replacement: Option<&'a Replacement>,
    /// What the backward pass runs again; none outside training.
    pub recompute: Option<&'a Recompute>,
    /// Keys and values of the tokens before these, where a text is continued.
    pub cache: Option<&'a RefCell<State>>,
}

impl<'a> Run<'a> {
    /// Rows of the token embedding, `[batch, seq, width]`, times `scale`, or the soft tokens in
    /// their places.
    pub fn embed(&self, embedding: &TokenEmbedding, scale: Option<f64>) -> Tensor<3> {
        let embeddings = embedding.forward(self.input.input_ids.clone());
        let embeddings = match scale {
            Some(scale) => {
                let scale = rounded(scale, embeddings.dtype());
                embeddings.mul_scalar(scale)
            }
            None => embeddings,
        };
        match self.replacement {
            Some(replacement) => replacement.apply(embeddings),
            None => embeddings,
        }
    }

    /// The run of one layer: only the last may leave tokens out.
    pub fn layer(&self, last: bool) -> Run<'a> {
        Run {
            selection: self.selection.filter(|_| last),
            ..*self
        }
    }

    /// The tokens needed: `[1, samples, width]` of `[batch, seq, width]`, or all of them.
    pub fn select(&self, states: Tensor<3>) -> Tensor<3> {
        match self.selection {
            Some(selection) => selection.take(states),
            None => states,
        }
    }
}

/// A factor as Transformers has it: in the type of the tensor that it multiplies.
fn rounded(factor: f64, dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => half::bf16::from_f64(factor).to_f64(),
        DType::F16 => half::f16::from_f64(factor).to_f64(),
        _ => factor,
    }
}

/// The tokens that are needed: one a sample, or those at chosen places.
#[derive(Debug, Clone)]
pub(crate) struct Selection {
    /// Places in `[batch · seq]`.
    places: Tensor<1, Int>,
    count: usize,
}

impl Selection {
    pub fn new(input: &ModelInput, pooling: Pooling) -> Selection {
        let [_, seq] = input.input_ids.dims();
        let places = input
            .samples
            .iter()
            .map(|span| {
                let place = span.row * seq + span.start;
                match pooling {
                    Pooling::Last => place + span.length - 1,
                    _ => place,
                }
            })
            .map(|place| place as i32)
            .collect::<Vec<_>>();
        Selection {
            count: places.len(),
            places: integer_tensor(places, &input.input_ids.device()),
        }
    }

    /// Tokens by their places in `[batch · seq]`.
    pub fn of_places(places: Tensor<1, Int>) -> Selection {
        Selection {
            count: places.dims()[0],
            places,
        }
    }

    fn take(&self, states: Tensor<3>) -> Tensor<3> {
        let [batch, seq, width] = states.dims();
        states
            .reshape([batch * seq, width])
            .select(0, self.places.clone())
            .reshape([1, self.count, width])
    }
}

/// Mean of each sample's states, `[1, samples, hidden]`, as one product with a matrix of `1/length`.
pub(crate) fn mean_over_samples(hidden: Tensor<3>, samples: &[SampleSpan]) -> Tensor<3> {
    let [batch, seq, width] = hidden.dims();
    let mut weights = vec![0f32; samples.len() * batch * seq];
    for (index, span) in samples.iter().enumerate() {
        let start = index * batch * seq + span.row * seq + span.start;
        weights[start..start + span.length].fill(1.0 / span.length as f32);
    }
    let device = hidden.device().inner();
    let weights = Tensor::<2>::from_data(
        TensorData::new(weights, [samples.len(), batch * seq]),
        (&device, DType::F32),
    );
    let hidden = hidden.cast(DType::F32).reshape([batch * seq, width]);
    calor_kernels::matmul(weights, hidden).reshape([1, samples.len(), width])
}

/// The next token of each token inside its segment, −100 at a segment's end and in padding.
///
/// `input_ids` and `segments` are `[rows, seq]`, flat.
pub fn shifted_targets(input_ids: &[i32], segments: &[i32], rows: usize, seq: usize) -> Vec<i32> {
    let mut targets = vec![calor_kernels::IGNORED_TARGET as i32; rows * seq];
    for row in 0..rows {
        for column in 1..seq {
            let place = row * seq + column;
            if segments[place] != 0 && segments[place] == segments[place - 1] {
                targets[place - 1] = input_ids[place];
            }
        }
    }
    targets
}
