//! Matrix products by cuBLASLt.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cudarc::cublaslt::result;
use cudarc::cublaslt::sys as cublas;
use cudarc::cublaslt::sys::cublasLtMatmulDescAttributes_t::{
    CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB,
};
use cudarc::cublaslt::sys::cublasLtMatmulPreferenceAttributes_t::{
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
};
use cudarc::cublaslt::sys::cublasLtMatrixLayoutAttribute_t::{
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
};

use super::session::{Queue, Refused, Session};

/// More products than this in one call are not worth their launches.
const MOST_LAUNCHES: usize = 64;
/// Plans kept; ragged batches bring ever new shapes.
const MOST_PLANS: usize = 4096;

/// `output = addend + alpha · lhs · rhs`, each matrix of the leading dimensions for itself. A leading
/// dimension of 1 is repeated. The output may be wider than the operands, and be what is added.
///
/// # Shapes
/// - lhs: `[…, rows, inner]`, rhs: `[…, inner, columns]`, output and addend: `[…, rows, columns]`
pub(crate) struct Product<'a> {
    pub(crate) lhs: &'a CubeTensor,
    pub(crate) rhs: &'a CubeTensor,
    pub(crate) addend: Option<&'a CubeTensor>,
    pub(crate) alpha: f32,
    pub(crate) output: &'a CubeTensor,
}

/// Submits products, each of which may read what those before it write; whether all were submitted.
pub(crate) fn submit(session: &Arc<Session>, products: &[Product]) -> bool {
    let prepared: Option<Vec<Prepared>> = products.iter().map(Prepared::new).collect();
    let Some(prepared) = prepared else {
        return false;
    };
    let tensors: Vec<&CubeTensor> = prepared.iter().flat_map(|one| &one.operands).collect();
    let client = &products[0].output.client;
    let submitted = session.run(client, &tensors, |queue, mut addresses| {
        for one in &prepared {
            let (mine, rest) = addresses.split_at(one.operands.len());
            one.launch(queue, mine)?;
            addresses = rest;
        }
        Ok(())
    });
    submitted.is_ok()
}

/// A product whose operands lie as cuBLASLt can read them.
struct Prepared {
    /// lhs, rhs, output, and what is added, if anything is.
    operands: Vec<CubeTensor>,
    matrices: Vec<Strided>,
    elements: [cublas::cudaDataType_t; 2],
    calls: Calls,
    inner: usize,
    alpha: f32,
}

impl Prepared {
    fn new(product: &Product) -> Option<Prepared> {
        let Product {
            lhs,
            rhs,
            addend,
            output,
            ..
        } = *product;
        let elements = [element(lhs.dtype)?, element(output.dtype)?];
        if rhs.dtype != lhs.dtype || addend.is_some_and(|addend| addend.dtype != output.dtype) {
            return None;
        }
        let readable = |tensor: &CubeTensor| match Strided::of(tensor) {
            Some(_) => tensor.clone(),
            None => into_contiguous(tensor.clone()),
        };
        // What is added lies as the output does, its rows in order.
        let addend = addend.map(|addend| match Strided::of(addend) {
            Some(matrix) if !matrix.transposed => addend.clone(),
            _ => into_contiguous(addend.clone()),
        });
        let mut operands = vec![readable(lhs), readable(rhs), output.clone()];
        operands.extend(addend);
        let matrices: Vec<Strided> = operands.iter().map(Strided::of).collect::<Option<_>>()?;
        if matrices[2].transposed {
            return None;
        }
        Some(Prepared {
            calls: Calls::new(&operands)?,
            inner: matrices[0].columns,
            operands,
            matrices,
            elements,
            alpha: product.alpha,
        })
    }

    fn launch(&self, queue: &Queue, addresses: &[u64]) -> Result<(), Refused> {
        let output = self.matrices[2];
        for offsets in &self.calls.offsets {
            let at: Vec<u64> = addresses.iter().zip(offsets).map(|(a, o)| a + o).collect();
            let operand = |(index, matrix): (usize, &Strided)| Operand {
                transposed: matrix.transposed,
                leading: matrix.leading,
                batch_stride: self.calls.batch_strides[index],
                alignment: alignment(at[index]),
            };
            let key = Key {
                elements: self.elements,
                sizes: [output.rows, output.columns, self.inner],
                batch: self.calls.batch,
                operands: self.matrices.iter().enumerate().map(operand).collect(),
            };
            launch(queue, key, &at, self.alpha)?;
        }
        Ok(())
    }
}

