//! The gradients: of the queries with a cube for 32 queries, of keys and values with one for 32 keys.

use cubecl::prelude::*;
use cubecl::std::tensor::layout::linear::{LinearView, LinearViewMut};

use super::tiles::{
    DOWN, Four, Head, OWN, Plan, ROWS, Sizes, TILES, add_weighted, over_rows, partners, products,
    score, store_weights, write_rows,
};
use crate::gpu::rows::sum_of_lanes;

/// Leaves the products of output and its gradient, summed over a row, in `deltas`.
#[cube(launch_unchecked)]
pub(super) fn query_gradient_kernel<T: Float, N: Size, P: Size>(
    query: LinearView<'_, Vector<T, N>>,
    key: LinearView<'_, Vector<T, N>>,
    value: LinearView<'_, Vector<T, N>>,
    runs: LinearView<'_, i32>,
    output: LinearView<'_, Vector<T, N>>,
    sums: LinearView<'_, f32>,
    gradient: LinearView<'_, Vector<T, N>>,
    mut deltas: LinearViewMut<'_, f32>,
    mut query_gradient: LinearViewMut<'_, Vector<T, N>>,
    sizes: Sizes,
    #[comptime] plan: Plan,
    #[define(T)] _dtype: ElemType,
) {
    let mut tiles = Shared::<[Vector<f32, Four>]>::new_slice(TILES);
    let mut weights =
        Shared::<[Vector<f32, P>]>::new_slice(comptime![(ROWS * (plan.across + 1)) as usize]);
    let mut shared = Shared::<[f32]>::new_slice(comptime![(ROWS * plan.across) as usize]);
    let columns = comptime![plan.columns()];

    let first = (sizes.seq.div_ceil(ROWS) - 1 - CUBE_POS_X) * ROWS;
    let (batch, head, seq) = (CUBE_POS_Z, CUBE_POS_Y, sizes.seq);
    let kv_head = head / (sizes.heads / sizes.kv_heads);
    let queries = Head::of(batch, head, seq, sizes.heads, sizes.head_dim);
    let keys = Head::of(batch, kv_head, seq, sizes.kv_heads, sizes.head_dim);
    let mut begins = Array::<u32>::new(OWN);
    let mut counts = Array::<u32>::new(OWN);
    let (begin, end) = partners(&runs, &mut begins, &mut counts, &sizes, first, true, plan);

    let mut row_sums = Array::<f32>::new(OWN);
    let mut row_deltas = Array::<f32>::new(OWN);
    let size = query.vector_size();
    let statistics = (batch * sizes.heads + head) * seq;
    #[unroll]
    for own in 0..OWN {
        row_sums[own] = f32::new(0.0);
        row_deltas[own] = f32::new(0.0);
        let row = first + UNIT_POS_Y + comptime![own as u32 * DOWN];
        if row < seq {
            row_sums[own] = sums.read((statistics + row) as usize);
            let start = (queries.start + row * queries.stride) / comptime![size as u32];
            let mut vector = UNIT_POS_X;
            while vector < sizes.head_dim / comptime![size as u32] {
                let at = (start + vector) as usize;
                let left = Vector::<f32, N>::cast_from(output.read(at));
                let right = Vector::<f32, N>::cast_from(gradient.read(at));
                row_deltas[own] += sum_of_lanes(left * right);
                vector += comptime![plan.across];
            }
        }
    }
    over_rows(&mut row_deltas, &mut shared, &sizes, false, plan);
    #[unroll]
    for own in 0..OWN {
        let row = first + UNIT_POS_Y + comptime![own as u32 * DOWN];
        if UNIT_POS_X == 0 && row < seq {
            deltas.write((statistics + row) as usize, row_deltas[own]);
        }
    }

    let mut scores = Array::<f32>::new(comptime![OWN * plan.columns()]);
    let mut changes = Array::<f32>::new(comptime![OWN * plan.columns()]);
    let mut sum = Array::<Vector<f32, Four>>::new(comptime![OWN * plan.vectors]);
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
        products::<T, N>(
            &mut changes,
            &mut tiles,
            &gradient,
            &queries,
            first,
            &value,
            &keys,
            start,
            &sizes,
            plan,
        );
        #[unroll]
        for own in 0..OWN {
            #[unroll]
            for column in 0..columns {
                let at = start + UNIT_POS_X * comptime![columns as u32] + comptime![column as u32];
                let product = scores[comptime![own * columns + column]];
                let (found, slope) = score(product, sizes.scale, sizes.soft_cap, plan);
                let seen = at - begins[own] < counts[own];
                let weight = select(seen, (found - row_sums[own]).exp(), f32::new(0.0));
                let change = changes[comptime![own * columns + column]] - row_deltas[own];
                changes[comptime![own * columns + column]] = weight * change * slope;
            }
        }
        store_weights::<P>(&mut weights, &changes, plan);
        add_weighted::<T, N, P>(
            &mut sum, &mut tiles, &weights, &key, &keys, start, &sizes, plan,
        );
        start += ROWS;
    }
    let mut factors = Array::<f32>::new(OWN);
    #[unroll]
    for own in 0..OWN {
        factors[own] = f32::new(1.0);
    }
    write_rows::<T, N>(
        &mut query_gradient,
        &queries,
        &sum,
        &factors,
        first,
        seq,
        plan,
    );
}

