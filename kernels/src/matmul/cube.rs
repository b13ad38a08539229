//! The product on a GPU: cuBLASLt where it is there, else through CubeCL one kernel a type, with no
//! timing of candidates.

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Cube, backend_extension};
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::ops::numeric::empty_device_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level::Strategy;
use cubek::matmul::multi_level::components::tile::TileMatmulKind;
use cubek::matmul::multi_level::routines::batch::double_buffering::DoubleBufferingArgs;
use cubek::matmul::routine::BlueprintStrategy;
use cubek::std::InputBinding;

use super::planned::launch_added;
use crate::gpu::empty_like;
use crate::gpu::operation::{Operation, Value, apply, input, tensor, value};

/// See [`matmul`](crate::matmul).
pub(super) fn matmul<const D: usize>(lhs: Tensor<D>, rhs: Tensor<D>) -> Tensor<D> {
    let shapes = [lhs.dims(), rhs.dims()];
    apply(Product { shapes }, [input(lhs), input(rhs)])
}

/// Of tensors outside autodiff.
pub(crate) fn product<const D: usize>(lhs: Tensor<D>, rhs: Tensor<D>) -> Tensor<D> {
    tensor(Cube::matrix_product(value(lhs), value(rhs)))
}

/// `addend + alpha · lhs · rhs`; of tensors outside autodiff.
pub(crate) fn product_add(
    lhs: Tensor<2>,
    rhs: Tensor<2>,
    addend: Tensor<2>,
    alpha: f32,
) -> Tensor<2> {
    tensor(Cube::product_add(
        value(lhs),
        value(rhs),
        value(addend),
        alpha,
    ))
}

/// `alpha · lhs · rhs` as f32, whatever the operands' type; of tensors outside autodiff.
pub(crate) fn wide_product(lhs: Tensor<2>, rhs: Tensor<2>, alpha: f32) -> Tensor<2> {
    tensor(Cube::wide_product(value(lhs), value(rhs), alpha))
}

/// The product as a backend computes it, without derivatives.
#[backend_extension(Cube, Fusion)]
pub trait MatrixProduct: Backend {
    /// See [`matmul`](crate::matmul).
    #[fusion(dtype = lhs, shape = product_shape(lhs, rhs))]
    fn matrix_product(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`wide_product`].
    #[fusion(dtype = { let _ = lhs; DType::F32 }, shape = product_shape(lhs, rhs))]
    fn wide_product(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        alpha: f32,
    ) -> FloatTensor<Self>;

    /// `addend + alpha · lhs · rhs`, in one pass where the device can.
    #[fusion(dtype = addend, shape = addend)]
    fn product_add(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        addend: FloatTensor<Self>,
        alpha: f32,
    ) -> FloatTensor<Self>;
}

impl MatrixProduct for CubeBackend {
    fn matrix_product(lhs: CubeTensor, rhs: CubeTensor) -> CubeTensor {
        let output = output(&lhs, &rhs, lhs.dtype);
        if native(&lhs, &rhs, None, 1.0, &output) {
            return output;
        }
        match kernels(lhs.dtype)
            .into_iter()
            .any(|kernel| launch(kernel, &lhs, &rhs, &output))
        {
            true => output,
            // Whatever burn's own choice is: better than none.
            false => CubeBackend::float_matmul(lhs, rhs),
        }
    }

    fn wide_product(lhs: CubeTensor, rhs: CubeTensor, alpha: f32) -> CubeTensor {
        let output = output(&lhs, &rhs, DType::F32);
        if native(&lhs, &rhs, None, alpha, &output) {
            return output;
        }
        let product = CubeBackend::matrix_product(lhs, rhs);
        let product = CubeBackend::float_cast(product, DType::F32.into());
        CubeBackend::float_mul_scalar(product, alpha.into())
    }

    fn product_add(lhs: CubeTensor, rhs: CubeTensor, addend: CubeTensor, alpha: f32) -> CubeTensor {
        let output = output(&lhs, &rhs, addend.dtype);
        if native(&lhs, &rhs, Some(&addend), alpha, &output) {
            return output;
        }
        // Of the two the smaller is scaled.
        let smaller = lhs.meta.num_elements() < rhs.meta.num_elements();
        let scale = |matrix| match alpha == 1.0 {
            true => matrix,
            false => CubeBackend::float_mul_scalar(matrix, alpha.into()),
        };
        let (lhs, rhs) = match smaller {
            true => (scale(lhs), rhs),
            false => (lhs, scale(rhs)),
        };
        let tensors = [&lhs, &rhs, &addend, &output];
        let launched = kernels(lhs.dtype).into_iter().any(|kernel| match kernel {
            Strategy::SimpleUnit(strategy) => launch_added(tensors, &strategy),
            Strategy::DoubleCyclicMma(strategy) => launch_added(tensors, &strategy),
            _ => false,
        });
        if launched {
            return output;
        }
        let product = CubeBackend::matrix_product(lhs, rhs);
        CubeBackend::float_add(addend, product)
    }
}

