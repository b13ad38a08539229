//! The LoRA linear on processors that multiply bf16: activations and weight are multiplied as they are
//! stored, with sums in f32; the pair, which is f32, takes part as two bf16 each.

use burn::tensor::{DType, Tensor, bf16};
use burn_flex::FlexTensor;

use super::cpu::{Adapter, inputs};
use super::{FrozenWeight, LinearPart};
use crate::cpu::cast::cast;
use crate::cpu::halves::{Engine, Halves, Sink, engine, multiply, split};
use crate::cpu::matrix::transposed;
use crate::cpu::operation::{
    JointOperation, apply_joint, dims, half_tensor, half_values as values, tensor,
};
use crate::joint::Results;
use crate::normalization::cpu::column_sums;

/// What multiplies, where all is as this takes it: frozen weights in bf16, pairs in f32.
pub(super) fn serves(x: &Tensor<3>, parts: &[LinearPart<'_>]) -> Option<Engine> {
    let stored = |part: &LinearPart<'_>| {
        let FrozenWeight::Dense(weight) = &part.weight else {
            return false;
        };
        let (bias, lora) = (part.bias.as_ref(), part.lora.as_ref());
        weight.dtype() == DType::BF16
            && !weight.is_tracked()
            && bias.is_none_or(|bias| bias.dtype() == DType::BF16)
            && lora.is_none_or(|lora| [lora.a.dtype(), lora.b.dtype()] == [DType::F32; 2])
    };
    if x.dtype() == DType::BF16 && parts.iter().all(stored) {
        engine()
    } else {
        None
    }
}

pub(super) fn dispatch(engine: Engine, x: Tensor<3>, parts: Vec<LinearPart<'_>>) -> Vec<Tensor<3>> {
    let linear = |part: &LinearPart<'_>| HalfLinear {
        engine,
        biased: part.bias.is_some(),
        adapter: part.lora.as_ref().map(Adapter::of),
    };
    let linears = HalfLinears(parts.iter().map(linear).collect());
    apply_joint(linears, inputs(x, parts))
}

/// Inputs as [`inputs`] has them; kept beside them is `low` of each that has an adapter.
#[derive(Clone, Debug)]
struct HalfLinears(Vec<HalfLinear>);

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

    /// Where `a` stands among its inputs.
    fn factor(&self) -> usize {
        1 + usize::from(self.biased)
    }

    fn inputs(&self) -> usize {
        self.factor() + 2 * usize::from(self.adapter.is_some())
    }

    /// The output, and what `a` makes of x.
    fn output(
        &self,
        [x, own]: [&[FlexTensor]; 2],
        [tokens, width]: [usize; 2],
    ) -> (Vec<bf16>, Option<FlexTensor>) {
        let x = values(&x[0]);
        let outputs = dims(&own[0])[0];
        let base = (
            Halves::new(x, tokens, width),
            Halves::new(values(&own[0]), outputs, width).transposed(),
        );
        let mut output = vec![bf16::ZERO; tokens * outputs];
        let sink = Sink::Half {
            values: &mut output,
            bias: self.biased.then(|| values(&own[1])),
        };
        let Some(adapter) = &self.adapter else {
            multiply(self.engine, &[base], sink);
            return (output, None);
        };
        let rank = dims(&own[self.factor()])[0];
        let [a, b] = self.pair(own);
        let dropped = self.seen(adapter, x);
        let seen = Halves::new(dropped.as_deref().unwrap_or(x), tokens, width);
        let a = Parts::of(&transposed(a, [rank, width]), [width, rank], adapter.keep());
        let low = self.by_parts(seen, &a, tokens);
        let parts = Parts::of(&low, [tokens, rank], 1.0);
        let b = Parts::of(b, [outputs, rank], adapter.scaling);
        let [first, second, third] = both(parts.apart(), b.apart().map(Halves::transposed));
        multiply(self.engine, &[base, first, second, third], sink);
        (output, Some(tensor(low, [tokens, rank])))
    }

    fn pair<'a>(&self, own: &'a [FlexTensor]) -> [&'a [f32]; 2] {
        let factor = self.factor();
        [&own[factor], &own[factor + 1]].map(|factor| factor.as_slice().expect("a pair in f32"))
    }
}

