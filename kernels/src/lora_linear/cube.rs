//! The LoRA linear on a GPU: the low-rank product is added into the base's, its input is held once,
//! and what dropout dropped is drawn again instead of kept.

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Cube, backend_extension};
use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};

use super::Lora;
use super::products::LoraProducts;
use crate::gpu::operation::{Operation, Value, apply, input, tensor, value};
use crate::gpu::rows::vector_size;
use crate::matmul::cube::product;
use crate::quantized::QuantizedWeight;

pub(super) fn lora_linear(
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    lora: &Lora,
) -> Tensor<3> {
    let linear = Linear::new(Base::Dense, lora);
    let (x, weight) = (input(x), input(weight));
    let (a, b) = (input(lora.a.clone()), input(lora.b.clone()));
    match bias {
        None => apply(linear, [x, a, b, weight]),
        Some(bias) => apply(linear, [x, a, b, weight, input(bias)]),
    }
}

/// As [`lora_linear`] with a quantised weight, which the backward pass dequantises again.
pub(crate) fn quantized(
    x: Tensor<3>,
    weight: &QuantizedWeight,
    bias: Option<Tensor<1>>,
    lora: &Lora,
) -> Tensor<3> {
    let linear = Linear::new(Base::Quantized(Box::new(weight.clone())), lora);
    let (a, b) = (input(lora.a.clone()), input(lora.b.clone()));
    match bias {
        None => apply(linear, [input(x), a, b]),
        Some(bias) => apply(linear, [input(x), a, b, input(bias)]),
    }
}

/// The input with elements dropped, see [`dropout`](super::dropout).
pub(super) fn dropped<const D: usize>(x: Tensor<D>, probability: f32, seed: u64) -> Tensor<D> {
    apply(Dropout { probability, seed }, [input(x)])
}

#[derive(Debug, Clone, Copy)]
struct Dropout {
    probability: f32,
    seed: u64,
}

impl Operation<1> for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn forward(&self, [x]: [Value; 1], _tracked: [bool; 1]) -> (Value, Vec<Value>) {
        (Cube::drop_elements(x, self.probability, self.seed), vec![])
    }

    fn backward(&self, _: Vec<Value>, gradient: Value, _: [bool; 1]) -> [Option<Value>; 1] {
        [Some(Cube::drop_elements(
            gradient,
            self.probability,
            self.seed,
        ))]
    }
}

/// Inputs in order: x, a, b, the weight if it is dense, and the bias if there is one.
#[derive(Debug, Clone)]
struct Linear {
    base: Base,
    scaling: f32,
    dropout: f32,
    seed: u64,
    /// Of a and b: their gradients have it too.
    dtypes: [DType; 2],
}

/// What x is multiplied with.
#[derive(Debug, Clone)]
enum Base {
    /// The fourth input.
    Dense,
    Quantized(Box<QuantizedWeight>),
}

impl Linear {
    fn new(base: Base, lora: &Lora) -> Linear {
        Linear {
            base,
            scaling: lora.scaling,
            dropout: lora.dropout,
            seed: lora.dropout_seed,
            dtypes: [lora.a.dtype(), lora.b.dtype()],
        }
    }

    /// The input of the low-rank part.
    fn dropped(&self, flat: Tensor<2>) -> Tensor<2> {
        if self.dropout <= 0.0 {
            return flat;
        }
        tensor(Cube::drop_elements(value(flat), self.dropout, self.seed))
    }

    /// Where the bias stands among the inputs.
    fn bias(&self) -> usize {
        match self.base {
            Base::Dense => 4,
            Base::Quantized(_) => 3,
        }
    }
}

