// Attention in tiles on tensor cores, forward and backward (Dao 2023, FlashAttention-2): scores are
// never stored, the backward pass computes them again from the logarithm of each row's sum.
//
// Compiled at run time after `primitives.cu`, with HEAD_DIM (a multiple of 16; shorter heads are padded
// with zeros), HALF (0: bf16, 1: f16) and CAPPED (scores are bounded). A query sees the keys from `key_first` up to `key_end`, which
// is all there is to causality, windows and packed segments; padding sees nothing.
//
// dK and dV are summed by one block each, dQ by a kernel of its own: no atomic additions, so the same
// inputs give the same bits.

#define FORWARD_ROWS (FORWARD_WARPS * 16)
#define BACKWARD_ROWS (BACKWARD_WARPS * 16)
#define COLUMNS 64
#define TILES (COLUMNS / 8)
// A row is 16 bytes longer than its numbers: eight rows at one column lie in different banks.
#define ROW_LENGTH (HEAD_DIM + 8)
#define CHUNKS (HEAD_DIM / 8)

struct Strides {
    long long batch, seq, head;
};

struct Arguments {
    const element *query, *key, *value;
    element *output;
    // [batch, heads, seq]: log2 of the sum of 2^score.
    float *sums;
    // [batch, seq] each: the keys a query sees, and the queries that see a key.
    int *key_first, *key_end, *query_first, *query_end;
    const element *output_gradient;
    // [batch, heads, seq]: the products of output and its gradient, summed over a row.
    float *deltas;
    element *query_gradient, *key_gradient, *value_gradient;
    Strides query_strides, key_strides, value_strides, output_strides;
    // Of the gradients of query, key and value; that of the output lies as the output.
    Strides query_gradient_strides, key_gradient_strides;
    int seq, heads, kv_heads, head_dim;
    // Scores are multiplied by `scale`, and bounded by `cap` where CAPPED says so.
    float scale, cap;
};

#define LOG2_E 1.4426950408889634f

// Rows `first` and on of one head into shared memory, zeros beyond its end; complete after
// `wait_for_copies`.
template <int ROWS, int THREADS>
__device__ __forceinline__ void copy_rows(element *tile, const element *from, long long stride, int first,
                                          int seq, int head_dim) {
    for (int index = threadIdx.x; index < ROWS * CHUNKS; index += THREADS) {
        int row = index / CHUNKS, column = index % CHUNKS * 8;
        bool there = first + row < seq && column < head_dim;
        const element *source = there ? from + (first + row) * stride + column : from;
        copy_16_bytes(address(tile + row * ROW_LENGTH + column), source, there);
    }
}

// c[16, COLUMNS] = a[16, HEAD_DIM] · b[COLUMNS, HEAD_DIM]ᵀ, both in shared memory; one warp.
__device__ __forceinline__ void product_of_rows(float (&c)[TILES][4], const element *a, const element *b) {
    int lane = threadIdx.x % WARP;
    unsigned a_at = address(a + (lane & 15) * ROW_LENGTH + (lane >> 4) * 8);
    unsigned b_at = address(b + ((lane & 7) + ((lane >> 4) << 3)) * ROW_LENGTH + ((lane >> 3) & 1) * 8);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) c[tile][i] = 0.0f;
#pragma unroll
    for (int inner = 0; inner < HEAD_DIM / 16; inner++) {
        unsigned rows[4];
        load_matrices(rows, a_at + inner * 32);
#pragma unroll
        for (int tile = 0; tile < TILES; tile += 2) {
            unsigned columns[4];
            load_matrices(columns, b_at + (tile * 8 * ROW_LENGTH + inner * 16) * 2);
            multiply(c[tile], rows, columns[0], columns[1]);
            multiply(c[tile + 1], rows, columns[2], columns[3]);
        }
    }
}

// sum[16, HEAD_DIM] += weights[16, COLUMNS] · b[COLUMNS, HEAD_DIM]; the weights of one warp are in its
// registers as `product_of_rows` left them, and are rounded here.
__device__ __forceinline__ void add_product(float (&sum)[CHUNKS][4], const float (&weights)[TILES][4],
                                            const element *b) {
    int lane = threadIdx.x % WARP;
    unsigned b_at = address(b + (lane & 15) * ROW_LENGTH + ((lane >> 4) << 3));
#pragma unroll
    for (int inner = 0; inner < COLUMNS / 16; inner++) {
        const float(&left)[4] = weights[2 * inner], (&right)[4] = weights[2 * inner + 1];
        unsigned rows[4] = {packed(left[0], left[1]), packed(left[2], left[3]), packed(right[0], right[1]),
                            packed(right[2], right[3])};
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
            unsigned columns[4];
            load_matrices_transposed(columns, b_at + (inner * 16 * ROW_LENGTH + chunk * 8) * 2);
            multiply(sum[chunk], rows, columns[0], columns[1]);
            multiply(sum[chunk + 1], rows, columns[2], columns[3]);
        }
    }
}

