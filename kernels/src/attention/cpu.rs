//! Attention on the CPU in tiles of queries: each tile's scores live only while they are used, the
//! backward pass computes them again from the log-sum-exp (Dao et al. 2022).

use burn::tensor::{Int, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::AttentionOptions;
use crate::cpu::elementary::{dot, exp_sum, maximum, tanh, vectorized, zeros};
use crate::cpu::matrix::{Threads, View, multiply};
use crate::cpu::operation::{Operation, apply, dims, input, integers, tensor, values};

/// Most queries of a tile.
const TILE: usize = 128;

pub(super) fn dispatch(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    segments: Tensor<2, Int>,
    options: &AttentionOptions,
) -> Tensor<4> {
    let seq = query.dims()[1];
    let operation = Attention {
        runs: runs(&integers(segments), seq),
        options: *options,
    };
    apply(operation, [input(query), input(key), input(value)])
}

/// A segment: its first token, counted over all rows, and its length.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Run {
    start: usize,
    length: usize,
}

/// The segments of all rows; padding belongs to none.
fn runs(segments: &[i32], seq: usize) -> Vec<Run> {
    let mut runs = Vec::new();
    for (row, segments) in segments.chunks(seq.max(1)).enumerate() {
        let mut first = 0;
        for same in segments.chunk_by(|left, right| left == right) {
            if same[0] > 0 {
                runs.push(Run {
                    start: row * seq + first,
                    length: same.len(),
                });
            }
            first += same.len();
        }
    }
    runs
}

#[derive(Clone, Debug)]
struct Attention {
    runs: Vec<Run>,
    options: AttentionOptions,
}

/// Head counts and the distances between tokens in memory.
#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Shape {
    fn of(query: &FlexTensor, key: &FlexTensor) -> Self {
        Self {
            heads: dims(query)[2],
            kv_heads: dims(key)[2],
            head_dim: dims(query)[3],
        }
    }
    fn query_stride(self) -> usize {
        self.heads * self.head_dim
    }
    fn key_stride(self) -> usize {
        self.kv_heads * self.head_dim
    }
    fn groups(self) -> usize {
        self.heads / self.kv_heads
    }
}

impl Attention {
    /// The queries of a segment, tile by tile: a tile's scores stay in the second-level cache up to some
    /// thousand keys. Where keys are masked, wider tiles compute more of what is.
    fn tiles(&self, length: usize) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let masked = self.options.causal || self.options.window.is_some();
        let size = match masked || length > 2048 {
            true => TILE / 2,
            false => TILE,
        };
        (0..length)
            .step_by(size)
            .map(move |first| first..(first + size).min(length))
    }

    /// Keys that any query of a tile may see, within the segment.
    fn visible(&self, tile: &std::ops::Range<usize>, length: usize) -> std::ops::Range<usize> {
        let window = self.options.window.unwrap_or(usize::MAX);
        let first = (tile.start + 1).saturating_sub(window);
        let last = if self.options.causal {
            tile.end
        } else {
            length.min((tile.end - 1).saturating_add(window))
        };
        first..last
    }

    /// Keys that one query may see.
    #[inline(always)]
    fn visible_to(&self, query: usize, length: usize) -> std::ops::Range<usize> {
        self.visible(&(query..query + 1), length)
    }

    /// Scores of one tile, masked keys at minus infinity: `[tile, keys]`.
    fn scores(&self, buffer: &mut Vec<f32>, tile: &Tile<'_>) {
        let (rows, columns) = (tile.queries.len(), tile.keys.len());
        buffer.resize(rows * columns, 0.0);
        multiply(
            buffer,
            columns,
            tile.query_view(),
            tile.key_view().transposed(),
            self.options.scale,
            false,
            Threads::One,
        );
        if let Some(cap) = self.options.soft_cap {
            vectorized(
                #[inline(always)]
                || {
                    for score in buffer.iter_mut() {
                        *score = cap * tanh(*score / cap);
                    }
                },
            );
        }
        for (row, query) in buffer.chunks_exact_mut(columns).zip(tile.queries.clone()) {
            let seen = self.visible_to(query, tile.length);
            row[..seen.start - tile.keys.start].fill(f32::NEG_INFINITY);
            row[seen.end - tile.keys.start..].fill(f32::NEG_INFINITY);
        }
    }
}

