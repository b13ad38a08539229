//! The tensors of one pass: what its blocks keep, and what exists beside that.

use burn::tensor::DType;

use super::{Block, F32, MemoryModel, Output, PassDevice, PassShape};

/// Elements of logits that the fused cross-entropy holds at once, and the fewest rows of them.
const LOGITS_AT_ONCE: u64 = 1 << 22;
const ROWS_AT_ONCE: u64 = 16;
/// Bytes of a weight that products of stored bf16 hold packed.
const PACKED_BYTES: u64 = 2 << 20;
/// Elements of logits that the chunked cross-entropy holds at once.
const CHUNKED_LOGITS: u64 = 1 << 24;
/// Bytes of logits in f32 that the fused cross-entropy of a GPU holds at once.
const DEVICE_LOGITS_BYTES: u64 = 256 << 20;
/// The widest head of which attention on a GPU is computed in tiles.
const WIDEST_HEAD: u64 = 256;
/// Queries that a thread of the attention kernel works on at once.
const TILE: u64 = 64;

/// Tensors of one pass.
pub(super) struct Count<'a> {
    pub model: &'a MemoryModel,
    pub shape: PassShape,
    pub device: PassDevice,
}

impl Count<'_> {
    fn on_device(&self) -> bool {
        matches!(self.device, PassDevice::Device { .. })
    }

    /// Whether the activations are bf16 and multiplied as such on the host.
    fn multiplies_halves(&self) -> bool {
        let PassDevice::Host {
            multiplies_halves, ..
        } = self.device
        else {
            return false;
        };
        multiplies_halves && self.model.dtype == DType::BF16 && !self.model.quantized
    }

    /// Whether the heads are too wide for the kernels of attention on a GPU, which keep the output and a
    /// sum a row. Plain operations keep the scores.
    fn plain_attention(&self) -> bool {
        self.on_device() && self.model.head_dim > WIDEST_HEAD
    }

    /// Positions that the part of a block behind attention computes.
    fn selected(&self, index: usize) -> u64 {
        let last = index + 1 == self.model.blocks.len();
        match self.model.output {
            Output::Pooled { every_token: false } if last => self.shape.samples as u64,
            _ => self.shape.positions(),
        }
    }

    /// What block `index` keeps from its forward pass, its input included.
    pub fn kept(&self, index: usize) -> u64 {
        let block = &self.model.blocks[index];
        if !block.tracked {
            return 0;
        }
        let element = self.model.element();
        let positions = self.shape.positions();
        let selected = self.selected(index);
        let Block {
            hidden,
            query,
            key,
            heads,
            norms,
            ..
        } = *block;
        // Before attention's output layer: on all positions; behind it: on the selected ones.
        let mut early = hidden + 2 * query + 2 * key;
        if norms.before_attention && block.input_tracked {
            early += hidden;
        }
        let mut late = self.behind_attention(index);
        if block.norms_query {
            early += query + key;
        }
        if self.model.dora {
            // What is multiplied by the magnitudes; with dropout what is dropped and what is not.
            late += block.adapted_outputs;
            late += match self.model.dropout {
                true => 2 * block.adapted_inputs,
                false => 0,
            };
        }
        let mut bytes = element * (positions * early + selected * late);
        if let Some(entries) = block.relative {
            // The scores of all pairs after the softmax, which of them are visible, and the table's keys
            // and queries.
            bytes += self.pairs(heads) * element + self.pairs(1) + 2 * element * entries * hidden;
        }
        bytes += F32 * (positions * heads + selected * block.ranks);
        if self.plain_attention() && block.relative.is_none() {
            // Scores after the softmax in f32 and as they are multiplied, their mask, and the keys
            // and values spread over the query heads.
            bytes += self.pairs(heads) * (F32 + element + 1);
            bytes += element * positions * 2 * (query - key);
        }
        bytes
    }

    /// What each position behind attention keeps: what the feed-forward block reads and computes, and
    /// what norms read.
    fn behind_attention(&self, index: usize) -> u64 {
        let block = &self.model.blocks[index];
        let norms = block.norms;
        let read = if block.parallel { 0 } else { 1 };
        let normed = [norms.before_mlp, norms.on[0], norms.on[1]];
        let normed = normed.into_iter().chain(norms.after);
        let states = read + normed.filter(|norm| *norm).count() as u64;
        states * block.hidden + if block.gated { 3 } else { 2 } * block.intermediate
    }

    /// Every position of a row with every other, for each head.
    fn pairs(&self, heads: u64) -> u64 {
        self.shape.rows as u64 * heads * (self.shape.seq as u64).pow(2)
    }

    /// For the whole pass: rotary tables, places in the table of relative positions, and embeddings on
    /// their way to the width of the blocks.
    pub fn tables(&self) -> u64 {
        let rotary = 2 * self.shape.positions() * self.model.rotated * self.model.element();
        let relative = self
            .model
            .blocks
            .iter()
            .find(|block| block.relative.is_some());
        let embeddings = self.shape.positions() * self.model.projected * self.model.element();
        rotary + embeddings + relative.map_or(0, |block| 2 * 4 * self.pairs(block.heads))
    }

    /// The input of the norm behind the blocks.
    pub fn last_norm(&self) -> u64 {
        let last = self.selected(self.model.blocks.len().saturating_sub(1));
        match self.model.norm_last {
            true => last * self.model.hidden * self.model.element(),
            false => 0,
        }
    }

    /// What exists beside the kept tensors while the loss is computed.
    pub fn loss(&self) -> u64 {
        let MemoryModel { hidden, vocab, .. } = *self.model;
        let element = self.model.element();
        let positions = self.shape.positions();
        match self.model.output {
            Output::Vocabulary { fused: true } if self.on_device() => {
                let rows = (DEVICE_LOGITS_BYTES / (F32 * vocab)).clamp(1, positions);
                // Logits and the gradient as it is multiplied; the states' gradient by chunks and whole.
                rows * vocab * (F32 + element) + 2 * positions * hidden * element
            }
            Output::Vocabulary { fused: true } if self.multiplies_halves() => {
                let rows = (LOGITS_AT_ONCE / 2 / vocab).clamp(1, positions);
                let rows = rows.max(ROWS_AT_ONCE.min(positions));
                // As below; rounded slopes, and those packed.
                positions * hidden * (element + F32)
                    + rows * (vocab * (F32 + 2 * element) + hidden * (F32 + 2 * element))
                    + PACKED_BYTES.min(element * hidden * vocab)
            }
            Output::Vocabulary { fused: true } => {
                let rows = (LOGITS_AT_ONCE / vocab).clamp(1, positions);
                let rows = rows.max(ROWS_AT_ONCE.min(positions));
                let wide = match self.model.dtype {
                    DType::F32 => 0,
                    // Widened states and weights.
                    _ => F32 * hidden * (positions + vocab),
                };
                // States, their gradient, and a chunk with its rows in and out.
                positions * hidden * (element + F32) + F32 * rows * (vocab + 2 * hidden) + wide
            }
            Output::Vocabulary { .. } => {
                let rows = (CHUNKED_LOGITS / vocab).clamp(1, positions);
                // Logits, their softmax and the gradients of both.
                2 * positions * hidden * element + 4 * F32 * rows * vocab
            }
            Output::Pooled { every_token: true } => {
                // The states in f32, and the weights of each sample's positions.
                let wide = if element < F32 { F32 } else { 0 };
                positions * hidden * (element + wide) + self.shape.samples as u64 * positions * F32
            }
            Output::Pooled { .. } | Output::States => 0,
        }
    }

    /// What exists beside the kept tensors where the backward pass of a block begins: the gradient
    /// of its output and those of its widest states, with copies for dropout; where all but some
    /// positions are left out behind attention, attention's gradients.
    pub fn backward(&self, index: usize) -> u64 {
        let block = &self.model.blocks[index];
        let Block {
            hidden,
            query,
            key,
            intermediate: wide,
            gated,
            norms,
            ..
        } = *block;
        let element = self.model.element();
        let (positions, selected) = (self.shape.positions(), self.selected(index));
        let dropped = u64::from(self.model.dropout && block.ranks > 0);
        let half_on_host = element < F32 && !self.on_device();
        // A norm at the block's end has given back its input, as wide as the gradient.
        let residual = element * if norms.after[1] { 0 } else { hidden };
        let late = match half_on_host {
            false => element * wide * (1 + dropped) + residual,
            true => {
                // Kernels widen what was kept and give the narrow copy back: the operands of the
                // last product with its result, or the activation's states with their gradients.
                let product = match self.multiplies_halves() {
                    // The packed gradient and the result, or both parts of it before they are added.
                    true => element * hidden + (element + dropped * (2 * F32 - element)) * wide,
                    false => F32 * (hidden + wide * (2 + dropped)) - element * wide,
                };
                // Computed as it is stored: the gradient and those of its inputs.
                let activation = element * wide * if gated { 3 } else { 2 };
                product.max(activation) + residual
            }
        };
        let early = match half_on_host {
            false => element * (hidden + 2 * query + 2 * key),
            // Widened: of the kernel query, key, value and gradient, of a product with scores one of them
            // and its result.
            true => {
                let wide = if block.relative.is_some() { 2 } else { 4 };
                (wide * F32 - 2 * element) * (query + key) + element * 2 * hidden
            }
        };
        // The gradient of a part of a product is as wide as the product.
        let late = match block.fused[1] {
            true => late.max(4 * element * wide + residual),
            false => late,
        };
        let early = match block.fused[0] {
            true => {
                let product = query + 2 * key;
                let widened = if half_on_host { F32 } else { element };
                early.max((2 * element + widened) * product + element * hidden)
            }
            false => early,
        };
        // Beside what the blocks after this one gave, what the feed-forward block gave waits.
        let early = early + if block.parallel { element * hidden } else { 0 };
        // Of the scores of relative positions: the gradient and its transpose, or widened the gradient and
        // the weights.
        let scores = match block.relative {
            Some(_) => 2 * F32 * self.pairs(block.heads),
            None => 0,
        };
        // When attention's turn comes, what stood behind it is gone.
        let gone = element * selected * self.behind_attention(index);
        let mut bytes = (selected * late).max((positions * early + scores).saturating_sub(gone));
        if self.multiplies_halves() {
            bytes += PACKED_BYTES.min(element * hidden * wide);
        } else if half_on_host && !self.model.quantized {
            bytes += F32 * hidden * wide;
        }
        if let PassDevice::Device { dequantizes } = self.device
            && self.model.quantized
        {
            // The widest weight as it is multiplied; DoRA reads it in f32.
            let value = match (self.model.dora, dequantizes) {
                (true, _) => F32,
                (false, true) => element,
                (false, false) => 0,
            };
            bytes += value * hidden * wide;
        }
        if let PassDevice::Host { threads, .. } = self.device {
            let seq = self.shape.seq as u64;
            bytes += threads as u64 * F32 * seq * 2 * (TILE + self.model.head_dim);
        }
        bytes
    }
}