// Writes the sums of one warp, row `first` and on, each multiplied by its row's factor.
__device__ __forceinline__ void write_rows(element *to, long long stride, int first, int seq, int head_dim,
                                           const float (&sum)[CHUNKS][4], float upper, float lower) {
    int lane = threadIdx.x % WARP;
    int row = first + (lane >> 2), column = (lane & 3) * 2;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        if (chunk * 8 >= head_dim) continue;
        element *at = to + row * stride + chunk * 8 + column;
        if (row < seq) *(unsigned *)at = packed(sum[chunk][0] * upper, sum[chunk][1] * upper);
        if (row + 8 < seq) *(unsigned *)(at + 8 * stride) = packed(sum[chunk][2] * lower, sum[chunk][3] * lower);
    }
}

// The score that the softmax sees, times log2(e); `slope` becomes its derivative by the plain product.
__device__ __forceinline__ float score_of(float product, float scale, float cap, float &slope) {
#if CAPPED
    float bounded = tanhf(product * scale / cap);
    slope = scale * (1.0f - bounded * bounded);
    return cap * LOG2_E * bounded;
#else
    slope = scale;
    return product * (scale * LOG2_E);
#endif
}

// The smallest first and the largest end over the rows of a block; an empty row has no part.
__device__ __forceinline__ void joined_range(int (&range)[2], const int (&first)[2], const int (&end)[2]) {
    if (threadIdx.x == 0) range[0] = 0x7fffffff, range[1] = 0;
    __syncthreads();
    for (int i = 0; i < 2; i++)
        if (threadIdx.x % 4 == 0 && first[i] < end[i]) {
            atomicMin(&range[0], first[i]);
            atomicMax(&range[1], end[i]);
        }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(FORWARD_WARPS *WARP) attention_forward(Arguments arguments) {
    extern __shared__ __align__(16) unsigned char memory[];
    constexpr int THREADS = FORWARD_WARPS * WARP;
    element *queries = (element *)memory;
    element *keys = queries + FORWARD_ROWS * ROW_LENGTH;
    element *values = keys + 2 * COLUMNS * ROW_LENGTH;
    __shared__ int range[2];

    // Under a causal mask the last rows have the most to do: they come first.
    int first = (gridDim.x - 1 - blockIdx.x) * FORWARD_ROWS, head = blockIdx.y, batch = blockIdx.z;
    int seq = arguments.seq, head_dim = arguments.head_dim;
    int kv_head = head / (arguments.heads / arguments.kv_heads);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Strides &qs = arguments.query_strides, &ks = arguments.key_strides, &vs = arguments.value_strides;
    const element *query = arguments.query + batch * qs.batch + head * qs.head;
    const element *key = arguments.key + batch * ks.batch + kv_head * ks.head;
    const element *value = arguments.value + batch * vs.batch + kv_head * vs.head;

    int rows[2] = {first + warp * 16 + (lane >> 2), first + warp * 16 + (lane >> 2) + 8};
    int key_first[2] = {0, 0}, key_end[2] = {0, 0};
    for (int i = 0; i < 2; i++)
        if (rows[i] < seq) {
            key_first[i] = arguments.key_first[batch * seq + rows[i]];
            key_end[i] = arguments.key_end[batch * seq + rows[i]];
        }
    joined_range(range, key_first, key_end);
    int begin = range[0], end = range[1];

    float sum[CHUNKS][4];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[chunk][i] = 0.0f;
    float largest[2] = {minus_infinity(), minus_infinity()}, total[2] = {0.0f, 0.0f};

    if (begin < end) {
        copy_rows<FORWARD_ROWS, THREADS>(queries, query, qs.seq, first, seq, head_dim);
        copy_rows<COLUMNS, THREADS>(keys, key, ks.seq, begin, seq, head_dim);
        copy_rows<COLUMNS, THREADS>(values, value, vs.seq, begin, seq, head_dim);
        close_copies();
    }
    int stage = 0;
    for (int start = begin; start < end; start += COLUMNS, stage ^= 1) {
        if (start + COLUMNS < end) {
            element *next_keys = keys + (stage ^ 1) * COLUMNS * ROW_LENGTH;
            element *next_values = values + (stage ^ 1) * COLUMNS * ROW_LENGTH;
            copy_rows<COLUMNS, THREADS>(next_keys, key, ks.seq, start + COLUMNS, seq, head_dim);
            copy_rows<COLUMNS, THREADS>(next_values, value, vs.seq, start + COLUMNS, seq, head_dim);
            close_copies();
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncthreads();
        float scores[TILES][4];
        product_of_rows(scores, queries + warp * 16 * ROW_LENGTH, keys + stage * COLUMNS * ROW_LENGTH);

        bool whole = start >= max(key_first[0], key_first[1]) && start + COLUMNS <= min(key_end[0], key_end[1]);
        whole = __all_sync(0xffffffff, whole);
        float now[2] = {largest[0], largest[1]};
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float slope;
                float score = score_of(scores[tile][i], arguments.scale, arguments.cap, slope);
                int at = start + tile * 8 + (lane & 3) * 2 + (i & 1);
                if (!whole && (at < key_first[i >> 1] || at >= key_end[i >> 1])) score = minus_infinity();
                scores[tile][i] = score;
                now[i >> 1] = fmaxf(now[i >> 1], score);
            }
        float shrink[2], base[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            now[i] = fmaxf(now[i], __shfl_xor_sync(0xffffffff, now[i], 1));
            now[i] = fmaxf(now[i], __shfl_xor_sync(0xffffffff, now[i], 2));
            // Nothing seen yet: any base gives zeros.
            base[i] = now[i] == minus_infinity() ? 0.0f : now[i];
            shrink[i] = power_of_two(largest[i] - base[i]);
            largest[i] = now[i];
            total[i] *= shrink[i];
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[tile][i] = power_of_two(scores[tile][i] - base[i >> 1]);
                total[i >> 1] += scores[tile][i];
            }
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[chunk][i] *= shrink[i >> 1];
        add_product(sum, scores, values + stage * COLUMNS * ROW_LENGTH);
        __syncthreads();
    }

    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i] += __shfl_xor_sync(0xffffffff, total[i], 1);
        total[i] += __shfl_xor_sync(0xffffffff, total[i], 2);
        factor[i] = total[i] > 0.0f ? 1.0f / total[i] : 0.0f;
        if ((lane & 3) == 0 && rows[i] < seq) {
            float sums = total[i] > 0.0f ? largest[i] + log2f(total[i]) : 0.0f;
            arguments.sums[((long long)batch * arguments.heads + head) * seq + rows[i]] = sums;
        }
    }
    const Strides &os = arguments.output_strides;
    write_rows(arguments.output + batch * os.batch + head * os.head, os.seq, first + warp * 16, seq, head_dim, sum,
               factor[0], factor[1]);
}

