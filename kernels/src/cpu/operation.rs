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
use burn::backend::{Autodiff, Flex, TensorMetadata};
use burn::tensor::{Bytes, DType, Int, Shape, Tensor, bf16};
use burn_flex::{FlexTensor, Layout};

use super::cast::cast;
use crate::joint::{Joint, Results, join};
use crate::profile::{self, Pass};

type Tracking = Autodiff<Flex, NoCheckpointing>;

/// A differentiable computation with `N` float inputs; everything else it needs is in `self`.
pub(crate) trait Operation<const N: usize>: Clone + Debug + Send + Sync + 'static {
    /// The result, and what the backward pass needs; `tracked` says whether there will be one.
    fn forward(&self, inputs: [FlexTensor; N], tracked: bool) -> (FlexTensor, Vec<FlexTensor>);

    /// Whether the operation takes its inputs and the gradient as they are stored, and gives its result
    /// in the type it has, instead of f32 all the way.
    const AS_STORED: bool = false;

    /// Whether it may write its result where an input was, of which it then keeps none but small ones.
    fn in_place(&self) -> bool {
        false
    }

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

/// As [`Operation`], with several results.
pub(crate) trait JointOperation: Clone + Debug + Send + Sync + 'static {
    /// See [`Operation::AS_STORED`].
    const AS_STORED: bool = false;

    /// See [`Operation::in_place`].
    fn in_place(&self) -> bool {
        false
    }

    /// See [`Operation::forward`].
    fn forward(&self, inputs: Vec<FlexTensor>, tracked: bool) -> Results<FlexTensor>;

    /// What it is called in a profile.
    fn name(&self) -> &'static str;

    /// The gradient of every input that is `wanted`. A result that nothing came of has none.
    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradients: Vec<Option<FlexTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<FlexTensor>>;
}

/// As [`apply`], with several results.
pub(crate) fn apply_joint<Op: JointOperation, const D: usize>(
    operation: Op,
    inputs: Vec<Input>,
) -> Vec<Tensor<D>> {
    let name = profile::named(|| operation.name());
    profile::timed(
        name,
        Pass::Forward,
        || (),
        || {
            let operation = JointStep {
                operation,
                dtypes: inputs.iter().map(Input::dtype).collect(),
            };
            if inputs.iter().all(|input| matches!(input, Input::Plain(_))) {
                let inputs = inputs.into_iter().map(Input::into_primitive).collect();
                let (outputs, _) = operation.forward(inputs, false);
                return outputs
                    .into_iter()
                    .map(Tensor::from_primitive::<Flex>)
                    .collect();
            }
            let inputs = inputs.into_iter().map(Input::tracking).collect();
            let outputs = join::<Flex, _>(operation, inputs).into_iter();
            outputs.map(Tensor::from_primitive::<Tracking>).collect()
        },
    )
}

fn run<Op: Operation<N>, const N: usize, const D: usize>(
    operation: Op,
    inputs: [Input; N],
) -> Tensor<D> {
    let forward = |inputs: Vec<FlexTensor>, tracked| {
        let compute = |wide: Vec<FlexTensor>| {
            let (output, saved) = operation.forward(as_array(wide), tracked);
            (vec![output], saved)
        };
        let (outputs, saved) = with_wide(inputs, Op::AS_STORED, operation.in_place(), compute);
        (outputs.into_iter().next().expect("one result"), saved)
    };
    if inputs.iter().all(|input| matches!(input, Input::Plain(_))) {
        let inputs = inputs.into_iter().map(Input::into_primitive).collect();
        return Tensor::from_primitive::<Flex>(forward(inputs, false).0);
    }
    let dtypes = inputs.iter().map(Input::dtype).collect();
    let parts = inputs.map(|input| input.tracking().into_parts());
    let (inputs, guards): (Vec<FlexTensor>, Vec<_>) = parts.into_iter().unzip();
    let step = Fused::<Op>(PhantomData);
    let output = match step
        .prepare::<NoCheckpointing>(as_array(guards))
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let (output, saved) = forward(inputs, true);
            prepared.finish((operation, saved, dtypes), output)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(forward(inputs, false).0),
    };
    Tensor::from_primitive::<Tracking>(output)
}

fn as_array<T, const N: usize>(items: Vec<T>) -> [T; N] {
    let count = items.len();
    match items.try_into() {
        Ok(array) => array,
        Err(_) => unreachable!("{count} of {N}"),
    }
}

