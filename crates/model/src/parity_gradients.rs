//! Finds the tensors that a reference has gradients of, and takes ours.

use std::collections::BTreeMap;

use burn::tensor::{Gradients, TensorData};

use crate::checkpoint::Checkpoint;
use crate::parameter::{Parameter, ParameterKind, Visit, peft_key};

/// Whether a parameter is the one a gradient of the reference is called after: by the checkpoint's
/// name, with or without class prefix, or by its key in an adapter.
fn called<const D: usize>(parameter: &Parameter<D>, name: &str) -> bool {
    match parameter.kind {
        ParameterKind::Adapter => peft_key(&parameter.name) == name,
        // Goes by the name of the trained tensor that it is the start of.
        ParameterKind::Start => false,
        _ => {
            Checkpoint::canonical_name(&parameter.name) == Checkpoint::canonical_name(name)
                || peft_key(&parameter.name) == name
        }
    }
}

/// Makes leaves of the tensors whose gradients are wanted.
pub(crate) struct Track<'a> {
    pub names: Vec<&'a str>,
}

impl Visit for Track<'_> {
    fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
        if parameter.kind == ParameterKind::Frozen
            && self.names.iter().any(|name| called(parameter, name))
        {
            parameter.tensor = parameter.tensor.clone().autodiff().require_grad();
        }
    }
}

/// Takes the wanted gradients, each as its checkpoint has the tensor.
pub(crate) struct Gather<'a> {
    pub gradients: &'a Gradients,
    pub wanted: &'a mut BTreeMap<String, Option<TensorData>>,
}

impl Visit for Gather<'_> {
    fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
        for (name, found) in self.wanted.iter_mut() {
            if called(parameter, name) {
                *found = parameter.tensor.grad(self.gradients).map(|gradient| {
                    let gradient = match parameter.transposed {
                        true => gradient.swap_dims(0, 1),
                        false => gradient,
                    };
                    gradient.into_data()
                });
            }
        }
    }
}
