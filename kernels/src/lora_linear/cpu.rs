//! The LoRA linear on the CPU: five products over one copy of the input, no weight gradient unless
//! the weight is tracked. The weight is a matrix, or quantised.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{Lora, dropout_keeps, halves};
use crate::cpu::elementary::{block_rows, vectorized, zeros};
use crate::cpu::matrix::{Threads, View, multiply, multiply_over_tokens, product, transposed};
use crate::cpu::operation::{Operation, apply, dims, input, tensor, values};
use crate::normalization::cpu::column_sums;
use crate::quantized::cpu::Weight as QuantizedWeight;

pub(super) fn dispatch(
    tensor: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    lora: Option<&Lora>,
) -> Tensor<3> {
    if let Some(engine) = halves::serves(&tensor, &weight, bias.as_ref(), lora) {
        return halves::dispatch(engine, tensor, weight, bias, lora);
    }
    let linear = Linear::new(Base::Dense, bias.is_some(), lora);
    apply_dense(linear, tensor, weight, bias, lora)
}

/// An operation on x, a weight, bias if there is one, a and b if there is an adapter.
pub(super) fn apply_dense<Op>(
    linear: Op,
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    lora: Option<&Lora>,
) -> Tensor<3>
where
    Op: Operation<2> + Operation<3> + Operation<4> + Operation<5>,
{
    let (x, w) = (input(x), input(weight));
    let pair = lora.map(|lora| [input(lora.a.clone()), input(lora.b.clone())]);
    match (bias.map(input), pair) {
        (None, None) => apply(linear, [x, w]),
        (Some(bias), None) => apply(linear, [x, w, bias]),
        (None, Some([a, b])) => apply(linear, [x, w, a, b]),
        (Some(bias), Some([a, b])) => apply(linear, [x, w, bias, a, b]),
    }
}

/// As [`dispatch`] with a quantised weight.
pub(crate) fn dispatch_quantized(
    tensor: Tensor<3>,
    weight: QuantizedWeight,
    bias: Option<Tensor<1>>,
    lora: Option<&Lora>,
) -> Tensor<3> {
    let x = input(tensor);
    let linear = Linear::new(Base::Quantized(Box::new(weight)), bias.is_some(), lora);
    match (bias.map(input), lora) {
        (None, None) => apply(linear, [x]),
        (Some(bias), None) => apply(linear, [x, bias]),
        (None, Some(lora)) => apply(linear, [x, input(lora.a.clone()), input(lora.b.clone())]),
        (Some(bias), Some(lora)) => apply(
            linear,
            [x, bias, input(lora.a.clone()), input(lora.b.clone())],
        ),
    }
}

/// Inputs in order: x, the weight if it is dense, bias if there is one, a and b if there is an
/// adapter.
#[derive(Clone, Debug)]
struct Linear {
    base: Base,
    biased: bool,
    adapter: Option<Adapter>,
}

/// What x is multiplied with.
#[derive(Clone, Debug)]
enum Base {
    /// The second input.
    Dense,
    Quantized(Box<QuantizedWeight>),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Adapter {
    pub scaling: f32,
    pub dropout: f32,
    pub seed: u64,
}

impl Linear {
    fn new(base: Base, biased: bool, lora: Option<&Lora>) -> Self {
        Self {
            base,
            biased,
            adapter: lora.map(Adapter::of),
        }
    }

    /// Where the bias stands among the inputs.
    fn bias(&self) -> usize {
        match self.base {
            Base::Dense => 2,
            Base::Quantized(_) => 1,
        }
    }

    /// Where `a` stands among the inputs.
    fn first_factor(&self) -> usize {
        self.bias() + usize::from(self.biased)
    }

    /// `[out, in]`
    fn shape(&self, inputs: &[FlexTensor]) -> [usize; 2] {
        match &self.base {
            Base::Dense => [dims(&inputs[1])[0], dims(&inputs[1])[1]],
            Base::Quantized(weight) => weight.shape(),
        }
    }
}

impl<const N: usize> Operation<N> for Linear {
    fn name(&self) -> &'static str {
        match (&self.base, &self.adapter) {
            (Base::Quantized(_), _) => "quantized_linear",
            (Base::Dense, Some(_)) => "lora_linear",
            (Base::Dense, None) => "linear",
        }
    }