fn launch(queue: &Queue, key: Key, at: &[u64], alpha: f32) -> Result<(), Refused> {
    let mut products = queue
        .products
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let handle = products.handle;
    let plan = products.plan(key, queue.workspace_bytes)?;
    let beta = if at.len() > 3 { 1.0f32 } else { 0.0 };
    crate::profile::launched();
    let added = at.get(3).copied().unwrap_or(at[2]);
    // SAFETY: the plan was made for these sizes, strides and alignments; the addresses are of live
    // tensors of that shape, on the device of the stream; alpha and beta are read before it returns.
    unsafe {
        result::matmul(
            handle,
            plan.description,
            (&raw const alpha).cast(),
            (&raw const beta).cast(),
            at[1] as *const c_void,
            plan.layouts[0],
            at[0] as *const c_void,
            plan.layouts[1],
            added as *const c_void,
            plan.layouts[2],
            at[2] as *mut c_void,
            plan.layouts[3],
            &plan.algorithm,
            queue.workspace as *mut c_void,
            queue.workspace_bytes,
            queue.stream.cast(),
        )
    }
    .map_err(|error| Refused(format!("cuBLASLt: {error}")))
}

fn element(dtype: DType) -> Option<cublas::cudaDataType_t> {
    match dtype {
        DType::F32 => Some(cublas::cudaDataType_t::CUDA_R_32F),
        DType::BF16 => Some(cublas::cudaDataType_t::CUDA_R_16BF),
        DType::F16 => Some(cublas::cudaDataType_t::CUDA_R_16F),
        _ => None,
    }
}

/// The largest power of two up to 256 that divides an address.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

/// The last two dimensions as they lie in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Strided {
    rows: usize,
    columns: usize,
    /// Columns lie one after another instead of rows.
    transposed: bool,
    /// Elements from one row, or column, to the next.
    leading: usize,
}

impl Strided {
    /// None where neither rows nor columns are contiguous.
    fn of(tensor: &CubeTensor) -> Option<Strided> {
        let shape: Vec<usize> = tensor.meta.shape().iter().copied().collect();
        let strides: Vec<usize> = tensor.meta.strides().iter().copied().collect();
        Strided::new(&shape, &strides)
    }

    fn new(shape: &[usize], strides: &[usize]) -> Option<Strided> {
        let rank = shape.len();
        let (rows, columns) = (shape[rank - 2], shape[rank - 1]);
        let (down, across) = (strides[rank - 2], strides[rank - 1]);
        let found = |transposed, leading| {
            Some(Strided {
                rows,
                columns,
                transposed,
                leading,
            })
        };
        if across == 1 || columns == 1 {
            let leading = if rows == 1 { columns } else { down };
            if leading >= columns {
                return found(false, leading);
            }
        }
        if down == 1 || rows == 1 {
            let leading = if columns == 1 { rows } else { across };
            if leading >= rows {
                return found(true, leading);
            }
        }
        None
    }
}

/// How the leading dimensions become calls of one batch each.
#[derive(Debug, PartialEq)]
struct Calls {
    batch: usize,
    /// Elements from one matrix of a batch to the next, an operand; 0 where it is repeated.
    batch_strides: Vec<usize>,
    /// Bytes from an operand's start to the first matrix of each call.
    offsets: Vec<Vec<u64>>,
}

/// Shape, strides and bytes an element.
type Layout = (Vec<usize>, Vec<usize>, usize);

impl Calls {
    fn new(operands: &[CubeTensor]) -> Option<Calls> {
        let layouts: Vec<Layout> = operands
            .iter()
            .map(|tensor| {
                (
                    tensor.meta.shape().iter().copied().collect(),
                    tensor.meta.strides().iter().copied().collect(),
                    tensor.dtype.size(),
                )
            })
            .collect();
        Calls::of(&layouts)
    }

