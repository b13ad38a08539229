//! What the kernels of [`portable`](super) are made of: a cube works on 32 rows of a head
//! and goes through the other side 32 rows at a time, both in slices of the head, in shared memory.
//!
//! A cube has 8 units along its rows and `across` units along the other side's. A unit has the rows
//! `y`, `y + 8`, …, so that units beside each other read other banks of shared memory, and consecutive
//! rows of the other side, whose weights it stores as one vector.

use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};

/// Rows of a cube, and of what it compares them with at a time.
pub(super) const ROWS: u32 = 32;
/// Units of a cube along its rows.
pub(super) const DOWN: u32 = 8;
/// Rows of a unit.
pub(super) const OWN: usize = (ROWS / DOWN) as usize;

/// Numbers of a head are held four at a time.
pub(super) type Four = Const<4>;

/// Vectors of a row that a product takes at a time, and from one row to the next: an odd number, so
/// that rows below each other begin in other banks.
const SLICE: u32 = 8;
const PITCH: u32 = SLICE + 1;
/// Vectors of shared memory: two slices of 32 rows, or some whole rows.
pub(super) const TILES: usize = (2 * ROWS * PITCH) as usize;

/// Below every score.
pub(super) const LOWEST: f32 = -3.0e38;

/// What is known of an attention when its kernels are compiled; sizes and masks are not, so that most
/// attentions share their kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    /// Units of a cube along the other side: 8 have fewer reads of shared memory a product, 16 fewer
    /// registers.
    pub across: u32,
    /// Vectors of a head that a unit sums up for each of its rows.
    pub vectors: usize,
    pub capped: bool,
}

impl Plan {
    pub fn new(head_dim: usize, capped: bool) -> Plan {
        let across = if head_dim <= 64 { 8 } else { 16 };
        Plan {
            across,
            vectors: head_dim.div_ceil(4 * across as usize),
            capped,
        }
    }

    /// Units of a cube.
    pub fn units(self) -> u32 {
        self.across * DOWN
    }

    /// Rows of the other side that a unit has.
    pub fn columns(self) -> usize {
        (ROWS / self.across) as usize
    }

    /// Vectors of a whole row, those of every unit.
    fn width(self) -> u32 {
        self.vectors as u32 * self.across
    }

    /// Whole rows that shared memory holds.
    fn whole_rows(self) -> u32 {
        let rows = TILES as u32 / self.width();
        ROWS.min(1 << rows.ilog2())
    }
}

/// What is known of an attention when its kernels run.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Sizes {
    pub seq: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    /// At most `seq`, which is none.
    pub window: u32,
    /// 1 where it is, else 0.
    pub causal: u32,
    pub scale: f32,
    pub soft_cap: f32,
    /// [`ROWS`] and the plan's `across` again, as bounds of the loops that move rows. Unrolled, which
    /// compilers do where a bound is known to them, those would be most of a kernel's code, and a driver
    /// in software compiles that for seconds.
    pub rows: u32,
    pub across: u32,
}

/// Where the rows of one head lie: the first one's first element, the elements from one to the next,
/// and those of a row.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Head {
    pub start: u32,
    pub stride: u32,
    pub width: u32,
}

#[cube]
impl Head {
    /// Of a contiguous `[batch, seq, heads, head_dim]`.
    pub fn of(batch: u32, head: u32, seq: u32, heads: u32, head_dim: u32) -> Head {
        Head {
            start: (batch * seq * heads + head) * head_dim,
            stride: heads * head_dim,
            width: head_dim,
        }
    }
}

