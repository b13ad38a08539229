//! One way in for every CPU kernel: an [`Operation`] computes on Flex tensors, and [`apply`] wires
//! its backward pass into burn's graph.
//!
//! Kernels compute in f32. Inputs in bf16 and f16 are widened on the way in and results rounded on
//! the way out, so that sums, statistics and products are f32 whatever is stored; for the backward
//! pass the stored inputs are kept, not their wide copies.

use std::fmt::Debug;
use std::marker::PhantomData;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Flex};
use burn::tensor::{Bytes, DType, Int, Shape, Tensor, bf16};
use burn_flex::{FlexTensor, Layout};

use super::cast::cast;
use crate::profile::{self, Pass};

type Tracking = Autodiff<Flex, NoCheckpointing>;

/// A differentiable computation with `N` float inputs; everything else it needs is in `self`.
pub(crate) trait Operation<const N: usize>: Clone + Debug + Send + Sync + 'static {
    /// The result, and what the backward pass needs; `tracked` says whether there will be one.
    fn forward(&self, inputs: [FlexTensor; N], tracked: bool) -> (FlexTensor, Vec<FlexTensor>);

    /// Whether the operation takes its inputs and the gradient as they are stored, and gives its result
    /// in the type it has, instead of f32 all the way.
    const AS_STORED: bool = false;

    /// What it is called in a profile.
    fn name(&self) -> &'static str {
        profile::folder_of::<Self>()
    }

    /// The gradient of every input that is `wanted`.
    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradient: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N];
}

/// A float input on its way into an operation.
pub(crate) enum Input {
    Plain(FlexTensor),
    Tracking(FloatTensor<Tracking>),
}

/// Takes a tensor off burn's dispatch, contiguous.
pub(crate) fn input<const D: usize>(tensor: Tensor<D>) -> Input {
    if tensor.device().is_autodiff() {
        Input::Tracking(
            tensor
                .try_into_primitive::<Tracking>()
                .expect("a Flex float tensor under autodiff without burn's own checkpointing"),
        )
    } else {
        Input::Plain(
            tensor
                .try_into_primitive::<Flex>()
                .expect("a Flex float tensor"),
        )
    }
}

/// The values of an integer tensor, in row-major order.
pub(crate) fn integers<const D: usize>(tensor: Tensor<D, Int>) -> Vec<i32> {
    tensor
        .into_data()
        .convert::<i32>()
        .try_into_vec::<i32>()
        .expect("converted to i32 just now")
}

/// Runs an operation and, where an input is tracked, registers its backward pass.
pub(crate) fn apply<Op: Operation<N>, const N: usize, const D: usize>(
    operation: Op,
    inputs: [Input; N],
) -> Tensor<D> {
    let name = profile::named(|| operation.name());
    profile::timed(name, Pass::Forward, || (), || run(operation, inputs))
}

fn run<Op: Operation<N>, const N: usize, const D: usize>(
    operation: Op,
    inputs: [Input; N],
) -> Tensor<D> {
    if inputs.iter().all(|input| matches!(input, Input::Plain(_))) {
        let inputs = inputs.map(|input| match input {
            Input::Plain(tensor) => contiguous(tensor),
            Input::Tracking(_) => unreachable!("checked above"),
        });
        let (output, _) = Widened::new::<Op>(inputs).forward(&operation, false);
        return Tensor::from_primitive::<Flex>(output);
    }
    // A tensor made outside autodiff is a constant of the graph.
    let parts = inputs.map(|input| match input {
        Input::Tracking(tensor) => tensor.into_parts(),
        Input::Plain(tensor) => {
            let constant: Tensor<1> = Tensor::from_primitive::<Flex>(flatten(tensor.clone()));
            let tracked = Tensor::<1>::from_inner(constant)
                .try_into_primitive::<Tracking>()
                .expect("lifted into autodiff just now");
            let (_, guard) = tracked.into_parts();
            (tensor, guard)
        }
    });
    let (primitives, guards): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    let primitives: [FlexTensor; N] = primitives
        .into_iter()
        .map(contiguous)
        .collect::<Vec<_>>()
        .try_into()
        .expect("N inputs");
    let guards = guards.try_into().expect("N inputs");
    let inputs = Widened::new::<Op>(primitives);

    let step = Fused::<Op>(PhantomData);
    let output = match step
        .prepare::<NoCheckpointing>(guards)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let dtypes = inputs.dtypes.to_vec();
            let (output, saved) = inputs.forward(&operation, true);
            prepared.finish((operation, saved, dtypes), output)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(inputs.forward(&operation, false).0),
    };
    Tensor::from_primitive::<Tracking>(output)
}

