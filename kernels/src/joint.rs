//! Computations with several results, for which burn's graph has no node: one node computes, and a node a
//! result hangs off it. On the way back each of these leaves its gradient where the first finds them all.

use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, TensorMetadata};
use burn::tensor::{DType, Shape};

type Tracking<B> = FloatTensor<Autodiff<B, NoCheckpointing>>;

/// A differentiable computation with any number of inputs, up to [`MOST_INPUTS`], and of results.
pub(crate) trait Joint<B: Backend>: Clone + Debug + Send + 'static {
    /// The results, and what the backward pass needs; `tracked` says whether there will be one.
    fn forward(&self, inputs: Vec<FloatTensor<B>>, tracked: bool) -> Results<FloatTensor<B>>;

    /// The gradient of every input that is `wanted`. A result that nothing came of has none.
    fn backward(
        &self,
        saved: Vec<FloatTensor<B>>,
        gradients: Vec<Option<FloatTensor<B>>>,
        wanted: &[bool],
    ) -> Vec<Option<FloatTensor<B>>>;
}

/// Results, and what is kept.
pub(crate) type Results<T> = (Vec<T>, Vec<T>);

/// Three linears with bias and pair, and what they read.
pub(crate) const MOST_INPUTS: usize = 13;

/// Runs a computation and, where an input is tracked, registers its backward pass.
pub(crate) fn join<B: Backend, Op: Joint<B>>(
    operation: Op,
    inputs: Vec<Tracking<B>>,
) -> Vec<Tracking<B>> {
    let count = inputs.len();
    assert!((1..=MOST_INPUTS).contains(&count), "{count} inputs");
    // The places that are left are the first input's, which is never given a gradient for them.
    let guards: [NodeGuard; MOST_INPUTS] =
        std::array::from_fn(|index| inputs[if index < count { index } else { 0 }].node());
    let inputs: Vec<FloatTensor<B>> = inputs
        .into_iter()
        .map(Tracking::<B>::into_primitive)
        .collect();
    let device = inputs[0].device();
    let specs = inputs.iter().map(|input| (input.shape(), input.dtype()));
    let specs: Vec<(Shape, DType)> = specs.collect();
    // A node has to have a value; nothing reads this one's.
    let value = inputs[0].clone();
    let found = Arc::new(Found::<B>(Mutex::default()));
    let (node, results) = match Compute::<B, Op>(PhantomData)
        .prepare::<NoCheckpointing>(guards)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let (results, saved) = operation.forward(inputs, true);
            *found.gradients() = results.iter().map(|_| None).collect();
            let state = State {
                operation,
                saved,
                specs,
                device,
                found: found.clone(),
            };
            (prepared.finish(state, value), results)
        }
        OpsKind::UnTracked(prepared) => {
            let (results, _) = operation.forward(inputs, false);
            (prepared.finish(value), results)
        }
    };
    let hang = |(index, result)| {
        let hung = Hang::<B>(PhantomData)
            .prepare::<NoCheckpointing>([node.node()])
            .compute_bound()
            .stateful();
        match hung {
            OpsKind::Tracked(prepared) => prepared.finish((index, found.clone()), result),
            OpsKind::UnTracked(prepared) => prepared.finish(result),
        }
    };
    results.into_iter().enumerate().map(hang).collect()
}

/// The gradients of the results that came in.
#[derive(Debug)]
struct Found<B: Backend>(Mutex<Vec<Option<FloatTensor<B>>>>);

impl<B: Backend> Found<B> {
    fn gradients(&self) -> MutexGuard<'_, Vec<Option<FloatTensor<B>>>> {
        // Nothing that could panic is done while it is held.
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[derive(Debug)]
struct State<B: Backend, Op> {
    operation: Op,
    saved: Vec<FloatTensor<B>>,
    /// Shape and type of every input.
    specs: Vec<(Shape, DType)>,
    device: B::Device,
    found: Arc<Found<B>>,
}

impl<B: Backend, Op: Clone> Clone for State<B, Op> {
    fn clone(&self) -> Self {
        State {
            operation: self.operation.clone(),
            saved: self.saved.clone(),
            specs: self.specs.clone(),
            device: self.device.clone(),
            found: self.found.clone(),
        }
    }
}

/// One result.
#[derive(Debug)]
struct Hang<B>(PhantomData<B>);

impl<B: Backend> Backward<B, 1> for Hang<B> {
    /// Which result, and where its gradient goes.
    type State = (usize, Arc<Found<B>>);

    fn backward(self, ops: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let (index, found) = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);
        let [node] = ops.parents;
        let mut found = found.gradients();
        if let Some(node) = node
            && found.iter().all(Option::is_none)
        {
            // A node that is reached has to have a gradient; nothing reads this one's.
            gradients.register::<B>(node.id, gradient.clone());
        }
        found[index] = Some(gradient);
    }
}

/// All of them.
#[derive(Debug)]
struct Compute<B, Op>(PhantomData<(B, Op)>);

impl<B: Backend, Op: Joint<B>> Backward<B, MOST_INPUTS> for Compute<B, Op> {
    type State = State<B, Op>;

    fn backward(
        self,
        ops: Ops<Self::State, MOST_INPUTS>,
        gradients: &mut Gradients,
        _: &mut Checkpointer,
    ) {
        // Gone before anything is computed, so that a gradient can be written in place.
        drop(gradients.consume::<B>(&ops.node));
        let State {
            operation,
            saved,
            specs,
            device,
            found,
        } = ops.state;
        let of_results = std::mem::take(&mut *found.gradients());
        let parents = ops.parents.into_iter().take(specs.len());
        let parents = parents.collect::<Vec<_>>();
        let wanted: Vec<bool> = parents.iter().map(Option::is_some).collect();
        let of_inputs = operation.backward(saved, of_results, &wanted);
        for ((parent, gradient), (shape, dtype)) in parents.into_iter().zip(of_inputs).zip(specs) {
            if let Some(parent) = parent {
                // What only an unused result depends on: a node that is reached has to have one.
                let zeros = || B::float_zeros(shape, &device, dtype.into());
                gradients.register::<B>(parent.id, gradient.unwrap_or_else(zeros));
            }
        }
    }
}
