//! Matrix products of bf16 numbers with sums in f32, on processors that multiply pairs of them: AMX's
//! tiles, or AVX-512's dot products.
//!
//! Both operands are packed into panels of 32 rows or columns, in the order in which AMX reads its
//! tiles; an [`Engine`] multiplies two panels into a block of 32 × 32 sums. What is f32 takes part as
//! the sum of two bf16 ([`split`]), which keeps 16 bits of its fraction.

mod engine;
mod pack;
mod select;

use burn::tensor::bf16;
use rayon::prelude::*;

pub(crate) use engine::Engine;
use pack::{PANEL, STEP, TILE, pack_columns, pack_rows};
pub(crate) use select::{choice, engine};

use super::matrix::View;

/// Packed columns that are held at once: 2 MiB.
const PACKED: usize = 1 << 20;
/// Panels of rows that a task multiplies with a panel of columns while it is in the cache.
const ROW_PANELS: usize = 4;

/// A matrix of bf16 somewhere in a slice.
pub(crate) type Halves<'a> = View<'a, bf16>;

/// Where a product goes.
pub(crate) enum Sink<'a> {
    /// As it is.
    Wide(&'a mut [f32]),
    /// Rounded to the nearest, after the bias of each column.
    Half {
        values: &'a mut [bf16],
        bias: Option<&'a [bf16]>,
    },
}

/// The sum of `left · right` over the terms, dense and row-major in `sink`.
///
/// # Shapes
/// - of each term: left `[rows, inner]`, right `[inner, columns]`, inner its own
/// - sink: `[rows, columns]`
pub(crate) fn multiply(engine: Engine, terms: &[(Halves<'_>, Halves<'_>)], sink: Sink<'_>) {
    let (rows, columns) = (terms[0].0.rows, terms[0].1.columns);
    for (left, right) in terms {
        assert_eq!(left.columns, right.rows, "inner dimensions of a product");
        assert_eq!(
            (left.rows, right.columns),
            (rows, columns),
            "terms of a sum"
        );
    }
    let sink = Target::new(sink, rows, columns);
    let steps: usize = terms
        .iter()
        .map(|(left, _)| left.columns.div_ceil(STEP))
        .sum();
    let panel = steps * 2 * TILE;
    let mut left = vec![bf16::ZERO; rows.div_ceil(PANEL) * panel];
    left.par_chunks_mut(panel.max(1))
        .enumerate()
        .for_each(|(index, panel)| {
            let first = index * PANEL;
            let count = PANEL.min(rows - first);
            pack(
                panel,
                terms.iter().map(|(left, _)| left.rows(first, count)),
                pack_rows,
            );
        });
    let at_once = (PACKED / panel.max(1)).max(1);
    let panels = columns.div_ceil(PANEL);
    let mut right = vec![bf16::ZERO; at_once.min(panels) * panel];
    for start in (0..panels).step_by(at_once) {
        let count = at_once.min(panels - start);
        let right = &mut right[..count * panel];
        right
            .par_chunks_mut(panel.max(1))
            .enumerate()
            .for_each(|(index, panel)| {
                let first = (start + index) * PANEL;
                let count = PANEL.min(columns - first);
                let columns = terms
                    .iter()
                    .map(|(_, right)| right.transposed().rows(first, count));
                pack(panel, columns, pack_columns);
            });
        let groups = rows.div_ceil(PANEL).div_ceil(ROW_PANELS);
        (0..groups * count).into_par_iter().for_each(|task| {
            let (group, column) = (task / count, task % count);
            let right = &right[column * panel..][..panel];
            let _configured = engine.configure();
            let mut sums = [0.0f32; PANEL * PANEL];
            let first = group * ROW_PANELS;
            for (index, left) in left[first * panel..]
                .chunks(panel.max(1))
                .take(ROW_PANELS)
                .enumerate()
            {
                engine.multiply_panels(left, right, &mut sums);
                sink.store(&sums, (first + index) * PANEL, (start + column) * PANEL);
            }
        });
    }
}

/// Packs what each term has of a panel, one after the other, by rows of `PANEL` or by columns.
fn pack<'a>(
    mut panel: &mut [bf16],
    parts: impl Iterator<Item = Halves<'a>>,
    pack_one: impl Fn(&mut [bf16], Halves<'a>),
) {
    for part in parts {
        let (own, rest) = panel.split_at_mut(part.columns.div_ceil(STEP) * 2 * TILE);
        pack_one(own, part);
        panel = rest;
    }
}

/// A sink that several threads write to, each its own blocks.
struct Target<'a> {
    values: Pointer,
    bias: Option<&'a [bf16]>,
    rows: usize,
    columns: usize,
    _borrowed: std::marker::PhantomData<&'a mut ()>,
}

#[derive(Clone, Copy)]
enum Pointer {
    Wide(*mut f32),
    Half(*mut bf16),
}

// SAFETY: blocks of a product do not overlap, and `store` is called once for each.
unsafe impl Sync for Target<'_> {}

