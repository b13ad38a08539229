//! Products by cubek's kernels in which something else takes part: a matrix that is unpacked where it is
//! read, or one that the product is added to.

use burn::backend::cubecl::dtype_to_storage_type;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::AddressType;
use cubecl::prelude::*;
use cubecl::std::tensor::launch::ViewArg;
use cubecl::std::tensor::layout::VirtualLayoutLaunch;
use cubek::matmul::definition::{
    AccumulatorOperand, AvailableVectorSizes, MatmulElems, MatmulGlobalElems, MatmulProblem,
};
use cubek::matmul::multi_level::args::{
    BatchedCoords, ConcreteOutputFactory, OutputArg, TensorArgs, TensorInputsLaunch,
};
use cubek::matmul::multi_level::components::global::memory::{
    GlobalLayout, GlobalLayoutConfig, GlobalLayoutLaunch, NoopLayout, NoopLayoutLaunch,
};
use cubek::matmul::multi_level::definition::Blueprint;
use cubek::matmul::multi_level::{BatchMatmulRoutine, LaunchInfo, launch_kernel};
use cubek::matmul::routine::BlueprintStrategy;

/// How the right side lies, or would lie if it were not packed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RightSide {
    pub(crate) shape: [usize; 2],
    pub(crate) strides: [usize; 2],
    /// The most neighbours that can be read at once.
    pub(crate) longest_vector: usize,
}

impl RightSide {
    fn of(matrix: &CubeTensor) -> RightSide {
        RightSide {
            shape: [0, 1].map(|dimension| matrix.meta.shape()[dimension]),
            strides: [0, 1].map(|dimension| matrix.meta.strides()[dimension]),
            longest_vector: usize::MAX,
        }
    }
}

/// A product that a device has a kernel for.
pub(crate) struct Planned<A: BatchMatmulRoutine<()>> {
    problem: MatmulProblem,
    pub(crate) info: LaunchInfo<A::Blueprint>,
}

impl<A: BatchMatmulRoutine<()>> Planned<A> {
    /// Of matrices of one type; `adds`: to something. None where the device has no such kernel.
    pub(crate) fn new(
        lhs: &CubeTensor,
        right: RightSide,
        output: &CubeTensor,
        adds: bool,
        strategy: &BlueprintStrategy<(), A>,
    ) -> Option<Self> {
        let client = &output.client;
        let element = dtype_to_storage_type(output.dtype);
        let elements = MatmulElems::from_globals(&MatmulGlobalElems {
            lhs: element,
            rhs: element,
            out: element,
        });
        let address_type = lhs
            .required_address_type()
            .max(output.required_address_type())
            .max(AddressType::from_len(right.shape.iter().product()));
        let mut problem = MatmulProblem::from_shapes_and_strides(
            lhs.meta.shape().clone(),
            right.shape.into(),
            output.meta.shape().clone(),
            lhs.meta.strides().clone(),
            right.strides.into(),
            output.meta.strides().clone(),
            elements.as_global_elems(),
            address_type,
            None,
            None,
        )
        .ok()?;
        if adds {
            problem.accumulator = AccumulatorOperand::Present;
        }
        let size = output.dtype.size();
        let sizes = AvailableVectorSizes::from_type_sizes(client, size, size, size)
            .filter_lhs_with_tensor(&problem.lhs_strides, &problem.lhs_shape, problem.lhs_layout)
            .filter_rhs(|&size| size <= right.longest_vector)
            .filter_rhs_with_tensor(&problem.rhs_strides, &problem.rhs_shape, problem.rhs_layout)
            .filter_out_with_tensor(&problem.out_strides, &problem.out_shape)
            .pick_max()
            .ok()?;
        let settings = A::device_settings(client, sizes);
        let expanded = A::expand_blueprint(&problem, &settings, strategy).ok()?;
        let info = A::prepare(&problem, &settings, expanded).ok()?;
        Some(Planned { problem, info })
    }

    pub(crate) fn left(&self, lhs: &CubeTensor) -> ViewArg<BatchedCoords> {
        let config = self.info.blueprint.lhs_global_layout_config();
        view(lhs, self.info.vector_sizes.lhs, config)
    }

    pub(crate) fn right_layout(&self, right: RightSide) -> GlobalLayoutLaunch {
        GlobalLayoutLaunch::new(
            VirtualLayoutLaunch::new::<NoopLayout>(NoopLayoutLaunch::new()),
            right.shape[0] as u32,
            right.shape[1] as u32,
            right.strides[0],
            right.strides[1],
            self.info.vector_sizes.rhs,
            1,
            self.info.blueprint.rhs_global_layout_config(),
        )
    }

    /// Of the output, or of what it is added to.
    pub(crate) fn output(&self, matrix: &CubeTensor) -> ViewArg<BatchedCoords> {
        let config = self.info.blueprint.out_global_layout_config();
        view(matrix, self.info.vector_sizes.out, config)
    }
}

/// `output = addend + lhs · rhs` in one kernel; whether the device has it.
pub(crate) fn launch_added<A: BatchMatmulRoutine<()>>(
    [lhs, rhs, addend, output]: [&CubeTensor; 4],
    strategy: &BlueprintStrategy<(), A>,
) -> bool {
    let right = RightSide::of(rhs);
    let Some(planned) = Planned::<A>::new(lhs, right, output, true, strategy) else {
        return false;
    };
    let info = &planned.info;
    // It is read in the vectors that the output is written in.
    let strides = addend.meta.strides();
    if strides[1] != 1 || !strides[0].is_multiple_of(info.vector_sizes.out) {
        return false;
    }
    let right = ViewArg::new_tensor::<GlobalLayout>(
        rhs.clone().binding().into_tensor_arg(),
        planned.right_layout(right),
    );
    // There is one batch.
    let batch = || VirtualLayoutLaunch::new::<NoopLayout>(NoopLayoutLaunch::new());
    let input = TensorInputsLaunch::new(
        batch(),
        planned.left(lhs),
        batch(),
        right,
        ComptimeOptionArgs::Some(batch()),
        ComptimeOptionArgs::Some(planned.output(addend)),
    );
    let written = <OutputArg<TensorArgs> as ConcreteOutputFactory<A>>::create(
        output.clone().binding(),
        &info.blueprint,
        &planned.problem,
        &info.vector_sizes,
        &info.dtypes,
    );
    launch_kernel::<TensorArgs, A>(&output.client, input, written, (), planned.info).is_ok()
}

fn view(
    matrix: &CubeTensor,
    vector_size: VectorSize,
    config: GlobalLayoutConfig,
) -> ViewArg<BatchedCoords> {
    let binding = matrix.clone().binding();
    let layout = GlobalLayoutLaunch::from_handle(&binding, vector_size, config);
    ViewArg::new_tensor::<GlobalLayout>(binding.into_tensor_arg(), layout)
}
