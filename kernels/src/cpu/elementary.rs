//! Exponential, error function and their kin, written so that the compiler vectorises the loops
//! they stand in, and the parallel loops over rows.
//!
//! Errors are a few units in the last place; the tests hold each against the standard library.

// Coefficients stand as published; rounding them to f32 is the compiler's business.
#![allow(clippy::excessive_precision)]

use std::mem::MaybeUninit;

use pulp::Arch;
use rayon::prelude::*;

/// Elements below which a loop is not worth a second thread.
const PARALLEL_ELEMENTS: usize = 1 << 14;

/// `e^x` by Cody-Waite reduction and a degree-6 polynomial; 0 below -87.3, finite above 88.7.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer
    const LOWEST: f32 = -87.336_54; // below, the result is not a normal number
    let bounded = x.clamp(LOWEST, 88.722_83);
    let shifted = bounded.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_375, bounded);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_2e-4f32;
    p = p.mul_add(r, 1.398_2e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 0.166_666_66);
    p = p.mul_add(r, 0.5);
    let p = (p * r).mul_add(r, r) + 1.0;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    // Two factors, so that 2^128 does not overflow the exponent field.
    let half = exponent >> 1;
    let low = f32::from_bits(((half + 127) << 23) as u32);
    let high = f32::from_bits(((exponent - half + 127) << 23) as u32);
    if x < LOWEST { 0.0 } else { p * low * high }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `tanh(x)`: an odd polynomial near 0, where `1 − 2 / (e^2x + 1)` would cancel (as in Cephes).
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let square = x * x;
    let mut p = -5.704_988_7e-3f32;
    p = p.mul_add(square, 2.063_908_8e-2);
    p = p.mul_add(square, -5.373_971_6e-2);
    p = p.mul_add(square, 0.133_314_42);
    p = p.mul_add(square, -0.333_332_82);
    let near = (p * square).mul_add(x, x);
    let far = (1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0)).copysign(x);
    if x.abs() < 0.625 { near } else { far }
}

/// The error function as a ratio of odd and even polynomials on `[-4, 4]`, beyond which it is ±1 in
/// f32 (the minimax coefficients that Eigen and XLA use).
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let square = x * x;
    let mut p = -2.726_142_3e-10f32;
    p = p.mul_add(square, 2.770_681_4e-8);
    p = p.mul_add(square, -2.101_024e-6);
    p = p.mul_add(square, -5.692_506_5e-5);
    p = p.mul_add(square, -7.349_906_3e-4);
    p = p.mul_add(square, -2.954_599_9e-3);
    p = p.mul_add(square, -1.609_603_3e-2);
    let mut q = -1.456_607_2e-5f32;
    q = q.mul_add(square, -2.133_740_6e-4);
    q = q.mul_add(square, -1.682_827e-3);
    q = q.mul_add(square, -7.373_329e-3);
    q = q.mul_add(square, -1.426_473_9e-2);
    x * p / q
}

/// Runs a closure with the widest vector instructions of this machine.
#[inline(always)]
pub(crate) fn vectorized<R>(run: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(run)
}

/// A vector whose blocks of `block` elements are filled in parallel, `fill(number of the block, block)`.
///
/// Each block is zeroed by the task that fills it, when it is in that core's cache.
#[inline(always)]
pub(crate) fn filled(
    length: usize,
    block: usize,
    fill: impl Fn(usize, &mut [f32]) + Sync + Send,
) -> Vec<f32> {
    let mut output = Vec::with_capacity(length);
    output.spare_capacity_mut()[..length]
        .par_chunks_mut(block)
        .enumerate()
        .for_each(|(number, block)| fill(number, zeroed(block)));
    // SAFETY: the blocks cover the length, and every element was written.
    unsafe { output.set_len(length) };
    output
}

/// As [`filled`], beside as long a slice that is changed: `fill(number of the block, block, its part)`.
#[inline(always)]
pub(crate) fn filled_beside(
    changed: &mut [f32],
    block: usize,
    fill: impl Fn(usize, &mut [f32], &mut [f32]) + Sync + Send,
) -> Vec<f32> {
    let length = changed.len();
    let mut output = Vec::with_capacity(length);
    output.spare_capacity_mut()[..length]
        .par_chunks_mut(block)
        .zip(changed.par_chunks_mut(block))
        .enumerate()
        .for_each(|(number, (block, changed))| fill(number, zeroed(block), changed));
    // SAFETY: as above.
    unsafe { output.set_len(length) };
    output
}

