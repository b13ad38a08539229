//! Attention on a GPU: the output and the logarithm of each row's sum are kept, nothing of the size of
//! the scores. On tensor cores where [`cuda`](super::cuda) serves, else with the kernels of
//! [`portable`](super::portable).

use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Cube, backend_extension};
use burn::tensor::{DType, Int, IntDType, Shape, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

#[cfg(feature = "cuda")]
use super::cuda;
use super::{AttentionOptions, portable};
use crate::gpu::operation::{Operation, Value, apply, input};

/// Units of a kernel hold a share of a row of the head in their registers.
const MOST_HEAD_DIM: usize = 256;

/// Whether there are kernels for such tensors.
pub(super) fn serves(query: &Tensor<4>, key: &Tensor<4>, value: &Tensor<4>) -> bool {
    let [_, seq, _, head_dim] = query.dims();
    let known = matches!(query.dtype(), DType::F32 | DType::BF16 | DType::F16);
    let same = [key, value]
        .iter()
        .all(|other| other.dtype() == query.dtype() && other.dims()[1] == seq);
    crate::gpu::serves(query) && known && same && head_dim <= MOST_HEAD_DIM
}

/// See [`attention`](crate::attention).
pub(super) fn attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    segments: Tensor<2, Int>,
    options: &AttentionOptions,
) -> Tensor<4> {
    #[cfg(feature = "cuda")]
    let tensor_cores = cuda::serves(&query, options);
    #[cfg(not(feature = "cuda"))]
    let tensor_cores = false;
    let segments = segments.cast(IntDType::I32);
    let segments = match segments.device().is_autodiff() {
        true => segments.inner(),
        false => segments,
    };
    let attend = Attend {
        segments,
        options: *options,
        tensor_cores,
    };
    apply(attend, [input(query), input(key), input(value)])
}

#[derive(Debug, Clone)]
struct Attend {
    segments: Tensor<2, Int>,
    options: AttentionOptions,
    tensor_cores: bool,
}

impl Attend {
    fn segments(&self) -> IntTensor<Cube> {
        self.segments
            .clone()
            .try_into_primitive::<Cube>()
            .expect("an integer tensor of this device outside autodiff")
    }
}

impl Operation<3> for Attend {
    fn forward(&self, [q, k, v]: [Value; 3], tracked: [bool; 3]) -> (Value, Vec<Value>) {
        let (output, sums) = Cube::tiled_attention(
            q.clone(),
            k.clone(),
            v.clone(),
            self.segments(),
            self.options,
            self.tensor_cores,
        );
        let saved = match tracked.contains(&true) {
            true => vec![q, k, v, output.clone(), sums],
            false => vec![],
        };
        (output, saved)
    }

    fn backward(&self, saved: Vec<Value>, gradient: Value, _: [bool; 3]) -> [Option<Value>; 3] {
        let [q, k, v, output, sums]: [Value; 5] = saved.try_into().expect("what forward kept");
        let (dq, dk, dv) = Cube::tiled_attention_backward(
            q,
            k,
            v,
            self.segments(),
            output,
            sums,
            gradient,
            self.options,
            self.tensor_cores,
        );
        [Some(dq), Some(dk), Some(dv)]
    }
}

/// Attention as a backend computes it, without derivatives.
#[backend_extension(Cube, Fusion)]
pub trait TiledAttention: Backend {
    /// The output, and of each row the logarithm of the sum over its keys, `[batch, heads, seq]`: to
    /// base 2 from tensor cores, else the natural one.
    #[fusion(meta = |query, _, _, _, _, _| (query.clone(), sums_of(query)))]
    fn tiled_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        segments: IntTensor<Self>,
        options: AttentionOptions,
        tensor_cores: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The gradients of query, key and value.
    #[allow(clippy::too_many_arguments)]
    #[fusion(meta = |query, key, value, _, _, _, _, _, _| (query.clone(), key.clone(), value.clone()))]
    fn tiled_attention_backward(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        segments: IntTensor<Self>,
        output: FloatTensor<Self>,
        sums: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        options: AttentionOptions,
        tensor_cores: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

fn sums_of(query: &TensorSpec) -> TensorSpec {
    TensorSpec::new(sums_shape(&query.shape), DType::F32)
}

pub(super) fn sums_shape(query: &Shape) -> Shape {
    Shape::from(vec![query[0], query[2], query[1]])
}

impl TiledAttention for CubeBackend {
    fn tiled_attention(
        query: CubeTensor,
        key: CubeTensor,
        value: CubeTensor,
        segments: CubeTensor,
        options: AttentionOptions,
        tensor_cores: bool,
    ) -> (CubeTensor, CubeTensor) {
        #[cfg(feature = "cuda")]
        if tensor_cores {
            return cuda::forward(query, key, value, segments, &options);
        }
        let _ = tensor_cores;
        portable::forward(query, key, value, segments, &options)
    }

    fn tiled_attention_backward(
        query: CubeTensor,
        key: CubeTensor,
        value: CubeTensor,
        segments: CubeTensor,
        output: CubeTensor,
        sums: CubeTensor,
        gradient: CubeTensor,
        options: AttentionOptions,
        tensor_cores: bool,
    ) -> (CubeTensor, CubeTensor, CubeTensor) {
        let (inputs, kept) = ([query, key, value], [output, sums, gradient]);
        #[cfg(feature = "cuda")]
        if tensor_cores {
            return cuda::backward(inputs, segments, kept, &options);
        }
        let _ = tensor_cores;
        portable::backward(inputs, segments, kept, &options)
    }
}
