//! A linear layer with an optional low-rank pair.

use burn::tensor::{DType, Tensor};
use calor_kernels::{FrozenWeight, LinearPart, Lora, lora_linear, lora_linears, quantized_linear};

use crate::dora::{self, Dora};
use crate::parameter::{Parameter, Visit};
use crate::random;
use crate::run::Mode;
use crate::weight::Weight;

/// `y = x Wᵀ + b`, plus the pair's `scaling · (x Aᵀ) Bᵀ`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// `[out, in]`
    pub weight: Weight,
    /// `[out]`
    pub bias: Option<Parameter<1>>,
    pub lora: Option<LowRank>,
}

#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    /// `[rank, in]`
    pub a: Parameter<2>,
    /// `[out, rank]`
    pub b: Parameter<2>,
    pub scaling: f32,
    pub dropout: f32,
    pub index: u64,
    pub dora: Option<Dora>,
    /// `a` and `b` before the first step, where the frozen weight lacks their product (PiSSA).
    pub start: Option<[Parameter<2>; 2]>,
}

/// Each of several linears on the same input `[batch, seq, in]`, which is read once.
pub(crate) fn forward_each<const N: usize>(
    linears: &[Linear; N],
    input: Tensor<3>,
    mode: Mode,
) -> [Tensor<3>; N] {
    let has_dora = |linear: &Linear| linear.lora.as_ref().is_some_and(|pair| pair.dora.is_some());
    if linears.iter().any(has_dora) {
        return linears
            .each_ref()
            .map(|linear| linear.forward(input.clone(), mode));
    }
    let stored = linears
        .each_ref()
        .map(|linear| linear.stored(input.dtype()));
    let part = |index: usize| linears[index].part(&stored[index], input.dtype(), mode);
    let parts = (0..N).map(part).collect();
    let outputs = lora_linears(input, parts);
    outputs.try_into().expect("an output a linear")
}

impl Linear {
    /// input `[batch, seq, in]`, returns `[batch, seq, out]`
    pub fn forward(&self, input: Tensor<3>, mode: Mode) -> Tensor<3> {
        match &self.weight {
            Weight::Dense(weight) => self.forward_with(input, weight, mode),
            Weight::Quantized(quantized) => self.adapted(
                input,
                mode,
                || quantized.weight.dequantize(DType::F32),
                |input, bias, lora| quantized_linear(input, &quantized.weight, bias, lora),
            ),
        }
    }

    /// As [`Linear::forward`] with another weight: the token embedding, for tied output layers.
    pub fn forward_with(&self, input: Tensor<3>, weight: &Parameter<2>, mode: Mode) -> Tensor<3> {
        let stored = weight.matching(input.dtype());
        self.adapted(
            input,
            mode,
            || weight.tensor.clone(),
            |input, bias, lora| lora_linear(input, stored.clone(), bias, lora),
        )
    }

    /// `product` multiplies with the weight whose `values` are `[out, in]`, and adds bias and pair.
    fn adapted(
        &self,
        input: Tensor<3>,
        mode: Mode,
        values: impl Fn() -> Tensor<2>,
        product: impl Fn(Tensor<3>, Option<Tensor<1>>, Option<&Lora>) -> Tensor<3>,
    ) -> Tensor<3> {
        let lora = self.pair(mode);
        let dtype = input.dtype();
        let bias = self.bias.as_ref().map(|bias| bias.matching(dtype));
        if let (Some(pair), Some(lora)) = (&self.lora, &lora)
            && let Some(dora) = &pair.dora
        {
            let scale = dora.scale(pair, &values());
            return dora::forward(input, product, bias, lora, scale);
        }
        product(input, bias, lora.as_ref())
    }

    /// The weight in some type, where it is a matrix.
    fn stored(&self, dtype: DType) -> Option<Tensor<2>> {
        self.weight.dense().map(|weight| weight.matching(dtype))
    }

    /// As kernels take it; `stored` is what [`Linear::stored`] gave.
    fn part<'a>(
        &'a self,
        stored: &'a Option<Tensor<2>>,
        dtype: DType,
        mode: Mode,
    ) -> LinearPart<'a> {
        LinearPart {
            weight: match (&self.weight, stored) {
                (Weight::Quantized(quantized), _) => FrozenWeight::Quantized(&quantized.weight),
                (Weight::Dense(_), Some(stored)) => FrozenWeight::Dense(stored),
                (Weight::Dense(weight), None) => FrozenWeight::Dense(&weight.tensor),
            },
            bias: self.bias.as_ref().map(|bias| bias.matching(dtype)),
            lora: self.pair(mode),
        }
    }

    /// The pair as kernels take it.
    fn pair(&self, mode: Mode) -> Option<Lora> {
        self.lora.as_ref().map(|pair| Lora {
            a: pair.a.tensor.clone(),
            b: pair.b.tensor.clone(),
            scaling: pair.scaling,
            dropout: match mode {
                Mode::Train { .. } => pair.dropout,
                Mode::Infer => 0.0,
            },
            dropout_seed: match mode {
                Mode::Train { dropout_seed } => random::mix(dropout_seed, pair.index),
                Mode::Infer => 0,
            },
        })
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.weight.visit(visitor);
        self.visit_rest(visitor);
    }

    /// All but the weight.
    pub fn visit_rest<V: Visit>(&mut self, visitor: &mut V) {
        if let Some(bias) = &mut self.bias {
            visitor.visit(bias);
        }
        if let Some(pair) = &mut self.lora {
            visitor.visit(&mut pair.a);
            visitor.visit(&mut pair.b);
            if let Some(dora) = &mut pair.dora {
                visitor.visit(&mut dora.magnitude);
            }
            for start in pair.start.iter_mut().flatten() {
                visitor.visit(start);
            }
        }
    }
}