#[inline(always)]
fn zeroed(block: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    for element in block.iter_mut() {
        element.write(0.0);
    }
    // SAFETY: every element was written just now.
    unsafe { block.assume_init_mut() }
}

/// Zeros, written in parallel.
pub(crate) fn zeros(length: usize) -> Vec<f32> {
    filled(length, block_length(length), |_, _| {})
}

/// `output[i] = function(left[i], right[i])`, vectorised and in parallel.
pub(crate) fn map2(
    left: &[f32],
    right: &[f32],
    function: impl Fn(f32, f32) -> f32 + Copy + Sync + Send,
) -> Vec<f32> {
    let block = block_length(left.len());
    filled(left.len(), block, |number, output| {
        let (left, right) = (&left[number * block..], &right[number * block..]);
        vectorized(
            #[inline(always)]
            || {
                for ((output, &left), &right) in output.iter_mut().zip(left).zip(right) {
                    *output = function(left, right);
                }
            },
        );
    })
}

/// `output[i] = function(input[i])`, vectorised and in parallel.
pub(crate) fn map(input: &[f32], function: impl Fn(f32) -> f32 + Copy + Sync + Send) -> Vec<f32> {
    let block = block_length(input.len());
    filled(input.len(), block, |number, output| {
        vectorized(
            #[inline(always)]
            || {
                for (output, &input) in output.iter_mut().zip(&input[number * block..]) {
                    *output = function(input);
                }
            },
        );
    })
}

/// `function(output row, input row)` over all rows of `width` elements, vectorised and in parallel.
#[inline(always)]
pub(crate) fn map_rows(
    input: &[f32],
    width: usize,
    function: impl Fn(&mut [f32], &[f32]) + Sync + Send,
) -> Vec<f32> {
    map_rows_numbered(
        input,
        width,
        #[inline(always)]
        |_, output, input| function(output, input),
    )
}

/// As [`map_rows`] with the number of the row.
#[inline(always)]
pub(crate) fn map_rows_numbered(
    input: &[f32],
    width: usize,
    function: impl Fn(usize, &mut [f32], &[f32]) + Sync + Send,
) -> Vec<f32> {
    let rows = block_rows(input.len() / width.max(1), width);
    filled(
        input.len(),
        rows * width,
        #[inline(always)]
        |block, output| {
            let input = &input[block * rows * width..];
            each_row(
                block * rows,
                output,
                input,
                width,
                // A reference would be called, not inlined, and lose the vectors.
                #[inline(always)]
                |number, output, input| function(number, output, input),
            );
        },
    )
}

/// `function(row to change, other row)` over all rows, like [`map_rows`].
#[inline(always)]
pub(crate) fn change_rows(
    changed: &mut [f32],
    other: &[f32],
    width: usize,
    function: impl Fn(&mut [f32], &[f32]) + Sync + Send,
) {
    let rows = block_rows(other.len() / width.max(1), width);
    changed
        .par_chunks_mut(rows * width)
        .zip(other.par_chunks(rows * width))
        .for_each(
            #[inline(always)]
            |(changed, other)| {
                each_row(
                    0,
                    changed,
                    other,
                    width,
                    #[inline(always)]
                    |_, changed, other| function(changed, other),
                );
            },
        );
}

/// `function(number, row, other row)`, vectorised; the first has the number `first`.
#[inline(always)]
fn each_row(
    first: usize,
    rows: &mut [f32],
    others: &[f32],
    width: usize,
    function: impl Fn(usize, &mut [f32], &[f32]),
) {
    vectorized(
        #[inline(always)]
        || {
            for (index, (row, other)) in rows
                .chunks_exact_mut(width)
                .zip(others.chunks_exact(width))
                .enumerate()
            {
                function(first + index, row, other);
            }
        },
    );
}