    /// The third operand has every leading dimension in full.
    fn of(layouts: &[Layout]) -> Option<Calls> {
        let leading = layouts[2].0.len() - 2;
        // Each dimension longer than 1, outermost first, with every operand's stride.
        let dimensions: Vec<(usize, Vec<usize>)> = (0..leading)
            .map(|dimension| {
                let strides = layouts
                    .iter()
                    .map(|(shape, strides, _)| match shape[dimension] {
                        1 => 0,
                        _ => strides[dimension],
                    });
                (layouts[2].0[dimension], strides.collect())
            })
            .filter(|(length, _)| *length != 1)
            .collect();
        let mut outer = dimensions;
        let (mut batch, batch_strides) = match outer.pop() {
            Some((length, strides)) => (length, strides),
            None => (1, vec![0; layouts.len()]),
        };
        while let Some((length, strides)) = outer.last() {
            let joins = |(&inner, &outer): (&usize, &usize)| outer == inner * batch;
            if !batch_strides.iter().zip(strides).all(joins) {
                break;
            }
            batch *= length;
            outer.pop();
        }
        let launches: usize = outer.iter().map(|(length, _)| length).product();
        if launches > MOST_LAUNCHES {
            return None;
        }
        let mut offsets = vec![vec![0u64; layouts.len()]];
        for (length, strides) in &outer {
            offsets = offsets
                .iter()
                .flat_map(|before| {
                    (0..*length).map(move |index| {
                        let operands = before.iter().zip(strides).zip(layouts);
                        operands
                            .map(|((&before, &stride), (.., bytes))| {
                                before + (index * stride * bytes) as u64
                            })
                            .collect()
                    })
                })
                .collect();
        }
        Some(Calls {
            batch,
            batch_strides,
            offsets,
        })
    }
}

/// What a plan depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    /// Of lhs and rhs; of what is added and the output.
    elements: [cublas::cudaDataType_t; 2],
    /// rows, columns, inner
    sizes: [usize; 3],
    batch: usize,
    /// lhs, rhs, output and what is added, if anything is.
    operands: Vec<Operand>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Operand {
    transposed: bool,
    leading: usize,
    batch_stride: usize,
    /// Of the first matrix, in bytes.
    alignment: u32,
}

/// cuBLASLt's handle, and the plans of the products seen so far.
pub(super) struct Products {
    handle: cublas::cublasLtHandle_t,
    plans: HashMap<Key, Plan>,
}

impl Products {
    pub(super) fn new() -> Result<Products, String> {
        let handle =
            result::create_handle().map_err(|error| format!("cuBLASLt does not start: {error}"))?;
        Ok(Products {
            handle,
            plans: HashMap::new(),
        })
    }

    fn plan(&mut self, key: Key, workspace_bytes: usize) -> Result<&Plan, Refused> {
        if self.plans.len() >= MOST_PLANS && !self.plans.contains_key(&key) {
            self.plans.clear();
        }
        let handle = self.handle;
        match self.plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(found) => Ok(found.into_mut()),
            std::collections::hash_map::Entry::Vacant(free) => {
                let plan = Plan::new(handle, free.key(), workspace_bytes)
                    .map_err(|error| Refused(format!("cuBLASLt: {error}")))?;
                Ok(free.insert(plan))
            }
        }
    }
}

/// One product, described, with the algorithm that cuBLASLt holds to be the fastest.
///
/// cuBLASLt stores columns one after another, so it is given the transposed product:
/// `outputᵀ = rhsᵀ · lhsᵀ`.
struct Plan {
    description: cublas::cublasLtMatmulDesc_t,
    /// rhs, lhs, what is added, output
    layouts: [cublas::cublasLtMatrixLayout_t; 4],
    algorithm: cublas::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(
        handle: cublas::cublasLtHandle_t,
        key: &Key,
        workspace_bytes: usize,
    ) -> Result<Plan, result::CublasError> {
        let [rows, columns, inner] = key.sizes;
        let (lhs, rhs, output) = (key.operands[0], key.operands[1], key.operands[2]);
        let added = key.operands.get(3).copied().unwrap_or(output);
        // SAFETY: every handle is made here and used before it is dropped; each attribute is read
        // from a live value of the size that is given.
        unsafe {
            // f32 sums of f32 products, whatever is stored: no TF32.
            let mut plan = Plan {
                description: result::create_matmul_desc(
                    cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    cublas::cudaDataType_t::CUDA_R_32F,
                )?,
                layouts: [std::ptr::null_mut(); 4],
                algorithm: std::mem::zeroed(),
            };
            for (attribute, transposed) in [
                (CUBLASLT_MATMUL_DESC_TRANSA, rhs.transposed),
                (CUBLASLT_MATMUL_DESC_TRANSB, lhs.transposed),
            ] {
                let operation = i32::from(transposed);
                result::set_matmul_desc_attribute(
                    plan.description,
                    attribute,
                    (&raw const operation).cast(),
                    size_of::<i32>(),
                )?;
            }
            let [narrow, wide] = key.elements;
            let shapes = [
                (rhs, narrow, columns, inner),
                (lhs, narrow, inner, rows),
                (added, wide, columns, rows),
                (output, wide, columns, rows),
            ];
            for (slot, (operand, element, down, across)) in plan.layouts.iter_mut().zip(shapes) {
                let (down, across) = match operand.transposed {
                    true => (across, down),
                    false => (down, across),
                };
                *slot = result::create_matrix_layout(
                    element,
                    down as u64,
                    across as u64,
                    operand.leading as i64,
                )?;
                let (batch, stride) = (key.batch as i32, operand.batch_stride as i64);
                result::set_matrix_layout_attribute(
                    *slot,
                    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                    (&raw const batch).cast(),
                    size_of::<i32>(),
                )?;
                result::set_matrix_layout_attribute(
                    *slot,
                    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                    (&raw const stride).cast(),
                    size_of::<i64>(),
                )?;
            }
            plan.algorithm = plan.fastest(handle, [rhs, lhs, added, output], workspace_bytes)?;
            Ok(plan)
        }
    }