/// One tile of queries of one head of one segment, with the keys and values it sees.
struct Tile<'a> {
    query: &'a [f32],
    key: &'a [f32],
    value: &'a [f32],
    queries: std::ops::Range<usize>,
    keys: std::ops::Range<usize>,
    length: usize,
    shape: Shape,
}

impl<'a> Tile<'a> {
    fn query_view(&self) -> View<'a> {
        rows_of(
            self.query,
            &self.queries,
            self.shape.query_stride(),
            self.shape.head_dim,
        )
    }
    fn key_view(&self) -> View<'a> {
        rows_of(
            self.key,
            &self.keys,
            self.shape.key_stride(),
            self.shape.head_dim,
        )
    }
    fn value_view(&self) -> View<'a> {
        rows_of(
            self.value,
            &self.keys,
            self.shape.key_stride(),
            self.shape.head_dim,
        )
    }
}

/// Tokens `range` of a head whose slice starts at the segment's first token.
fn rows_of<'a>(
    head: &'a [f32],
    range: &std::ops::Range<usize>,
    stride: usize,
    head_dim: usize,
) -> View<'a> {
    View::strided(&head[range.start * stride..], range.len(), head_dim, stride)
}

/// Lets tasks write rows of different segments and heads of one buffer.
#[derive(Clone, Copy)]
struct Shared {
    start: *mut f32,
    length: usize,
}

// SAFETY: every task writes elements of its own segment and head only; see `Shared::rows`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(buffer: &mut [f32]) -> Self {
        Self {
            start: buffer.as_mut_ptr(),
            length: buffer.len(),
        }
    }

    /// Copies dense rows of `width` elements to `offset`, `offset + stride`, …
    ///
    /// # Safety
    /// No other task may write the same elements, and the buffer must outlive the call.
    unsafe fn write(self, offset: usize, stride: usize, rows: &[f32], width: usize) {
        for (i, row) in rows.chunks_exact(width).enumerate() {
            let position = offset + i * stride;
            assert!(position + width <= self.length);
            // SAFETY: in bounds by the assertion; disjointness is the caller's promise.
            unsafe {
                std::ptr::copy_nonoverlapping(row.as_ptr(), self.start.add(position), width);
            }
        }
    }
}