impl<const N: usize> Operation<N> for Linear {
    fn name(&self) -> &'static str {
        match self.base {
            Base::Dense => "lora_linear",
            Base::Quantized(_) => "quantized_linear",
        }
    }

    fn forward(&self, inputs: [Value; N], tracked: [bool; N]) -> (Value, Vec<Value>) {
        let mut inputs = inputs.into_iter();
        let mut next = || inputs.next().expect("N inputs");
        let (x, a, b) = (next(), next(), next());
        let x = tensor::<3>(x);
        let [batch, seq, width] = x.dims();
        let flat = x.reshape([batch * seq, width]);
        let dtype = flat.dtype();
        // Adapters are f32 whatever the activations are.
        let (a, b) = (tensor::<2>(a).cast(dtype), tensor::<2>(b).cast(dtype));
        let (weight, stored) = match &self.base {
            Base::Dense => {
                let weight = next();
                (tensor::<2>(weight.clone()), Some(weight))
            }
            Base::Quantized(weight) => (weight.dequantize(dtype), None),
        };

        let seen = self.dropped(flat.clone());
        let (output, low) = Cube::lora_products(
            value(flat.clone()),
            value(seen),
            value(weight),
            value(a.clone()),
            value(b.clone()),
            self.scaling,
        );
        let (mut output, low) = (tensor::<2>(output), tensor::<2>(low));
        if let Some(bias) = inputs.next() {
            output = output + tensor::<1>(bias).unsqueeze::<2>();
        }
        let [_, outputs] = output.dims();
        let mut saved = vec![];
        if tracked.contains(&true) {
            saved.extend([flat, a, b, low].map(value));
            saved.extend(stored);
        }
        (value(output.reshape([batch, seq, outputs])), saved)
    }

    fn backward(
        &self,
        saved: Vec<Value>,
        gradient: Value,
        wanted: [bool; N],
    ) -> [Option<Value>; N] {
        let mut saved = saved.into_iter();
        let mut next = || tensor::<2>(saved.next().expect("what forward kept"));
        let (flat, a, b, low) = (next(), next(), next(), next());
        let gradient = tensor::<3>(gradient);
        let [batch, seq, outputs] = gradient.dims();
        let [tokens, width] = flat.dims();
        let gradient = gradient.reshape([tokens, outputs]);

        let mut found = [const { None }; N];
        let seen = self.dropped(flat.clone());
        let factors = (value(seen), value(low), value(a), value(b));
        let (of_a, of_b) = if wanted[0] {
            let weight = match &self.base {
                Base::Dense => next(),
                Base::Quantized(weight) => weight.dequantize(flat.dtype()),
            };
            let (seen, low, a, b) = factors;
            let (gradient, weight) = (value(gradient.clone()), value(weight));
            let (of_x, of_a, of_b) = match self.dropout > 0.0 {
                false => Cube::lora_gradients(gradient, seen, low, weight, a, b, self.scaling),
                true => {
                    let (of_x, of_seen, of_a, of_b) =
                        Cube::lora_gradients_apart(gradient, seen, low, weight, a, b, self.scaling);
                    let of_x = Cube::add_dropped(of_x, of_seen, self.dropout, self.seed);
                    (of_x, of_a, of_b)
                }
            };
            found[0] = Some(value(tensor::<2>(of_x).reshape([batch, seq, width])));
            (of_a, of_b)
        } else {
            let (seen, low, a, b) = factors;
            Cube::lora_gradients_of_factors(value(gradient.clone()), seen, low, a, b, self.scaling)
        };
        for (index, factor) in [of_a, of_b].into_iter().enumerate() {
            if wanted[1 + index] {
                let factor = tensor::<2>(factor).cast(self.dtypes[index]);
                found[1 + index] = Some(value(factor));
            }
        }
        if self.bias() > 3 && wanted[3] {
            found[3] = Some(value(product(gradient.clone().transpose(), flat)));
        }
        if wanted.get(self.bias()) == Some(&true) {
            let dtype = gradient.dtype();
            let sum = gradient.cast(DType::F32).sum_dim(0).reshape([outputs]);
            found[self.bias()] = Some(value(sum.cast(dtype)));
        }
        found
    }
}

