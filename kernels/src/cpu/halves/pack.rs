//! The order in which the engines read their operands.

use burn::tensor::bf16;

use super::Halves;

/// Rows or columns of a panel: two tiles.
pub(super) const PANEL: usize = 32;
/// Inner dimension of a tile.
pub(super) const STEP: usize = 32;
/// Elements of a tile: 16 rows of 32, or of columns 16 pairs of rows of 16.
pub(super) const TILE: usize = 512;
const ROWS: usize = 16;

/// Packs up to 32 rows: for each step two tiles of 16 rows, each with its 32 numbers together. What is
/// missing is zero.
pub(super) fn pack_rows(panel: &mut [bf16], matrix: Halves<'_>) {
    let tiles = panel.chunks_exact_mut(TILE).enumerate();
    for (index, tile) in tiles {
        let (first, start) = (index % 2 * ROWS, index / 2 * STEP);
        let count = STEP.min(matrix.columns - start);
        for (row, packed) in tile.chunks_exact_mut(STEP).enumerate() {
            let row = first + row;
            if row >= matrix.rows {
                packed.fill(bf16::ZERO);
                continue;
            }
            let source = &matrix.data[row * matrix.row_stride + start * matrix.column_stride..];
            match matrix.column_stride {
                1 => packed[..count].copy_from_slice(&source[..count]),
                stride => {
                    let source = source.iter().step_by(stride);
                    for (packed, value) in packed[..count].iter_mut().zip(source) {
                        *packed = *value;
                    }
                }
            }
            packed[count..].fill(bf16::ZERO);
        }
    }
}

/// Packs up to 32 columns, given as the rows of their transpose: for each step two tiles of 16 columns,
/// each with 16 pairs of neighbours of every column. What is missing is zero.
pub(super) fn pack_columns(panel: &mut [bf16], columns: Halves<'_>) {
    let tiles = panel.chunks_exact_mut(TILE).enumerate();
    for (index, tile) in tiles {
        let (first, start) = (index % 2 * ROWS, index / 2 * STEP);
        let count = STEP.min(columns.columns - start);
        let present = columns.rows.saturating_sub(first).min(ROWS);
        if present < ROWS || count < STEP {
            tile.fill(bf16::ZERO);
        }
        if present == 0 {
            continue;
        }
        if columns.column_stride == 1 {
            for column in 0..present {
                let source =
                    &columns.data[(first + column) * columns.row_stride + start..][..count];
                let (pairs, rest) = source.as_chunks::<2>();
                for (pair, values) in pairs.iter().enumerate() {
                    tile[pair * STEP + 2 * column..][..2].copy_from_slice(values);
                }
                if let [value] = rest {
                    tile[pairs.len() * STEP + 2 * column] = *value;
                }
            }
        } else {
            for inner in 0..count {
                let source = &columns.data
                    [(start + inner) * columns.column_stride + first * columns.row_stride..];
                let packed = &mut tile[inner / 2 * STEP..][..STEP];
                for (column, value) in source
                    .iter()
                    .step_by(columns.row_stride)
                    .take(present)
                    .enumerate()
                {
                    packed[2 * column + inner % 2] = *value;
                }
            }
        }
    }
}
