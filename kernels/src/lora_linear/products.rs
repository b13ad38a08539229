//! The products of a LoRA linear, forward and backward, handed to the device together.

use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, backend_extension};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::slice;
use burn_cubecl::ops::permute;
use burn_cubecl::tensor::CubeTensor;

use crate::matmul::cube::MatrixProduct;

/// See [`lora_linear`](crate::lora_linear). `seen` is the input of the low-rank part: `x`, or `x`
/// with elements dropped.
///
/// # Shapes
/// - x, seen: `[tokens, in]`, weight: `[out, in]`, a: `[rank, in]`, b: `[out, rank]`
/// - gradient: `[tokens, out]`, low: `[tokens, rank]`
#[backend_extension(Cube, Fusion)]
pub trait LoraProducts: Backend {
    /// `x Wᵀ + scaling · low Bᵀ`, and `low = seen Aᵀ`.
    #[fusion(meta = |x, _, weight, a, _, _| (spec(x, 0, weight, 0), spec(x, 0, a, 0)))]
    fn lora_products(
        x: FloatTensor<Self>,
        seen: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scaling: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `x Wᵀ + scaling · low Bᵀ`, where `low` is there already: columns of it from `first` on, as
    /// many as `b` has.
    #[fusion(meta = |x, _, weight, _, _, _| spec(x, 0, weight, 0))]
    fn lora_output(
        x: FloatTensor<Self>,
        low: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scaling: f32,
        first: usize,
    ) -> FloatTensor<Self>;

    /// The gradients of a and b, in f32. Here and below `low` is columns as for
    /// [`lora_output`](Self::lora_output).
    #[fusion(meta = |_, _, _, a, b, _, _| (wide(a), wide(b)))]
    fn lora_gradients_of_factors(
        gradient: FloatTensor<Self>,
        seen: FloatTensor<Self>,
        low: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scaling: f32,
        first: usize,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The gradients of `seen`, added to `addend` where `adds`, of a and of b.
    #[allow(clippy::too_many_arguments)]
    #[fusion(meta = |_, seen, _, a, b, _, _, _, _| (seen.clone(), wide(a), wide(b)))]
    fn lora_gradients_of_seen(
        gradient: FloatTensor<Self>,
        seen: FloatTensor<Self>,
        low: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        addend: FloatTensor<Self>,
        scaling: f32,
        first: usize,
        adds: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// The gradients of x, where nothing is dropped, of a and of b. That of x is added to `addend`, its
    /// gradient from elsewhere, where there is one: where `adds`.
    #[allow(clippy::too_many_arguments)]
    #[fusion(meta = |_, seen, _, _, a, b, _, _, _, _| (seen.clone(), wide(a), wide(b)))]
    fn lora_gradients(
        gradient: FloatTensor<Self>,
        seen: FloatTensor<Self>,
        low: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        addend: FloatTensor<Self>,
        scaling: f32,
        first: usize,
        adds: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// The gradients of x through the base, added likewise, and of `seen`, of a and of b.
    #[allow(clippy::too_many_arguments)]
    #[fusion(meta = |_, seen, _, _, a, b, _, _, _, _| (seen.clone(), seen.clone(), wide(a), wide(b)))]
    fn lora_gradients_apart(
        gradient: FloatTensor<Self>,
        seen: FloatTensor<Self>,
        low: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        addend: FloatTensor<Self>,
        scaling: f32,
        first: usize,
        adds: bool,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    );
}

/// In the type of `rows`, as long as one dimension of each.
fn spec(rows: &TensorSpec, row: usize, columns: &TensorSpec, column: usize) -> TensorSpec {
    let shape = Shape::from(vec![rows.shape[row], columns.shape[column]]);
    TensorSpec::new(shape, rows.dtype)
}

fn wide(tensor: &TensorSpec) -> TensorSpec {
    TensorSpec::new(tensor.shape.clone(), DType::F32)
}

impl LoraProducts for CubeBackend {
    fn lora_products(
        x: CubeTensor,
        seen: CubeTensor,
        weight: CubeTensor,
        a: CubeTensor,
        b: CubeTensor,
        scaling: f32,
    ) -> (CubeTensor, CubeTensor) {
        let [weight, a, b] = [weight, a, b].map(transposed);
        #[cfg(feature = "cuda")]
        if let Some(session) = session(&x) {
            let output = empty(&x, [rows(&x), columns(&weight)], x.dtype);
            let low = empty(&x, [rows(&x), columns(&a)], x.dtype);
            let products = [
                product(&x, &weight, &output),
                product(&seen, &a, &low),
                added(&low, &b, &output, scaling),
            ];
            if crate::cuda::product::submit(&session, &products) {
                return (output, low);
            }
        }
        let output = Self::matrix_product(x, weight);
        let low = Self::matrix_product(seen, a);
        (Self::product_add(low.clone(), b, output, scaling), low)
    }

    fn lora_output(
        x: CubeTensor,
        low: CubeTensor,
        weight: CubeTensor,
        b: CubeTensor,
        scaling: f32,
        first: usize,
    ) -> CubeTensor {
        let rank = b.meta.shape()[1];
        let [weight, b] = [weight, b].map(transposed);
        #[cfg(feature = "cuda")]
        if let Some(session) = session(&x) {
            let output = empty(&x, [rows(&x), columns(&weight)], x.dtype);
            let view = view_of(&low, first, rank);
            let products = [
                product(&x, &weight, &output),
                added(&view, &b, &output, scaling),
            ];
            if crate::cuda::product::submit(&session, &products) {
                return output;
            }
        }
        let output = Self::matrix_product(x, weight);
        Self::product_add(columns_of(low, first, rank), b, output, scaling)
    }

    fn lora_gradients_of_factors(
        gradient: CubeTensor,
        seen: CubeTensor,
        low: CubeTensor,
        a: CubeTensor,
        b: CubeTensor,
        scaling: f32,
        first: usize,
    ) -> (CubeTensor, CubeTensor) {
        let found = gradients(
            gradient,
            seen,
            (low, first),
            None,
            a,
            b,
            None,
            scaling,
            Of::Factors,
        );
        let [of_a, of_b]: [CubeTensor; 2] = found.try_into().expect("two gradients");
        (of_a, of_b)
    }

    fn lora_gradients_of_seen(
        gradient: CubeTensor,
        seen: CubeTensor,
        low: CubeTensor,
        a: CubeTensor,
        b: CubeTensor,
        addend: CubeTensor,
        scaling: f32,
        first: usize,
        adds: bool,
    ) -> (CubeTensor, CubeTensor, CubeTensor) {
        let addend = adds.then_some(addend);
        let found = gradients(
            gradient,
            seen,
            (low, first),
            None,
            a,
            b,
            addend,
            scaling,
            Of::Seen,
        );
        let [of_a, of_b, of_seen]: [CubeTensor; 3] = found.try_into().expect("three gradients");
        (of_seen, of_a, of_b)
    }

    fn lora_gradients(
        gradient: CubeTensor,
        seen: CubeTensor,
        low: CubeTensor,
        weight: CubeTensor,
        a: CubeTensor,
        b: CubeTensor,
        addend: CubeTensor,
        scaling: f32,
        first: usize,
        adds: bool,
    ) -> (CubeTensor, CubeTensor, CubeTensor) {
        let (weight, addend) = (Some(weight), adds.then_some(addend));
        let found = gradients(
            gradient,
            seen,
            (low, first),
            weight,
            a,
            b,
            addend,
            scaling,
            Of::Input,
        );
        let [of_a, of_b, of_x]: [CubeTensor; 3] = found.try_into().expect("three gradients");
        (of_x, of_a, of_b)
    }

    fn lora_gradients_apart(
        gradient: CubeTensor,
        seen: CubeTensor,
        low: CubeTensor,
        weight: CubeTensor,
        a: CubeTensor,
        b: CubeTensor,
        addend: CubeTensor,
        scaling: f32,
        first: usize,
        adds: bool,
    ) -> (CubeTensor, CubeTensor, CubeTensor, CubeTensor) {
        let (weight, addend) = (Some(weight), adds.then_some(addend));
        let found = gradients(
            gradient,
            seen,
            (low, first),
            weight,
            a,
            b,
            addend,
            scaling,
            Of::InputApart,
        );
        let [of_a, of_b, of_x, of_seen]: [CubeTensor; 4] = found.try_into().expect("four");
        (of_x, of_seen, of_a, of_b)
    }
}

/// Whose gradients, beside those of a and b.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    Factors,
    /// Through the low-rank part alone.
    Seen,
    Input,
    /// Through the base and through the low-rank part, each for itself.
    InputApart,
}

/// Of a and b in f32, then those of `of`, the first of them added to `addend`.
#[allow(clippy::too_many_arguments)]
fn gradients(
    gradient: CubeTensor,
    seen: CubeTensor,
    (low, first): (CubeTensor, usize),
    weight: Option<CubeTensor>,
    a: CubeTensor,
    b: CubeTensor,
    addend: Option<CubeTensor>,
    scaling: f32,
    of: Of,
) -> Vec<CubeTensor> {
    let across = transposed(gradient.clone());
    let rank = b.meta.shape()[1];
    #[cfg(feature = "cuda")]
    if let Some(session) = session(&gradient) {
        let (tokens, dtype) = (rows(&gradient), gradient.dtype);
        let view = view_of(&low, first, rank);
        let of_low = empty(&gradient, [tokens, columns(&b)], dtype);
        let of_low_across = transposed(of_low.clone());
        let of_a = empty(&gradient, [rows(&a), columns(&a)], DType::F32);
        let of_b = empty(&gradient, [rows(&b), columns(&b)], DType::F32);
        let inputs = match of {
            Of::Factors => 0,
            Of::Seen | Of::Input => 1,
            Of::InputApart => 2,
        };
        let of_inputs: Vec<CubeTensor> = (0..inputs)
            .map(|_| empty(&gradient, [tokens, columns(&a)], dtype))
            .collect();
        let mut products = vec![
            scaled(&gradient, &b, &of_low, scaling),
            scaled(&across, &view, &of_b, scaling),
            product(&of_low_across, &seen, &of_a),
        ];
        if let (Of::Seen, Some(of_seen)) = (of, of_inputs.first()) {
            products.push(Product {
                addend: addend.as_ref(),
                ..product(&of_low, &a, of_seen)
            });
        }
        if let (Some(weight), Some(of_x)) = (&weight, of_inputs.first()) {
            products.push(Product {
                addend: addend.as_ref(),
                ..product(&gradient, weight, of_x)
            });
            products.push(match of_inputs.get(1) {
                Some(of_seen) => product(&of_low, &a, of_seen),
                None => added(&of_low, &a, of_x, 1.0),
            });
        }
        if crate::cuda::product::submit(&session, &products) {
            return [of_a, of_b].into_iter().chain(of_inputs).collect();
        }
    }
    use burn::backend::ops::FloatTensorOps;
    type This = CubeBackend;
    let of_low = This::float_mul_scalar(This::matrix_product(gradient.clone(), b), scaling.into());
    let of_a = This::wide_product(transposed(of_low.clone()), seen, 1.0);
    let of_b = This::wide_product(across, columns_of(low, first, rank), scaling);
    let mut found = vec![of_a, of_b];
    if of == Of::Seen {
        found.push(match addend {
            Some(addend) => This::product_add(of_low, a, addend, 1.0),
            None => This::matrix_product(of_low, a),
        });
        return found;
    }
    if let Some(weight) = weight.filter(|_| of != Of::Factors) {
        let of_x = match addend {
            Some(addend) => This::product_add(gradient, weight, addend, 1.0),
            None => This::matrix_product(gradient, weight),
        };
        match of {
            Of::InputApart => found.extend([of_x, This::matrix_product(of_low, a)]),
            _ => found.push(This::product_add(of_low, a, of_x, 1.0)),
        }
    }
    found
}

/// Some columns of a matrix.
fn columns_of(matrix: CubeTensor, first: usize, count: usize) -> CubeTensor {
    let [rows, columns] = [0, 1].map(|dimension| matrix.meta.shape()[dimension]);
    match columns == count {
        true => matrix,
        false => slice(matrix, &[0..rows, first..first + count]),
    }
}

fn transposed(matrix: CubeTensor) -> CubeTensor {
    permute(matrix, &[1, 0])
}

#[cfg(feature = "cuda")]
use native::*;

#[cfg(feature = "cuda")]
mod native {
    use std::sync::Arc;

    use super::*;
    use crate::cuda::Session;
    pub(super) use crate::cuda::product::Product;

    pub(super) fn session(tensor: &CubeTensor) -> Option<Arc<Session>> {
        Session::of(&tensor.device)?.ok()
    }

    pub(super) fn rows(matrix: &CubeTensor) -> usize {
        matrix.meta.shape()[0]
    }

    pub(super) fn columns(matrix: &CubeTensor) -> usize {
        matrix.meta.shape()[1]
    }

    pub(super) fn empty(like: &CubeTensor, shape: [usize; 2], dtype: DType) -> CubeTensor {
        crate::matmul::cube::empty(like, Shape::from(shape.to_vec()), dtype)
    }

    /// Some columns of a matrix where they lie, for cuBLASLt only: burn's slices are copies unless they
    /// begin at multiples of 512 bytes, since kernels may read vectors.
    pub(super) fn view_of(matrix: &CubeTensor, first: usize, count: usize) -> CubeTensor {
        let mut view = matrix.clone();
        let offset = first * matrix.meta.strides()[1] * matrix.dtype.size();
        view.handle = view.handle.offset_start(offset as u64);
        view.meta.shape = Shape::from(vec![rows(matrix), count]);
        view
    }

    pub(super) fn product<'a>(
        lhs: &'a CubeTensor,
        rhs: &'a CubeTensor,
        output: &'a CubeTensor,
    ) -> Product<'a> {
        scaled(lhs, rhs, output, 1.0)
    }

    pub(super) fn scaled<'a>(
        lhs: &'a CubeTensor,
        rhs: &'a CubeTensor,
        output: &'a CubeTensor,
        alpha: f32,
    ) -> Product<'a> {
        Product {
            lhs,
            rhs,
            addend: None,
            alpha,
            output,
        }
    }

    /// Added to what the output holds.
    pub(super) fn added<'a>(
        lhs: &'a CubeTensor,
        rhs: &'a CubeTensor,
        output: &'a CubeTensor,
        alpha: f32,
    ) -> Product<'a> {
        Product {
            addend: Some(output),
            ..scaled(lhs, rhs, output, alpha)
        }
    }
}
