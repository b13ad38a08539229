//! A quantised weight as kernels read it, and dequantising in one pass: from packed words to values of
//! the asked type, a unit a vector of neighbours. The values are those of the reference to the bit,
//! rounded once.

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;
use cubecl::std::tensor::View;
use cubecl::std::tensor::layout::Coords1d;
use cubecl::std::tensor::layout::linear::LinearViewMut;

use super::fused;
use crate::gpu::rows::vector_size_within;

/// How the words are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Four codes a word, a scale a row.
    Int8,
    /// Eight codes a word, a scale for `block` of them.
    Nf4 { block: u32 },
    /// The same, where the scales are codes too: a scale for `scale_block` of them.
    Nf4Double { block: u32, scale_block: u32 },
}

/// What is known of a packed weight beside its words.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    pub packing: Packing,
    /// `[out, in]`
    pub shape: [usize; 2],
    /// The mean of scales that are codes.
    pub offset: f32,
}

/// Which rows of a weight, and what they become.
#[derive(Debug, Clone, Copy)]
pub struct RowRange {
    pub first: usize,
    pub rows: usize,
    pub dtype: DType,
}

/// Which dimension of the weight a product sums over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// `x Wᵀ`
    In,
    /// `x W`
    Out,
}

/// What a backend computes with packed weights.
///
/// # Shapes
/// - codes, scale_codes: words of four bytes as [`QuantizedWeight`](crate::QuantizedWeight) packs them,
///   map: `[16]`, scale_map: `[256]`; what a packing has no use for is any tensor of the type
/// - absmax: one a row (8 bits), a block of weights, or a block of scales
#[backend_extension(Cube, Fusion)]
pub trait PackedWeights: Backend {
    /// `[range.rows, in]` in `range.dtype`.
    #[fusion(meta = |_, _, _, _, _, form, range| range.spec(form))]
    fn dequantize(
        codes: IntTensor<Self>,
        absmax: FloatTensor<Self>,
        map: FloatTensor<Self>,
        scale_codes: IntTensor<Self>,
        scale_map: FloatTensor<Self>,
        form: Form,
        range: RowRange,
    ) -> FloatTensor<Self>;

    /// `x` `[tokens, in]` or `[tokens, out]` times the weight, which never lies dequantised in memory
    /// where the device has a kernel for that. Where it `adds`, to `addend`.
    #[allow(clippy::too_many_arguments)]
    #[fusion(meta = |x, _, _, _, _, _, _, form, over, _| form.product_spec(x, over))]
    fn packed_product(
        x: FloatTensor<Self>,
        addend: FloatTensor<Self>,
        codes: IntTensor<Self>,
        absmax: FloatTensor<Self>,
        map: FloatTensor<Self>,
        scale_codes: IntTensor<Self>,
        scale_map: FloatTensor<Self>,
        form: Form,
        over: Over,
        adds: bool,
    ) -> FloatTensor<Self>;
}

impl RowRange {
    fn spec(&self, form: &Form) -> TensorSpec {
        TensorSpec::new(Shape::from(vec![self.rows, form.shape[1]]), self.dtype)
    }
}

impl Form {
    fn product_spec(&self, x: &TensorSpec, over: &Over) -> TensorSpec {
        TensorSpec::new(self.product_shape(x.shape[0], *over), x.dtype)
    }

    pub(super) fn product_shape(&self, tokens: usize, over: Over) -> Shape {
        let [outputs, inputs] = self.shape;
        Shape::from(vec![
            tokens,
            match over {
                Over::In => outputs,
                Over::Out => inputs,
            },
        ])
    }

    /// Codes a word.
    pub(super) fn word(&self) -> usize {
        match self.packing {
            Packing::Int8 => 4,
            Packing::Nf4 { .. } | Packing::Nf4Double { .. } => 8,
        }
    }
}

impl PackedWeights for CubeBackend {
    fn dequantize(
        codes: CubeTensor,
        absmax: CubeTensor,
        map: CubeTensor,
        scale_codes: CubeTensor,
        scale_map: CubeTensor,
        form: Form,
        range: RowRange,
    ) -> CubeTensor {
        let words = Words::new([codes, absmax, map, scale_codes, scale_map], form);
        words.dequantized(range)
    }

    fn packed_product(
        x: CubeTensor,
        addend: CubeTensor,
        codes: CubeTensor,
        absmax: CubeTensor,
        map: CubeTensor,
        scale_codes: CubeTensor,
        scale_map: CubeTensor,
        form: Form,
        over: Over,
        adds: bool,
    ) -> CubeTensor {
        let words = Words::new([codes, absmax, map, scale_codes, scale_map], form);
        fused::product(x, &words, over, adds.then_some(addend))
    }
}

/// A packed weight's tensors, each contiguous.
pub(super) struct Words {
    /// Codes, scales, the codes' values, the scales' codes, their values.
    tensors: [CubeTensor; 5],
    pub(super) form: Form,
}

impl Words {
    fn new(tensors: [CubeTensor; 5], form: Form) -> Words {
        Words {
            tensors: tensors.map(into_contiguous),
            form,
        }
    }

