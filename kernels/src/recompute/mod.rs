//! A part of a model that keeps nothing of its forward pass but its input, and runs again in the
//! backward pass (Chen et al. 2016).

use std::fmt::Debug;
use std::sync::Arc;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Backend, BackendTensor, DispatchKindConversion, DispatchTensor};
use burn::tensor::{Device, Tensor, TensorData};

/// What is run again: a function of one tensor and of trained parameters that it holds.
pub trait Segment: Debug + Send + Sync + 'static {
    /// The output for `input` `[batch, seq, hidden]`; both outside autodiff.
    fn forward(&self, input: Tensor<3>) -> Tensor<3>;

    /// The parameters with a gradient, leaves of the caller's graph, in a fixed order.
    fn parameters(&self) -> Vec<AnyTensor>;

    /// Runs forward again and backward from `gradient`, the output's, all outside the caller's
    /// graph: whatever is tracked inside has to be a new leaf.
    fn backward(&self, input: Tensor<3>, gradient: Tensor<3>, wanted: Wanted) -> SegmentGradients;
}

/// Whether the gradient of a segment's input is asked for; those of its parameters always are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The input comes from something trained.
    InputAndParameters,
    /// Nothing before the segment is trained.
    Parameters,
}

/// What a segment gives back; outside autodiff.
pub struct SegmentGradients {
    /// Of the input, where it was wanted.
    pub input: Option<Tensor<3>>,
    /// Of each of [`Segment::parameters`]; none where one had no part in the output.
    pub parameters: Vec<Option<AnyTensor>>,
}

/// A float tensor of any number of dimensions.
#[derive(Debug, Clone)]
pub struct AnyTensor(DispatchTensor);

impl<const D: usize> From<Tensor<D>> for AnyTensor {
    fn from(tensor: Tensor<D>) -> AnyTensor {
        AnyTensor(tensor.into_dispatch())
    }
}

/// Where a segment's input waits for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeptOn {
    /// Where it was computed.
    #[default]
    Device,
    /// In the host's memory: copied there and back, one wait for the device each way.
    Host,
}

/// The segment's output for `input`, differentiable in the input and in the segment's parameters.
/// Between the two passes only the input is held.
///
/// Bit for bit what the segment computes when it is run under autodiff, as far as the device
/// computes the same twice.
pub fn recompute(input: Tensor<3>, segment: Arc<dyn Segment>, kept: KeptOn) -> Tensor<3> {
    let parameters = segment.parameters();
    if !input.is_tracked() && parameters.is_empty() {
        return segment.forward(input.inner());
    }
    #[cfg(feature = "cpu")]
    if crate::cpu::is_flex(&input.device()) {
        return record::<burn::backend::Flex>(input, segment, parameters, kept);
    }
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    {
        record::<burn::backend::Cube>(input, segment, parameters, kept)
    }
    #[cfg(not(any(feature = "cuda", feature = "wgpu")))]
    {
        let _ = kept;
        unreachable!("a tensor on a device that this build has no backend for")
    }
}

#[cfg_attr(
    not(any(feature = "cpu", feature = "cuda", feature = "wgpu")),
    allow(dead_code)
)]
fn record<B: Backend>(
    input: Tensor<3>,
    segment: Arc<dyn Segment>,
    parameters: Vec<AnyTensor>,
    kept: KeptOn,
) -> Tensor<3>
where
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
{
    let plain = input.clone().inner();
    let input = input
        .autodiff()
        .try_into_primitive::<Autodiff<B>>()
        .expect("a float tensor under autodiff on the device it was found on");
    let leaves: Vec<_> = parameters
        .into_iter()
        .map(|parameter| {
            <DispatchTensor as DispatchKindConversion<Autodiff<B>>>::try_into_backend(parameter.0)
                .expect("a parameter on the device of the input, under autodiff")
                .float()
        })
        .collect();
    // One of the parameters stands for all: the step belongs into the graph even where nothing
    // before the segment is trained.
    let (_, input_node) = input.into_parts();
    let anchor = match leaves.first() {
        Some(leaf) => leaf.node(),
        None => Tensor::<1>::zeros([1], &plain.device())
            .autodiff()
            .try_into_primitive::<Autodiff<B>>()
            .expect("made on this device just now")
            .node(),
    };
    let state = |plain| Recorded {
        input: Kept::new(plain, kept),
        parameters: leaves.iter().map(|leaf| leaf.id()).collect(),
        segment: segment.clone(),
    };
    let primitive = |output: Tensor<3>| {
        output
            .try_into_primitive::<B>()
            .expect("computed on the device of the input, without autodiff")
    };
    let nodes = [input_node, anchor];
    let output = match <Recompute as Backward<B, 2>>::prepare::<NoCheckpointing>(Recompute, nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let output = primitive(segment.forward(plain.clone()));
            prepared.finish(state(plain), output)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(primitive(segment.forward(plain))),
    };
    Tensor::from_primitive::<Autodiff<B>>(output)
}

#[derive(Debug, Clone)]
enum Kept {
    Device(Tensor<3>),
    Host(TensorData, Device),
}

impl Kept {
    fn new(tensor: Tensor<3>, on: KeptOn) -> Kept {
        match on {
            KeptOn::Device => Kept::Device(tensor),
            KeptOn::Host => {
                let device = tensor.device();
                let data = tensor.into_data();
                // CubeCL reads when the bytes are first looked at. By then the device's memory may
                // hold something else, and until then it is not free.
                let _ = data.as_bytes().len();
                Kept::Host(data, device)
            }
        }
    }

    fn take(self) -> Tensor<3> {
        match self {
            Kept::Device(tensor) => tensor,
            Kept::Host(data, device) => {
                let dtype = data.dtype();
                Tensor::from_data(data, (&device, dtype))
            }
        }
    }
}

#[derive(Debug, Clone)]
struct Recorded {
    segment: Arc<dyn Segment>,
    input: Kept,
    parameters: Vec<NodeId>,
}

#[derive(Debug)]
struct Recompute;

impl<B: Backend> Backward<B, 2> for Recompute
where
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = Recorded;

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let Recorded {
            segment,
            input,
            parameters,
        } = ops.state;
        let gradient = Tensor::from_primitive::<B>(gradients.consume::<B>(&ops.node));
        let [input_node, _] = ops.parents;
        let wanted = match input_node {
            Some(_) => Wanted::InputAndParameters,
            None => Wanted::Parameters,
        };
        let found = segment.backward(input.take(), gradient, wanted);
        if let (Some(node), Some(gradient)) = (input_node, found.input) {
            let gradient = gradient
                .try_into_primitive::<B>()
                .expect("a gradient outside autodiff");
            gradients.register::<B>(node.id, gradient);
        }
        // A leaf's gradient is read from here by its number, so it need not be a parent.
        for (id, gradient) in parameters.into_iter().zip(found.parameters) {
            let Some(AnyTensor(gradient)) = gradient else {
                continue;
            };
            let gradient: BackendTensor<B> =
                <DispatchTensor as DispatchKindConversion<B>>::try_into_backend(gradient)
                    .expect("a gradient outside autodiff");
            gradients.register::<B>(id, gradient.float());
        }
    }
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