/// The inputs as they are stored, and as the kernels read them.
struct Widened<const N: usize> {
    stored: [FlexTensor; N],
    wide: [FlexTensor; N],
    dtypes: [DType; N],
}

impl<const N: usize> Widened<N> {
    fn new<Op: Operation<N>>(stored: [FlexTensor; N]) -> Self {
        Self {
            wide: match Op::AS_STORED {
                true => stored.clone(),
                false => stored.clone().map(wide),
            },
            dtypes: stored.each_ref().map(|tensor| tensor.dtype()),
            stored,
        }
    }

    /// The result in the type of the first input, and what is kept in the types it came in.
    fn forward<Op: Operation<N>>(
        self,
        operation: &Op,
        tracked: bool,
    ) -> (FlexTensor, Vec<FlexTensor>) {
        let Widened {
            stored,
            wide,
            dtypes,
        } = self;
        if Op::AS_STORED || dtypes.iter().all(|&dtype| dtype == DType::F32) {
            // Dropped, so that an operation may work in place.
            drop(stored);
            return operation.forward(wide, tracked);
        }
        let address = |tensor: &FlexTensor| values(tensor).as_ptr();
        let addresses: Vec<*const f32> = wide.iter().map(address).collect();
        let (output, saved) = operation.forward(wide, tracked);
        let (computed, output) = (address(&output), cast(output, dtypes[0]));
        let saved = saved
            .into_iter()
            .map(|tensor| {
                let at = address(&tensor);
                match addresses.iter().position(|&input| input == at) {
                    Some(input) => stored[input].clone(),
                    None if at == computed => output.clone(),
                    None => tensor,
                }
            })
            .collect();
        (output, saved)
    }
}

/// The same numbers in f32.
pub(crate) fn wide(tensor: FlexTensor) -> FlexTensor {
    cast(tensor, DType::F32)
}

#[derive(Debug)]
struct Fused<Op>(PhantomData<Op>);

impl<Op: Operation<N>, const N: usize> Backward<Flex, N> for Fused<Op> {
    /// The operation, what it keeps, and the types of its inputs.
    type State = (Op, Vec<FlexTensor>, Vec<DType>);

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let (operation, saved, dtypes) = ops.state;
        let gradient = gradients.consume::<Flex>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let name = profile::named(|| operation.name());
        let work = || {
            let mut gradient = contiguous(gradient);
            let mut saved = saved;
            if !Op::AS_STORED {
                gradient = wide(gradient);
                saved = saved.into_iter().map(wide).collect();
            }
            let results = operation.backward(saved, gradient, wanted);
            let mut dtypes = dtypes.into_iter();
            results.map(|result| {
                let dtype = dtypes.next().expect("a type an input");
                result.map(|result| cast(result, dtype))
            })
        };
        let results = profile::timed(name, Pass::Backward, || (), work);
        for (parent, result) in ops.parents.into_iter().zip(results) {
            if let (Some(parent), Some(result)) = (parent, result) {
                gradients.register::<Flex>(parent.id, result);
            }
        }
    }
}

/// The tensor with its elements in row-major order from the start of its buffer.
pub(crate) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// The elements of a contiguous tensor.
pub(crate) fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().expect("contiguous f32")
}

/// The elements of a contiguous tensor in bf16.
pub(crate) fn half_values(tensor: &FlexTensor) -> &[bf16] {
    tensor.as_slice::<bf16>().expect("contiguous bf16")
}

/// A tensor around freshly computed values in bf16.
pub(crate) fn half_tensor(values: Vec<bf16>, shape: impl Into<Shape>) -> FlexTensor {
    let layout = Layout::contiguous(shape.into());
    FlexTensor::new(Bytes::from_elems(values), layout, DType::BF16)
}

/// A contiguous tensor with a buffer that is its alone, to be written in place.
pub(crate) fn owned(shared: FlexTensor) -> FlexTensor {
    let whole = values(&shared).len() == shared.storage::<f32>().len();
    match whole && shared.is_unique() {
        true => shared,
        false => tensor(values(&shared).to_vec(), dims(&shared)),
    }
}

/// A tensor around freshly computed values.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape.into()),
        burn::tensor::DType::F32,
    )
}

/// The lengths of the dimensions.
pub(crate) fn dims(tensor: &FlexTensor) -> Vec<usize> {
    tensor.layout().shape().iter().copied().collect()
}

fn flatten(tensor: FlexTensor) -> FlexTensor {
    let elements = tensor.layout().num_elements();
    contiguous(tensor).reshape(Shape::from(vec![elements]))
}