impl Input {
    fn dtype(&self) -> DType {
        match self {
            Input::Plain(tensor) => tensor.dtype(),
            Input::Tracking(tensor) => tensor.dtype(),
        }
    }

    fn into_primitive(self) -> FlexTensor {
        match self {
            Input::Plain(tensor) => tensor,
            Input::Tracking(tensor) => tensor.into_primitive(),
        }
    }

    /// A tensor made outside autodiff is a constant of the graph.
    fn tracking(self) -> FloatTensor<Tracking> {
        fn lifted<const D: usize>(tensor: FlexTensor) -> FloatTensor<Tracking> {
            Tensor::<D>::from_inner(Tensor::from_primitive::<Flex>(tensor))
                .try_into_primitive::<Tracking>()
                .expect("lifted into autodiff just now")
        }
        match self {
            Input::Tracking(tensor) => tensor,
            Input::Plain(tensor) => match tensor.layout().shape().num_dims() {
                1 => lifted::<1>(tensor),
                2 => lifted::<2>(tensor),
                3 => lifted::<3>(tensor),
                4 => lifted::<4>(tensor),
                dimensions => unreachable!("no operation takes {dimensions} dimensions"),
            },
        }
    }
}

/// Runs `compute` on the inputs as kernels read them, contiguous, and in f32 unless it takes them
/// `as_stored`. Gives the results in the type of the first input, and what is kept in the types it came
/// in.
fn with_wide(
    inputs: Vec<FlexTensor>,
    as_stored: bool,
    in_place: bool,
    compute: impl FnOnce(Vec<FlexTensor>) -> Results<FlexTensor>,
) -> Results<FlexTensor> {
    let stored: Vec<FlexTensor> = inputs.into_iter().map(contiguous).collect();
    if as_stored || stored.iter().all(|tensor| tensor.dtype() == DType::F32) {
        // Not held here, so that an operation may work in place.
        return compute(stored);
    }
    let dtype = stored[0].dtype();
    let inputs: Vec<FlexTensor> = stored.iter().cloned().map(wide).collect();
    // Held while their addresses are compared: what is freed may lie elsewhere again.
    let (held, stored) = match in_place {
        true => {
            drop(stored);
            (vec![], vec![])
        }
        false => (inputs.clone(), stored),
    };
    let (computed, saved) = compute(inputs);
    let as_it_came = |tensor: &FlexTensor| {
        let at = values(tensor).as_ptr();
        let mut places = held.iter().map(|input| values(input).as_ptr());
        places
            .position(|place| place == at)
            .map(|input| stored[input].clone())
    };
    let result = |computed| as_it_came(computed).unwrap_or_else(|| cast(computed.clone(), dtype));
    let results: Vec<FlexTensor> = computed.iter().map(result).collect();
    let kept = |tensor: FlexTensor| {
        let at = values(&tensor).as_ptr();
        let mut places = computed.iter().map(|result| values(result).as_ptr());
        let result = places.position(|place| place == at);
        as_it_came(&tensor).unwrap_or_else(|| match result {
            Some(result) => results[result].clone(),
            None => tensor,
        })
    };
    let saved = saved.into_iter().map(kept).collect();
    (results, saved)
}

/// A [`JointOperation`] with the types of its inputs.
#[derive(Clone, Debug)]
struct JointStep<Op> {
    operation: Op,
    dtypes: Vec<DType>,
}

impl<Op: JointOperation> Joint<Flex> for JointStep<Op> {
    fn forward(&self, inputs: Vec<FlexTensor>, tracked: bool) -> Results<FlexTensor> {
        let compute = |inputs| self.operation.forward(inputs, tracked);
        with_wide(inputs, Op::AS_STORED, self.operation.in_place(), compute)
    }

    fn backward(
        &self,
        saved: Vec<FlexTensor>,
        gradients: Vec<Option<FlexTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<FlexTensor>> {
        let name = profile::named(|| self.operation.name());
        let work = || {
            let as_read = |tensor: FlexTensor| match Op::AS_STORED {
                true => contiguous(tensor),
                false => wide(contiguous(tensor)),
            };
            let saved = saved.into_iter().map(as_read).collect();
            let gradients = gradients.into_iter().map(|gradient| gradient.map(as_read));
            let found = self.operation.backward(saved, gradients.collect(), wanted);
            let found = found.into_iter().zip(&self.dtypes);
            found
                .map(|(gradient, &dtype)| gradient.map(|gradient| cast(gradient, dtype)))
                .collect()
        };
        profile::timed(name, Pass::Backward, || (), work)
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
