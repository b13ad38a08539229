//! LoRA linears on the CPU: products over one copy of the input, no weight gradient unless a weight is
//! tracked. A weight is a matrix, or quantised. Several that read the same input share what they do with
//! it: one product with all their `a`, and one gradient that each adds its part to.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{FrozenWeight, LinearPart, Lora, dropout_keeps, halves};
use crate::cpu::cast::cast;
use crate::cpu::elementary::{block_rows, vectorized, zeros};
use crate::cpu::matrix::{Threads, View, multiply, multiply_over_tokens, product, transposed};
use crate::cpu::operation::{
    Input, JointOperation, apply_joint, dims, input, tensor, values, wide,
};
use crate::joint::Results;
use crate::normalization::cpu::column_sums;
use crate::quantized::cpu::Weight as QuantizedWeight;

/// Three at most.
pub(super) fn dispatch(x: Tensor<3>, parts: Vec<LinearPart<'_>>) -> Vec<Tensor<3>> {
    if let Some(engine) = halves::serves(&x, &parts) {
        return halves::dispatch(engine, x, parts);
    }
    let linears = Linears(parts.iter().map(Linear::of).collect());
    apply_joint(linears, inputs(x, parts))
}

/// x, then of each part the weight if it is dense, the bias if there is one, a and b if there is an
/// adapter.
pub(super) fn inputs(x: Tensor<3>, parts: Vec<LinearPart<'_>>) -> Vec<Input> {
    let mut inputs = vec![input(x)];
    for part in parts {
        if let FrozenWeight::Dense(weight) = part.weight {
            inputs.push(input(weight.clone()));
        }
        inputs.extend(part.bias.map(input));
        if let Some(lora) = part.lora {
            inputs.extend([input(lora.a), input(lora.b)]);
        }
    }
    inputs
}

/// Inputs as [`inputs`] has them.
#[derive(Clone, Debug)]
struct Linears(Vec<Linear>);

#[derive(Clone, Debug)]
struct Linear {
    base: Base,
    biased: bool,
    adapter: Option<Adapter>,
}

/// What x is multiplied with.
#[derive(Clone, Debug)]
enum Base {
    /// The first of its inputs.
    Dense,
    Quantized(Box<QuantizedWeight>),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Adapter {
    pub scaling: f32,
    pub dropout: f32,
    pub seed: u64,
}

/// A linear with its own inputs as they are stored, and where its columns are among those of all low-rank parts.
struct Part<'a> {
    linear: &'a Linear,
    own: &'a [FlexTensor],
    /// The number of its first input.
    first: usize,
    column: usize,
    rank: usize,
}

impl Linear {
    fn of(part: &LinearPart<'_>) -> Linear {
        Linear {
            base: match &part.weight {
                FrozenWeight::Dense(_) => Base::Dense,
                FrozenWeight::Quantized(weight) => {
                    Base::Quantized(Box::new(QuantizedWeight::new(weight)))
                }
            },
            biased: part.bias.is_some(),
            adapter: part.lora.as_ref().map(Adapter::of),
        }
    }

    /// Where the bias stands among its inputs.
    fn bias(&self) -> usize {
        usize::from(matches!(self.base, Base::Dense))
    }

    /// Where `a` stands among its inputs.
    fn factor(&self) -> usize {
        self.bias() + usize::from(self.biased)
    }

    fn inputs(&self) -> usize {
        self.factor() + 2 * usize::from(self.adapter.is_some())
    }
}

impl Linears {
    /// With the inputs of all, but `x`.
    fn parts<'a>(&'a self, inputs: &'a [FlexTensor]) -> Vec<Part<'a>> {
        let (mut first, mut column) = (1, 0);
        let part = |linear: &'a Linear| {
            let own = &inputs[first - 1..][..linear.inputs()];
            let rank = match linear.adapter {
                Some(_) => dims(&own[linear.factor()])[0],
                None => 0,
            };
            let part = Part {
                linear,
                own,
                first,
                column,
                rank,
            };
            (first, column) = (first + own.len(), column + rank);
            part
        };
        self.0.iter().map(part).collect()
    }

    /// Whether every `a` reads all of x.
    fn drops_nothing(&self) -> bool {
        let dropout = |linear: &Linear| linear.adapter.map_or(0.0, |adapter| adapter.dropout);
        self.0.iter().all(|linear| dropout(linear) == 0.0)
    }
}

