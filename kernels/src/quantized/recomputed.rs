//! The product with a quantised weight on backends without a kernel of their own: plain tensor
//! operations, but a backward pass that dequantises the weight again instead of keeping it.
//!
//! Autodiff would keep the dequantised weight of every layer from the forward to the backward pass,
//! which is the memory that quantising saves.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Backend, DispatchDevice, DispatchKindConversion, DispatchTensor};
use burn::tensor::Tensor;

use super::QuantizedWeight;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use super::{cube, kernel::Over};
use crate::matmul;

/// `x Wᵀ`, in the type of `x`.
///
/// # Shapes
/// - input: `[tokens, in]`
/// - returns: `[tokens, out]`
pub(super) fn product(input: Tensor<2>, weight: &QuantizedWeight) -> Tensor<2> {
    if !input.device().is_autodiff() {
        return plain(input, weight);
    }
    let device = input.device().without_autodiff();
    match device.as_dispatch() {
        #[cfg(feature = "cpu")]
        DispatchDevice::Flex(_) => tracked::<burn::backend::Flex>(input, weight),
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        DispatchDevice::Cube(_) => tracked::<burn::backend::Cube>(input, weight),
        #[allow(unreachable_patterns)]
        _ => plain(input, weight),
    }
}

fn plain(input: Tensor<2>, weight: &QuantizedWeight) -> Tensor<2> {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&input) && cube::multiplies(&input) {
        return cube::product(input, weight, Over::In, None);
    }
    let weight = weight.dequantize(input.dtype());
    matmul(input, weight.transpose())
}

/// The gradient of the input.
fn backward(gradient: Tensor<2>, weight: &QuantizedWeight) -> Tensor<2> {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if crate::gpu::serves(&gradient) && cube::multiplies(&gradient) {
        return cube::product(gradient, weight, Over::Out, None);
    }
    let weight = weight.dequantize(gradient.dtype());
    matmul(gradient, weight)
}

type Tracking<B> = Autodiff<B, NoCheckpointing>;

fn tracked<B>(input: Tensor<2>, weight: &QuantizedWeight) -> Tensor<2>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Tracking<B>>,
{
    let (input, guard) = input
        .try_into_primitive::<Tracking<B>>()
        .expect("a float tensor under autodiff without burn's own checkpointing")
        .into_parts();
    let output = plain(Tensor::from_primitive::<B>(input), weight);
    let output = primitive::<B>(output);
    let output = match Product
        .prepare::<NoCheckpointing>([guard])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => prepared.finish(weight.clone(), output),
        OpsKind::UnTracked(prepared) => prepared.finish(output),
    };
    Tensor::from_primitive::<Tracking<B>>(output)
}

#[derive(Debug)]
struct Product;

impl<B> Backward<B, 1> for Product
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = QuantizedWeight;

    fn backward(
        self,
        ops: Ops<QuantizedWeight, 1>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let weight = ops.state;
        let upstream = Tensor::<2>::from_primitive::<B>(gradients.consume::<B>(&ops.node));
        if let [Some(parent)] = ops.parents {
            let result = backward(upstream, &weight);
            gradients.register::<B>(parent.id, primitive::<B>(result));
        }
    }
}

fn primitive<B>(tensor: Tensor<2>) -> burn::backend::tensor::FloatTensor<B>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
{
    tensor
        .try_into_primitive::<B>()
        .expect("a float tensor of this backend outside autodiff")
}
