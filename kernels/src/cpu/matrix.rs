//! Matrix products on slices, through the `gemm` crate.

use gemm::Parallelism;
use rayon::prelude::*;

use super::elementary::vectorized;

/// Multiply-adds below which one thread is faster.
const PARALLEL_PRODUCT: usize = 1 << 20;

/// A matrix somewhere in a slice.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, T = f32> {
    pub(super) data: &'a [T],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<'a, T: Copy> View<'a, T> {
    /// A row-major matrix whose rows are `row_stride` apart.
    pub(crate) fn strided(data: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
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
    pub(crate) fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        assert_eq!(
            data.len(),
            rows * columns,
            "a matrix of [{rows}, {columns}]"
        );
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

    pub(crate) fn row_count(self) -> usize {
        self.rows
    }

    pub(crate) fn column_count(self) -> usize {
        self.columns
    }

    /// Columns from `first` on.
    pub(crate) fn columns(self, first: usize, count: usize) -> Self {
        self.transposed().rows(first, count).transposed()
    }

    /// Rows from `first` on.
    pub(crate) fn rows(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows, "rows of a matrix");
        Self {
            data: &self.data[(first * self.row_stride).min(self.data.len())..],
            rows: count,
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

/// What a product is added to.
#[derive(Clone, Copy)]
enum Start<'a> {
    Nothing,
    Output,
    /// One number a column.
    Bias(&'a [f32]),
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
    let (rows, columns) = (left.rows, right.columns);
    assert!(rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= output.len());
    let start = if accumulate {
        Start::Output
    } else {
        Start::Nothing
    };
    // SAFETY: the output has place, as asserted, and its exclusive borrow keeps it apart from the
    // operands.
    unsafe {
        let output = Shared(output.as_mut_ptr());
        multiply_to(output, row_stride, left, right, factor, start, threads);
    }
}

/// `factor · left · right`, dense, with a bias added to every row, on every core.
pub(crate) fn product(
    left: View<'_>,
    right: View<'_>,
    factor: f32,
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let (rows, columns) = (left.rows, right.columns);
    assert!(bias.is_none_or(|bias| bias.len() == columns));
    let mut output: Vec<f32> = Vec::with_capacity(rows * columns);
    let start = bias.map_or(Start::Nothing, Start::Bias);
    // SAFETY: the capacity is that of the product, which writes every element, and reads none that it did
    // not write.
    unsafe {
        let place = Shared(output.as_mut_ptr());
        multiply_to(place, columns, left, right, factor, start, Threads::All);
        output.set_len(rows * columns);
    }
    output
}

/// Adds `factor · left · right` to the start.
///
/// # Safety
/// The output has place for the product with rows `row_stride` apart, and is neither an operand's nor
/// used by anything else meanwhile; with [`Start::Output`] it was written before.
unsafe fn multiply_to(
    output: Shared,
    row_stride: usize,
    left: View<'_>,
    right: View<'_>,
    factor: f32,
    start: Start<'_>,
    threads: Threads,
) {
    let (rows, inner, columns) = (left.rows, left.columns, right.columns);
    assert_eq!(inner, right.rows, "inner dimensions of a product");
    if rows == 0 || columns == 0 {
        return;
    }
    let parallel = threads == Threads::All && rows * inner * columns >= PARALLEL_PRODUCT;
    let [down, across] = match parallel {
        true => parts(rows, columns, rayon::current_num_threads()),
        false => [1, 1],
    };
    let (height, width) = (
        rows.div_ceil(down).next_multiple_of(GRAIN),
        columns.div_ceil(across).next_multiple_of(GRAIN),
    );
    let part = |number: usize| {
        let (row, column) = (number / across * height, number % across * width);
        if row >= rows || column >= columns {
            return;
        }
        let (height, width) = (height.min(rows - row), width.min(columns - column));
        let (left, right) = (left.rows(row, height), right.columns(column, width));
        // SAFETY: `View::strided` and the caller keep every addressed element inside its slice, and parts
        // do not overlap.
        unsafe {
            let output = output.at(row * row_stride + column);
            if let Start::Bias(bias) = start {
                let bias = bias[column..column + width].as_ptr();
                for row in 0..height {
                    std::ptr::copy_nonoverlapping(bias, output.add(row * row_stride), width);
                }
            }
            gemm::gemm(
                height,
                width,
                inner,
                output,
                1,
                row_stride as isize,
                !matches!(start, Start::Nothing),
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
                Parallelism::None,
            );
        }
    };
    match down * across {
        1 => part(0),
        parts => (0..parts).into_par_iter().for_each(part),
    }
}

/// `factor · left · right` where the inner dimension is the tokens: a gradient. Its terms may cancel, so
/// that the order in which they are added shows; blocks of tokens are added in f64.
///
/// # Shapes
/// - left: `[rows, tokens]`, right: `[tokens, columns]`
/// - result: `[rows, columns]`
pub(crate) fn multiply_over_tokens(left: View<'_>, right: View<'_>, factor: f32) -> Vec<f32> {
    let (rows, tokens, columns) = (left.rows, left.columns, right.columns);
    let [_, across] = match rows * tokens * columns >= PARALLEL_PRODUCT {
        true => parts(rows, columns, rayon::current_num_threads()),
        false => [1, 1],
    };
    let width = columns.div_ceil(across).next_multiple_of(GRAIN);
    let sums_of = |first: usize| {
        let count = width.min(columns - first);
        let mut sums = vec![0.0f64; rows * count];
        let mut block = vec![0.0f32; rows * count];
        for start in (0..tokens).step_by(TOKENS) {
            let length = TOKENS.min(tokens - start);
            multiply(
                &mut block,
                count,
                left.columns(start, length),
                right.rows(start, length).columns(first, count),
                1.0,
                false,
                Threads::One,
            );
            vectorized(
                #[inline(always)]
                || {
                    for (sum, &value) in sums.iter_mut().zip(&block) {
                        *sum += f64::from(value);
                    }
                },
            );
        }
        sums
    };
    let firsts: Vec<usize> = (0..columns).step_by(width.max(1)).collect();
    let parts: Vec<Vec<f64>> = firsts.par_iter().map(|&first| sums_of(first)).collect();
    let mut output = Vec::with_capacity(rows * columns);
    for row in 0..rows {
        for part in &parts {
            let count = part.len() / rows;
            let sums = &part[row * count..][..count];
            output.extend(sums.iter().map(|sum| (sum * f64::from(factor)) as f32));
        }
    }
    output
}

/// `[columns, rows]` of `[rows, columns]`.
pub(crate) fn transposed(values: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| values[row * columns + column]))
        .collect()
}