    /// # Safety
    /// The description and all layouts are made.
    unsafe fn fastest(
        &self,
        handle: cublas::cublasLtHandle_t,
        operands: [Operand; 4],
        workspace_bytes: usize,
    ) -> Result<cublas::cublasLtMatmulAlgo_t, result::CublasError> {
        let preference = result::create_matmul_pref()?;
        let alignments = [
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ];
        // SAFETY: as the caller promises; the preference lives until it is destroyed below.
        unsafe {
            let asked = (|| {
                result::set_matmul_pref_attribute(
                    preference,
                    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                    (&raw const workspace_bytes).cast(),
                    size_of::<usize>(),
                )?;
                for (attribute, operand) in alignments.into_iter().zip(operands) {
                    result::set_matmul_pref_attribute(
                        preference,
                        attribute,
                        (&raw const operand.alignment).cast(),
                        size_of::<u32>(),
                    )?;
                }
                result::get_matmul_algo_heuristic(
                    handle,
                    self.description,
                    self.layouts[0],
                    self.layouts[1],
                    self.layouts[2],
                    self.layouts[3],
                    preference,
                )
            })();
            result::destroy_matmul_pref(preference)?;
            Ok(asked?.algo)
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `new` and used by nothing else; a layout that was never made is null. What
        // the library says to it changes nothing.
        unsafe {
            for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.description);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_is_read_by_rows_or_by_columns() {
        let found = |shape, strides| Strided::new(shape, strides);
        let rows = found(&[2, 3, 4], &[12, 4, 1]).unwrap();
        assert_eq!((rows.transposed, rows.leading), (false, 4));
        let padded = found(&[3, 4], &[16, 1]).unwrap();
        assert_eq!((padded.transposed, padded.leading), (false, 16));
        let columns = found(&[4, 3], &[1, 4]).unwrap();
        assert_eq!((columns.transposed, columns.leading), (true, 4));
        let one_row = found(&[1, 4], &[99, 1]).unwrap();
        assert_eq!((one_row.transposed, one_row.leading), (false, 4));
        let one_column = found(&[4, 1], &[3, 99]).unwrap();
        assert_eq!((one_column.transposed, one_column.leading), (false, 3));
        assert_eq!(found(&[4, 3], &[6, 2]), None);
    }

    #[test]
    fn leading_dimensions_become_one_batch_where_their_strides_allow_it() {
        let layout = |shape: &[usize], strides: &[usize]| (shape.to_vec(), strides.to_vec(), 2);
        let whole = || layout(&[2, 3, 5, 7], &[105, 35, 7, 1]);
        let calls = Calls::of(&[whole(), whole(), whole()]).unwrap();
        assert_eq!((calls.batch, calls.offsets.len()), (6, 1));
        assert_eq!(calls.batch_strides, [35, 35, 35]);
        // Heads swapped with places: one call for each row of the batch.
        let swapped = layout(&[2, 3, 5, 7], &[105, 7, 21, 1]);
        let calls = Calls::of(&[swapped, whole(), whole()]).unwrap();
        assert_eq!((calls.batch, calls.batch_strides), (3, vec![7, 35, 35]));
        assert_eq!(calls.offsets, [vec![0, 0, 0], vec![210, 210, 210]]);
        // An operand that is the same for all is read again.
        let single = layout(&[1, 1, 5, 7], &[35, 35, 7, 1]);
        let calls = Calls::of(&[whole(), single, whole()]).unwrap();
        assert_eq!((calls.batch, calls.batch_strides), (6, vec![35, 0, 35]));
        let plain = layout(&[5, 7], &[7, 1]);
        let calls = Calls::of(&[plain.clone(), plain.clone(), plain]).unwrap();
        assert_eq!((calls.batch, calls.offsets.len()), (1, 1));
    }
}