fn output(lhs: &CubeTensor, rhs: &CubeTensor, dtype: DType) -> CubeTensor {
    let shape = product_shape(lhs.meta.shape(), rhs.meta.shape());
    empty(lhs, shape, dtype)
}

/// A matrix, or a batch of them, to be written. Rows of whole 16 bytes lie one behind the other: that is
/// all that products ask for, and what reads them needs no copy. Others are as far apart as the device
/// likes.
pub(crate) fn empty(like: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    let row_bytes = shape[shape.num_dims() - 1] * dtype.size();
    match row_bytes.is_multiple_of(16) {
        true => empty_like(like, shape, dtype),
        false => empty_device_dtype(like.client.clone(), like.device.clone(), shape, dtype),
    }
}

/// Whether NVIDIA's library took the product.
fn native(
    lhs: &CubeTensor,
    rhs: &CubeTensor,
    addend: Option<&CubeTensor>,
    alpha: f32,
    output: &CubeTensor,
) -> bool {
    #[cfg(feature = "cuda")]
    if let Some(Ok(session)) = crate::cuda::Session::of(&output.device) {
        let product = crate::cuda::product::Product {
            lhs,
            rhs,
            addend,
            alpha,
            output,
        };
        return crate::cuda::product::submit(&session, &[product]);
    }
    let _ = (lhs, rhs, addend, alpha, output);
    false
}

/// The kernels for operands of a type, in the order they are tried: one may need hardware that is not
/// there.
pub(crate) fn kernels(dtype: DType) -> Vec<Strategy> {
    let units = Strategy::SimpleUnit(BlueprintStrategy::Inferred(Default::default()));
    let matrix_units = |tile_matmul| {
        Strategy::DoubleCyclicMma(BlueprintStrategy::Inferred(DoubleBufferingArgs {
            tile_matmul,
            specialized: false,
        }))
    };
    match dtype {
        DType::BF16 | DType::F16 => vec![
            matrix_units(TileMatmulKind::Mma),
            matrix_units(TileMatmulKind::Cmma),
            units,
            Strategy::Naive,
        ],
        _ => vec![units, Strategy::Naive],
    }
}

fn launch(kernel: Strategy, lhs: &CubeTensor, rhs: &CubeTensor, output: &CubeTensor) -> bool {
    let element = dtype_to_storage_type(output.dtype);
    let mut elements = MatmulElems::from_globals(&MatmulGlobalElems {
        lhs: element,
        rhs: element,
        out: element,
    });
    launch_ref(
        &kernel.into(),
        &output.client,
        InputBinding::new(lhs.clone().binding(), element),
        InputBinding::new(rhs.clone().binding(), element),
        output.clone().binding(),
        &mut elements,
    )
    .is_ok()
}

fn product_shape(lhs: &Shape, rhs: &Shape) -> Shape {
    let mut shape: Vec<usize> = lhs.iter().zip(rhs.iter()).map(|(l, r)| *l.max(r)).collect();
    let rank = shape.len();
    shape[rank - 2] = lhs[rank - 2];
    shape[rank - 1] = rhs[rank - 1];
    Shape::from(shape)
}

/// Inputs in order: lhs, rhs.
#[derive(Debug, Clone)]
struct Product<const D: usize> {
    shapes: [[usize; D]; 2],
}

impl<const D: usize> Operation<2> for Product<D> {
    fn forward(&self, [lhs, rhs]: [Value; 2], tracked: [bool; 2]) -> (Value, Vec<Value>) {
        let output = Cube::matrix_product(lhs.clone(), rhs.clone());
        // A frozen weight's gradient needs no input, so none is kept for it.
        let kept = [tracked[1].then_some(lhs), tracked[0].then_some(rhs)];
        (output, kept.into_iter().flatten().collect())
    }

    fn backward(
        &self,
        saved: Vec<Value>,
        gradient: Value,
        wanted: [bool; 2],
    ) -> [Option<Value>; 2] {
        let mut saved = saved.into_iter();
        let lhs = wanted[1].then(|| saved.next().expect("kept for the gradient of rhs"));
        let rhs = wanted[0].then(|| saved.next().expect("kept for the gradient of lhs"));
        let gradient = tensor::<D>(gradient);
        let of_lhs = rhs.map(|rhs| {
            let found = product(gradient.clone(), tensor::<D>(rhs).transpose());
            value(summed(found, self.shapes[0]))
        });
        let of_rhs = lhs.map(|lhs| {
            let found = product(tensor::<D>(lhs).transpose(), gradient);
            value(summed(found, self.shapes[1]))
        });
        [of_lhs, of_rhs]
    }
}

/// The sum over the leading dimensions that an operand was repeated along.
fn summed<const D: usize>(mut gradient: Tensor<D>, shape: [usize; D]) -> Tensor<D> {
    for (dimension, length) in shape.into_iter().enumerate() {
        if length == 1 && gradient.dims()[dimension] != 1 {
            gradient = gradient.sum_dim(dimension);
        }
    }
    gradient
}
