//! The output and the logarithm of each row's sum.

use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};

use super::tiles::{
    DOWN, Four, Head, LOWEST, OWN, Plan, ROWS, Sizes, TILES, add_weighted, over_rows, partners,
    products, score, store_weights, write_rows,
};

#[cube(launch_unchecked)]
pub(super) fn forward_kernel<T: Float, N: Size, P: Size>(
    query: LinearView<'_, Vector<T, N>>,
    key: LinearView<'_, Vector<T, N>>,
    value: LinearView<'_, Vector<T, N>>,
    runs: LinearView<'_, i32>,
    mut output: LinearViewMut<'_, Vector<T, N>>,
    mut sums: LinearViewMut<'_, f32>,
    sizes: Sizes,
    #[comptime] plan: Plan,
    #[define(T)] _dtype: ElemType,
) {
    let mut tiles = Shared::<[Vector<f32, Four>]>::new_slice(TILES);
    let mut weights =
        Shared::<[Vector<f32, P>]>::new_slice(comptime![(ROWS * (plan.across + 1)) as usize]);
    let mut shared = Shared::<[f32]>::new_slice(comptime![(ROWS * plan.across) as usize]);
    let columns = comptime![plan.columns()];

    // Under a causal mask the last rows have the most to do: they come first.
    let first = (sizes.seq.div_ceil(ROWS) - 1 - CUBE_POS_X) * ROWS;
    let (batch, head, seq) = (CUBE_POS_Z, CUBE_POS_Y, sizes.seq);
    let kv_head = head / (sizes.heads / sizes.kv_heads);
    let queries = Head::of(batch, head, seq, sizes.heads, sizes.head_dim);
    let keys = Head::of(batch, kv_head, seq, sizes.kv_heads, sizes.head_dim);
    let mut begins = Array::<u32>::new(OWN);
    let mut counts = Array::<u32>::new(OWN);
    let (begin, end) = partners(&runs, &mut begins, &mut counts, &sizes, first, true, plan);

    let mut scores = Array::<f32>::new(comptime![OWN * plan.columns()]);
    let mut sum = Array::<Vector<f32, Four>>::new(comptime![OWN * plan.vectors]);
    let mut largest = Array::<f32>::new(OWN);
    let mut now = Array::<f32>::new(OWN);
    // Of a unit's own columns until the end.
    let mut total = Array::<f32>::new(OWN);
    #[unroll]
    for own in 0..OWN {
        largest[own] = f32::new(LOWEST);
        total[own] = f32::new(0.0);
    }
    #[unroll]
    for i in 0..comptime![OWN * plan.vectors] {
        sum[i] = Vector::cast_from(f32::new(0.0));
    }

    let mut start = begin;
    while start < end {
        products::<T, N>(
            &mut scores,
            &mut tiles,
            &query,
            &queries,
            first,
            &key,
            &keys,
            start,
            &sizes,
            plan,
        );
        #[unroll]
        for own in 0..OWN {
            now[own] = largest[own];
            #[unroll]
            for column in 0..columns {
                let at = start + UNIT_POS_X * comptime![columns as u32] + comptime![column as u32];
                let product = scores[comptime![own * columns + column]];
                let (found, _) = score(product, sizes.scale, sizes.soft_cap, plan);
                let seen = at - begins[own] < counts[own];
                let found = select(seen, found, f32::new(LOWEST));
                scores[comptime![own * columns + column]] = found;
                now[own] = max(now[own], found);
            }
        }
        over_rows(&mut now, &mut shared, &sizes, true, plan);
        #[unroll]
        for own in 0..OWN {
            // Nothing seen yet: any base gives zeros.
            let base = select(now[own] > LOWEST, now[own], f32::new(0.0));
            let shrink = (largest[own] - base).exp();
            largest[own] = now[own];
            total[own] *= shrink;
            #[unroll]
            for column in 0..columns {
                let weight = (scores[comptime![own * columns + column]] - base).exp();
                scores[comptime![own * columns + column]] = weight;
                total[own] += weight;
            }
            #[unroll]
            for vector in 0..comptime![plan.vectors] {
                sum[comptime![vector * OWN + own]] *= Vector::cast_from(shrink);
            }
        }
        store_weights::<P>(&mut weights, &scores, plan);
        add_weighted::<T, N, P>(
            &mut sum, &mut tiles, &weights, &value, &keys, start, &sizes, plan,
        );
        start += ROWS;
    }

    over_rows(&mut total, &mut shared, &sizes, false, plan);
    let mut factors = Array::<f32>::new(OWN);
    #[unroll]
    for own in 0..OWN {
        let row = first + UNIT_POS_Y + comptime![own as u32 * DOWN];
        let any = total[own] > 0.0;
        let divisor = select(any, total[own], f32::new(1.0));
        factors[own] = select(any, f32::new(1.0) / divisor, f32::new(0.0));
        if UNIT_POS_X == 0 && row < seq {
            let found = select(any, largest[own] + divisor.ln(), f32::new(0.0));
            sums.write(((batch * sizes.heads + head) * seq + row) as usize, found);
        }
    }
    write_rows::<T, N>(&mut output, &queries, &sum, &factors, first, seq, plan);
}
