//! The LoRA linear on processors that multiply bf16: activations and weight are multiplied as they are
//! stored, with sums in f32; the pair, which is f32, takes part as two bf16 each.

use burn::tensor::{DType, Tensor, bf16};
use burn_flex::FlexTensor;

use super::Lora;
use super::cpu::{Adapter, apply_dense};
use crate::cpu::cast::cast;
use crate::cpu::halves::{Engine, Halves, Sink, engine, multiply, split};
use crate::cpu::matrix::transposed;
use crate::cpu::operation::{Operation, dims, half_tensor, half_values as values, tensor};
use crate::normalization::cpu::column_sums;

/// What multiplies, where all is as this takes it: a frozen weight in bf16, a pair in f32.
pub(super) fn serves(
    x: &Tensor<3>,
    weight: &Tensor<2>,
    bias: Option<&Tensor<1>>,
    lora: Option<&Lora>,
) -> Option<Engine> {
    let stored = x.dtype() == DType::BF16
        && weight.dtype() == DType::BF16
        && bias.is_none_or(|bias| bias.dtype() == DType::BF16)
        && lora.is_none_or(|lora| [lora.a.dtype(), lora.b.dtype()] == [DType::F32; 2]);
    if stored && !weight.is_tracked() {
        engine()
    } else {
        None
    }
}

pub(super) fn dispatch(
    engine: Engine,
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    lora: Option<&Lora>,
) -> Tensor<3> {
    let linear = HalfLinear {
        engine,
        biased: bias.is_some(),
        adapter: lora.map(Adapter::of),
    };
    apply_dense(linear, x, weight, bias, lora)
}

/// Inputs in order: x, the weight, bias if there is one, a and b if there is an adapter.
#[derive(Clone, Debug)]
struct HalfLinear {
    engine: Engine,
    biased: bool,
    adapter: Option<Adapter>,
}

/// A matrix `[rows, columns]` of f32 as the sum of two of bf16, which lie side by side,
/// `[rows, 2 · columns]`.
struct Parts {
    values: Vec<bf16>,
    rows: usize,
    columns: usize,
}

impl Parts {
    fn of(values: &[f32], [rows, columns]: [usize; 2], factor: f32) -> Parts {
        let mut parts = Vec::with_capacity(2 * values.len());
        for row in values.chunks(columns.max(1)) {
            let (high, low) = split(row, factor);
            parts.extend(high);
            parts.extend(low);
        }
        Parts {
            values: parts,
            rows,
            columns,
        }
    }

    fn side_by_side(&self) -> Halves<'_> {
        Halves::new(&self.values, self.rows, 2 * self.columns)
    }

    fn apart(&self) -> [Halves<'_>; 2] {
        let both = self.side_by_side();
        [0, self.columns].map(|first| both.columns(first, self.columns))
    }
}

/// The terms of a product of two matrices in two parts each; what the low parts make together is
/// smaller than what either leaves out.
fn both<'a>(left: [Halves<'a>; 2], right: [Halves<'a>; 2]) -> [(Halves<'a>, Halves<'a>); 3] {
    [
        (left[0], right[0]),
        (left[1], right[0]),
        (left[0], right[1]),
    ]
}

impl HalfLinear {
    fn wide(&self, terms: &[(Halves<'_>, Halves<'_>)], rows: usize, columns: usize) -> Vec<f32> {
        let mut output = vec![0.0f32; rows * columns];
        multiply(self.engine, terms, Sink::Wide(&mut output));
        output
    }

    /// `left · right`, `[rows, columns]`, where `right` is in parts: each is multiplied for itself, and
    /// both fill a panel.
    fn by_parts(&self, left: Halves<'_>, right: &Parts, rows: usize) -> Vec<f32> {
        let columns = right.columns;
        let both = self.wide(&[(left, right.side_by_side())], rows, 2 * columns);
        let rows = both.chunks(2 * columns.max(1));
        rows.flat_map(|row| (0..columns).map(|column| row[column] + row[columns + column]))
            .collect()
    }