// One warp a row: the product of output and gradient.
extern "C" __global__ void attention_deltas(Arguments arguments) {
    int seq = arguments.seq, head = blockIdx.y, batch = blockIdx.z;
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= seq) return;
    const Strides &os = arguments.output_strides;
    long long at = batch * os.batch + head * os.head + row * os.seq;
    float sum = 0.0f;
    for (int column = lane; column < arguments.head_dim; column += WARP)
        sum += widened(arguments.output[at + column]) * widened(arguments.output_gradient[at + column]);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (lane == 0) arguments.deltas[((long long)batch * arguments.heads + head) * seq + row] = sum;
}

extern "C" __global__ void __launch_bounds__(BACKWARD_WARPS *WARP) attention_query_gradient(Arguments arguments) {
    extern __shared__ __align__(16) unsigned char memory[];
    constexpr int THREADS = BACKWARD_WARPS * WARP;
    element *queries = (element *)memory;
    element *gradients = queries + BACKWARD_ROWS * ROW_LENGTH;
    element *keys = gradients + BACKWARD_ROWS * ROW_LENGTH;
    element *values = keys + COLUMNS * ROW_LENGTH;
    __shared__ int range[2];

    int first = (gridDim.x - 1 - blockIdx.x) * BACKWARD_ROWS, head = blockIdx.y, batch = blockIdx.z;
    int seq = arguments.seq, head_dim = arguments.head_dim;
    int kv_head = head / (arguments.heads / arguments.kv_heads);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Strides &qs = arguments.query_strides, &ks = arguments.key_strides, &vs = arguments.value_strides;
    const Strides &os = arguments.output_strides;
    const element *query = arguments.query + batch * qs.batch + head * qs.head;
    const element *gradient = arguments.output_gradient + batch * os.batch + head * os.head;
    const element *key = arguments.key + batch * ks.batch + kv_head * ks.head;
    const element *value = arguments.value + batch * vs.batch + kv_head * vs.head;

    int rows[2] = {first + warp * 16 + (lane >> 2), first + warp * 16 + (lane >> 2) + 8};
    int key_first[2] = {0, 0}, key_end[2] = {0, 0};
    float sums[2] = {0.0f, 0.0f}, deltas[2] = {0.0f, 0.0f};
    for (int i = 0; i < 2; i++)
        if (rows[i] < seq) {
            key_first[i] = arguments.key_first[batch * seq + rows[i]];
            key_end[i] = arguments.key_end[batch * seq + rows[i]];
            long long at = ((long long)batch * arguments.heads + head) * seq + rows[i];
            sums[i] = arguments.sums[at];
            deltas[i] = arguments.deltas[at];
        }
    joined_range(range, key_first, key_end);
    int begin = range[0], end = range[1];

    float sum[CHUNKS][4];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[chunk][i] = 0.0f;
    if (begin < end) {
        copy_rows<BACKWARD_ROWS, THREADS>(queries, query, qs.seq, first, seq, head_dim);
        copy_rows<BACKWARD_ROWS, THREADS>(gradients, gradient, os.seq, first, seq, head_dim);
    }
    for (int start = begin; start < end; start += COLUMNS) {
        copy_rows<COLUMNS, THREADS>(keys, key, ks.seq, start, seq, head_dim);
        copy_rows<COLUMNS, THREADS>(values, value, vs.seq, start, seq, head_dim);
        close_copies();
        wait_for_copies<0>();
        __syncthreads();
        float scores[TILES][4], changes[TILES][4];
        product_of_rows(scores, queries + warp * 16 * ROW_LENGTH, keys);
        product_of_rows(changes, gradients + warp * 16 * ROW_LENGTH, values);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float slope;
                float score = score_of(scores[tile][i], arguments.scale, arguments.cap, slope);
                int at = start + tile * 8 + (lane & 3) * 2 + (i & 1);
                bool seen = at >= key_first[i >> 1] && at < key_end[i >> 1];
                float weight = seen ? power_of_two(score - sums[i >> 1]) : 0.0f;
                changes[tile][i] = weight * (changes[tile][i] - deltas[i >> 1]) * slope;
            }
        add_product(sum, changes, keys);
        __syncthreads();
    }
    const Strides &gs = arguments.query_gradient_strides;
    write_rows(arguments.query_gradient + batch * gs.batch + head * gs.head, gs.seq, first + warp * 16, seq, head_dim,
               sum, 1.0f, 1.0f);
}

