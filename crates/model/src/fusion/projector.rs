//! From a resampler's tokens to the backbone's embeddings.

use burn::tensor::{DType, Tensor};

use super::new::New;
use crate::linear::Linear;
use crate::parameter::Visit;
use crate::run::Mode;

/// Rows of an embedding that are widened to f32 at once.
const ROWS: usize = 8192;

/// Linear, GELU, linear. The last layer starts at zero weight and the mean token embedding as bias:
/// whatever the item, the backbone sees the mean of its own embeddings, and training starts from
/// the unmodified model.
#[derive(Debug, Clone)]
pub(super) struct Projector {
    first: Linear,
    second: Linear,
}

impl Projector {
    /// `mean` is the backbone's mean token embedding, `[hidden]`.
    pub fn new(new: &New, width: usize, mean: &Tensor<1>) -> Projector {
        let hidden = mean.dims()[0];
        let second = new.at("second");
        Projector {
            first: new.linear("first", width, hidden),
            second: Linear {
                weight: second.zeros("weight", [hidden, hidden]),
                bias: Some(second.parameter("bias", mean.clone())),
                lora: None,
            },
        }
    }

    /// `[items, K, width]` → `[items, K, hidden]`, f32
    pub fn forward(&self, tokens: Tensor<3>, mode: Mode) -> Tensor<3> {
        let wide = calor_kernels::gelu(self.first.forward(tokens, mode));
        self.second.forward(wide, mode)
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.first.visit(visitor);
        self.second.visit(visitor);
    }
}

/// The mean row of a table `[rows, hidden]` of any float type, in f32, outside autodiff.
pub(super) fn mean_row(table: Tensor<2>) -> Tensor<1> {
    let table = table.inner();
    let [rows, hidden] = table.dims();
    let mut sum = Tensor::<2>::zeros([1, hidden], (&table.device(), DType::F32));
    for start in (0..rows).step_by(ROWS) {
        let part = table.clone().narrow(0, start, ROWS.min(rows - start));
        sum = sum + part.cast(DType::F32).sum_dim(0);
    }
    sum.div_scalar(rows as f32).reshape([hidden])
}