/// Vector `vector` of a row; zeros beyond the head and the sequence.
#[cube]
fn fetch<T: Float, N: Size>(
    from: &LinearView<'_, Vector<T, N>>,
    head: &Head,
    row: u32,
    vector: u32,
    seq: u32,
) -> Vector<f32, Four> {
    let size = from.vector_size();
    let zero = Vector::<f32, N>::cast_from(f32::new(0.0));
    let mut value = Vector::<f32, Four>::cast_from(f32::new(0.0));
    #[unroll]
    for piece in 0..comptime![4 / size] {
        let at = vector * 4 + comptime![(piece * size) as u32];
        let inside = row < seq && at < head.width;
        let place = (head.start + row * head.stride + at) / comptime![size as u32];
        let read = from.read(select(inside, place, 0) as usize);
        let read = select(inside, Vector::<f32, N>::cast_from(read), zero);
        #[unroll]
        for lane in 0..size {
            value.insert(comptime![piece * size + lane], read.extract(lane));
        }
    }
    value
}

/// The products of a unit's rows of `left` with its rows of `right`, row by row.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn products<T: Float, N: Size>(
    sums: &mut Array<f32>,
    tiles: &mut Shared<[Vector<f32, Four>]>,
    left: &LinearView<'_, Vector<T, N>>,
    left_head: &Head,
    left_first: u32,
    right: &LinearView<'_, Vector<T, N>>,
    right_head: &Head,
    right_first: u32,
    sizes: &Sizes,
    #[comptime] plan: Plan,
) {
    let second = comptime![ROWS * PITCH];
    let columns = comptime![plan.columns()];
    let across = comptime![plan.across];
    #[unroll]
    for i in 0..comptime![OWN * plan.columns()] {
        sums[i] = f32::new(0.0);
    }
    let vectors = sizes.head_dim.div_ceil(4);
    let mut start = u32::new(0);
    while start < vectors {
        // What was there may still be read.
        sync_cube();
        let mut index = UNIT_POS_Y * across + UNIT_POS_X;
        while index < sizes.rows * SLICE {
            let (slot, vector) = (index / SLICE, index % SLICE);
            // The rows that a unit has lie `across` apart.
            let right_row = slot % across * comptime![columns as u32] + slot / across;
            let from_left = fetch::<T, N>(
                left,
                left_head,
                left_first + slot,
                start + vector,
                sizes.seq,
            );
            let from_right = fetch::<T, N>(
                right,
                right_head,
                right_first + right_row,
                start + vector,
                sizes.seq,
            );
            let place = slot * PITCH + vector;
            tiles[place as usize] = from_left;
            tiles[(second + place) as usize] = from_right;
            index += comptime![plan.units()];
        }
        sync_cube();
        for vector in 0..min(vectors - start, SLICE) {
            let mut rows = Array::<Vector<f32, Four>>::new(OWN);
            #[unroll]
            for own in 0..OWN {
                let row = UNIT_POS_Y + comptime![own as u32 * DOWN];
                rows[own] = tiles[(row * PITCH + vector) as usize];
            }
            #[unroll]
            for column in 0..columns {
                let slot = UNIT_POS_X + comptime![column as u32 * plan.across];
                let other = tiles[(second + slot * PITCH + vector) as usize];
                #[unroll]
                for own in 0..OWN {
                    sums[comptime![own * columns + column]] += rows[own].dot(other);
                }
            }
        }
        start += SLICE;
    }
}

/// Puts a unit's weights where all of its rows' units find them, after whoever read the last ones
/// has met a `sync_cube`.
#[cube]
pub(super) fn store_weights<P: Size>(
    weights: &mut Shared<[Vector<f32, P>]>,
    values: &Array<f32>,
    #[comptime] plan: Plan,
) {
    let columns = comptime![plan.columns()];
    #[unroll]
    for own in 0..OWN {
        let mut vector = Vector::<f32, P>::cast_from(f32::new(0.0));
        #[unroll]
        for column in 0..columns {
            vector.insert(column, values[comptime![own * columns + column]]);
        }
        let row = UNIT_POS_Y + comptime![own as u32 * DOWN];
        weights[(row * comptime![plan.across + 1] + UNIT_POS_X) as usize] = vector;
    }
}

