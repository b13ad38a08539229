//! The key-value cache: what a language model keeps of a text that it continues, so that each new
//! token costs one position and not all of them.

use std::cell::RefCell;

use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Tensor, TensorData};
use calor_kernels::AttentionOptions;
use calor_kernels::reference::soft_cap;

use crate::head::{Head, HeadOptions};
use crate::model::Model;
use crate::run::{Mode, ModelInput, Selection};
use crate::weights::integer_tensor;

/// Keys and values of some texts, one a row, of each layer.
///
/// Texts of different lengths stand in one cache: [`Model::extend`] fills up the shorter ones on
/// their left, and nothing ever sees that padding.
#[derive(Debug, Default)]
pub struct KeyValueCache {
    state: RefCell<State>,
}

/// The cache as the layers see it, which take their turns one after the other.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Keys and values of each layer, `[batch, columns, kv_heads, head_dim]`.
    layers: Vec<(Tensor<4>, Tensor<4>)>,
    /// The layer whose turn it is.
    next_layer: usize,
    /// Of each text, the place of the token in every column; `None` in padding.
    places: Vec<Vec<Option<usize>>>,
    /// Columns that the current pass adds.
    added: usize,
    /// What the added columns see, `[batch, 1, added, columns]`, by window.
    visible: Vec<(Option<usize>, Tensor<4, Bool>)>,
}

impl KeyValueCache {
    /// An empty cache; the first call of [`Model::extend`] says how many texts it is for.
    pub fn new() -> KeyValueCache {
        KeyValueCache::default()
    }

    /// Tokens of each text so far.
    pub fn lengths(&self) -> Vec<usize> {
        self.state.borrow().lengths()
    }
}

impl Model {
    /// Reads on: `tokens` follow what the cache holds of each text. Returns the logits of the token
    /// after the last one, `[batch, vocab]`.
    ///
    /// # Panics
    /// When the model was built without [`HeadOptions::CausalLm`] or with streams of modality
    /// items, when there is no text or one gets no token, or when their number is not the cache's.
    pub fn extend(&self, cache: &mut KeyValueCache, tokens: &[Vec<u32>]) -> Tensor<2> {
        assert!(
            self.options().head == HeadOptions::CausalLm && self.options().fusion.is_none(),
            "only a language model of text is continued"
        );
        let batch = tokens.len();
        assert!(
            batch > 0 && tokens.iter().all(|text| !text.is_empty()),
            "every text needs a token"
        );
        let seq = tokens.iter().map(Vec::len).max().unwrap_or(0);
        let (mut ids, mut positions, mut segments) = (Vec::new(), Vec::new(), Vec::new());
        {
            let state = cache.state.get_mut();
            if state.places.is_empty() {
                state.places = vec![Vec::new(); batch];
            }
            assert_eq!(state.places.len(), batch, "the cache is for other texts");
            let lengths = state.lengths();
            for ((text, length), places) in tokens.iter().zip(lengths).zip(&mut state.places) {
                let padding = seq - text.len();
                ids.extend(std::iter::repeat_n(0, padding));
                ids.extend(text.iter().map(|&token| token as i32));
                positions.extend(std::iter::repeat_n(0, padding));
                segments.extend(std::iter::repeat_n(0, padding));
                places.extend(std::iter::repeat_n(None, padding));
                for place in length..length + text.len() {
                    positions.push(place as i32);
                    segments.push(1);
                    places.push(Some(place));
                }
            }
            state.added = seq;
            state.next_layer = 0;
            state.visible.clear();
        }
        let device = self.device();
        let matrix = |values: Vec<i32>| integer_tensor(values, device).reshape([batch, seq]);
        let input = ModelInput {
            input_ids: matrix(ids),
            positions: matrix(positions),
            segments: matrix(segments),
            samples: Vec::new(),
            soft: None,
        };
        let last = (1..=batch).map(|row| (row * seq - 1) as i32).collect();
        let selection = Selection::of_places(integer_tensor(last, device));
        let hidden = self.run_cached(&input, &selection, &cache.state);
        debug_assert!(matches!(self.head, Head::CausalLm { .. }));
        let (linear, weight) = self.output_layer();
        let logits = self.capped(linear.forward_with(hidden, &weight, Mode::Infer));
        let vocab = logits.dims()[2];
        logits.reshape([batch, vocab])
    }
}

impl State {
    fn lengths(&self) -> Vec<usize> {
        let tokens = |places: &Vec<Option<usize>>| places.iter().flatten().count();
        self.places.iter().map(tokens).collect()
    }

    /// Attention of new tokens to all tokens of their text so far, after adding the new ones.
    ///
    /// Queries are `[batch, seq, heads, head_dim]`, keys and values `[batch, seq, kv_heads,
    /// head_dim]`; returns `[batch, seq, heads, head_dim]`.
    pub fn attend(
        &mut self,
        query: Tensor<4>,
        key: Tensor<4>,
        value: Tensor<4>,
        options: &AttentionOptions,
    ) -> Tensor<4> {
        let layer = self.next_layer;
        self.next_layer += 1;
        let (key, value) = match self.layers.get(layer) {
            Some((keys, values)) => (
                Tensor::cat(vec![keys.clone(), key], 1),
                Tensor::cat(vec![values.clone(), value], 1),
            ),
            None => (key, value),
        };
        match self.layers.get_mut(layer) {
            Some(kept) => *kept = (key.clone(), value.clone()),
            None => self.layers.push((key.clone(), value.clone())),
        }
        let [batch, seq, heads, head_dim] = query.dims();
        let [_, columns, kv_heads, _] = key.dims();
        let shared = heads / kv_heads;
        // The query heads that read one key-value head stand below each other, so that keys and
        // values need not be repeated.
        let query = query
            .swap_dims(1, 2)
            .reshape([batch, kv_heads, shared * seq, head_dim]);
        let visible = self.visible(options.window, &query).repeat_dim(2, shared);
        let scores = calor_kernels::matmul(query, key.swap_dims(1, 2).swap_dims(2, 3))
            .mul_scalar(options.scale);
        let scores = match options.soft_cap {
            Some(cap) => soft_cap(scores, cap),
            None => scores,
        };
        let scores = scores.mask_fill(visible.bool_not().repeat_dim(1, kv_heads), -1e30);
        debug_assert_eq!(scores.dims(), [batch, kv_heads, shared * seq, columns]);
        calor_kernels::matmul(softmax(scores, 3), value.swap_dims(1, 2))
            .reshape([batch, heads, seq, head_dim])
            .swap_dims(1, 2)
    }

    /// Whether a new token sees a column: one of its text, not later than itself, and within the
    /// window.
    fn visible(&mut self, window: Option<usize>, like: &Tensor<4>) -> Tensor<4, Bool> {
        if let Some((_, visible)) = self.visible.iter().find(|(of, _)| *of == window) {
            return visible.clone();
        }
        let mut values = Vec::new();
        for places in &self.places {
            for query in &places[places.len() - self.added..] {
                values.extend(places.iter().map(|key| match (query, key) {
                    (Some(query), Some(key)) => {
                        key <= query && window.is_none_or(|window| query - key < window)
                    }
                    _ => false,
                }));
            }
        }
        let columns = self.places.first().map_or(0, Vec::len);
        let shape = [self.places.len(), 1, self.added, columns];
        let visible = Tensor::from_data(TensorData::new(values, shape), &like.device());
        self.visible.push((window, visible.clone()));
        visible
    }
}