impl Operation<3> for Attention {
    fn forward(&self, inputs: [FlexTensor; 3], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let [query, key, value] = inputs;
        let shape = Shape::of(&query, &key);
        let head_dim = shape.head_dim;
        let tokens = values(&query).len() / shape.query_stride();
        let mut output = zeros(values(&query).len());
        let mut log_sums = vec![0.0f32; if tracked { tokens * shape.heads } else { 0 }];
        let shared_output = Shared::new(&mut output);
        let shared_sums = Shared::new(&mut log_sums);
        let (q, k, v) = (values(&query), values(&key), values(&value));

        let tasks: Vec<(Run, usize)> = self
            .runs
            .iter()
            .flat_map(|&run| (0..shape.heads).map(move |head| (run, head)))
            .collect();
        tasks.par_iter().for_each_init(
            || (Vec::new(), Vec::new()),
            |(scores, result): &mut (Vec<f32>, Vec<f32>), &(run, head)| {
                let query_offset = run.start * shape.query_stride() + head * head_dim;
                let key_offset = run.start * shape.key_stride() + head / shape.groups() * head_dim;
                for queries in self.tiles(run.length) {
                    let tile = Tile {
                        query: &q[query_offset..],
                        key: &k[key_offset..],
                        value: &v[key_offset..],
                        keys: self.visible(&queries, run.length),
                        queries,
                        length: run.length,
                        shape,
                    };
                    let rows = tile.queries.len();
                    self.scores(scores, &tile);
                    let mut sums = [0.0f32; TILE];
                    let mut inverses = [0.0f32; TILE];
                    vectorized(
                        #[inline(always)]
                        || {
                            for (i, row) in scores.chunks_exact_mut(tile.keys.len()).enumerate() {
                                let largest = maximum(row);
                                let total = exp_sum(row, largest);
                                inverses[i] = 1.0 / total;
                                sums[i] = largest + total.ln();
                            }
                        },
                    );
                    result.resize(rows * head_dim, 0.0);
                    multiply(
                        result,
                        head_dim,
                        View::new(scores, rows, tile.keys.len()),
                        tile.value_view(),
                        1.0,
                        false,
                        Threads::One,
                    );
                    for (row, inverse) in result.chunks_exact_mut(head_dim).zip(inverses) {
                        for value in row {
                            *value *= inverse;
                        }
                    }
                    let stride = shape.query_stride();
                    let offset = query_offset + tile.queries.start * stride;
                    // SAFETY: segments do not overlap and a task has one head of one segment.
                    unsafe { shared_output.write(offset, stride, result, head_dim) };
                    if tracked {
                        let offset = (run.start + tile.queries.start) * shape.heads + head;
                        // SAFETY: as above, one element a token and head.
                        unsafe { shared_sums.write(offset, shape.heads, &sums[..rows], 1) };
                    }
                }
            },
        );
        let output = tensor(output, dims(&query));
        let saved = if tracked {
            let log_sums = tensor(log_sums, [tokens, shape.heads]);
            vec![query, key, value, output.clone(), log_sums]
        } else {
            vec![]
        };
        (output, saved)
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradient: FlexTensor,
        wanted: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [query, key, value, output, log_sums] =
            <[FlexTensor; 5]>::try_from(saved).expect("what the forward pass kept");
        let shape = Shape::of(&query, &key);
        let head_dim = shape.head_dim;
        let mut query_gradient = zeros(values(&query).len());
        let mut key_gradient = zeros(values(&key).len());
        let mut value_gradient = zeros(values(&value).len());
        let to_query = Shared::new(&mut query_gradient);
        let to_key = Shared::new(&mut key_gradient);
        let to_value = Shared::new(&mut value_gradient);
        let (q, k, v) = (values(&query), values(&key), values(&value));
        let (o, g, log_sums) = (values(&output), values(&gradient), values(&log_sums));

        // All query heads of a key-value head in one task: its sums have one writer and one order.
        let tasks: Vec<(Run, usize)> = self
            .runs
            .iter()
            .flat_map(|&run| (0..shape.kv_heads).map(move |head| (run, head)))
            .collect();
        tasks
            .par_iter()
            .for_each_init(Scratch::default, |scratch, &(run, kv_head)| {
                let key_offset = run.start * shape.key_stride() + kv_head * head_dim;
                scratch.key.clear();
                scratch.key.resize(run.length * head_dim, 0.0);
                scratch.value.clear();
                scratch.value.resize(run.length * head_dim, 0.0);
                for head in kv_head * shape.groups()..(kv_head + 1) * shape.groups() {
                    let query_offset = run.start * shape.query_stride() + head * head_dim;
                    for queries in self.tiles(run.length) {
                        let tile = Tile {
                            query: &q[query_offset..],
                            key: &k[key_offset..],
                            value: &v[key_offset..],
                            keys: self.visible(&queries, run.length),
                            queries,
                            length: run.length,
                            shape,
                        };
                        let upstream = rows_of(
                            &g[query_offset..],
                            &tile.queries,
                            shape.query_stride(),
                            head_dim,
                        );
                        let token = |row: usize| run.start + tile.queries.start + row;
                        let log_sum = |row: usize| log_sums[token(row) * shape.heads + head];
                        self.backward_tile(
                            scratch,
                            &tile,
                            upstream,
                            log_sum,
                            // Part of what is vectorised there.
                            #[inline(always)]
                            |row| {
                                let at = token(row) * shape.query_stride() + head * head_dim;
                                dot(&o[at..at + head_dim], &g[at..at + head_dim])
                            },
                        );
                        let stride = shape.query_stride();
                        let offset = query_offset + tile.queries.start * stride;
                        // SAFETY: this task alone has this segment's query heads.
                        unsafe { to_query.write(offset, stride, &scratch.query, head_dim) };
                    }
                }
                // SAFETY: this task alone has this segment's key-value head.
                unsafe {
                    to_key.write(key_offset, shape.key_stride(), &scratch.key, head_dim);
                    to_value.write(key_offset, shape.key_stride(), &scratch.value, head_dim);
                }
            });
        [
            wanted[0].then(|| tensor(query_gradient, dims(&query))),
            wanted[1].then(|| tensor(key_gradient, dims(&key))),
            wanted[2].then(|| tensor(value_gradient, dims(&value))),
        ]
    }
}