    /// As an argument of a kernel.
    pub(super) fn launch(&self) -> PackedLaunch {
        let [codes, absmax, map, scale_codes, scale_map] = self
            .tensors
            .each_ref()
            .map(|tensor| tensor.clone().into_linear_view());
        let [outputs, inputs] = self.form.shape;
        PackedLaunch::new(
            codes,
            absmax,
            map,
            scale_codes,
            scale_map,
            (outputs * inputs) as u32,
            inputs as u32,
            self.form.offset,
            1.0 / 127.0,
            self.form.packing,
        )
    }

    /// See [`PackedWeights::dequantize`].
    pub(super) fn dequantized(&self, range: RowRange) -> CubeTensor {
        let like = &self.tensors[0];
        let width = self.form.shape[1];
        let shape = Shape::from(vec![range.rows, width]);
        let (client, device) = (like.client.clone(), like.device.clone());
        let output = empty_device_contiguous_dtype(client, device, shape, range.dtype);
        // A vector lies within a row and within a word of codes, and so within a block.
        let vector_size = vector_size_within(&output, width, self.form.word());
        let units = range.rows * width / vector_size;
        let dimension = CubeDim::new(&output.client, units);
        dequantize_kernel::launch(
            &output.client,
            calculate_cube_count_elemwise(&output.client, units, dimension),
            dimension,
            vector_size,
            self.launch(),
            output.clone().into_linear_view(),
            (range.first * width) as u32,
            dtype_to_storage_type(range.dtype),
        );
        output
    }
}

/// A packed weight inside a kernel.
#[derive(CubeType, CubeLaunch, Clone)]
#[expand(derive(Clone))]
pub(super) struct Packed {
    codes: View<'static, i32, Coords1d>,
    absmax: View<'static, f32, Coords1d>,
    map: View<'static, f32, Coords1d>,
    scale_codes: View<'static, i32, Coords1d>,
    scale_map: View<'static, f32, Coords1d>,
    /// Of the whole weight.
    pub(super) elements: u32,
    /// Weights a row.
    width: u32,
    offset: f32,
    /// 1/127; a constant would be brought together with the scale by some drivers: one rounding less.
    unit: f32,
    #[cube(comptime)]
    packing: Packing,
}

#[cube]
impl Packed {
    /// Neighbours from the `first`-th weight on, in one word of codes.
    pub(super) fn values<N: Size>(&self, first: u32) -> Vector<f32, N> {
        match self.packing.comptime() {
            Packing::Int8 => self.int8_values::<N>(first),
            Packing::Nf4 { block } => {
                let scale = self.absmax.read((first / block) as usize);
                self.nf4_values::<N>(first, scale)
            }
            Packing::Nf4Double { block, scale_block } => {
                let scale = self.scale(first / block, scale_block);
                self.nf4_values::<N>(first, scale)
            }
        }
    }

    fn int8_values<N: Size>(&self, first: u32) -> Vector<f32, N> {
        let mut values = Vector::<f32, N>::cast_from(f32::new(0.0));
        let word = self.codes.read((first / 4) as usize);
        let scale = self.absmax.read((first / self.width) as usize);
        #[unroll]
        for lane in 0..values.vector_size() {
            let shift = (first % 4 + lane as u32) * 8;
            let code = (word >> shift as i32) & 0xFF;
            // Two's complement.
            let code = (code ^ 0x80) - 0x80;
            values.insert(lane, f32::cast_from(code) * scale * self.unit);
        }
        values
    }

    /// Of each byte the high half comes first.
    fn nf4_values<N: Size>(&self, first: u32, scale: f32) -> Vector<f32, N> {
        let mut values = Vector::<f32, N>::cast_from(f32::new(0.0));
        let word = self.codes.read((first / 8) as usize);
        #[unroll]
        for lane in 0..values.vector_size() {
            let shift = ((first % 8 + lane as u32) ^ 1) * 4;
            let code = (word >> shift as i32) & 0xF;
            values.insert(lane, self.map.read(code as usize) * scale);
        }
        values
    }

    /// The scale of a block, from its code.
    fn scale(&self, place: u32, #[comptime] scale_block: u32) -> f32 {
        let word = self.scale_codes.read((place / 4) as usize);
        let code = (word >> ((place % 4) * 8) as i32) & 0xFF;
        let product =
            self.scale_map.read(code as usize) * self.absmax.read((place / scale_block) as usize);
        // The bound changes nothing, but keeps compilers from making product and sum one operation that
        // rounds once: the reference rounds twice.
        max(product, f32::new(-3.0e38)) + self.offset
    }
}

#[cube(launch)]
fn dequantize_kernel<T: Float, N: Size>(
    weight: &Packed,
    mut output: LinearViewMut<'_, Vector<T, N>>,
    start: u32,
    #[define(T)] _dtype: ElemType,
) {
    if !output.is_in_bounds(ABSOLUTE_POS) {
        terminate!();
    }
    let lanes = output.vector_size();
    let values = weight.values::<N>(start + (ABSOLUTE_POS * lanes) as u32);
    output.write(ABSOLUTE_POS, Vector::cast_from(values));
}