/// Every `a` below the other, `[ranks, in]`.
fn every_a(parts: &[Part<'_>]) -> FlexTensor {
    let mut factors = parts.iter().filter(|part| part.rank > 0).map(Part::a);
    let first = factors.next();
    let rest: Vec<FlexTensor> = factors.collect();
    match first {
        Some(first) if rest.is_empty() => first,
        first => {
            let all = first.iter().chain(&rest).map(values);
            let all = all.collect::<Vec<_>>().concat();
            let length = all.len();
            tensor(all, [length])
        }
    }
}

fn ranks(parts: &[Part<'_>]) -> usize {
    parts.iter().map(|part| part.rank).sum()
}

impl<'a> Part<'a> {
    /// `[out, in]`
    fn shape(&self) -> [usize; 2] {
        match &self.linear.base {
            Base::Dense => [dims(&self.own[0])[0], dims(&self.own[0])[1]],
            Base::Quantized(weight) => weight.shape(),
        }
    }

    /// One of its inputs in f32, for as long as it is used.
    fn wide(&self, input: usize) -> FlexTensor {
        wide(self.own[input].clone())
    }

    /// Of one that has an adapter.
    fn a(&self) -> FlexTensor {
        self.wide(self.linear.factor())
    }

    /// Likewise.
    fn b(&self) -> FlexTensor {
        self.wide(self.linear.factor() + 1)
    }

    /// `b` as it was given by [`Part::b`].
    fn b_view<'b>(&self, b: &'b FlexTensor) -> View<'b> {
        View::new(values(b), self.shape()[0], self.rank)
    }

    /// x through the base and the bias, and `low` through `b`.
    fn output(&self, x: View<'_>, low: View<'_>) -> Vec<f32> {
        let [outputs, _] = self.shape();
        let bias = self.linear.biased.then(|| self.wide(self.linear.bias()));
        let bias = bias.as_ref().map(values);
        let mut output = match &self.linear.base {
            Base::Dense => {
                let weight = self.wide(0);
                let weight = View::new(values(&weight), outputs, x.column_count());
                product(x, weight.transposed(), 1.0, bias)
            }
            Base::Quantized(weight) => {
                let mut output = match bias {
                    Some(bias) => bias.repeat(x.row_count()),
                    None => zeros(x.row_count() * outputs),
                };
                weight.multiply_transposed(&mut output, x, bias.is_some());
                output
            }
        };
        if let Some(adapter) = self.linear.adapter {
            let low = low.columns(self.column, self.rank);
            let b = self.b();
            let b = self.b_view(&b).transposed();
            multiply(
                &mut output,
                outputs,
                low,
                b,
                adapter.scaling,
                true,
                Threads::All,
            );
        }
        output
    }

    /// The gradient of x through the base, added to that of others.
    fn through_base(&self, upstream: View<'_>, sum: Option<Vec<f32>>) -> Vec<f32> {
        let [outputs, width] = self.shape();
        match (&self.linear.base, sum) {
            (Base::Dense, sum) => {
                let weight = self.wide(0);
                let weight = View::new(values(&weight), outputs, width);
                let Some(mut sum) = sum else {
                    return product(upstream, weight, 1.0, None);
                };
                multiply(&mut sum, width, upstream, weight, 1.0, true, Threads::All);
                sum
            }
            (Base::Quantized(weight), sum) => {
                let added = sum.is_some();
                let mut sum = sum.unwrap_or_else(|| zeros(upstream.row_count() * width));
                weight.multiply_plain(&mut sum, upstream, added);
                sum
            }
        }
    }
}

impl JointOperation for Linears {
    /// A weight is widened where it is used, so that no two are wide at once.
    const AS_STORED: bool = true;

