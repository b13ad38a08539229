//! Rotary embedding on a GPU: nothing is kept but the tables, which all layers share; the backward
//! pass rotates the other way.

use burn::backend::Cube;
use burn::tensor::Tensor;

use super::kernel::Rotate;
use crate::gpu::operation::{Operation, Value, apply, input, value};

pub(super) fn rotary(x: Tensor<4>, cos: Tensor<3>, sin: Tensor<3>) -> Tensor<4> {
    let constant = |table: Tensor<3>| match table.device().is_autodiff() {
        true => table.inner(),
        false => table,
    };
    let rotation = Rotation {
        cos: constant(cos),
        sin: constant(sin),
    };
    apply(rotation, [input(x)])
}

#[derive(Debug, Clone)]
struct Rotation {
    cos: Tensor<3>,
    sin: Tensor<3>,
}

impl Rotation {
    fn rotate(&self, x: Value, back: bool) -> Value {
        Cube::rotate(x, value(self.cos.clone()), value(self.sin.clone()), back)
    }
}

impl Operation<1> for Rotation {
    fn forward(&self, [x]: [Value; 1], _tracked: [bool; 1]) -> (Value, Vec<Value>) {
        (self.rotate(x, false), vec![])
    }

    fn backward(&self, _: Vec<Value>, gradient: Value, _: [bool; 1]) -> [Option<Value>; 1] {
        [Some(self.rotate(gradient, true))]
    }
}