extern "C" __global__ void __launch_bounds__(BACKWARD_WARPS *WARP) attention_key_value_gradient(Arguments arguments) {
    extern __shared__ __align__(16) unsigned char memory[];
    constexpr int THREADS = BACKWARD_WARPS * WARP;
    element *keys = (element *)memory;
    element *values = keys + BACKWARD_ROWS * ROW_LENGTH;
    element *queries = values + BACKWARD_ROWS * ROW_LENGTH;
    element *gradients = queries + COLUMNS * ROW_LENGTH;
    __shared__ int range[2];
    __shared__ float sums[COLUMNS], deltas[COLUMNS];

    int first = blockIdx.x * BACKWARD_ROWS, kv_head = blockIdx.y, batch = blockIdx.z;
    int seq = arguments.seq, head_dim = arguments.head_dim, group = arguments.heads / arguments.kv_heads;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Strides &qs = arguments.query_strides, &ks = arguments.key_strides, &vs = arguments.value_strides;
    const Strides &os = arguments.output_strides;

    int rows[2] = {first + warp * 16 + (lane >> 2), first + warp * 16 + (lane >> 2) + 8};
    int query_first[2] = {0, 0}, query_end[2] = {0, 0};
    for (int i = 0; i < 2; i++)
        if (rows[i] < seq) {
            query_first[i] = arguments.query_first[batch * seq + rows[i]];
            query_end[i] = arguments.query_end[batch * seq + rows[i]];
        }
    joined_range(range, query_first, query_end);
    int begin = range[0], end = range[1];

    float key_sum[CHUNKS][4], value_sum[CHUNKS][4];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
        for (int i = 0; i < 4; i++) key_sum[chunk][i] = value_sum[chunk][i] = 0.0f;
    if (begin < end) {
        const element *key = arguments.key + batch * ks.batch + kv_head * ks.head;
        const element *value = arguments.value + batch * vs.batch + kv_head * vs.head;
        copy_rows<BACKWARD_ROWS, THREADS>(keys, key, ks.seq, first, seq, head_dim);
        copy_rows<BACKWARD_ROWS, THREADS>(values, value, vs.seq, first, seq, head_dim);
    }
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const element *query = arguments.query + batch * qs.batch + head * qs.head;
        const element *gradient = arguments.output_gradient + batch * os.batch + head * os.head;
        long long statistics = ((long long)batch * arguments.heads + head) * seq;
        for (int start = begin; start < end; start += COLUMNS) {
            copy_rows<COLUMNS, THREADS>(queries, query, qs.seq, start, seq, head_dim);
            copy_rows<COLUMNS, THREADS>(gradients, gradient, os.seq, start, seq, head_dim);
            close_copies();
            for (int index = threadIdx.x; index < COLUMNS; index += THREADS) {
                bool there = start + index < seq;
                sums[index] = there ? arguments.sums[statistics + start + index] : 0.0f;
                deltas[index] = there ? arguments.deltas[statistics + start + index] : 0.0f;
            }
            wait_for_copies<0>();
            __syncthreads();
            float weights[TILES][4], changes[TILES][4], slopes[TILES][4];
            product_of_rows(weights, keys + warp * 16 * ROW_LENGTH, queries);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float score = score_of(weights[tile][i], arguments.scale, arguments.cap, slopes[tile][i]);
                    int column = tile * 8 + (lane & 3) * 2 + (i & 1), at = start + column;
                    bool seen = at >= query_first[i >> 1] && at < query_end[i >> 1];
                    weights[tile][i] = seen ? power_of_two(score - sums[column]) : 0.0f;
                }
            add_product(value_sum, weights, gradients);
            product_of_rows(changes, values + warp * 16 * ROW_LENGTH, gradients);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int column = tile * 8 + (lane & 3) * 2 + (i & 1);
                    changes[tile][i] = weights[tile][i] * (changes[tile][i] - deltas[column]) * slopes[tile][i];
                }
            add_product(key_sum, changes, queries);
            __syncthreads();
        }
    }
    const Strides &gs = arguments.key_gradient_strides;
    long long to = batch * gs.batch + kv_head * gs.head;
    write_rows(arguments.key_gradient + to, gs.seq, first + warp * 16, seq, head_dim, key_sum, 1.0f, 1.0f);
    write_rows(arguments.value_gradient + to, gs.seq, first + warp * 16, seq, head_dim, value_sum, 1.0f, 1.0f);
}

