//! DoRA (Liu et al. 2024): an adapted weight as a trained magnitude a row times a direction, with
//! PEFT's treatment of the bias, of dropout and of the norm.

use burn::tensor::{DType, Tensor};
use calor_kernels::Lora;

use crate::linear::LowRank;
use crate::parameter::{Parameter, ParameterKind};

/// Elements of a half-precision weight that are widened to f32 at once.
const WIDENED: usize = 1 << 20;

/// The magnitudes of one module.
#[derive(Debug, Clone)]
pub(crate) struct Dora {
    /// `[out]`, f32
    pub magnitude: Parameter<1>,
    /// Squared norms of the frozen weight's rows, `[out]`, f32.
    squares: Tensor<1>,
}

impl Dora {
    /// Magnitudes that change nothing: the norms of the rows as they are.
    ///
    /// `weight` is `[out, in]`, `a` `[rank, in]`, `b` `[out, rank]`.
    pub fn new(path: &str, weight: &Tensor<2>, pair: [&Parameter<2>; 2], scaling: f32) -> Dora {
        let squares = row_squares(weight);
        let [a, b] = pair.map(|parameter| parameter.tensor.clone().inner());
        let norms = norms(weight, squares.clone(), a, b, scaling);
        let name = format!("{path}.lora_magnitude_vector");
        Dora {
            magnitude: Parameter::new(name, norms, ParameterKind::Adapter),
            squares,
        }
    }

    /// Takes note of another frozen weight.
    pub fn reweigh(&mut self, weight: &Tensor<2>) {
        self.squares = row_squares(weight);
    }

    /// `m / ‖W + s·B·A‖`, `[out]`, f32; the norm counts as a constant (section 4.3 of the paper).
    pub fn scale(&self, pair: &LowRank, weight: &Tensor<2>) -> Tensor<1> {
        let (a, b) = (pair.a.tensor.clone().inner(), pair.b.tensor.clone().inner());
        let norms = norms(weight, self.squares.clone(), a, b, pair.scaling);
        self.magnitude.tensor.clone() / norms
    }
}

/// `bias + scale ∘ (W x + s·B·A·x)` without dropout. With it, PEFT scales what the dropped input
/// gives and leaves what the whole input gives to the weight itself:
/// `bias + W x + (scale − 1) ∘ W d(x) + scale ∘ s·B·A·d(x)`, here as
/// `bias + W (x − d(x)) + scale ∘ (W d(x) + s·B·A·d(x))`, two products with the weight as there.
///
/// input `[batch, seq, in]`, bias and scale `[out]`; returns `[batch, seq, out]`. `product` multiplies
/// with the weight and adds what it is given.
pub(crate) fn forward(
    input: Tensor<3>,
    product: impl Fn(Tensor<3>, Option<Tensor<1>>, Option<&Lora>) -> Tensor<3>,
    bias: Option<Tensor<1>>,
    lora: &Lora,
    scale: Tensor<1>,
) -> Tensor<3> {
    let scale = scale.cast(input.dtype()).unsqueeze::<3>();
    if lora.dropout == 0.0 {
        let scaled = product(input, None, Some(lora)) * scale;
        return match bias {
            Some(bias) => scaled + bias.unsqueeze::<3>(),
            None => scaled,
        };
    }
    let dropped = calor_kernels::dropout(input.clone(), lora.dropout, lora.dropout_seed);
    let undropped = Lora {
        dropout: 0.0,
        ..lora.clone()
    };
    let rest = product(input - dropped.clone(), bias, None);
    rest + product(dropped, None, Some(&undropped)) * scale
}

/// Norms of the rows of `W + s·B·A`, `[out]`, f32, without that matrix:
///
/// ```text
/// ‖w + s·b·A‖² = ‖w‖² + 2s · (W Aᵀ)·b + s² · b (A Aᵀ) bᵀ
/// ```
///
/// `‖w‖²` is of the frozen weight and known; the rest takes a product `[out, in] × [in, rank]` and
/// holds nothing larger than `[out, rank]`, so a step costs as much as `rank` more tokens. The sum
/// loses digits only where the pair nearly cancels the weight.
fn norms(
    weight: &Tensor<2>,
    squares: Tensor<1>,
    a: Tensor<2>,
    b: Tensor<2>,
    scaling: f32,
) -> Tensor<1> {
    let a = a.cast(DType::F32);
    let b = b.cast(DType::F32);
    let across = over_rows(weight, |rows| {
        calor_kernels::matmul(rows, a.clone().transpose())
    });
    let cross = (across * b.clone()).sum_dim(1).squeeze_dim::<1>(1);
    let gram = calor_kernels::matmul(a.clone(), a.transpose());
    let own = (calor_kernels::matmul(b.clone(), gram) * b)
        .sum_dim(1)
        .squeeze_dim::<1>(1);
    let sum = squares + cross.mul_scalar(2.0 * scaling) + own.mul_scalar(scaling * scaling);
    // Rounding may bring the sum of a row that is zero below zero.
    sum.clamp_min(0.0).sqrt()
}

