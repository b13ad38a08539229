//! The product with a packed weight: cubek's kernels, whose loads from the weight unpack it on the way to
//! shared memory, so that it never lies dequantised in the device's.

use burn::backend::ops::FloatTensorOps;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::permute;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::barrier::BarrierExpand;
use cubecl::prelude::*;
use cubecl::std::tensor::layout::Coords1d;
use cubecl::std::tensor::{View, ViewMut, ViewOperations, ViewOperationsExpand};
use cubek::matmul::multi_level::args::{BatchedCoords, MatmulArgs};
use cubek::matmul::multi_level::components::global::memory::{GlobalLayout, GlobalLayoutConfig};
use cubek::matmul::multi_level::{BatchMatmulRoutine, Strategy, launch_kernel};
use cubek::matmul::routine::BlueprintStrategy;

use super::kernel::{Over, Packed, RowRange, Words};
use crate::matmul::cube::{MatrixProduct, empty, kernels};
use crate::matmul::planned::{Planned, RightSide};

/// `x Wᵀ` or `x W`, added to `addend` if there is one.
///
/// # Shapes
/// - x: `[tokens, in]` or `[tokens, out]`
/// - addend, and what is returned: `[tokens, out]` or `[tokens, in]`
pub(super) fn product(
    x: CubeTensor,
    words: &Words,
    over: Over,
    addend: Option<CubeTensor>,
) -> CubeTensor {
    let shape = words.form.product_shape(x.meta.shape()[0], over);
    let output = empty(&x, shape, x.dtype);
    let addend = addend.map(into_contiguous);
    let tensors = (&x, addend.as_ref(), &output);
    let launched = kernels(x.dtype).into_iter().any(|kernel| match kernel {
        Strategy::SimpleUnit(strategy) => launch(tensors, words, over, &strategy),
        Strategy::DoubleCyclicMma(strategy) => launch(tensors, words, over, &strategy),
        _ => false,
    });
    if launched {
        return output;
    }
    let whole = RowRange {
        first: 0,
        rows: words.form.shape[0],
        dtype: x.dtype,
    };
    let weight = words.dequantized(whole);
    let weight = match over {
        Over::In => permute(weight, &[1, 0]),
        Over::Out => weight,
    };
    let product = CubeBackend::matrix_product(x, weight);
    match addend {
        Some(addend) => CubeBackend::float_add(addend, product),
        None => product,
    }
}

/// Whether the device has the kernel.
fn launch<A: BatchMatmulRoutine<()>>(
    (x, addend, output): (&CubeTensor, Option<&CubeTensor>, &CubeTensor),
    words: &Words,
    over: Over,
    strategy: &BlueprintStrategy<(), A>,
) -> bool {
    let [outputs, inputs] = words.form.shape;
    let (shape, strides) = match over {
        Over::In => ([inputs, outputs], [1, inputs]),
        Over::Out => ([outputs, inputs], [inputs, 1]),
    };
    let right = RightSide {
        shape,
        strides,
        // A vector lies within a word of codes, and so within a block.
        longest_vector: words.form.word(),
    };
    let Some(planned) = Planned::<A>::new(x, right, output, addend.is_some(), strategy) else {
        return false;
    };
    let input = PackedInputsLaunch::new(
        planned.left(x),
        words.launch(),
        planned.right_layout(right),
        addend.map_or(ComptimeOptionArgs::None, |addend| {
            ComptimeOptionArgs::Some(planned.output(addend))
        }),
        planned.info.vector_sizes.rhs,
    );
    let written = PackedOutputLaunch::new(planned.output(output));
    launch_kernel::<PackedArgs, A>(&output.client, input, written, (), planned.info).is_ok()
}

/// A plain matrix, one that is unpacked where it is read, and what the product is added to.
#[derive(CubeType, CubeLaunch, Clone)]
#[expand(derive(Clone))]
struct PackedInputs<Lhs: CubePrimitive, EO: CubePrimitive> {
    lhs: View<'static, Lhs, BatchedCoords>,
    weight: Packed,
    layout: GlobalLayout,
    addend: ComptimeOption<View<'static, EO, BatchedCoords>>,
    #[cube(comptime)]
    vector_size: VectorSize,
}

#[derive(CubeType, CubeLaunch, Clone)]
#[expand(derive(Clone))]
struct PackedOutput<EO: CubePrimitive> {
    output: ViewMut<'static, EO, BatchedCoords>,
}

/// What cubek's kernels read and write here. There is one batch.
#[derive(Clone)]
struct PackedArgs;

#[cube]
impl MatmulArgs for PackedArgs {
    type Input<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive> = PackedInputs<Lhs, EO>;
    type Output<EO: CubePrimitive> = PackedOutput<EO>;
    type Config = ();
    type State<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive> =
        (PackedInputs<Lhs, EO>, PackedOutput<EO>);

