//! RMSNorm and LayerNorm over the last dimension.

#[cfg(feature = "cpu")]
pub(crate) mod cpu;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cube;
pub(crate) mod reference;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod rows;

use burn::tensor::Tensor;

/// A norm over the last dimension: [`layer_norm`] where it has a bias, else [`rms_norm`].
#[derive(Debug, Clone)]
pub struct Norm {
    /// `[hidden]`
    pub weight: Tensor<1>,
    /// `[hidden]`
    pub bias: Option<Tensor<1>>,
    pub epsilon: f64,
}

/// `x / √(mean(x²) + ε) · weight` (Zhang and Sennrich 2019), in the type of the input. A weight in f32
/// beside an input in half precision is multiplied before the result is rounded.
///
/// # Shapes
/// - input: `[…, hidden]`, weight: `[hidden]`, returns `[…, hidden]`
pub fn rms_norm<const D: usize>(input: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    let bias = None;
    Norm {
        weight,
        bias,
        epsilon,
    }
    .of(input)
}

/// `(x − mean(x)) / √(var(x) + ε) · weight + bias`, with the biased variance (Ba et al. 2016).
///
/// # Shapes
/// - input: `[…, hidden]`, weight, bias: `[hidden]`, returns `[…, hidden]`
pub fn layer_norm<const D: usize>(
    input: Tensor<D>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    epsilon: f64,
) -> Tensor<D> {
    let bias = Some(bias);
    Norm {
        weight,
        bias,
        epsilon,
    }
    .of(input)
}

/// `x + update`, and its norm: what a block adds to the residual stream, and what the next one reads of
/// it. Without an `update`, `x` itself. The gradient of both results is made in one pass.
///
/// # Shapes
/// - x, update and the results: `[…, hidden]`
pub fn residual_norm<const D: usize>(
    x: Tensor<D>,
    update: Option<Tensor<D>>,
    norm: Norm,
) -> (Tensor<D>, Tensor<D>) {
    let of = |tensor: &Tensor<D>| (tensor.dims(), tensor.dtype());
    let alike = |update| of(update) == of(&x);
    assert!(
        update.as_ref().is_none_or(alike),
        "an update of another shape or type"
    );
    #[cfg(feature = "cpu")]
    if crate::on_cpu(&x) && cpu::rounds(x.dtype()) {
        return pair(cpu::apply(Form::of(&update), x, update, norm));
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&x) {
        return pair(cube::apply(Form::of(&update), x, update, norm));
    }
    let sum = match update {
        Some(update) => x + update,
        None => x,
    };
    (sum.clone(), norm.of(sum))
}

impl Norm {
    fn of<const D: usize>(self, input: Tensor<D>) -> Tensor<D> {
        #[cfg(feature = "cpu")]
        if crate::on_cpu(&input) {
            return cpu::apply(Form::Alone, input, None, self).remove(0);
        }
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if crate::gpu::serves(&input) {
            return cube::apply(Form::Alone, input, None, self).remove(0);
        }
        match self.bias {
            Some(bias) => reference::layer_norm(input, self.weight, bias, self.epsilon),
            None => reference::rms_norm(input, self.weight, self.epsilon),
        }
    }
}

/// What is normalised, and what else comes of it.
#[cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu"))]
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// The first input; only its norm.
    Alone,
    /// The first input; that itself, and its norm.
    Forked,
    /// The sum of the first two; that, and its norm.
    Added,
}

#[cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu"))]
impl Form {
    /// Of a norm beside what it is of.
    fn of<const D: usize>(update: &Option<Tensor<D>>) -> Form {
        match update {
            Some(_) => Form::Added,
            None => Form::Forked,
        }
    }

    /// Where the weight stands among the inputs.
    fn weight(self) -> usize {
        1 + usize::from(self == Form::Added)
    }
}

/// What is normalised, and its norm.
#[cfg(any(feature = "cpu", feature = "cuda", feature = "wgpu"))]
fn pair<const D: usize>(found: Vec<Tensor<D>>) -> (Tensor<D>, Tensor<D>) {
    let [sum, normed] = found.try_into().expect("a sum and its norm");
    (sum, normed)
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