/// Dropout as a backend computes it, without derivatives.
#[backend_extension(Cube, Fusion)]
pub trait DropElements: Backend {
    /// Each element divided by the share that is kept, or zero where
    /// [`dropout_keeps`](super::dropout_keeps) says so.
    #[fusion(dtype = x, shape = x)]
    fn drop_elements(x: FloatTensor<Self>, probability: f32, seed: u64) -> FloatTensor<Self>;

    /// The same, added to another tensor.
    #[fusion(dtype = addend, shape = addend)]
    fn add_dropped(
        addend: FloatTensor<Self>,
        x: FloatTensor<Self>,
        probability: f32,
        seed: u64,
    ) -> FloatTensor<Self>;
}

impl DropElements for CubeBackend {
    fn drop_elements(x: CubeTensor, probability: f32, seed: u64) -> CubeTensor {
        let x = into_contiguous(x);
        launch_drop(&x.clone(), x, probability, seed, false)
    }

    fn add_dropped(addend: CubeTensor, x: CubeTensor, probability: f32, seed: u64) -> CubeTensor {
        launch_drop(
            &into_contiguous(addend),
            into_contiguous(x),
            probability,
            seed,
            true,
        )
    }
}

/// Both are contiguous: an element's number is its place in row-major order.
fn launch_drop(
    addend: &CubeTensor,
    x: CubeTensor,
    probability: f32,
    seed: u64,
    adds: bool,
) -> CubeTensor {
    let output = empty_device_dtype(
        x.client.clone(),
        x.device.clone(),
        x.meta.shape().clone(),
        x.dtype,
    );
    let width = x.meta.shape()[x.meta.num_dims() - 1];
    let vector_size = vector_size(&x, width);
    let units = x.meta.num_elements() / vector_size;
    let dimension = CubeDim::new(&x.client, units);
    let count = calculate_cube_count_elemwise(&x.client, units, dimension);
    drop_kernel::launch(
        &output.client,
        count,
        dimension,
        vector_size,
        addend.clone().into_linear_view(),
        x.into_linear_view(),
        output.clone().into_linear_view(),
        probability,
        1.0 / (1.0 - probability),
        seed as u32,
        (seed >> 32) as u32,
        adds,
        dtype_to_storage_type(output.dtype),
    );
    output
}

/// See [`dropout_keeps`](super::dropout_keeps): the same numbers.
#[cube]
fn keeps(index: u32, seed_low: u32, seed_high: u32, probability: f32) -> bool {
    let mut x = (index * 0x9E37_79B1u32) ^ seed_low;
    x += seed_high;
    x ^= x >> 16u32;
    x *= 0x7FEB_352Du32;
    x ^= x >> 15u32;
    x *= 0x846C_A68Bu32;
    x ^= x >> 16u32;
    f32::cast_from(x >> 8u32) * (1.0f32 / 16_777_216.0f32) >= probability
}

#[cube(launch)]
fn drop_kernel<T: Float, N: Size>(
    addend: LinearView<'_, Vector<T, N>>,
    input: LinearView<'_, Vector<T, N>>,
    mut output: LinearViewMut<'_, Vector<T, N>>,
    probability: f32,
    scale: f32,
    seed_low: u32,
    seed_high: u32,
    #[comptime] adds: bool,
    #[define(T)] _dtype: ElemType,
) {
    if !output.is_in_bounds(ABSOLUTE_POS) {
        terminate!();
    }
    let values = input.read(ABSOLUTE_POS);
    let added = addend.read(ABSOLUTE_POS);
    let mut result = values;
    let width = values.vector_size();
    #[unroll]
    for lane in 0..width {
        let index = u32::cast_from(ABSOLUTE_POS * width + lane);
        let kept = f32::cast_from(values.extract(lane)) * scale;
        let mut value = select(keeps(index, seed_low, seed_high, probability), kept, 0.0);
        if comptime![adds] {
            value += f32::cast_from(added.extract(lane));
        }
        result.insert(lane, T::cast_from(value));
    }
    output.write(ABSOLUTE_POS, result);
}