impl<'a> Target<'a> {
    fn new(sink: Sink<'a>, rows: usize, columns: usize) -> Self {
        let (values, length, bias) = match sink {
            Sink::Wide(values) => (Pointer::Wide(values.as_mut_ptr()), values.len(), None),
            Sink::Half { values, bias } => {
                assert!(
                    bias.is_none_or(|bias| bias.len() == columns),
                    "a bias a column"
                );
                (Pointer::Half(values.as_mut_ptr()), values.len(), bias)
            }
        };
        assert_eq!(length, rows * columns, "a product of [{rows}, {columns}]");
        Self {
            values,
            bias,
            rows,
            columns,
            _borrowed: std::marker::PhantomData,
        }
    }

    /// Writes the block whose first element is at `row`, `column`, as far as it is inside.
    fn store(&self, sums: &[f32; PANEL * PANEL], row: usize, column: usize) {
        let width = PANEL.min(self.columns - column);
        let height = PANEL.min(self.rows - row);
        for (index, sums) in sums.chunks_exact(PANEL).take(height).enumerate() {
            let start = (row + index) * self.columns + column;
            let sums = &sums[..width];
            match self.values {
                // SAFETY: `new` checked the length, and this block is this call's alone.
                Pointer::Wide(values) => unsafe {
                    std::slice::from_raw_parts_mut(values.add(start), width).copy_from_slice(sums);
                },
                Pointer::Half(values) => {
                    // SAFETY: as above.
                    let values =
                        unsafe { std::slice::from_raw_parts_mut(values.add(start), width) };
                    match self.bias {
                        None => {
                            for (value, sum) in values.iter_mut().zip(sums) {
                                *value = bf16::from_f32(*sum);
                            }
                        }
                        Some(bias) => {
                            let bias = &bias[column..column + width];
                            for ((value, sum), bias) in values.iter_mut().zip(sums).zip(bias) {
                                *value = bf16::from_f32(sum + bias.to_f32());
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Each number as a bf16 and what that leaves of it, `factor` times.
pub(crate) fn split(values: &[f32], factor: f32) -> (Vec<bf16>, Vec<bf16>) {
    values
        .iter()
        .map(|value| {
            let value = value * factor;
            let high = bf16::from_f32(value);
            (high, bf16::from_f32(value - high.to_f32()))
        })
        .unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that bf16 holds.
    fn halves(count: usize, seed: u32) -> Vec<bf16> {
        let mut state = seed;
        let mut draw = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        };
        (0..count).map(|_| draw()).collect()
    }

    fn at(matrix: Halves<'_>, row: usize, column: usize) -> f64 {
        f64::from(matrix.data[row * matrix.row_stride + column * matrix.column_stride].to_f32())
    }

    #[test]
    fn every_engine_multiplies_any_size_and_layout() {
        for engine in Engine::all() {
            for (rows, inner, columns) in [
                (1, 1, 1),
                (5, 33, 31),
                (32, 32, 32),
                (150, 70, 65),
                (33, 2, 1),
            ] {
                let (a, b) = (halves(rows * inner, 1), halves(inner * columns, 2));
                let (c, d) = (halves(rows * 7, 3), halves(7 * columns, 4));
                for layout in 0..4 {
                    let left = match layout & 1 {
                        0 => Halves::new(&a, rows, inner),
                        _ => Halves::new(&a, inner, rows).transposed(),
                    };
                    let right = match layout & 2 {
                        0 => Halves::new(&b, inner, columns),
                        _ => Halves::new(&b, columns, inner).transposed(),
                    };
                    let more = (Halves::new(&c, rows, 7), Halves::new(&d, 7, columns));
                    let mut wide = vec![f32::NAN; rows * columns];
                    multiply(engine, &[(left, right), more], Sink::Wide(&mut wide));
                    let bias = halves(columns, 5);
                    let mut half = vec![bf16::NAN; rows * columns];
                    let sink = Sink::Half {
                        values: &mut half,
                        bias: Some(&bias),
                    };
                    multiply(engine, &[(left, right), more], sink);
                    for row in 0..rows {
                        for (column, bias) in bias.iter().enumerate() {
                            let mut sum = 0.0;
                            for k in 0..inner {
                                sum += at(left, row, k) * at(right, k, column);
                            }
                            for k in 0..7 {
                                sum += at(more.0, row, k) * at(more.1, k, column);
                            }
                            let index = row * columns + column;
                            // 77 sums at most, each rounded to 24 bits.
                            let found = f64::from(wide[index]);
                            assert!(
                                (found - sum).abs() < 1e-5,
                                "{engine:?} {layout}: {found} {sum}"
                            );
                            let expected = bf16::from_f32(wide[index] + bias.to_f32());
                            assert_eq!(half[index], expected);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn two_parts_hold_sixteen_bits() {
        let values = [1.0f32, std::f32::consts::PI, -1.234_568e-3, 8.5e10, 0.0];
        let (high, low) = split(&values, 2.0);
        for ((value, high), low) in values.iter().zip(&high).zip(&low) {
            let held = high.to_f32() + low.to_f32();
            assert!((held - 2.0 * value).abs() <= 2.0 * value.abs() * 2f32.powi(-16));
        }
    }
}
