//! One way in for every operation with a backward pass of its own: an [`Operation`] computes outside
//! autodiff, and [`apply`] wires its backward pass into burn's graph.

use std::fmt::Debug;
use std::marker::PhantomData;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Cube, TensorMetadata};
use burn::tensor::Tensor;

use crate::joint::{Joint, Results, join};
use crate::profile::{self, Pass};

type Tracking = Autodiff<Cube, NoCheckpointing>;

/// A float tensor of any number of dimensions, outside autodiff.
pub(crate) type Value = FloatTensor<Cube>;

/// A differentiable computation with `N` float inputs; everything else it needs is in `self`.
pub(crate) trait Operation<const N: usize>: Clone + Debug + Send + Sync + 'static {
    /// The result, and what the backward pass needs for the gradients of the `tracked` inputs.
    fn forward(&self, inputs: [Value; N], tracked: [bool; N]) -> (Value, Vec<Value>);

    /// The gradient of every input that is `wanted`.
    fn backward(&self, saved: Vec<Value>, gradient: Value, wanted: [bool; N])
    -> [Option<Value>; N];

    /// What it is called in a profile.
    fn name(&self) -> &'static str {
        profile::folder_of::<Self>()
    }
}

/// A float input on its way into an operation.
pub(crate) struct Input {
    value: Value,
    tracking: Option<FloatTensor<Tracking>>,
    tracked: bool,
}

/// Takes a tensor off burn's dispatch.
pub(crate) fn input<const D: usize>(tensor: Tensor<D>) -> Input {
    let tracked = tensor.is_tracked();
    if !tensor.device().is_autodiff() {
        return Input {
            value: value(tensor),
            tracking: None,
            tracked,
        };
    }
    let plain = value(tensor.clone().inner());
    let tracking = tensor
        .try_into_primitive::<Tracking>()
        .expect("a float tensor of this device under autodiff, without burn's checkpointing");
    Input {
        value: plain,
        tracking: Some(tracking),
        tracked,
    }
}

/// A tensor outside autodiff as an operation sees it.
pub(crate) fn value<const D: usize>(tensor: Tensor<D>) -> Value {
    tensor
        .try_into_primitive::<Cube>()
        .expect("a float tensor of this device outside autodiff")
}

/// The other way round.
pub(crate) fn tensor<const D: usize>(value: Value) -> Tensor<D> {
    Tensor::from_primitive::<Cube>(value)
}

/// Runs an operation and, where an input is tracked, registers its backward pass.
pub(crate) fn apply<Op: Operation<N>, const N: usize, const D: usize>(
    operation: Op,
    inputs: [Input; N],
) -> Tensor<D> {
    let name = profile::named(|| operation.name());
    let wait = waiting_for(name.map(|_| &inputs[0].value));
    profile::timed(name, Pass::Forward, wait, || run(operation, inputs))
}

/// As [`Operation`], with several results.
pub(crate) trait JointOperation: Joint<Cube> {
    /// What it is called in a profile.
    fn name(&self) -> &'static str;
}

/// As [`apply`], with several results.
pub(crate) fn apply_joint<Op: JointOperation, const D: usize>(
    operation: Op,
    inputs: Vec<Input>,
) -> Vec<Tensor<D>> {
    let name = profile::named(|| operation.name());
    let wait = waiting_for(name.map(|_| &inputs[0].value));
    profile::timed(name, Pass::Forward, wait, || {
        if inputs.iter().all(|input| input.tracking.is_none()) {
            let inputs = inputs.into_iter().map(|input| input.value).collect();
            let (outputs, _) = operation.forward(inputs, false);
            return outputs.into_iter().map(tensor).collect();
        }
        let tracking = |input: Input| input.tracking.unwrap_or_else(|| lift(input.value));
        let inputs = inputs.into_iter().map(tracking).collect();
        let outputs = join::<Cube, _>(Timed(operation), inputs).into_iter();
        outputs.map(Tensor::from_primitive::<Tracking>).collect()
    })
}

/// An operation whose backward pass a profile sees.
#[derive(Debug, Clone)]
struct Timed<Op>(Op);

impl<Op: JointOperation> Joint<Cube> for Timed<Op> {
    fn forward(&self, inputs: Vec<Value>, tracked: bool) -> Results<Value> {
        self.0.forward(inputs, tracked)
    }

    fn backward(
        &self,
        saved: Vec<Value>,
        gradients: Vec<Option<Value>>,
        wanted: &[bool],
    ) -> Vec<Option<Value>> {
        let name = profile::named(|| self.0.name());
        let any = gradients.iter().flatten().next();
        let wait = waiting_for(any.filter(|_| name.is_some()));
        let work = || self.0.backward(saved, gradients, wanted);
        profile::timed(name, Pass::Backward, wait, work)
    }
}

/// What waits for the device of a tensor.
fn waiting_for(value: Option<&Value>) -> impl Fn() + use<> {
    let device = value.map(|value| value.device());
    move || {
        if let Some(device) = &device {
            // A failure shows again where the results are read.
            let _ = Cube::sync(device);
        }
    }
}

fn run<Op: Operation<N>, const N: usize, const D: usize>(
    operation: Op,
    inputs: [Input; N],
) -> Tensor<D> {
    let tracked = inputs.each_ref().map(|input| input.tracked);
    if inputs.iter().all(|input| input.tracking.is_none()) {
        let (output, _) = operation.forward(inputs.map(|input| input.value), tracked);
        return tensor(output);
    }
    let (values, guards): (Vec<Value>, Vec<_>) = inputs
        .into_iter()
        .map(|input| {
            let tracking = input.tracking.unwrap_or_else(|| lift(input.value.clone()));
            (input.value, tracking.into_parts().1)
        })
        .unzip();
    let values: [Value; N] = values.try_into().expect("N inputs");
    let guards = guards.try_into().expect("N inputs");
    let output = match Custom::<Op>(PhantomData)
        .prepare::<NoCheckpointing>(guards)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let (output, saved) = operation.forward(values, tracked);
            prepared.finish((operation, saved), output)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(operation.forward(values, [false; N]).0),
    };
    Tensor::from_primitive::<Tracking>(output)
}

/// A tensor made outside autodiff is a constant of the graph.
fn lift(value: Value) -> FloatTensor<Tracking> {
    fn constant<const D: usize>(value: Value) -> FloatTensor<Tracking> {
        Tensor::<D>::from_inner(tensor(value))
            .try_into_primitive::<Tracking>()
            .expect("lifted into autodiff just now")
    }
    match value.shape().num_dims() {
        1 => constant::<1>(value),
        2 => constant::<2>(value),
        3 => constant::<3>(value),
        4 => constant::<4>(value),
        dimensions => unreachable!("no operation takes {dimensions} dimensions"),
    }
}

#[derive(Debug)]
struct Custom<Op>(PhantomData<Op>);

impl<Op: Operation<N>, const N: usize> Backward<Cube, N> for Custom<Op> {
    /// The operation and what it keeps.
    type State = (Op, Vec<Value>);

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let (operation, saved) = ops.state;
        let gradient = gradients.consume::<Cube>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let name = profile::named(|| operation.name());
        let wait = waiting_for(name.map(|_| &gradient));
        let work = || operation.backward(saved, gradient, wanted);
        let found = profile::timed(name, Pass::Backward, wait, work);
        for (parent, gradient) in ops.parents.into_iter().zip(found) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<Cube>(parent.id, gradient);
            }
        }
    }
}
