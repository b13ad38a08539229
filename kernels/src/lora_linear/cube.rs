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

use super::products::LoraProducts;
use super::{FrozenWeight, LinearPart, Lora};
use crate::gpu::operation::{
    Input, JointOperation, Operation, Value, apply, apply_joint, input, tensor, value,
};
use crate::gpu::rows::vector_size;
use crate::joint::{Joint, Results};
use crate::matmul::cube::{product, product_add};
use crate::quantized::QuantizedWeight;
use crate::quantized::cube as packed;
use crate::quantized::kernel::Over;

/// Three at most, of which one at least has a pair.
pub(super) fn linears(x: Tensor<3>, parts: Vec<LinearPart<'_>>) -> Vec<Tensor<3>> {
    let linears = Linears(parts.iter().map(Linear::of).collect());
    let mut inputs = vec![input(x)];
    for part in parts {
        inputs.extend(
            part.lora
                .into_iter()
                .flat_map(|lora| -> [Input; 2] { [input(lora.a), input(lora.b)] }),
        );
        if let FrozenWeight::Dense(weight) = part.weight {
            inputs.push(input(weight.clone()));
        }
        inputs.extend(part.bias.map(input));
    }
    apply_joint(linears, inputs)
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

/// Inputs in order: x, then of each a and b if it has a pair, the weight if it is dense, and the bias if
/// there is one.
#[derive(Debug, Clone)]
struct Linears(Vec<Linear>);

#[derive(Debug, Clone)]
struct Linear {
    base: Base,
    biased: bool,
    pair: Option<Pair>,
}

/// What x is multiplied with.
#[derive(Debug, Clone)]
enum Base {
    /// One of the inputs.
    Dense,
    Quantized(Box<QuantizedWeight>),
}

#[derive(Debug, Clone, Copy)]
struct Pair {
    scaling: f32,
    dropout: f32,
    seed: u64,
    /// Of a and b: their gradients have it too.
    dtypes: [DType; 2],
}

impl Linear {
    fn of(part: &LinearPart<'_>) -> Linear {
        Linear {
            base: match part.weight {
                FrozenWeight::Dense(_) => Base::Dense,
                FrozenWeight::Quantized(weight) => Base::Quantized(Box::new(weight.clone())),
            },
            biased: part.bias.is_some(),
            pair: part.lora.as_ref().map(Pair::of),
        }
    }

    /// Where the weight would stand among its inputs.
    fn weight(&self) -> usize {
        2 * usize::from(self.pair.is_some())
    }

    /// Where the bias would.
    fn bias(&self) -> usize {
        self.weight() + usize::from(matches!(self.base, Base::Dense))
    }

    fn inputs(&self) -> usize {
        self.bias() + usize::from(self.biased)
    }
}

impl Pair {
    fn of(lora: &Lora) -> Pair {
        Pair {
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
}

impl Linears {
    /// The pairs whose `a` read all of x, if they are several.
    fn shares_input(&self) -> bool {
        let reads_all = |linear: &Linear| linear.pair.is_none_or(|pair| pair.dropout <= 0.0);
        let pairs = self.0.iter().filter(|linear| linear.pair.is_some());
        pairs.count() > 1 && self.0.iter().all(reads_all)
    }
}

impl JointOperation for Linears {
    fn name(&self) -> &'static str {
        let quantized = |linear: &Linear| matches!(linear.base, Base::Quantized(_));
        match self.0.iter().any(quantized) {
            true => "quantized_linear",
            false => "lora_linear",
        }
    }
}

impl Joint<Cube> for Linears {
    fn forward(&self, inputs: Vec<Value>, tracked: bool) -> Results<Value> {
        let mut inputs = inputs.into_iter();
        let x = tensor::<3>(inputs.next().expect("x"));
        let [batch, seq, width] = x.dims();
        let flat = x.reshape([batch * seq, width]);
        let dtype = flat.dtype();
        let own: Vec<Vec<Value>> = self
            .0
            .iter()
            .map(|linear| inputs.by_ref().take(linear.inputs()).collect())
            .collect();
        let mut shared = self.shares_input().then(|| {
            let pairs = self
                .0
                .iter()
                .zip(&own)
                .filter(|(linear, _)| linear.pair.is_some());
            let every_a = pairs.map(|(_, own)| tensor::<2>(own[0].clone())).collect();
            let every_a = Tensor::cat(every_a, 0).cast(dtype);
            Shared {
                low: product(flat.clone(), every_a.transpose()),
                first: 0,
            }
        });
        let (mut outputs, mut saved) = (vec![], vec![flat.clone()]);
        for (linear, own) in self.0.iter().zip(own) {
            let weight = match &linear.base {
                Base::Dense => Weight::Plain(tensor::<2>(own[linear.weight()].clone())),
                Base::Quantized(weight) => Weight::of(weight, &flat),
            };
            let mut output = match linear.pair {
                None => weight.product(flat.clone()),
                Some(pair) => {
                    // Adapters are f32 whatever the activations are.
                    let b = tensor::<2>(own[1].clone()).cast(dtype);
                    let a = tensor::<2>(own[0].clone()).cast(dtype);
                    let shared = shared.as_mut().map(|shared| shared.next(a.dims()[0]));
                    let (output, low) = match (&weight, shared) {
                        (Weight::Plain(weight), Some((low, first))) => {
                            let output = Cube::lora_output(
                                value(flat.clone()),
                                value(low.clone()),
                                value(weight.clone()),
                                value(b.clone()),
                                pair.scaling,
                                first,
                            );
                            (tensor::<2>(output), low)
                        }
                        (Weight::Plain(weight), None) => {
                            let (output, low) = Cube::lora_products(
                                value(flat.clone()),
                                value(pair.dropped(flat.clone())),
                                value(weight.clone()),
                                value(a.clone()),
                                value(b.clone()),
                                pair.scaling,
                            );
                            (tensor::<2>(output), tensor::<2>(low))
                        }
                        (Weight::Packed(_), shared) => {
                            let (low, first) = shared.unwrap_or_else(|| {
                                let seen = pair.dropped(flat.clone());
                                (product(seen, a.clone().transpose()), 0)
                            });
                            let output = weight.product(flat.clone());
                            let own = low.clone().narrow(1, first, a.dims()[0]);
                            let b = b.clone().transpose();
                            (product_add(own, b, output, pair.scaling), low)
                        }
                    };
                    saved.extend([a, b, low]);
                    output
                }
            };
            if let (Base::Dense, Weight::Plain(weight)) = (&linear.base, weight) {
                saved.push(weight);
            }
            if linear.biased {
                let bias = tensor::<1>(own[linear.bias()].clone());
                output = output + bias.unsqueeze::<2>();
            }
            let [_, width] = output.dims();
            outputs.push(value(output.reshape([batch, seq, width])));
        }
        let saved = match tracked {
            true => saved.into_iter().map(value).collect(),
            false => vec![],
        };
        (outputs, saved)
    }

    fn backward(
        &self,
        saved: Vec<Value>,
        gradients: Vec<Option<Value>>,
        wanted: &[bool],
    ) -> Vec<Option<Value>> {
        let mut saved = saved.into_iter().map(tensor::<2>);
        let mut next = || saved.next().expect("what forward kept");
        let flat = next();
        let mut found = vec![None; wanted.len()];
        let mut of_input = None;
        let mut dims = None;
        let (mut first, mut column) = (1, 0);
        for (linear, gradient) in self.0.iter().zip(gradients) {
            let pair = linear.pair.map(|_| [next(), next(), next()]);
            let dense = matches!(linear.base, Base::Dense).then(&mut next);
            let own = first..first + linear.inputs();
            first = own.end;
            // Of `low`, where it is that of all pairs.
            let place = column;
            if let Some([a, ..]) = pair.as_ref().filter(|_| self.shares_input()) {
                column += a.dims()[0];
            }
            let Some(gradient) = gradient else {
                continue;
            };
            let weight = || match (&linear.base, dense) {
                (Base::Quantized(weight), _) => Weight::of(weight, &flat),
                (Base::Dense, Some(weight)) => Weight::Plain(weight),
                (Base::Dense, None) => unreachable!("kept by the forward pass"),
            };
            let gradient = tensor::<3>(gradient);
            let [batch, seq, outputs] = gradient.dims();
            dims = Some([batch, seq, flat.dims()[1]]);
            let gradient = gradient.reshape([batch * seq, outputs]);
            let places = &wanted[own.clone()];
            let results = &mut found[own];
            if matches!(linear.base, Base::Dense) && places[linear.weight()] {
                let of_weight = product(gradient.clone().transpose(), flat.clone());
                results[linear.weight()] = Some(value(of_weight));
            }
            if linear.biased && places[linear.bias()] {
                let dtype = gradient.dtype();
                let sum = gradient
                    .clone()
                    .cast(DType::F32)
                    .sum_dim(0)
                    .reshape([outputs]);
                results[linear.bias()] = Some(value(sum.cast(dtype)));
            }
            let (
                Some(Pair {
                    scaling,
                    dropout,
                    seed,
                    dtypes,
                }),
                Some(factors),
            ) = (linear.pair, pair)
            else {
                if wanted[0] {
                    of_input = Some(weight().product_add(gradient, of_input));
                }
                continue;
            };
            let [a, b, low] = factors.map(value);
            let seen = linear.pair.expect("just seen").dropped(flat.clone());
            let (seen, weight) = (value(seen), wanted[0].then(weight));
            let (of_a, of_b) = match weight {
                None => {
                    let gradient = value(gradient);
                    Cube::lora_gradients_of_factors(gradient, seen, low, a, b, scaling, place)
                }
                Some(weight @ Weight::Packed(_)) => {
                    let of_x = weight.product_add(gradient.clone(), of_input.take());
                    let (of_x, gradient, adds) = (value(of_x), value(gradient), dropout <= 0.0);
                    let (of_seen, of_a, of_b) = Cube::lora_gradients_of_seen(
                        gradient,
                        seen,
                        low,
                        a,
                        b,
                        of_x.clone(),
                        scaling,
                        place,
                        adds,
                    );
                    let of_x = match adds {
                        true => of_seen,
                        false => Cube::add_dropped(of_x, of_seen, dropout, seed),
                    };
                    of_input = Some(tensor::<2>(of_x));
                    (of_a, of_b)
                }
                Some(Weight::Plain(weight)) => {
                    let (gradient, weight) = (value(gradient), value(weight));
                    let adds = of_input.is_some();
                    // Where nothing is added, nothing is read of it.
                    let addend = of_input.take().map_or_else(|| seen.clone(), value);
                    let (of_x, of_a, of_b) = if dropout > 0.0 {
                        let (of_x, of_seen, of_a, of_b) = Cube::lora_gradients_apart(
                            gradient, seen, low, weight, a, b, addend, scaling, place, adds,
                        );
                        (Cube::add_dropped(of_x, of_seen, dropout, seed), of_a, of_b)
                    } else {
                        Cube::lora_gradients(
                            gradient, seen, low, weight, a, b, addend, scaling, place, adds,
                        )
                    };
                    of_input = Some(tensor::<2>(of_x));
                    (of_a, of_b)
                }
            };
            for (index, factor) in [of_a, of_b].into_iter().enumerate() {
                if places[index] {
                    let factor = tensor::<2>(factor).cast(dtypes[index]);
                    results[index] = Some(value(factor));
                }
            }
        }
        if let (Some(of_input), Some(dims)) = (of_input, dims) {
            found[0] = Some(value(of_input.reshape(dims)));
        }
        found
    }
}

/// What x is multiplied with, as this device does it best.
#[allow(clippy::large_enum_variant, reason = "lives for one product")]
enum Weight<'a> {
    Plain(Tensor<2>),
    Packed(&'a QuantizedWeight),
}

impl<'a> Weight<'a> {
    fn of(weight: &'a QuantizedWeight, x: &Tensor<2>) -> Weight<'a> {
        match packed::multiplies(x) {
            true => Weight::Packed(weight),
            false => Weight::Plain(weight.dequantize(x.dtype())),
        }
    }

    /// `x Wᵀ`
    fn product(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Weight::Packed(weight) => packed::product(x, weight, Over::In, None),
            Weight::Plain(weight) => product(x, weight.clone().transpose()),
        }
    }

    /// `gradient · W`, added to what there is.
    fn product_add(&self, gradient: Tensor<2>, sum: Option<Tensor<2>>) -> Tensor<2> {
        match (self, sum) {
            (Weight::Packed(weight), sum) => packed::product(gradient, weight, Over::Out, sum),
            (Weight::Plain(weight), Some(sum)) => product_add(gradient, weight.clone(), sum, 1.0),
            (Weight::Plain(weight), None) => product(gradient, weight.clone()),
        }
    }
}

/// What every `a` makes of x, side by side, and which column comes next.
struct Shared {
    low: Tensor<2>,
    first: usize,
}

impl Shared {
    /// All of it, and where the next pair's columns begin.
    fn next(&mut self, rank: usize) -> (Tensor<2>, usize) {
        let first = self.first;
        self.first += rank;
        (self.low.clone(), first)
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