/// Tokens whose terms are added in f32.
const TOKENS: usize = 16;
/// Rows and columns that a part is a multiple of.
const GRAIN: usize = 16;
/// Fewest columns, and rows, of a part: narrower ones spend their time on packing.
const NARROWEST: usize = 96;

/// Into how many parts rows and columns are divided: a part a thread, wide rather than high, each
/// multiplied by one thread. The `gemm` crate's own threads take turns over smaller parts and wait for
/// each other.
fn parts(rows: usize, columns: usize, threads: usize) -> [usize; 2] {
    let across = threads.min(columns / NARROWEST).max(1);
    let down = (threads / across).min(rows / NARROWEST).max(1);
    [down, across]
}

/// Where several threads write, each its own part.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: every part of an output is one thread's alone.
unsafe impl Sync for Shared {}

impl Shared {
    /// # Safety
    /// `offset` is inside the slice.
    unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: promised by the caller.
        unsafe { self.0.add(offset) }
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

    #[test]
    fn sums_over_tokens_keep_what_is_left_of_terms_that_cancel() {
        // Terms of 1 that all but cancel, in an order in which f32 would lose most of what is left.
        let (rows, tokens, columns) = (16, 1000, 300);
        let sign = |token: usize| if token < tokens / 2 { 1.0 } else { -1.0 };
        let left: Vec<f32> = (0..tokens * rows).map(|i| sign(i / rows)).collect();
        let small = |i: usize| (i * 7919 % 1013) as f32 * 1e-7;
        let right: Vec<f32> = (0..tokens * columns).map(|i| 1.0 + small(i)).collect();
        let (left, right) = (
            View::new(&left, tokens, rows).transposed(),
            View::new(&right, tokens, columns),
        );
        let mut expected = Vec::with_capacity(rows * columns);
        for row in 0..rows {
            for column in 0..columns {
                let terms = (0..tokens).map(|t| {
                    f64::from(left.data[t * rows + row] * right.data[t * columns + column])
                });
                expected.push(2.0 * terms.sum::<f64>());
            }
        }
        let off = |found: Vec<f32>| {
            let pairs = found.into_iter().zip(&expected);
            let off = pairs.map(|(found, expected)| (f64::from(found) - expected).abs());
            off.fold(0.0, f64::max)
        };
        let [over_tokens, plain] = [
            multiply_over_tokens(left, right, 2.0),
            product(left, right, 2.0, None),
        ]
        .map(off);
        // A block's sum of 16 ones is off by 16 half units in the last place of 16 at most, mostly by far
        // less; one sum of all goes up to 500 on its way.
        assert!(over_tokens < 1e-4, "{over_tokens}");
        assert!(over_tokens < plain, "{over_tokens} {plain}");
    }

    #[test]
    fn a_product_over_nothing_is_what_it_starts_from() {
        let (left, right) = (View::new(&[], 3, 0), View::new(&[], 0, 2));
        assert_eq!(product(left, right, 1.0, None), [0.0; 6]);
        let bias = Some([1.0, 2.0].as_slice());
        assert_eq!(product(left, right, 1.0, bias), [1.0, 2.0].repeat(3));
        assert_eq!(multiply_over_tokens(left, right, 1.0), [0.0; 6]);
    }
}
