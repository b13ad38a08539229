//! From a resampler's tokens to the backbone's embeddings.

use burn::tensor::{DType, Tensor};

use super::new::New;
use crate::affine::Affine;
use crate::linear::Linear;
use crate::parameter::Visit;
use crate::run::Mode;

/// Rows of an embedding that are widened to f32 at once.
const ROWS: usize = 8192;

/// Scale and shift, linear, GELU, scale and shift, linear. The last layer starts at zero, and what comes out is in units of
/// [`Embeddings`]: whatever the item, the backbone sees the mean of its own embeddings, and training
/// starts from the unmodified model.
#[derive(Debug, Clone)]
pub(super) struct Projector {
    /// Of what comes in, `[K, width]`.
    pub input: Affine,
    first: Linear,
    /// Of what the GELU gives, `[K, hidden]`.
    pub inside: Affine,
    second: Linear,
}

impl Projector {
    pub fn new(new: &New, count: usize, width: usize, hidden: usize) -> Projector {
        let second = new.at("second");
        let affine = |name: &str, width: usize| {
            let path = format!("{}.{name}", new.path);
            Affine::new(&path, [count, width], new.group, new.device)
        };
        Projector {
            input: affine("input", width),
            first: new.linear("first", width, hidden),
            inside: affine("inside", hidden),
            second: Linear {
                weight: second.zeros("weight", [hidden, hidden]).into(),
                bias: Some(second.zeros("bias", [hidden])),
                lora: None,
            },
        }
    }

    /// `[items, K, width]` → `[items, K, hidden]`, f32
    pub fn forward(&self, tokens: Tensor<3>, mode: Mode) -> Tensor<3> {
        let wide = self.inside.forward(self.wide(tokens, mode));
        let [_, _, hidden] = wide.dims();
        // A step of Adam moves all of a row's weights alike: without this, the output would move by
        // the width of the layer as much.
        self.second
            .forward(wide.div_scalar((hidden as f32).sqrt()), mode)
    }

    /// What the GELU gives, `[items, K, hidden]`.
    pub fn wide(&self, tokens: Tensor<3>, mode: Mode) -> Tensor<3> {
        calor_kernels::gelu(self.first.forward(self.input.forward(tokens), mode))
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.input.visit(visitor);
        self.first.visit(visitor);
        self.inside.visit(visitor);
        self.second.visit(visitor);
    }
}

/// The scale of a backbone's token embeddings: where soft tokens start, and the unit in which they are
/// trained, so that one learning rate fits backbones whose embeddings differ a hundredfold.
#[derive(Debug, Clone)]
pub(super) struct Embeddings {
    /// `[hidden]`, f32.
    pub mean: Tensor<1>,
    /// Root mean square of a coordinate's distance from its mean.
    pub spread: f32,
}

impl Embeddings {
    /// Of a table `[vocab, hidden]` of any float type.
    pub fn of(table: &Tensor<2>) -> Embeddings {
        let mean = mean_row(table.clone(), |part| part);
        let centre = mean.clone().unsqueeze::<2>();
        let squares = mean_row(table.clone(), |part| (part - centre.clone()).powi_scalar(2));
        let spread: f32 = squares.mean().into_scalar();
        Embeddings {
            mean,
            spread: spread.sqrt(),
        }
    }

    /// Of the table times `scale`.
    pub fn scaled(self, scale: f64) -> Embeddings {
        Embeddings {
            mean: self.mean.mul_scalar(scale),
            spread: self.spread * scale as f32,
        }
    }

    /// From those units to embeddings, `[…, hidden]`.
    pub fn place<const D: usize>(&self, tokens: Tensor<D>) -> Tensor<D> {
        tokens.mul_scalar(self.spread) + self.mean.clone().unsqueeze::<D>()
    }
}

/// The mean row of what `of` makes of a table `[rows, hidden]` in f32, outside autodiff.
fn mean_row(table: Tensor<2>, of: impl Fn(Tensor<2>) -> Tensor<2>) -> Tensor<1> {
    let table = table.inner();
    let [rows, hidden] = table.dims();
    let mut sum = Tensor::<2>::zeros([1, hidden], (&table.device(), DType::F32));
    for start in (0..rows).step_by(ROWS) {
        let part = table.clone().narrow(0, start, ROWS.min(rows - start));
        sum = sum + of(part.cast(DType::F32)).sum_dim(0);
    }
    sum.div_scalar(rows as f32).reshape([hidden])
}