/// The gradient of x through a pair: at the output of `a`, and `a`.
struct Through<'a> {
    adapter: &'a Adapter,
    inner: Parts,
    a: Parts,
}

impl HalfLinears {
    /// Each with its own inputs and the number of the first.
    fn parts<'a>(
        &'a self,
        inputs: &'a [FlexTensor],
    ) -> Vec<(&'a HalfLinear, usize, &'a [FlexTensor])> {
        let mut first = 1;
        let part = |linear: &'a HalfLinear| {
            let own = &inputs[first..first + linear.inputs()];
            first += own.len();
            (linear, first - own.len(), own)
        };
        self.0.iter().map(part).collect()
    }

    /// The gradient of x: a sum over all, rounded once.
    fn of_input(
        &self,
        bases: &[(Halves<'_>, Halves<'_>)],
        through: &[Through<'_>],
        shape: Vec<usize>,
    ) -> FlexTensor {
        let linear = &self.0[0];
        let (tokens, width) = (bases[0].0.row_count(), bases[0].1.column_count());
        let (dropping, plain): (Vec<_>, Vec<_>) = through
            .iter()
            .partition(|through| through.adapter.dropout > 0.0);
        let plain = plain.iter().flat_map(|through| {
            let Through { inner, a, .. } = through;
            both(inner.apart(), a.apart())
        });
        let terms: Vec<_> = bases.iter().copied().chain(plain).collect();
        if dropping.is_empty() {
            let mut output = vec![bf16::ZERO; tokens * width];
            let sink = Sink::Half {
                values: &mut output,
                bias: None,
            };
            multiply(linear.engine, &terms, sink);
            return half_tensor(output, shape);
        }
        let mut output = linear.wide(&terms, tokens, width);
        for Through { adapter, inner, a } in dropping {
            let through = linear.wide(&both(inner.apart(), a.apart()), tokens, width);
            adapter.add_kept(&mut output, &through);
        }
        cast(tensor(output, shape), DType::BF16)
    }
}

impl JointOperation for HalfLinears {
    const AS_STORED: bool = true;