    fn name(&self) -> &'static str {
        let quantized = |linear: &Linear| matches!(linear.base, Base::Quantized(_));
        match self.0.iter().any(quantized) {
            true => "quantized_linear",
            false if self.0.iter().any(|linear| linear.adapter.is_some()) => "lora_linear",
            false => "linear",
        }
    }

    fn forward(&self, inputs: Vec<FlexTensor>, tracked: bool) -> Results<FlexTensor> {
        let mut shape = dims(&inputs[0]);
        let width = *shape.last().expect("three dimensions");
        let dtype = inputs[0].dtype();
        let wide_x = wide(inputs[0].clone());
        let x = values(&wide_x);
        let tokens = x.len() / width.max(1);
        let flat = View::new(x, tokens, width);
        let parts = self.parts(&inputs[1..]);
        let ranks = ranks(&parts);
        let low = if self.drops_nothing() {
            let a = every_a(&parts);
            let a = View::new(values(&a), ranks, width);
            product(flat, a.transposed(), 1.0, None)
        } else {
            let mut low = zeros(tokens * ranks);
            for part in parts.iter().filter(|part| part.rank > 0) {
                let dropped = part.linear.drop_inputs(x);
                let seen = View::new(dropped.as_deref().unwrap_or(x), tokens, width);
                let a = part.a();
                let a = View::new(values(&a), part.rank, width).transposed();
                let low = &mut low[part.column..];
                multiply(low, ranks, seen, a, 1.0, false, Threads::All);
            }
            low
        };
        let seen = View::new(&low, tokens, ranks);
        let outputs = parts.iter().map(|part| {
            let [outputs, _] = part.shape();
            *shape.last_mut().expect("three dimensions") = outputs;
            cast(tensor(part.output(flat, seen), shape.clone()), dtype)
        });
        let outputs = outputs.collect();
        drop(parts);
        let saved = match tracked {
            true => inputs
                .into_iter()
                .chain([tensor(low, [tokens, ranks])])
                .collect(),
            false => vec![],
        };
        (outputs, saved)
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradients: Vec<Option<FlexTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<FlexTensor>> {
        let mut results = vec![None; wanted.len()];
        let mut saved = saved.into_iter();
        let mut next = || saved.next().expect("what forward kept");
        // What was stored goes when it is widened.
        let wide_x = wide(next());
        let inputs: Vec<FlexTensor> = (1..wanted.len()).map(|_| next()).collect();
        let low = next();
        let x = values(&wide_x);
        let width = *dims(&wide_x).last().expect("three dimensions");
        let tokens = x.len() / width.max(1);
        let flat = View::new(x, tokens, width);
        let parts = self.parts(&inputs);
        let ranks = ranks(&parts);
        let low = View::new(values(&low), tokens, ranks);

        let mut for_input = None;
        // The gradient at the output of every `a`, from which both the input and `a` get theirs.
        let mut inner = zeros(tokens * ranks);
        for (part, gradient) in parts.iter().zip(gradients) {
            let Some(gradient) = gradient else {
                continue;
            };
            let [outputs, _] = part.shape();
            let gradient = wide(gradient);
            let upstream = View::new(values(&gradient), tokens, outputs);
            if wanted[0] {
                for_input = Some(part.through_base(upstream, for_input));
            }
            let own = |input: usize| part.first + input;
            if matches!(part.linear.base, Base::Dense) && wanted[own(0)] {
                let output = product(upstream.transposed(), flat, 1.0, None);
                results[own(0)] = Some(tensor(output, [outputs, width]));
            }
            let bias = own(part.linear.bias());
            if part.linear.biased && wanted[bias] {
                let sums = column_sums(values(&gradient), outputs);
                results[bias] = Some(tensor(sums, [outputs]));
            }
            let Some(adapter) = part.linear.adapter else {
                continue;
            };
            let place = &mut inner[part.column..];
            let factor = part.b();
            multiply(
                place,
                ranks,
                upstream,
                part.b_view(&factor),
                adapter.scaling,
                false,
                Threads::All,
            );
            let b = own(part.linear.factor() + 1);
            if wanted[b] {
                let low = low.columns(part.column, part.rank).transposed();
                let output = multiply_over_tokens(low, upstream, adapter.scaling);
                let output = transposed(&output, [part.rank, outputs]);
                results[b] = Some(tensor(output, [outputs, part.rank]));
            }
        }
        let inner = View::new(&inner, tokens, ranks);
        let wants_a = |part: &Part<'_>| part.rank > 0 && wanted[part.first + part.linear.factor()];
        if self.drops_nothing() {
            if let Some(output) = &mut for_input {
                let a = every_a(&parts);
                let a = View::new(values(&a), ranks, width);
                multiply(output, width, inner, a, 1.0, true, Threads::All);
            }
            if parts.iter().any(wants_a) {
                let all = multiply_over_tokens(inner.transposed(), flat, 1.0);
                for part in parts.iter().filter(|part| wants_a(part)) {
                    let output = all[part.column * width..][..part.rank * width].to_vec();
                    let a = part.first + part.linear.factor();
                    results[a] = Some(tensor(output, [part.rank, width]));
                }
            }
        } else {
            for part in parts.iter().filter(|part| part.rank > 0) {
                let inner = inner.columns(part.column, part.rank);
                if let (Some(output), Some(adapter)) = (&mut for_input, part.linear.adapter) {
                    let a = part.a();
                    let a = View::new(values(&a), part.rank, width);
                    match adapter.dropout > 0.0 {
                        true => adapter.add_kept(output, &product(inner, a, 1.0, None)),
                        false => multiply(output, width, inner, a, 1.0, true, Threads::All),
                    }
                }
                if wants_a(part) {
                    let dropped = part.linear.drop_inputs(x);
                    let seen = View::new(dropped.as_deref().unwrap_or(x), tokens, width);
                    let output = multiply_over_tokens(inner.transposed(), seen, 1.0);
                    let a = part.first + part.linear.factor();
                    results[a] = Some(tensor(output, [part.rank, width]));
                }
            }
        }
        results[0] = for_input.map(|output| tensor(output, dims(&wide_x)));
        results
    }
}