/// Squared norms of rows, `[out]`, f32.
fn row_squares(weight: &Tensor<2>) -> Tensor<1> {
    over_rows(weight, |rows| rows.square().sum_dim(1)).squeeze_dim::<1>(1)
}

/// Applies `rows` to a weight in f32, in pieces where it has to be widened: no f32 copy of the whole
/// weight exists.
fn over_rows(weight: &Tensor<2>, rows: impl Fn(Tensor<2>) -> Tensor<2>) -> Tensor<2> {
    let weight = weight.clone().inner();
    if weight.dtype() == DType::F32 {
        return rows(weight);
    }
    let [outputs, inputs] = weight.dims();
    let height = (WIDENED / inputs.max(1)).max(1);
    let pieces = (0..outputs)
        .step_by(height)
        .map(|start| {
            let piece = weight.clone().narrow(0, start, height.min(outputs - start));
            rows(piece.cast(DType::F32))
        })
        .collect();
    Tensor::cat(pieces, 0)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};
    use calor_kernels::lora_linear;

    use super::*;
    use crate::random::Stream;

    fn drawn(name: &str, shape: [usize; 2]) -> Tensor<2> {
        let values = Stream::new(3, name).normal(shape[0] * shape[1], 0.3);
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    #[test]
    fn dropout_scales_what_the_dropped_input_gives_and_nothing_else() {
        let device = Device::flex();
        let [seq, inputs, outputs] = [5, 6, 4];
        let input = drawn("x", [seq, inputs]).reshape([1, seq, inputs]);
        let weight = drawn("w", [outputs, inputs]);
        let lora = Lora {
            a: drawn("a", [2, inputs]),
            b: drawn("b", [outputs, 2]),
            scaling: 1.5,
            dropout: 0.4,
            dropout_seed: 9,
        };
        let bias = Tensor::<1>::from_floats([0.1, -0.2, 0.3, 0.4], &device);
        let scale = Tensor::<1>::from_floats([0.9, 1.2, 1.0, 0.5], &device);
        let found = forward(
            input.clone(),
            |input, bias, lora| lora_linear(input, weight.clone(), bias, lora),
            Some(bias.clone()),
            &lora,
            scale.clone(),
        );
        let dropped = calor_kernels::dropout(input.clone(), 0.4, 9);
        let with_weight = |x: Tensor<3>| x.matmul(weight.clone().transpose().unsqueeze());
        let low = dropped
            .clone()
            .matmul(lora.a.clone().transpose().unsqueeze())
            .matmul(lora.b.clone().transpose().unsqueeze());
        let scale = scale.unsqueeze::<3>();
        let expected = with_weight(input)
            + bias.unsqueeze::<3>()
            + with_weight(dropped) * scale.clone().sub_scalar(1.0)
            + low * scale.mul_scalar(1.5);
        let difference = (found - expected).abs().max().into_scalar::<f32>();
        // f32: sums of six products in another order.
        assert!(difference < 1e-6, "{difference}");
    }

    #[test]
    fn norms_are_those_of_the_whole_matrix() {
        for (outputs, inputs, rank, scaling) in
            [(5, 7, 2, 0.5f32), (48, 96, 16, 2.0), (1, 1, 1, 1.0)]
        {
            let weight = drawn("w", [outputs, inputs]);
            let (a, b) = (drawn("a", [rank, inputs]), drawn("b", [outputs, rank]));
            let whole = weight.clone() + b.clone().matmul(a.clone()).mul_scalar(scaling);
            let expected: Vec<f32> = whole
                .square()
                .sum_dim(1)
                .sqrt()
                .into_data()
                .try_to_vec()
                .unwrap();
            for dtype in [DType::F32, DType::BF16] {
                let weight = weight.clone().cast(dtype);
                let squares = row_squares(&weight);
                let found: Vec<f32> = norms(&weight, squares, a.clone(), b.clone(), scaling)
                    .into_data()
                    .try_to_vec()
                    .unwrap();
                for (found, expected) in found.iter().zip(&expected) {
                    // f32: a few roundings of sums of 96; bf16: the weight itself has 8 bits.
                    let tolerance = if dtype == DType::F32 { 1e-6 } else { 1e-2 };
                    let difference = (found - expected).abs();
                    assert!(difference <= tolerance * expected, "{found} {expected}");
                }
            }
        }
    }
}