/// Adds the rows of `from`, each times its weight, to the sums of a unit's rows.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn add_weighted<T: Float, N: Size, P: Size>(
    sums: &mut Array<Vector<f32, Four>>,
    tiles: &mut Shared<[Vector<f32, Four>]>,
    weights: &Shared<[Vector<f32, P>]>,
    from: &LinearView<'_, Vector<T, N>>,
    head: &Head,
    first: u32,
    sizes: &Sizes,
    #[comptime] plan: Plan,
) {
    let width = comptime![plan.width()];
    let columns = comptime![plan.columns() as u32];
    let groups = comptime![plan.whole_rows() / plan.columns() as u32];
    let half = comptime![plan.whole_rows() / 2];
    let passes = comptime![ROWS / plan.whole_rows()];
    for pass in 0..passes {
        sync_cube();
        let from_row = first + pass * comptime![plan.whole_rows()];
        let mut index = UNIT_POS_Y * comptime![plan.across] + UNIT_POS_X;
        while index < sizes.rows * width / comptime![2 * passes] {
            // Two at a time, so that their ways from memory overlap.
            let (slot, vector) = (index / width, index % width);
            let above = fetch::<T, N>(from, head, from_row + slot, vector, sizes.seq);
            let below = fetch::<T, N>(from, head, from_row + half + slot, vector, sizes.seq);
            tiles[index as usize] = above;
            tiles[(half * width + index) as usize] = below;
            index += comptime![plan.units()];
        }
        sync_cube();
        for group in 0..groups {
            let mut shares = Array::<Vector<f32, P>>::new(OWN);
            #[unroll]
            for own in 0..OWN {
                let row = UNIT_POS_Y + comptime![own as u32 * DOWN];
                let at = row * comptime![plan.across + 1] + pass * groups + group;
                shares[own] = weights[at as usize];
            }
            #[unroll]
            for column in 0..comptime![plan.columns()] {
                let row = group * columns + comptime![column as u32];
                #[unroll]
                for vector in 0..comptime![plan.vectors] {
                    let place = UNIT_POS_X + comptime![vector as u32 * plan.across];
                    let value = tiles[(row * width + place) as usize];
                    #[unroll]
                    for own in 0..OWN {
                        let share = Vector::<f32, Four>::cast_from(shares[own].extract(column));
                        sums[comptime![vector * OWN + own]] += value * share;
                    }
                }
            }
        }
    }
}

/// Writes the sums of a unit's rows, from row `first` on, each times its row's factor.
#[cube]
pub(super) fn write_rows<T: Float, N: Size>(
    to: &mut LinearViewMut<'_, Vector<T, N>>,
    head: &Head,
    sums: &Array<Vector<f32, Four>>,
    factors: &Array<f32>,
    first: u32,
    seq: u32,
    #[comptime] plan: Plan,
) {
    let size = to.vector_size();
    #[unroll]
    for own in 0..OWN {
        let row = first + UNIT_POS_Y + comptime![own as u32 * DOWN];
        #[unroll]
        for vector in 0..comptime![plan.vectors] {
            let factor = Vector::<f32, Four>::cast_from(factors[own]);
            let value = sums[comptime![vector * OWN + own]] * factor;
            let column = (comptime![vector as u32 * plan.across] + UNIT_POS_X) * 4;
            #[unroll]
            for piece in 0..comptime![4 / size] {
                let at = column + comptime![(piece * size) as u32];
                if row < seq && at < head.width {
                    let mut part = Vector::<f32, N>::cast_from(f32::new(0.0));
                    #[unroll]
                    for lane in 0..size {
                        part.insert(lane, value.extract(comptime![piece * size + lane]));
                    }
                    let place = (head.start + row * head.stride + at) / comptime![size as u32];
                    to.write(place as usize, Vector::cast_from(part));
                }
            }
        }
    }
}