#[cube(launch_unchecked)]
pub(super) fn key_value_gradient_kernel<T: Float, N: Size, P: Size>(
    query: LinearView<'_, Vector<T, N>>,
    key: LinearView<'_, Vector<T, N>>,
    value: LinearView<'_, Vector<T, N>>,
    runs: LinearView<'_, i32>,
    sums: LinearView<'_, f32>,
    gradient: LinearView<'_, Vector<T, N>>,
    deltas: LinearView<'_, f32>,
    mut key_gradient: LinearViewMut<'_, Vector<T, N>>,
    mut value_gradient: LinearViewMut<'_, Vector<T, N>>,
    sizes: Sizes,
    #[comptime] plan: Plan,
    #[define(T)] _dtype: ElemType,
) {
    let mut tiles = Shared::<[Vector<f32, Four>]>::new_slice(TILES);
    let mut weights =
        Shared::<[Vector<f32, P>]>::new_slice(comptime![(ROWS * (plan.across + 1)) as usize]);
    let columns = comptime![plan.columns()];

    let first = CUBE_POS_X * ROWS;
    let (batch, kv_head, seq) = (CUBE_POS_Z, CUBE_POS_Y, sizes.seq);
    let group = sizes.heads / sizes.kv_heads;
    let keys = Head::of(batch, kv_head, seq, sizes.kv_heads, sizes.head_dim);
    let mut begins = Array::<u32>::new(OWN);
    let mut counts = Array::<u32>::new(OWN);
    let (begin, end) = partners(&runs, &mut begins, &mut counts, &sizes, first, false, plan);

    let mut scores = Array::<f32>::new(comptime![OWN * plan.columns()]);
    let mut changes = Array::<f32>::new(comptime![OWN * plan.columns()]);
    let mut slopes = Array::<f32>::new(comptime![OWN * plan.columns()]);
    let mut key_sum = Array::<Vector<f32, Four>>::new(comptime![OWN * plan.vectors]);
    let mut value_sum = Array::<Vector<f32, Four>>::new(comptime![OWN * plan.vectors]);
    #[unroll]
    for i in 0..comptime![OWN * plan.vectors] {
        key_sum[i] = Vector::cast_from(f32::new(0.0));
        value_sum[i] = Vector::cast_from(f32::new(0.0));
    }
    for head in kv_head * group..(kv_head + 1) * group {
        let queries = Head::of(batch, head, seq, sizes.heads, sizes.head_dim);
        let statistics = (batch * sizes.heads + head) * seq;
        let mut start = begin;
        while start < end {
            products::<T, N>(
                &mut scores,
                &mut tiles,
                &key,
                &keys,
                first,
                &query,
                &queries,
                start,
                &sizes,
                plan,
            );
            let mut column_deltas = Array::<f32>::new(columns);
            #[unroll]
            for column in 0..columns {
                let at = start + UNIT_POS_X * comptime![columns as u32] + comptime![column as u32];
                let mut row_sum = f32::new(0.0);
                column_deltas[column] = f32::new(0.0);
                if at < seq {
                    row_sum = sums.read((statistics + at) as usize);
                    column_deltas[column] = deltas.read((statistics + at) as usize);
                }
                #[unroll]
                for own in 0..OWN {
                    let product = scores[comptime![own * columns + column]];
                    let (found, slope) = score(product, sizes.scale, sizes.soft_cap, plan);
                    let seen = at - begins[own] < counts[own];
                    let weight = select(seen, (found - row_sum).exp(), f32::new(0.0));
                    scores[comptime![own * columns + column]] = weight;
                    slopes[comptime![own * columns + column]] = weight * slope;
                }
            }
            store_weights::<P>(&mut weights, &scores, plan);
            add_weighted::<T, N, P>(
                &mut value_sum,
                &mut tiles,
                &weights,
                &gradient,
                &queries,
                start,
                &sizes,
                plan,
            );
            products::<T, N>(
                &mut changes,
                &mut tiles,
                &value,
                &keys,
                first,
                &gradient,
                &queries,
                start,
                &sizes,
                plan,
            );
            #[unroll]
            for own in 0..OWN {
                #[unroll]
                for column in 0..columns {
                    let change = changes[comptime![own * columns + column]] - column_deltas[column];
                    let slope = slopes[comptime![own * columns + column]];
                    changes[comptime![own * columns + column]] = change * slope;
                }
            }
            store_weights::<P>(&mut weights, &changes, plan);
            add_weighted::<T, N, P>(
                &mut key_sum,
                &mut tiles,
                &weights,
                &query,
                &queries,
                start,
                &sizes,
                plan,
            );
            start += ROWS;
        }
    }
    let mut factors = Array::<f32>::new(OWN);
    #[unroll]
    for own in 0..OWN {
        factors[own] = f32::new(1.0);
    }
    write_rows::<T, N>(
        &mut key_gradient,
        &keys,
        &key_sum,
        &factors,
        first,
        seq,
        plan,
    );
    write_rows::<T, N>(
        &mut value_gradient,
        &keys,
        &value_sum,
        &factors,
        first,
        seq,
        plan,
    );
}