/// Buffers of one thread, kept from task to task.
#[derive(Default)]
struct Scratch {
    probabilities: Vec<f32>,
    /// The capped scores as shares of the cap, where there is one.
    capped: Vec<f32>,
    slopes: Vec<f32>,
    /// Gradients: of a tile's queries, and of a segment's keys and values.
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
}

impl Attention {
    /// Adds a tile's part to the key and value gradients and leaves its query gradient in `scratch`.
    fn backward_tile(
        &self,
        scratch: &mut Scratch,
        tile: &Tile<'_>,
        upstream: View<'_>,
        log_sum: impl Fn(usize) -> f32,
        delta: impl Fn(usize) -> f32,
    ) {
        let head_dim = tile.shape.head_dim;
        let (rows, columns) = (tile.queries.len(), tile.keys.len());
        let Scratch {
            probabilities,
            capped,
            slopes,
            query,
            key,
            value,
        } = scratch;
        self.scores(probabilities, tile);
        if let Some(cap) = self.options.soft_cap {
            capped.clear();
            // What is masked has no slope, whatever its score.
            let share = |score: &f32| if score.is_finite() { score / cap } else { 0.0 };
            capped.extend(probabilities.iter().map(share));
        }
        vectorized(
            #[inline(always)]
            || {
                for (row, scores) in probabilities.chunks_exact_mut(columns).enumerate() {
                    exp_sum(scores, log_sum(row));
                }
            },
        );
        let keys = tile.keys.start * head_dim..tile.keys.end * head_dim;
        multiply(
            &mut value[keys.clone()],
            head_dim,
            View::new(probabilities, rows, columns).transposed(),
            upstream,
            1.0,
            true,
            Threads::One,
        );
        slopes.resize(rows * columns, 0.0);
        multiply(
            slopes,
            columns,
            upstream,
            tile.value_view().transposed(),
            1.0,
            false,
            Threads::One,
        );
        let scale = self.options.scale;
        vectorized(
            #[inline(always)]
            || {
                for (row, (slopes, probabilities)) in slopes
                    .chunks_exact_mut(columns)
                    .zip(probabilities.chunks_exact(columns))
                    .enumerate()
                {
                    let delta = delta(row);
                    for (slope, &probability) in slopes.iter_mut().zip(probabilities) {
                        *slope = probability * (*slope - delta) * scale;
                    }
                }
                if self.options.soft_cap.is_some() {
                    // d(cap · tanh(x / cap)) / dx = 1 − tanh²(x / cap)
                    for (slope, &share) in slopes.iter_mut().zip(capped.iter()) {
                        *slope *= 1.0 - share * share;
                    }
                }
            },
        );
        query.resize(rows * head_dim, 0.0);
        let slopes = View::new(slopes, rows, columns);
        multiply(
            query,
            head_dim,
            slopes,
            tile.key_view(),
            1.0,
            false,
            Threads::One,
        );
        multiply(
            &mut key[keys],
            head_dim,
            slopes.transposed(),
            tile.query_view(),
            1.0,
            true,
            Threads::One,
        );
    }
}