/// Sums of the values that the units of a row have, or the largest of them, the same for all.
#[cube]
pub(super) fn over_rows(
    values: &mut Array<f32>,
    shared: &mut Shared<[f32]>,
    sizes: &Sizes,
    #[comptime] largest: bool,
    #[comptime] plan: Plan,
) {
    let across = comptime![plan.across];
    sync_cube();
    #[unroll]
    for own in 0..OWN {
        let row = UNIT_POS_Y + comptime![own as u32 * DOWN];
        shared[(row * across + UNIT_POS_X) as usize] = values[own];
    }
    sync_cube();
    let row = UNIT_POS_Y * across + UNIT_POS_X;
    if row < ROWS {
        let mut found = shared[(row * across) as usize];
        for unit in 1..sizes.across {
            let other = shared[(row * across + unit) as usize];
            if comptime![largest] {
                found = max(found, other);
            } else {
                found += other;
            }
        }
        shared[(row * across) as usize] = found;
    }
    sync_cube();
    #[unroll]
    for own in 0..OWN {
        let row = UNIT_POS_Y + comptime![own as u32 * DOWN];
        values[own] = shared[(row * across) as usize];
    }
}

/// The score that the softmax sees, and its derivative by the plain product.
#[cube]
pub(super) fn score(product: f32, scale: f32, soft_cap: f32, #[comptime] plan: Plan) -> (f32, f32) {
    if comptime![plan.capped] {
        let bounded = (product * scale / soft_cap).tanh();
        (
            soft_cap * bounded,
            scale * (f32::new(1.0) - bounded * bounded),
        )
    } else {
        (product * scale, scale)
    }
}

/// What a unit's rows from `first` on are paired with: for each the first of the keys that the query
/// sees, or of the queries that see the key, and how many there are. Returns where those of all 32 rows
/// begin and end.
#[cube]
pub(super) fn partners(
    runs: &LinearView<'_, i32>,
    begins: &mut Array<u32>,
    counts: &mut Array<u32>,
    sizes: &Sizes,
    first: u32,
    #[comptime] of_queries: bool,
    #[comptime] plan: Plan,
) -> (u32, u32) {
    let mut row_begins = Shared::<[u32]>::new_slice(comptime![ROWS as usize]);
    let mut row_ends = Shared::<[u32]>::new_slice(comptime![ROWS as usize]);
    let unit = UNIT_POS_Y * comptime![plan.across] + UNIT_POS_X;
    if unit < ROWS {
        let row = first + unit;
        let mut begin = u32::new(0);
        let mut end = u32::new(0);
        if row < sizes.seq {
            let at = CUBE_POS_Z * sizes.seq + row;
            begin = u32::cast_from(runs.read(at as usize));
            end = u32::cast_from(runs.read((CUBE_COUNT_Z * sizes.seq + at) as usize));
            // Padding is paired with nothing.
            if begin < end {
                // Backwards in the window and forwards: none beyond the row itself where causal.
                let mut back = min(sizes.window, row + 1);
                let mut on = sizes.window;
                if sizes.causal == 1 {
                    if comptime![of_queries] {
                        on = u32::new(1);
                    } else {
                        back = u32::new(1);
                    }
                }
                begin = max(begin, row + 1 - back);
                end = min(end, row + on);
            }
        }
        row_begins[unit as usize] = begin;
        row_ends[unit as usize] = max(begin, end);
    }
    sync_cube();
    #[unroll]
    for own in 0..OWN {
        let row = (UNIT_POS_Y + comptime![own as u32 * DOWN]) as usize;
        begins[own] = row_begins[row];
        counts[own] = row_ends[row] - row_begins[row];
    }
    let mut begin = sizes.seq;
    let mut end = u32::new(0);
    for row in 0..min(sizes.seq - first, ROWS) {
        let row = row as usize;
        if row_begins[row] < row_ends[row] {
            begin = min(begin, row_begins[row]);
            end = max(end, row_ends[row]);
        }
    }
    (begin, end)
}