    /// The input of the low-rank part, but for the factor of what is kept.
    fn seen(&self, adapter: &Adapter, x: &[bf16]) -> Option<Vec<bf16>> {
        (adapter.dropout > 0.0).then(|| {
            let mut output = vec![bf16::ZERO; x.len()];
            adapter.over_kept(&mut output, x, |_, x| x, |_| bf16::ZERO);
            output
        })
    }

    fn first_factor(&self) -> usize {
        2 + usize::from(self.biased)
    }
}

impl<const N: usize> Operation<N> for HalfLinear {
    const AS_STORED: bool = true;

    fn forward(&self, inputs: [FlexTensor; N], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let mut shape = dims(&inputs[0]);
        let (x, weight) = (values(&inputs[0]), values(&inputs[1]));
        let outputs = dims(&inputs[1])[0];
        let width = *shape.last().expect("three dimensions");
        let tokens = x.len() / width.max(1);
        let base = (
            Halves::new(x, tokens, width),
            Halves::new(weight, outputs, width).transposed(),
        );
        let mut output = vec![bf16::ZERO; tokens * outputs];
        let sink = Sink::Half {
            values: &mut output,
            bias: self.biased.then(|| values(&inputs[2])),
        };
        let mut low_rank = None;
        match &self.adapter {
            None => multiply(self.engine, &[base], sink),
            Some(adapter) => {
                let first = self.first_factor();
                let rank = dims(&inputs[first])[0];
                let wide = |index: usize| inputs[index].as_slice::<f32>().expect("a pair in f32");
                let dropped = self.seen(adapter, x);
                let seen = Halves::new(dropped.as_deref().unwrap_or(x), tokens, width);
                let a = Parts::of(
                    &transposed(wide(first), [rank, width]),
                    [width, rank],
                    adapter.keep(),
                );
                let low = self.by_parts(seen, &a, tokens);
                let parts = Parts::of(&low, [tokens, rank], 1.0);
                let b = Parts::of(wide(first + 1), [outputs, rank], adapter.scaling);
                let [first, second, third] = both(parts.apart(), b.apart().map(Halves::transposed));
                multiply(self.engine, &[base, first, second, third], sink);
                low_rank = Some(tensor(low, [tokens, rank]));
            }
        }
        *shape.last_mut().expect("three dimensions") = outputs;
        let saved = match tracked {
            true => inputs.into_iter().chain(low_rank).collect(),
            false => vec![],
        };
        (half_tensor(output, shape), saved)
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradient: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N] {
        let mut results = [const { None }; N];
        let (x, weight) = (values(&saved[0]), values(&saved[1]));
        let [outputs, width] = [dims(&saved[1])[0], dims(&saved[1])[1]];
        let tokens = x.len() / width.max(1);
        let upstream = Halves::new(values(&gradient), tokens, outputs);
        let base = (upstream, Halves::new(weight, outputs, width));
        let half = |terms: &[(Halves<'_>, Halves<'_>)]| {
            let mut output = vec![bf16::ZERO; tokens * width];
            let sink = Sink::Half {
                values: &mut output,
                bias: None,
            };
            multiply(self.engine, terms, sink);
            half_tensor(output, dims(&saved[0]))
        };

        if self.biased && wanted[2] {
            let wide = cast(gradient.clone(), DType::F32);
            let sums = column_sums(wide.as_slice().expect("f32"), outputs);
            results[2] = Some(tensor(sums, [outputs]));
        }
        let Some(adapter) = &self.adapter else {
            results[0] = wanted[0].then(|| half(&[base]));
            return results;
        };
        let first = self.first_factor();
        let rank = dims(&saved[first])[0];
        let wide = |index: usize| saved[index].as_slice::<f32>().expect("f32");
        // The gradient at the output of `a`, from which both the input and `a` get theirs.
        let b = Parts::of(wide(first + 1), [outputs, rank], adapter.scaling);
        let inner = self.by_parts(upstream, &b, tokens);
        let inner = Parts::of(&inner, [tokens, rank], 1.0);
        if wanted[0] {
            let a = Parts::of(wide(first), [rank, width], 1.0);
            let through = both(inner.apart(), a.apart());
            results[0] = Some(match adapter.dropout > 0.0 {
                false => half(&[base, through[0], through[1], through[2]]),
                true => {
                    let mut output = self.wide(&[base], tokens, width);
                    let through = self.wide(&through, tokens, width);
                    adapter.add_kept(&mut output, &through);
                    cast(tensor(output, dims(&saved[0])), DType::BF16)
                }
            });
        }
        if wanted[first] {
            let dropped = self.seen(adapter, x);
            let seen = Halves::new(dropped.as_deref().unwrap_or(x), tokens, width);
            // As rows of the left operand both parts fill a panel.
            let parts = self.wide(
                &[(inner.side_by_side().transposed(), seen)],
                2 * rank,
                width,
            );
            let (high, low) = parts.split_at(rank * width);
            let sum = high
                .iter()
                .zip(low)
                .map(|(high, low)| (high + low) * adapter.keep());
            results[first] = Some(tensor(sum.collect(), [rank, width]));
        }
        if wanted[first + 1] {
            let low = Parts::of(wide(first + 2), [tokens, rank], adapter.scaling);
            let output = self.by_parts(upstream.transposed(), &low, outputs);
            results[first + 1] = Some(tensor(output, [outputs, rank]));
        }
        results
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{difference, random};

    /// Output and every gradient against the same numbers in f32, for every engine of this machine.
    #[test]
    fn halves_are_multiplied_as_wide_numbers_are() {
        for engine in Engine::all() {
            for (biased, dropout, [batch, seq, width, outputs, rank]) in [
                (false, None, [2, 5, 16, 12, 1]),
                (true, None, [1, 3, 33, 65, 1]),
                (false, Some(0.0), [2, 5, 16, 12, 4]),
                (true, Some(0.0), [3, 17, 40, 70, 8]),
                (true, Some(0.3), [3, 17, 40, 70, 3]),
            ] {
                let stored = |seed| random([batch, seq, width], seed).cast(DType::BF16);
                let pair = [random([rank, width], 2), random([outputs, rank], 3)];
                let pair = pair.map(|factor| factor.detach().require_grad());
                let lora = dropout.map(|dropout| Lora {
                    a: pair[0].clone(),
                    b: pair[1].clone(),
                    scaling: 0.7,
                    dropout,
                    dropout_seed: 5,
                });
                let weight = random([outputs, width], 4).detach().cast(DType::BF16);
                let bias = random([outputs], 6).detach().cast(DType::BF16);
                let [wide, half] = [DType::F32, DType::BF16].map(|dtype| {
                    let x = stored(1).cast(dtype).detach().require_grad();
                    let bias = biased.then(|| bias.clone().cast(dtype).detach().require_grad());
                    let (weight, lora) = (weight.clone().cast(dtype), lora.as_ref());
                    let output = match dtype {
                        DType::F32 => crate::lora_linear(x.clone(), weight, bias.clone(), lora),
                        _ => dispatch(engine, x.clone(), weight, bias.clone(), lora),
                    };
                    assert_eq!(output.dtype(), dtype);
                    // The same upstream gradient, which bf16 holds.
                    let weights = random(output.dims(), 7).detach().cast(DType::BF16);
                    let sum = (output.clone() * weights.cast(dtype))
                        .cast(DType::F32)
                        .sum();
                    let found = sum.backward();
                    let x = x.grad(&found).unwrap().cast(DType::F32);
                    let factors =
                        lora.map(|_| pair.each_ref().map(|factor| factor.grad(&found).unwrap()));
                    let bias = bias.map(|bias| bias.grad(&found).unwrap().cast(DType::F32));
                    (output.inner().cast(DType::F32), x, factors, bias)
                });
                // A rounding to 8 bits, of numbers up to a few.
                assert!(difference(half.0, wide.0) < 8e-3, "{engine:?}");
                assert!(difference(half.1, wide.1) < 8e-3, "{engine:?}");
                assert!(
                    half.3
                        .zip(wide.3)
                        .is_none_or(|(half, wide)| difference(half, wide) < 8e-3)
                );
                // 16 bits of the pair, and nothing rounded further.
                for (half, wide) in half
                    .2
                    .into_iter()
                    .flatten()
                    .zip(wide.2.into_iter().flatten())
                {
                    assert_eq!(half.dtype(), DType::F32);
                    assert!(difference(half, wide) < 5e-5, "{engine:?}");
                }
            }
        }
    }
}
