//! A linear layer with an optional low-rank pair.

use burn::tensor::{DType, Tensor};
use calor_kernels::{Lora, lora_linear, quantized_linear};

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
        let lora = self.lora.as_ref().map(|pair| Lora {
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
        });
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