/// `function(output row, left row, right row)` over all rows, like [`map_rows`].
#[inline(always)]
pub(crate) fn map_rows2(
    left: &[f32],
    right: &[f32],
    width: usize,
    function: impl Fn(&mut [f32], &[f32], &[f32]) + Sync + Send,
) -> Vec<f32> {
    let block = block_rows(left.len() / width.max(1), width) * width;
    filled(
        left.len(),
        block,
        #[inline(always)]
        |number, output| {
            let (left, right) = (&left[number * block..], &right[number * block..]);
            vectorized(
                #[inline(always)]
                || {
                    for ((output, left), right) in output
                        .chunks_exact_mut(width)
                        .zip(left.chunks_exact(width))
                        .zip(right.chunks_exact(width))
                    {
                        function(output, left, right);
                    }
                },
            );
        },
    )
}

/// How many elements one task takes, so that small inputs stay on one thread.
pub(crate) fn block_length(elements: usize) -> usize {
    let threads = rayon::current_num_threads();
    elements.div_ceil(threads * 4).max(PARALLEL_ELEMENTS)
}

/// How many rows of `width` elements one task takes.
pub(crate) fn block_rows(rows: usize, width: usize) -> usize {
    (block_length(rows * width) / width.max(1)).max(1)
}

/// Sum of products, in sixteen partial sums so that it vectorises without reassociating by flag.
#[inline(always)]
pub(crate) fn dot(left: &[f32], right: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (left_blocks, left_rest) = left.as_chunks::<16>();
    let (right_blocks, right_rest) = right.as_chunks::<16>();
    for (left, right) in left_blocks.iter().zip(right_blocks) {
        for lane in 0..16 {
            sums[lane] = left[lane].mul_add(right[lane], sums[lane]);
        }
    }
    let mut total = 0.0;
    for sum in sums {
        total += sum;
    }
    for (&left, &right) in left_rest.iter().zip(right_rest) {
        total += left * right;
    }
    total
}

/// Largest element.
#[inline(always)]
pub(crate) fn maximum(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (blocks, rest) = values.as_chunks::<16>();
    for block in blocks {
        for lane in 0..16 {
            lanes[lane] = if block[lane] > lanes[lane] {
                block[lane]
            } else {
                lanes[lane]
            };
        }
    }
    let mut largest = f32::NEG_INFINITY;
    for &value in lanes.iter().chain(rest) {
        largest = if value > largest { value } else { largest };
    }
    largest
}

/// Replaces each `x` by `e^(x - shift)` and returns their sum.
#[inline(always)]
pub(crate) fn exp_sum(values: &mut [f32], shift: f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let (blocks, rest) = values.as_chunks_mut::<16>();
    for block in blocks {
        for lane in 0..16 {
            block[lane] = exp(block[lane] - shift);
            sums[lane] += block[lane];
        }
    }
    let mut total = 0.0;
    for sum in sums {
        total += sum;
    }
    for value in rest {
        *value = exp(*value - shift);
        total += *value;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elementary_functions_match_the_standard_library() {
        // Tolerances: two to four units in the last place of the result's magnitude.
        for step in -8_000..8_000 {
            let x = step as f32 * 0.010_7;
            let expected = f64::from(x).exp();
            assert!(
                ((f64::from(exp(x)) - expected) / expected).abs() < 3e-7,
                "exp {x}"
            );
            assert!(
                (f64::from(tanh(x)) - f64::from(x).tanh()).abs()
                    < 3e-7 * f64::from(x).tanh().abs().max(1e-30),
                "tanh {x}"
            );
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan(), "a NaN must reach the watchdog");
    }

    #[test]
    fn error_function_matches_known_values() {
        // Abramowitz and Stegun, table 7.1.
        for (x, expected) in [
            (0.0, 0.0),
            (0.1, 0.112_462_916),
            (0.5, 0.520_499_878),
            (1.0, 0.842_700_793),
            (1.5, 0.966_105_146),
            (2.0, 0.995_322_265),
            (3.0, 0.999_977_91),
        ] {
            assert!((erf(x) - expected as f32).abs() < 3e-7, "erf {x}");
            assert!((erf(-x) + expected as f32).abs() < 3e-7, "erf -{x}");
        }
    }

    #[test]
    fn reductions_cover_odd_lengths() {
        for length in [0, 1, 15, 16, 17, 63] {
            let left: Vec<f32> = (0..length).map(|i| i as f32 * 0.5 - 3.0).collect();
            let expected: f32 = left.iter().map(|x| x * x).sum();
            assert!((dot(&left, &left) - expected).abs() <= 1e-3 * expected.max(1.0));
            let largest = left.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(maximum(&left), largest);
        }
    }
}
