//! The masked softmax on a GPU: plain tensor operations, of which only the result is kept.

use burn::tensor::{Bool, DType, Tensor};

use super::{ScoreOptions, reference};
use crate::gpu::operation::{Operation, Value, apply, input, tensor, value};

pub(super) fn masked_softmax(
    scores: Tensor<4>,
    visible: Tensor<4, Bool>,
    options: &ScoreOptions,
) -> Tensor<4> {
    let visible = match visible.device().is_autodiff() {
        true => visible.inner(),
        false => visible,
    };
    let softmax = Softmax {
        visible,
        options: *options,
    };
    apply(softmax, [input(scores)])
}

#[derive(Debug, Clone)]
struct Softmax {
    visible: Tensor<4, Bool>,
    options: ScoreOptions,
}

impl Operation<1> for Softmax {
    fn forward(&self, [scores]: [Value; 1], tracked: [bool; 1]) -> (Value, Vec<Value>) {
        let kept = self.options.soft_cap.map(|_| scores.clone());
        let visible = self.visible.clone();
        let weights = reference::masked_softmax(tensor(scores), visible, &self.options);
        let weights = value(weights);
        let saved = match tracked {
            [true] => [Some(weights.clone()), kept]
                .into_iter()
                .flatten()
                .collect(),
            [false] => vec![],
        };
        (weights, saved)
    }

    fn backward(&self, saved: Vec<Value>, gradient: Value, _: [bool; 1]) -> [Option<Value>; 1] {
        let mut saved = saved
            .into_iter()
            .map(|saved| tensor::<4>(saved).cast(DType::F32));
        let weights = saved.next().expect("the result");
        let gradient = tensor::<4>(gradient);
        let dtype = gradient.dtype();
        let gradient = gradient.cast(DType::F32);
        let mean = (weights.clone() * gradient.clone()).sum_dim(3);
        let mut slopes = weights * (gradient - mean) * self.options.scale;
        if let (Some(cap), Some(scores)) = (self.options.soft_cap, saved.next()) {
            let share = (scores * (self.options.scale / cap)).tanh();
            slopes = slopes * (share.square().neg() + 1.0);
        }
        [Some(value(slopes.cast(dtype)))]
    }
}