    fn forward(&self, inputs: [FlexTensor; N], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let x = &inputs[0];
        let mut shape = dims(x);
        let [outputs, width] = self.shape(&inputs);
        let tokens = values(x).len() / width;

        let bias = self.biased.then(|| values(&inputs[self.bias()]));
        let flat = View::new(values(x), tokens, width);
        let mut output = match &self.base {
            Base::Dense => {
                let weight = View::new(values(&inputs[1]), outputs, width);
                product(flat, weight.transposed(), 1.0, bias)
            }
            Base::Quantized(weight) => {
                let mut output = match bias {
                    Some(bias) => bias.repeat(tokens),
                    None => zeros(tokens * outputs),
                };
                weight.multiply_transposed(&mut output, flat, self.biased);
                output
            }
        };
        let mut low_rank = None;
        if let Some(adapter) = self.adapter {
            let a = &inputs[self.first_factor()];
            let b = &inputs[self.first_factor() + 1];
            let rank = dims(a)[0];
            let dropped = adapter.drop_inputs(values(x));
            let seen = View::new(dropped.as_deref().unwrap_or(values(x)), tokens, width);
            let a = View::new(values(a), rank, width);
            let low = product(seen, a.transposed(), 1.0, None);
            multiply(
                &mut output,
                outputs,
                View::new(&low, tokens, rank),
                View::new(values(b), outputs, rank).transposed(),
                adapter.scaling,
                true,
                Threads::All,
            );
            low_rank = Some(tensor(low, [tokens, rank]));
        }
        *shape.last_mut().expect("three dimensions") = outputs;
        let saved = if tracked {
            inputs.into_iter().chain(low_rank).collect()
        } else {
            vec![]
        };
        (tensor(output, shape), saved)
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradient: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N] {
        let mut results = [const { None }; N];
        let x = &saved[0];
        let [outputs, width] = self.shape(&saved);
        let tokens = values(x).len() / width;
        let upstream = View::new(values(&gradient), tokens, outputs);

        let mut for_input = wanted[0].then(|| match &self.base {
            Base::Dense => {
                let weight = View::new(values(&saved[1]), outputs, width);
                product(upstream, weight, 1.0, None)
            }
            Base::Quantized(weight) => {
                let mut output = zeros(tokens * width);
                weight.multiply_plain(&mut output, values(&gradient));
                output
            }
        });
        if matches!(self.base, Base::Dense) && wanted[1] {
            let x = View::new(values(x), tokens, width);
            let output = product(upstream.transposed(), x, 1.0, None);
            results[1] = Some(tensor(output, [outputs, width]));
        }
        if self.biased && wanted[self.bias()] {
            results[self.bias()] = Some(tensor(column_sums(values(&gradient), outputs), [outputs]));
        }
        if let Some(adapter) = self.adapter {
            let first = self.first_factor();
            let (a, b, low) = (&saved[first], &saved[first + 1], &saved[first + 2]);
            let rank = dims(a)[0];
            // The gradient at the output of `a`, from which both the input and `a` get theirs.
            let factor = View::new(values(b), outputs, rank);
            let inner = product(upstream, factor, adapter.scaling, None);
            let inner = View::new(&inner, tokens, rank);
            if let Some(output) = &mut for_input {
                let a = View::new(values(a), rank, width);
                if adapter.dropout > 0.0 {
                    let through = product(inner, a, 1.0, None);
                    adapter.add_kept(output, &through);
                } else {
                    multiply(output, width, inner, a, 1.0, true, Threads::All);
                }
            }
            if wanted[first] {
                let dropped = adapter.drop_inputs(values(x));
                let x = dropped.as_deref().unwrap_or(values(x));
                let x = View::new(x, tokens, width);
                let output = multiply_over_tokens(inner.transposed(), x, 1.0);
                results[first] = Some(tensor(output, [rank, width]));
            }
            if wanted[first + 1] {
                let low = View::new(values(low), tokens, rank).transposed();
                let output = multiply_over_tokens(low, upstream, adapter.scaling);
                let output = transposed(&output, [rank, outputs]);
                results[first + 1] = Some(tensor(output, [outputs, rank]));
            }
        }
        results[0] = for_input.map(|output| tensor(output, dims(x)));
        results
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
