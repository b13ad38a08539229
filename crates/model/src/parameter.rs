//! A model's tensors with their names, and the way through all of them.

use burn::tensor::Tensor;

use crate::weight::QuantizedParameter;

/// What a trainable tensor belongs to; each group may have a learning rate of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ParameterGroup {
    /// `lora_A` and `lora_B` of the backbone.
    Adapter,
    /// Heads and whatever `modules_to_save` names.
    Head,
    /// Encoders of modality items: ours in full, of pretrained towers the low-rank pairs.
    Encoder,
    /// Between the encoders and the backbone: resamplers, projectors, type, site and time
    /// embeddings, missing tokens.
    Projector,
}

/// Goes through trainable tensors in a fixed order; see
/// [`Model::visit_trainable`](crate::Model::visit_trainable).
///
/// An optimizer writes back a new leaf:
/// `*tensor = Tensor::from_inner(new_value).require_grad()`.
pub trait ParameterVisitor {
    /// Called once a tensor. `name` is its key in the adapter file.
    fn visit<const D: usize>(&mut self, name: &str, group: ParameterGroup, tensor: &mut Tensor<D>);
}

/// What becomes of a tensor in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ParameterKind {
    /// Kept as pretrained.
    Frozen,
    /// Part of the low-rank adapter.
    Adapter,
    /// What a pair was before the first step, where the frozen weight lacks it: never trained,
    /// subtracted where the adapter is saved.
    Start,
    /// Trained in full and saved under its module's name, PEFT's `modules_to_save`.
    Saved,
    /// Trained; PEFT has no place for it.
    Own(ParameterGroup),
}

/// One tensor of the model under its path in the Transformers class, `.weight` and all.
#[derive(Debug, Clone)]
pub(crate) struct Parameter<const D: usize> {
    pub name: String,
    pub tensor: Tensor<D>,
    pub kind: ParameterKind,
    /// The checkpoint has it transposed: `[in, out]` of Transformers' `Conv1D`.
    pub transposed: bool,
}

impl<const D: usize> Parameter<D> {
    /// A trainable parameter's tensor becomes a leaf of the autodiff graph.
    pub fn new(name: String, tensor: Tensor<D>, kind: ParameterKind) -> Parameter<D> {
        let tensor = match kind {
            ParameterKind::Frozen | ParameterKind::Start => tensor,
            _ => tensor.autodiff().require_grad(),
        };
        Parameter {
            name,
            tensor,
            kind,
            transposed: false,
        }
    }

    /// The tensor in the type of the activations it meets.
    pub fn matching(&self, other: burn::tensor::DType) -> Tensor<D> {
        if self.tensor.dtype() == other {
            self.tensor.clone()
        } else {
            self.tensor.clone().cast(other)
        }
    }
}

/// Goes through every tensor of the model, frozen ones included.
pub(crate) trait Visit {
    fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>);

    /// A quantised tensor: always frozen, and outside autodiff.
    fn visit_quantized(&mut self, _parameter: &mut QuantizedParameter) {}
}

/// Key of a parameter in `adapter_model.safetensors`.
pub(crate) fn peft_key(name: &str) -> String {
    format!("base_model.model.{name}")
}
