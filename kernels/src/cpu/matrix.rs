//! Matrix products on slices, through the `gemm` crate.

use gemm::Parallelism;

/// Multiply-adds below which one thread is faster.
const PARALLEL_PRODUCT: usize = 1 << 20;

/// A matrix somewhere in a slice.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix whose rows are `row_stride` apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(
            rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= data.len(),
            "a view of [{rows}, {columns}] with stride {row_stride} leaves {} elements",
            data.len()
        );
        Self {
            data,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        }
    }

    /// A dense row-major matrix.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// The same elements with rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// Whether a product may use every core.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Threads {
    All,
    One,
}

/// `output = factor · left · right`, added to `output` when `accumulate`; rows of the output are
/// `row_stride` apart.
pub(crate) fn multiply(
    output: &mut [f32],
    row_stride: usize,
    left: View<'_>,
    right: View<'_>,
    factor: f32,
    accumulate: bool,
    threads: Threads,
) {
    let (rows, inner, columns) = (left.rows, left.columns, right.columns);
    assert_eq!(inner, right.rows, "inner dimensions of a product");
    if rows == 0 || columns == 0 {
        return;
    }
    assert!((rows - 1) * row_stride + columns <= output.len());
    let parallelism = if threads == Threads::All && rows * inner * columns >= PARALLEL_PRODUCT {
        Parallelism::Rayon(0)
    } else {
        Parallelism::None
    };
    // SAFETY: `View::strided` and the assertion above keep every addressed element inside its
    // slice, and the exclusive borrow of `output` keeps it apart from the operands.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            inner,
            output.as_mut_ptr(),
            1,
            row_stride as isize,
            accumulate,
            left.data.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_strided_and_transposed_views() {
        let left: Vec<f32> = (0..12).map(|i| i as f32).collect(); // [3, 4], used as [3, 2] stride 4
        let right: Vec<f32> = (0..6).map(|i| i as f32 - 2.0).collect(); // [3, 2] transposed → [2, 3]
        let mut output = vec![1.0; 3 * 5];
        multiply(
            &mut output,
            5,
            View::strided(&left, 3, 2, 4),
            View::new(&right, 3, 2).transposed(),
            2.0,
            true,
            Threads::One,
        );
        for i in 0..3 {
            for j in 0..3 {
                let product: f32 = (0..2).map(|k| left[i * 4 + k] * right[j * 2 + k]).sum();
                assert_eq!(output[i * 5 + j], 1.0 + 2.0 * product);
            }
        }
        assert_eq!(output[3], 1.0, "what lies between rows is untouched");
    }
}