    fn init_state<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        input: &Self::Input<Lhs, Rhs, EO>,
        output: &mut Self::Output<EO>,
        _config: (),
        #[comptime] _lhs_layout_config: GlobalLayoutConfig,
        #[comptime] _rhs_layout_config: GlobalLayoutConfig,
        #[comptime] _out_layout_config: GlobalLayoutConfig,
    ) -> Self::State<Lhs, Rhs, EO> {
        (input.clone(), output.clone())
    }

    fn view_lhs<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        state: &Self::State<Lhs, Rhs, EO>,
    ) -> View<'_, Lhs, BatchedCoords> {
        state.0.lhs
    }

    fn batch_lhs<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        _state: &Self::State<Lhs, Rhs, EO>,
        _batch: usize,
    ) -> usize {
        0
    }

    fn view_rhs<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        state: &Self::State<Lhs, Rhs, EO>,
    ) -> View<'_, Rhs, BatchedCoords> {
        let rows = PackedVectors {
            weight: state.0.weight.clone(),
            vector_size: state.0.vector_size,
        };
        View::new::<PackedVectors, Coords1d>(rows, state.0.layout.clone())
    }

    fn batch_rhs<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        _state: &Self::State<Lhs, Rhs, EO>,
        _batch: usize,
    ) -> usize {
        0
    }

    fn view_acc<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        state: &Self::State<Lhs, Rhs, EO>,
    ) -> ComptimeOption<View<'_, EO, BatchedCoords>> {
        state.0.addend.map(|view| view)
    }

    fn batch_acc<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        _state: &Self::State<Lhs, Rhs, EO>,
        _batch: usize,
    ) -> usize {
        0
    }

    fn view_out<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        state: &Self::State<Lhs, Rhs, EO>,
    ) -> ViewMut<'_, EO, BatchedCoords> {
        state.1.output
    }

    fn batch_out<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        _state: &Self::State<Lhs, Rhs, EO>,
        _batch: usize,
    ) -> usize {
        0
    }

    fn runtime_config<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        _state: &Self::State<Lhs, Rhs, EO>,
    ) {
    }
}

/// The weight as if it lay there dequantised, a vector a place.
#[derive(CubeType, Clone)]
#[expand(derive(Clone))]
struct PackedVectors {
    weight: Packed,
    #[cube(comptime)]
    vector_size: VectorSize,
}

#[cube]
impl PackedVectors {
    /// The vector at a place, or another where the place is beyond the weight.
    fn vector<N: Size>(&self, place: usize) -> Vector<f32, N> {
        let lanes = self.vector_size.comptime() as u32;
        let first = min(place as u32 * lanes, self.weight.elements - lanes);
        self.weight.values::<N>(first)
    }

    fn places(&self) -> usize {
        self.weight.elements as usize / self.vector_size.comptime()
    }

    fn holds(&self, place: usize) -> bool {
        place < self.places()
    }
}

impl Vectorized for PackedVectors {}
impl VectorizedExpand for PackedVectorsExpand {
    fn __expand_vector_size_method(&self, _scope: &Scope) -> VectorSize {
        self.vector_size
    }
}

type Expand<T> = <T as CubeType>::ExpandType;

// What the attribute for kernels would write, were there a trait to put it on: cubek asks for these
// operations of its own.
impl<E: CubePrimitive> ViewOperations<E, Coords1d> for PackedVectors {}
impl<E: CubePrimitive> ViewOperationsExpand<E, Coords1d> for PackedVectorsExpand {
    fn __expand_read_method(&self, scope: &Scope, place: NativeExpand<usize>) -> Expand<E> {
        let vector = self.__expand_vector_method::<E::Size>(scope, place);
        E::__expand_cast_from(scope, vector)
    }

    fn __expand_read_checked_method(&self, scope: &Scope, place: NativeExpand<usize>) -> Expand<E> {
        let zero = E::__expand_cast_from(scope, 0.into());
        ViewOperationsExpand::<E, Coords1d>::__expand_read_masked_method(self, scope, place, zero)
    }

    fn __expand_read_masked_method(
        &self,
        scope: &Scope,
        place: NativeExpand<usize>,
        otherwise: Expand<E>,
    ) -> Expand<E> {
        let held = self.__expand_holds_method(scope, place);
        let found = ViewOperationsExpand::<E, Coords1d>::__expand_read_method(self, scope, place);
        select::expand::<E>(scope, held, found, otherwise)
    }

    fn __expand_read_unchecked_method(
        &self,
        scope: &Scope,
        place: NativeExpand<usize>,
    ) -> Expand<E> {
        ViewOperationsExpand::<E, Coords1d>::__expand_read_method(self, scope, place)
    }

    fn __expand_as_linear_slice_method(
        &self,
        _: &Scope,
        _: NativeExpand<usize>,
        _: NativeExpand<usize>,
    ) -> &SliceExpand<E> {
        unreachable!("kernels that copy slices of memory are not launched with packed weights")
    }

    fn __expand_tensor_map_load_method(
        &self,
        _: &Scope,
        _: &BarrierExpand,
        _: &mut SliceExpand<E>,
        _: NativeExpand<usize>,
    ) {
        unreachable!("kernels that copy tiles of memory are not launched with packed weights")
    }

    fn __expand_shape_method(&self, scope: &Scope) -> NativeExpand<usize> {
        self.__expand_places_method(scope)
    }

    fn __expand_is_in_bounds_method(
        &self,
        scope: &Scope,
        place: NativeExpand<usize>,
    ) -> NativeExpand<bool> {
        self.__expand_holds_method(scope, place)
    }
}
