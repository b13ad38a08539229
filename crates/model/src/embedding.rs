//! The embedding of the vocabulary: looked up, with a low-rank pair on it, or with some of its rows
//! trained.

use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};

use crate::error::ModelError;
use crate::parameter::{Parameter, ParameterKind, Visit};

/// Rows of a table by token number.
#[derive(Debug, Clone)]
pub(crate) struct TokenEmbedding {
    /// `[vocab, hidden]`
    pub weight: Parameter<2>,
    /// The padding token's number.
    pub padding: Option<u32>,
    pub pair: Option<EmbeddingPair>,
    pub rows: Option<TrainedRows>,
}

/// Adds `scaling · (B · A)ᵀ` to the table: a token's row of `Aᵀ`, through `Bᵀ`. Without dropout, as in
/// PEFT.
#[derive(Debug, Clone)]
pub(crate) struct EmbeddingPair {
    /// `[rank, vocab]`
    pub a: Parameter<2>,
    /// `[hidden, rank]`
    pub b: Parameter<2>,
    pub scaling: f32,
}

/// Rows that take the place of the table's, PEFT's `trainable_tokens_delta`: values, not differences.
#[derive(Debug, Clone)]
pub(crate) struct TrainedRows {
    /// `[tokens, hidden]`, f32
    pub values: Parameter<2>,
    /// Which tokens, `[tokens]`.
    tokens: Tensor<1, Int>,
    /// For each token of the vocabulary its place among them, counted from 1; 0 for the others.
    places: Tensor<1, Int>,
}

impl TokenEmbedding {
    /// `ids` `[batch, seq]`, returns `[batch, seq, hidden]`.
    ///
    /// As in PyTorch, looking up the padding token moves its row by nothing: that matters where the
    /// embedding is trained, or where its gradient is compared.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, seq] = ids.dims();
        let count = batch * seq;
        let ids = ids.reshape([count]);
        let hidden = self.weight.tensor.dims()[1];
        let mut rows = self.weight.tensor.clone().select(0, ids.clone());
        let dtype = rows.dtype();
        if let Some(pair) = &self.pair {
            let low = pair.a.matching(dtype).select(1, ids.clone()).transpose();
            let added = calor_kernels::matmul(low, pair.b.matching(dtype).transpose());
            rows = rows + added.mul_scalar(pair.scaling);
        }
        if let Some(trained) = &self.rows {
            let places = trained.places.clone().select(0, ids.clone());
            let replaced = places
                .clone()
                .greater_elem(0)
                .reshape([count, 1])
                .repeat_dim(1, hidden);
            let places = places.sub_scalar(1).clamp_min(0);
            let values = trained.values.matching(dtype).select(0, places);
            rows = rows.mask_where(replaced, values);
        }
        if let Some(padding) = self.padding
            && rows.is_tracked()
        {
            let is_padding = ids
                .equal_elem(padding as i32)
                .reshape([count, 1])
                .repeat_dim(1, hidden);
            let constant = rows.clone().detach();
            rows = rows.mask_where(is_padding, constant);
        }
        rows.reshape([batch, seq, hidden])
    }

    /// The table an output layer multiplies with that is tied to it: with the trained rows, and
    /// without a pair, which PEFT adds where tokens are looked up and nowhere else.
    pub fn output_weight(&self) -> Parameter<2> {
        let Some(trained) = &self.rows else {
            return self.weight.clone();
        };
        let table = self.weight.tensor.clone();
        let before = table.clone().select(0, trained.tokens.clone());
        let change = trained.values.matching(table.dtype()) - before;
        Parameter {
            name: self.weight.name.clone(),
            tensor: table.select_assign(0, trained.tokens.clone(), change, IndexingUpdateOp::Add),
            kind: self.weight.kind,
            transposed: false,
        }
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        visitor.visit(&mut self.weight);
        if let Some(pair) = &mut self.pair {
            visitor.visit(&mut pair.a);
            visitor.visit(&mut pair.b);
        }
        if let Some(rows) = &mut self.rows {
            visitor.visit(&mut rows.values);
        }
    }
}

impl TrainedRows {
    /// The rows of `tokens` as they are in the table `[vocab, hidden]`.
    ///
    /// # Errors
    /// A token that the vocabulary has not, or one that is named twice.
    pub fn new(path: &str, table: &Tensor<2>, tokens: &[u32]) -> Result<TrainedRows, ModelError> {
        let vocab = table.dims()[0];
        let mut places = vec![0i32; vocab];
        for (index, token) in tokens.iter().enumerate() {
            let wrong = |problem: &str| {
                ModelError::options(format!(
                    "`trained_tokens` names the token {token}, {problem}"
                ))
            };
            let place = places
                .get_mut(*token as usize)
                .ok_or_else(|| wrong(&format!("and the embedding has {vocab}, from 0")))?;
            if *place != 0 {
                return Err(wrong("twice"));
            }
            *place = index as i32 + 1;
        }
        let device = table.device().inner();
        let numbers: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
        let integers = |values: Vec<i32>| {
            let length = values.len();
            Tensor::<1, Int>::from_data(TensorData::new(values, [length]), &device)
        };
        let tokens = integers(numbers);
        let values = table.clone().inner().select(0, tokens.clone());
        Ok(TrainedRows {
            values: Parameter::new(
                format!("{path}.token_adapter.trainable_tokens_delta"),
                values.cast(DType::F32),
                ParameterKind::Adapter,
            ),
            tokens,
            places: integers(places),
        })
    }
}
