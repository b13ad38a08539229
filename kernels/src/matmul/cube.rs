//! The product through CubeCL: one kernel a type, no timing of candidates.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Cube, DispatchDevice, backend_extension};
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

type Tracking = Autodiff<Cube, NoCheckpointing>;

/// Whether the tensor lives on a device of CubeCL's.
pub(super) fn serves<const D: usize>(tensor: &Tensor<D>) -> bool {
    let device = tensor.device().without_autodiff();
    matches!(device.as_dispatch(), DispatchDevice::Cube(_))
}

/// See [`matmul`](crate::matmul).
pub(super) fn matmul<const D: usize>(lhs: Tensor<D>, rhs: Tensor<D>) -> Tensor<D> {
    if !lhs.device().is_autodiff() && !rhs.device().is_autodiff() {
        return plain(lhs, rhs);
    }
    // A frozen weight's gradient needs no input, so none is kept for it.
    let kept = Operands {
        lhs: rhs.is_tracked().then(|| lhs.clone().inner()),
        rhs: lhs.is_tracked().then(|| rhs.clone().inner()),
        shapes: [lhs.dims(), rhs.dims()],
    };
    let output = primitive(plain(lhs.clone().inner(), rhs.clone().inner()));
    let guards = [lhs, rhs].map(|tensor| {
        let tracked = tensor.autodiff().try_into_primitive::<Tracking>();
        let (_, guard) = tracked
            .expect("a float tensor of this device under autodiff, without burn's checkpointing")
            .into_parts();
        guard
    });
    let output = match Product::<D>
        .prepare::<NoCheckpointing>(guards)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => prepared.finish(kept, output),
        OpsKind::UnTracked(prepared) => prepared.finish(output),
    };
    Tensor::from_primitive::<Tracking>(output)
}

/// Of tensors outside autodiff.
fn plain<const D: usize>(lhs: Tensor<D>, rhs: Tensor<D>) -> Tensor<D> {
    Tensor::from_primitive::<Cube>(Cube::matrix_product(primitive(lhs), primitive(rhs)))
}

fn primitive<const D: usize>(tensor: Tensor<D>) -> FloatTensor<Cube> {
    tensor
        .try_into_primitive::<Cube>()
        .expect("a float tensor of this device outside autodiff")
}

/// The product as a backend computes it, without derivatives.
#[backend_extension(Cube, Fusion)]
pub trait MatrixProduct: Backend {
    /// See [`matmul`](crate::matmul).
    #[fusion(dtype = lhs, shape = product_shape(lhs, rhs))]
    fn matrix_product(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl MatrixProduct for CubeBackend {
    fn matrix_product(lhs: CubeTensor, rhs: CubeTensor) -> CubeTensor {
        let shape = product_shape(lhs.meta.shape(), rhs.meta.shape());
        let output = empty_device_dtype(lhs.client.clone(), lhs.device.clone(), shape, lhs.dtype);
        match kernels(lhs.dtype)
            .into_iter()
            .any(|kernel| launch(kernel, &lhs, &rhs, &output))
        {
            true => output,
            // Whatever burn's own choice is: better than none.
            false => CubeBackend::float_matmul(lhs, rhs),
        }
    }
}

/// The kernels for operands of a type, in the order they are tried: one may need hardware that is not
/// there.
fn kernels(dtype: DType) -> Vec<Strategy> {
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

/// What the backward pass needs.
#[derive(Debug, Clone)]
struct Operands<const D: usize> {
    lhs: Option<Tensor<D>>,
    rhs: Option<Tensor<D>>,
    shapes: [[usize; D]; 2],
}

#[derive(Debug)]
struct Product<const D: usize>;

impl<const D: usize> Backward<Cube, 2> for Product<D> {
    type State = Operands<D>;

    fn backward(
        self,
        ops: Ops<Operands<D>, 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let gradient = Tensor::<D>::from_primitive::<Cube>(gradients.consume::<Cube>(&ops.node));
        let [lhs_node, rhs_node] = ops.parents;
        let Operands { lhs, rhs, shapes } = ops.state;
        if let (Some(node), Some(rhs)) = (lhs_node, rhs) {
            let found = summed(plain(gradient.clone(), rhs.transpose()), shapes[0]);
            gradients.register::<Cube>(node.id, primitive(found));
        }
        if let (Some(node), Some(lhs)) = (rhs_node, lhs) {
            let found = summed(plain(lhs.transpose(), gradient), shapes[1]);
            gradients.register::<Cube>(node.id, primitive(found));
        }
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