    fn name(&self) -> &'static str {
        match self.0.iter().any(|linear| linear.adapter.is_some()) {
            true => "lora_linear",
            false => "linear",
        }
    }

    fn forward(&self, inputs: Vec<FlexTensor>, tracked: bool) -> Results<FlexTensor> {
        let mut shape = dims(&inputs[0]);
        let width = *shape.last().expect("three dimensions");
        let tokens = values(&inputs[0]).len() / width.max(1);
        let (mut outputs, mut kept) = (vec![], vec![]);
        for (linear, _, own) in self.parts(&inputs) {
            let (output, low) = linear.output([&inputs, own], [tokens, width]);
            *shape.last_mut().expect("three dimensions") = dims(&own[0])[0];
            outputs.push(half_tensor(output, shape.clone()));
            kept.extend(low);
        }
        let saved = match tracked {
            true => inputs.into_iter().chain(kept).collect(),
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
        let (inputs, low) = saved.split_at(wanted.len());
        let x = values(&inputs[0]);
        let shape = dims(&inputs[0]);
        let width = *shape.last().expect("three dimensions");
        let tokens = x.len() / width.max(1);
        let mut low = low.iter();
        let (mut bases, mut through) = (vec![], vec![]);
        for ((linear, first, own), gradient) in self.parts(inputs).into_iter().zip(&gradients) {
            let low = linear.adapter.as_ref().and_then(|_| low.next());
            let Some(gradient) = gradient else {
                continue;
            };
            let outputs = dims(&own[0])[0];
            let upstream = Halves::new(values(gradient), tokens, outputs);
            bases.push((upstream, Halves::new(values(&own[0]), outputs, width)));
            if linear.biased && wanted[first + 1] {
                let wide = cast(gradient.clone(), DType::F32);
                let sums = column_sums(wide.as_slice().expect("f32"), outputs);
                results[first + 1] = Some(tensor(sums, [outputs]));
            }
            let (Some(adapter), Some(low)) = (&linear.adapter, low) else {
                continue;
            };
            let rank = dims(low)[1];
            let [a, b] = linear.pair(own);
            // The gradient at the output of `a`, from which both the input and `a` get theirs.
            let b = Parts::of(b, [outputs, rank], adapter.scaling);
            let inner = linear.by_parts(upstream, &b, tokens);
            let inner = Parts::of(&inner, [tokens, rank], 1.0);
            let factor = first + linear.factor();
            if wanted[factor] {
                let dropped = linear.seen(adapter, x);
                let seen = Halves::new(dropped.as_deref().unwrap_or(x), tokens, width);
                // As rows of the left operand both parts fill a panel.
                let inner = inner.side_by_side().transposed();
                let parts = linear.wide(&[(inner, seen)], 2 * rank, width);
                let (high, low) = parts.split_at(rank * width);
                let sum = high
                    .iter()
                    .zip(low)
                    .map(|(high, low)| (high + low) * adapter.keep());
                results[factor] = Some(tensor(sum.collect(), [rank, width]));
            }
            if wanted[factor + 1] {
                let low = low.as_slice::<f32>().expect("f32");
                let low = Parts::of(low, [tokens, rank], adapter.scaling);
                let output = linear.by_parts(upstream.transposed(), &low, outputs);
                results[factor + 1] = Some(tensor(output, [outputs, rank]));
            }
            if wanted[0] {
                let a = Parts::of(a, [rank, width], 1.0);
                through.push(Through { adapter, inner, a });
            }
        }
        results[0] = wanted[0].then(|| self.of_input(&bases, &through, shape));
        results
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lora;
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
                        _ => {
                            let part = LinearPart {
                                weight: FrozenWeight::Dense(&weight),
                                bias: bias.clone(),
                                lora: lora.cloned(),
                            };
                            dispatch(engine, x.clone(), vec![part]).remove(0)
                        }
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

    /// Three that read the same input, each with its own rank, dropout and bias.
    #[test]
    fn several_linears_of_one_input_are_each_for_itself() {
        let (width, outputs) = (40, [12usize, 33, 64]);
        let x = random([2, 17, width], 1).cast(DType::BF16);
        let x = x.detach().require_grad();
        let weights = outputs.map(|outputs| {
            let drawn = random([outputs, width], outputs as u64).detach();
            drawn.cast(DType::BF16)
        });
        let bias = random([12], 2).detach().cast(DType::BF16).require_grad();
        let pair = |outputs: usize, rank: usize, dropout| Lora {
            a: random([rank, width], 3).require_grad(),
            b: random([outputs, rank], 4).require_grad(),
            scaling: 0.7,
            dropout,
            dropout_seed: outputs as u64,
        };
        for dropout in [0.0, 0.3] {
            let pairs = [Some(pair(12, 4, dropout)), None, Some(pair(64, 3, 0.0))];
            let part = |index: usize| LinearPart {
                weight: FrozenWeight::Dense(&weights[index]),
                bias: (index == 0).then(|| bias.clone()),
                lora: pairs[index].clone(),
            };
            for engine in Engine::all() {
                let run = |results: Vec<Tensor<3>>| {
                    let all = Tensor::cat(results, 2).cast(DType::F32);
                    let weights = random(all.dims(), 7).detach();
                    (all.clone().inner(), (all * weights).sum().backward())
                };
                let together = run(dispatch(engine, x.clone(), (0..3).map(part).collect()));
                let one = |index| dispatch(engine, x.clone(), vec![part(index)]).remove(0);
                let apart = run((0..3).map(one).collect());
                assert!(difference(together.0, apart.0) == 0.0, "{engine:?}");
                let found = [&together.1, &apart.1];
                // Together it is rounded once.
                let [ours, theirs] = found.map(|of| x.grad(of).unwrap().cast(DType::F32));
                assert!(difference(ours, theirs) < 1.2e-2, "{engine:?}");
                let [ours, theirs] = found.map(|of| bias.grad(of).unwrap().cast(DType::F32));
                assert!(difference(ours, theirs) == 0.0);
                for factor in pairs.iter().flatten().flat_map(|lora| [&lora.a, &lora.b]) {
                    let [ours, theirs] = found.map(|of| factor.grad(of).unwrap());
                    assert!(difference(ours, theirs) == 0.0, "{engine:?}");
                }
            }
        }
    }
}