impl Linear {
    /// See [`Adapter::drop_inputs`].
    fn drop_inputs(&self, x: &[f32]) -> Option<Vec<f32>> {
        self.adapter.and_then(|adapter| adapter.drop_inputs(x))
    }
}

impl Adapter {
    pub fn of(lora: &Lora) -> Adapter {
        Adapter {
            scaling: lora.scaling,
            dropout: lora.dropout,
            seed: lora.dropout_seed,
        }
    }

    /// What a kept element is multiplied with.
    pub fn keep(&self) -> f32 {
        1.0 / (1.0 - self.dropout)
    }

    /// The input with dropped elements zeroed and the others divided by what is kept; none where
    /// nothing is dropped.
    fn drop_inputs(&self, input: &[f32]) -> Option<Vec<f32>> {
        let keep = self.keep();
        (self.dropout > 0.0).then(|| {
            let mut output = zeros(input.len());
            self.over_kept(&mut output, input, |_, x| x * keep, |_| 0.0);
            output
        })
    }

    /// Adds the kept elements, divided by what is kept.
    pub fn add_kept(&self, output: &mut [f32], through: &[f32]) {
        let keep = self.keep();
        self.over_kept(output, through, |sum, x| sum + x * keep, |sum| sum);
    }

    /// Replaces each element of `output` by `kept` of it and of the input's, or by `dropped` of it.
    pub fn over_kept<T: Copy + Send + Sync>(
        &self,
        output: &mut [T],
        input: &[T],
        kept: impl Fn(T, T) -> T + Copy + Send + Sync,
        dropped: impl Fn(T) -> T + Copy + Send + Sync,
    ) {
        let block = block_rows(input.len(), 1);
        let Adapter { dropout, seed, .. } = *self;
        output
            .par_chunks_mut(block)
            .zip(input.par_chunks(block))
            .enumerate()
            .for_each(|(number, (output, input))| {
                let start = number * block;
                vectorized(
                    #[inline(always)]
                    || {
                        for (i, (output, &x)) in output.iter_mut().zip(input).enumerate() {
                            *output = match dropout_keeps(seed, start + i, dropout) {
                                true => kept(*output, x),
                                false => dropped(*output),
                            };
                        }
                    },
                );
            });
    }
}