#define BOUND_THREADS 1024

// The place where each token's run of equal numbers begins and ends, and from that what it sees and
// what sees it; one block a row of the batch. `window` is 0 where there is none.
extern "C" __global__ void __launch_bounds__(BOUND_THREADS)
    attention_bounds(Arguments arguments, const int *segments, long long stride, int causal, int window) {
    __shared__ int last[BOUND_THREADS], next[BOUND_THREADS];
    int seq = arguments.seq, thread = threadIdx.x;
    const int *row = segments + blockIdx.x * stride;
    long long offset = (long long)blockIdx.x * seq;
    int share = (seq + BOUND_THREADS - 1) / BOUND_THREADS;
    int begin = min(thread * share, seq), end = min(begin + share, seq);

    int newest = -1, oldest = seq;
    for (int i = begin; i < end; i++)
        if (i == 0 || row[i] != row[i - 1]) {
            newest = i;
            if (oldest == seq) oldest = i;
        }
    last[thread] = newest;
    next[thread] = oldest;
    __syncthreads();
    for (int step = 1; step < BOUND_THREADS; step *= 2) {
        int before = thread >= step ? last[thread - step] : -1;
        int after = thread + step < BOUND_THREADS ? next[thread + step] : seq;
        __syncthreads();
        last[thread] = max(last[thread], before);
        next[thread] = min(next[thread], after);
        __syncthreads();
    }
    int start = thread > 0 ? last[thread - 1] : 0;
    for (int i = begin; i < end; i++) {
        if (i == 0 || row[i] != row[i - 1]) start = i;
        arguments.key_first[offset + i] = start;
    }
    int stop = thread + 1 < BOUND_THREADS ? next[thread + 1] : seq;
    for (int i = end - 1; i >= begin; i--) {
        int from = arguments.key_first[offset + i], to = stop;
        if (i == 0 || row[i] != row[i - 1]) stop = i;
        int left = window > 0 ? max(from, i - window + 1) : from;
        int right = window > 0 ? min(to, i + window) : to;
        bool there = row[i] > 0;
        arguments.key_first[offset + i] = there ? left : 0;
        arguments.key_end[offset + i] = there ? (causal ? i + 1 : right) : 0;
        arguments.query_first[offset + i] = there ? (causal ? i : left) : 0;
        arguments.query_end[offset + i] = there ? right : 0;
    }
}
