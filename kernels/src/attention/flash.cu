// Attention in tiles on tensor cores, forward and backward (Dao 2023, FlashAttention-2): scores are
// never stored, the backward pass computes them again from the logarithm of each row's sum.
//
// Compiled at run time after `primitives.cu`, with HEAD_DIM (a multiple of 16; shorter heads are padded
// with zeros), WARPS (of a block, 16 rows each), COLUMNS (rows of the other side that a block holds at a
// time, a multiple of 16), HALF (0: bf16, 1: f16) and CAPPED (scores are bounded). A query sees the keys
// from `key_first` up to `key_end`, which is all there is to causality, windows and packed segments;
// padding sees nothing.
//
// dK and dV are summed by one block each, dQ by a kernel of its own: no atomic additions, so the same
// inputs give the same bits.

#define ROWS (WARPS * 16)
#define THREADS (WARPS * WARP)
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
template <int COUNT>
__device__ __forceinline__ void copy_rows(element *tile, const element *from, long long stride, int first,
                                          int seq, int head_dim) {
    for (int index = threadIdx.x; index < COUNT * CHUNKS; index += THREADS) {
        int row = index / CHUNKS, column = index % CHUNKS * 8;
        bool there = first + row < seq && column < head_dim;
        const element *source = there ? from + (first + row) * stride + column : from;
        copy_16_bytes(address(tile + row * ROW_LENGTH + column), source, there);
    }
}

template <int TALL, int COUNT> __device__ __forceinline__ void clear(float (&sums)[TALL][COUNT][4]) {
#pragma unroll
    for (int tall = 0; tall < TALL; tall++)
#pragma unroll
        for (int at = 0; at < COUNT; at++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[tall][at][i] = 0.0f;
}

// c[16 · TALL, 8 · TILES] = a[16 · TALL, HEAD_DIM] · b[8 · TILES, HEAD_DIM]ᵀ, both in shared memory; one
// warp, which reads b once for all its rows.
template <int TALL, int TILES>
__device__ __forceinline__ void product_of_rows(float (&c)[TALL][TILES][4], const element *a, const element *b) {
    int lane = threadIdx.x % WARP;
    unsigned a_at = address(a + (lane & 15) * ROW_LENGTH + (lane >> 4) * 8);
    unsigned b_at = address(b + ((lane & 7) + ((lane >> 4) << 3)) * ROW_LENGTH + ((lane >> 3) & 1) * 8);
    clear(c);
#pragma unroll
    for (int inner = 0; inner < HEAD_DIM / 16; inner++) {
        unsigned rows[TALL][4];
#pragma unroll
        for (int tall = 0; tall < TALL; tall++)
            load_matrices(rows[tall], a_at + (tall * 16 * ROW_LENGTH + inner * 16) * 2);
#pragma unroll
        for (int tile = 0; tile < TILES; tile += 2) {
            unsigned columns[4];
            load_matrices(columns, b_at + (tile * 8 * ROW_LENGTH + inner * 16) * 2);
#pragma unroll
            for (int tall = 0; tall < TALL; tall++) {
                multiply(c[tall][tile], rows[tall], columns[0], columns[1]);
                multiply(c[tall][tile + 1], rows[tall], columns[2], columns[3]);
            }
        }
    }
}

// sum[16 · TALL, HEAD_DIM] += weights[16 · TALL, 8 · TILES] · b[8 · TILES, HEAD_DIM]; the weights of one
// warp are in its registers as `product_of_rows` left them, and are rounded here.
template <int TALL, int TILES>
__device__ __forceinline__ void add_product(float (&sum)[TALL][CHUNKS][4], const float (&weights)[TALL][TILES][4],
                                            const element *b) {
    int lane = threadIdx.x % WARP;
    unsigned b_at = address(b + (lane & 15) * ROW_LENGTH + ((lane >> 4) << 3));
#pragma unroll
    for (int inner = 0; inner < TILES / 2; inner++) {
        unsigned rows[TALL][4];
#pragma unroll
        for (int tall = 0; tall < TALL; tall++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *pair = &weights[tall][2 * inner + i / 2][i % 2 * 2];
                rows[tall][i] = packed(pair[0], pair[1]);
            }
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
            unsigned columns[4];
            load_matrices_transposed(columns, b_at + (inner * 16 * ROW_LENGTH + chunk * 8) * 2);
#pragma unroll
            for (int tall = 0; tall < TALL; tall++) {
                multiply(sum[tall][chunk], rows[tall], columns[0], columns[1]);
                multiply(sum[tall][chunk + 1], rows[tall], columns[2], columns[3]);
            }
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

// From the smallest first to the largest end over the rows of a warp, and of the block; an empty row has
// no part.
struct Range {
    int begin, end;

    // Whether some row of the warp sees one of `count` places from `start` on. Where none does, the warp has
    // nothing to do: rows of other patients, and what comes later.
    __device__ __forceinline__ bool meets(int start, int count) const { return start < end && start + count > begin; }
};

template <int COUNT>
__device__ __forceinline__ Range joined_range(int (&range)[2], const int (&first)[COUNT], const int (&end)[COUNT]) {
    if (threadIdx.x == 0) range[0] = 0x7fffffff, range[1] = 0;
    __syncthreads();
    Range mine = {0x7fffffff, 0};
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (first[i] < end[i]) {
            mine.begin = min(mine.begin, first[i]);
            mine.end = max(mine.end, end[i]);
        }
    for (int step = 16; step > 0; step /= 2) {
        mine.begin = min(mine.begin, __shfl_xor_sync(0xffffffff, mine.begin, step));
        mine.end = max(mine.end, __shfl_xor_sync(0xffffffff, mine.end, step));
    }
    if (threadIdx.x % WARP == 0) {
        atomicMin(&range[0], mine.begin);
        atomicMax(&range[1], mine.end);
    }
    __syncthreads();
    return mine;
}

// A warp has TALL times 16 rows.
template <int TALL> __device__ __forceinline__ void forward(const Arguments &arguments) {
    constexpr int TILES = COLUMNS / 8;
    extern __shared__ __align__(16) unsigned char memory[];
    element *queries = (element *)memory;
    element *keys = queries + ROWS * TALL * ROW_LENGTH;
    element *values = keys + 2 * COLUMNS * ROW_LENGTH;
    __shared__ int range[2];

    // Under a causal mask the last rows have the most to do: they come first.
    int first = (gridDim.x - 1 - blockIdx.x) * ROWS * TALL, head = blockIdx.y, batch = blockIdx.z;
    int seq = arguments.seq, head_dim = arguments.head_dim;
    int kv_head = head / (arguments.heads / arguments.kv_heads);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Strides &qs = arguments.query_strides, &ks = arguments.key_strides, &vs = arguments.value_strides;
    const element *query = arguments.query + batch * qs.batch + head * qs.head;
    const element *key = arguments.key + batch * ks.batch + kv_head * ks.head;
    const element *value = arguments.value + batch * vs.batch + kv_head * vs.head;

    // A thread holds two rows of every 16, eight apart.
    int first_row = first + warp * 16 * TALL + (lane >> 2);
    int key_first[2 * TALL], key_end[2 * TALL], earliest = 0, latest = 0x7fffffff;
#pragma unroll
    for (int i = 0; i < 2 * TALL; i++) {
        bool there = first_row + 8 * i < seq;
        key_first[i] = there ? arguments.key_first[batch * seq + first_row + 8 * i] : 0;
        key_end[i] = there ? arguments.key_end[batch * seq + first_row + 8 * i] : 0;
        earliest = max(earliest, key_first[i]);
        latest = min(latest, key_end[i]);
    }
    Range mine = joined_range(range, key_first, key_end);
    // At a multiple of COLUMNS, so that a row is added up in the same order whatever rows are beside it.
    int begin = range[0] / COLUMNS * COLUMNS, end = range[1];

    float sum[TALL][CHUNKS][4], largest[2 * TALL], total[2 * TALL];
    clear(sum);
#pragma unroll
    for (int i = 0; i < 2 * TALL; i++) largest[i] = minus_infinity(), total[i] = 0.0f;

    if (begin < end) {
        copy_rows<ROWS * TALL>(queries, query, qs.seq, first, seq, head_dim);
        copy_rows<COLUMNS>(keys, key, ks.seq, begin, seq, head_dim);
        copy_rows<COLUMNS>(values, value, vs.seq, begin, seq, head_dim);
        close_copies();
    }
    int stage = 0;
    for (int start = begin; start < end; start += COLUMNS, stage ^= 1) {
        if (start + COLUMNS < end) {
            element *next_keys = keys + (stage ^ 1) * COLUMNS * ROW_LENGTH;
            element *next_values = values + (stage ^ 1) * COLUMNS * ROW_LENGTH;
            copy_rows<COLUMNS>(next_keys, key, ks.seq, start + COLUMNS, seq, head_dim);
            copy_rows<COLUMNS>(next_values, value, vs.seq, start + COLUMNS, seq, head_dim);
            close_copies();
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncthreads();
        if (mine.meets(start, COLUMNS)) {
            float scores[TALL][TILES][4];
            product_of_rows(scores, queries + warp * 16 * TALL * ROW_LENGTH, keys + stage * COLUMNS * ROW_LENGTH);

            bool whole = __all_sync(0xffffffff, start >= earliest && start + COLUMNS <= latest);
#pragma unroll
            for (int tall = 0; tall < TALL; tall++) {
                float now[2] = {largest[2 * tall], largest[2 * tall + 1]};
#pragma unroll
                for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float slope;
                        float score = score_of(scores[tall][tile][i], arguments.scale, arguments.cap, slope);
                        int at = start + tile * 8 + (lane & 3) * 2 + (i & 1), row = 2 * tall + (i >> 1);
                        if (!whole && (at < key_first[row] || at >= key_end[row])) score = minus_infinity();
                        scores[tall][tile][i] = score;
                        now[i >> 1] = fmaxf(now[i >> 1], score);
                    }
                float shrink[2], base[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int row = 2 * tall + i;
                    now[i] = fmaxf(now[i], __shfl_xor_sync(0xffffffff, now[i], 1));
                    now[i] = fmaxf(now[i], __shfl_xor_sync(0xffffffff, now[i], 2));
                    // Nothing seen yet: any base gives zeros.
                    base[i] = now[i] == minus_infinity() ? 0.0f : now[i];
                    shrink[i] = power_of_two(largest[row] - base[i]);
                    largest[row] = now[i];
                    total[row] *= shrink[i];
                }
#pragma unroll
                for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        scores[tall][tile][i] = power_of_two(scores[tall][tile][i] - base[i >> 1]);
                        total[2 * tall + (i >> 1)] += scores[tall][tile][i];
                    }
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[tall][chunk][i] *= shrink[i >> 1];
            }
            add_product(sum, scores, values + stage * COLUMNS * ROW_LENGTH);
        }
        __syncthreads();
    }

    const Strides &os = arguments.output_strides;
    element *output = arguments.output + batch * os.batch + head * os.head;
#pragma unroll
    for (int tall = 0; tall < TALL; tall++) {
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float all = total[2 * tall + i];
            all += __shfl_xor_sync(0xffffffff, all, 1);
            all += __shfl_xor_sync(0xffffffff, all, 2);
            factor[i] = all > 0.0f ? 1.0f / all : 0.0f;
            int row = first_row + 16 * tall + 8 * i;
            if ((lane & 3) == 0 && row < seq) {
                float sums = all > 0.0f ? largest[2 * tall + i] + log2f(all) : 0.0f;
                arguments.sums[((long long)batch * arguments.heads + head) * seq + row] = sums;
            }
        }
        int first_of_16 = first + (warp * TALL + tall) * 16;
        write_rows(output, os.seq, first_of_16, seq, head_dim, sum[tall], factor[0], factor[1]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_forward(Arguments arguments) { forward<1>(arguments); }

// The same to the bit. Keys and values are read from shared memory half as often, which is what the
// forward pass waits for, but there are half as many blocks, and registers for no more than this.
#if HEAD_DIM <= 128 && !CAPPED
extern "C" __global__ void __launch_bounds__(THREADS) attention_forward_tall(Arguments arguments) {
    forward<2>(arguments);
}
#endif

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

// A warp has TALL times 16 rows, and a block WIDTH keys and values at a time.
template <int TALL, int WIDTH> __device__ __forceinline__ void query_gradient(const Arguments &arguments) {
    constexpr int TILES = WIDTH / 8;
    extern __shared__ __align__(16) unsigned char memory[];
    element *queries = (element *)memory;
    element *gradients = queries + ROWS * TALL * ROW_LENGTH;
    element *keys = gradients + ROWS * TALL * ROW_LENGTH;
    element *values = keys + WIDTH * ROW_LENGTH;
    __shared__ int range[2];

    int first = (gridDim.x - 1 - blockIdx.x) * ROWS * TALL, head = blockIdx.y, batch = blockIdx.z;
    int seq = arguments.seq, head_dim = arguments.head_dim;
    int kv_head = head / (arguments.heads / arguments.kv_heads);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Strides &qs = arguments.query_strides, &ks = arguments.key_strides, &vs = arguments.value_strides;
    const Strides &os = arguments.output_strides;
    const element *query = arguments.query + batch * qs.batch + head * qs.head;
    const element *gradient = arguments.output_gradient + batch * os.batch + head * os.head;
    const element *key = arguments.key + batch * ks.batch + kv_head * ks.head;
    const element *value = arguments.value + batch * vs.batch + kv_head * vs.head;

    int first_row = first + warp * 16 * TALL + (lane >> 2);
    int key_first[2 * TALL], key_end[2 * TALL];
    float sums[2 * TALL], deltas[2 * TALL];
#pragma unroll
    for (int i = 0; i < 2 * TALL; i++) {
        int row = first_row + 8 * i;
        bool there = row < seq;
        long long at = ((long long)batch * arguments.heads + head) * seq + row;
        key_first[i] = there ? arguments.key_first[batch * seq + row] : 0;
        key_end[i] = there ? arguments.key_end[batch * seq + row] : 0;
        sums[i] = there ? arguments.sums[at] : 0.0f;
        deltas[i] = there ? arguments.deltas[at] : 0.0f;
    }
    Range mine = joined_range(range, key_first, key_end);
    // As in the forward pass.
    int begin = range[0] / COLUMNS * COLUMNS, end = range[1];

    float sum[TALL][CHUNKS][4];
    clear(sum);
    if (begin < end) {
        copy_rows<ROWS * TALL>(queries, query, qs.seq, first, seq, head_dim);
        copy_rows<ROWS * TALL>(gradients, gradient, os.seq, first, seq, head_dim);
    }
    for (int start = begin; start < end; start += WIDTH) {
        copy_rows<WIDTH>(keys, key, ks.seq, start, seq, head_dim);
        copy_rows<WIDTH>(values, value, vs.seq, start, seq, head_dim);
        close_copies();
        wait_for_copies<0>();
        __syncthreads();
        if (mine.meets(start, WIDTH)) {
            float scores[TALL][TILES][4], changes[TALL][TILES][4];
            product_of_rows(scores, queries + warp * 16 * TALL * ROW_LENGTH, keys);
            product_of_rows(changes, gradients + warp * 16 * TALL * ROW_LENGTH, values);
#pragma unroll
            for (int tall = 0; tall < TALL; tall++)
#pragma unroll
                for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float slope;
                        float score = score_of(scores[tall][tile][i], arguments.scale, arguments.cap, slope);
                        int at = start + tile * 8 + (lane & 3) * 2 + (i & 1), row = 2 * tall + (i >> 1);
                        bool seen = at >= key_first[row] && at < key_end[row];
                        float weight = seen ? power_of_two(score - sums[row]) : 0.0f;
                        changes[tall][tile][i] = weight * (changes[tall][tile][i] - deltas[row]) * slope;
                    }
            add_product(sum, changes, keys);
        }
        __syncthreads();
    }
    const Strides &gs = arguments.query_gradient_strides;
    element *to = arguments.query_gradient + batch * gs.batch + head * gs.head;
#pragma unroll
    for (int tall = 0; tall < TALL; tall++)
        write_rows(to, gs.seq, first + (warp * TALL + tall) * 16, seq, head_dim, sum[tall], 1.0f, 1.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_query_gradient(Arguments arguments) {
    query_gradient<1, COLUMNS>(arguments);
}

#if HEAD_DIM <= 128 && !CAPPED
extern "C" __global__ void __launch_bounds__(THREADS) attention_query_gradient_tall(Arguments arguments) {
    query_gradient<2, COLUMNS / 2>(arguments);
}
#endif

// One block's rows of the gradients of KEYS, of VALUES, or of both.
template <bool KEYS, bool VALUES> __device__ __forceinline__ void key_value_gradient(const Arguments &arguments) {
    constexpr int TILES = COLUMNS / 8;
    extern __shared__ __align__(16) unsigned char memory[];
    element *keys = (element *)memory;
    element *values = keys + ROWS * ROW_LENGTH;
    element *queries = values + ROWS * ROW_LENGTH;
    element *gradients = queries + COLUMNS * ROW_LENGTH;
    __shared__ int range[2];
    __shared__ float sums[COLUMNS], deltas[COLUMNS];

    int first = blockIdx.x * ROWS, kv_head = blockIdx.y, batch = blockIdx.z;
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
    Range mine = joined_range(range, query_first, query_end);
    int begin = range[0], end = range[1];

    float key_sum[1][CHUNKS][4], value_sum[1][CHUNKS][4];
    clear(key_sum);
    clear(value_sum);
    if (begin < end) {
        const element *key = arguments.key + batch * ks.batch + kv_head * ks.head;
        const element *value = arguments.value + batch * vs.batch + kv_head * vs.head;
        copy_rows<ROWS>(keys, key, ks.seq, first, seq, head_dim);
        if (KEYS) copy_rows<ROWS>(values, value, vs.seq, first, seq, head_dim);
    }
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const element *query = arguments.query + batch * qs.batch + head * qs.head;
        const element *gradient = arguments.output_gradient + batch * os.batch + head * os.head;
        long long statistics = ((long long)batch * arguments.heads + head) * seq;
        for (int start = begin; start < end; start += COLUMNS) {
            copy_rows<COLUMNS>(queries, query, qs.seq, start, seq, head_dim);
            copy_rows<COLUMNS>(gradients, gradient, os.seq, start, seq, head_dim);
            close_copies();
            for (int index = threadIdx.x; index < COLUMNS; index += THREADS) {
                bool there = start + index < seq;
                sums[index] = there ? arguments.sums[statistics + start + index] : 0.0f;
                deltas[index] = there ? arguments.deltas[statistics + start + index] : 0.0f;
            }
            wait_for_copies<0>();
            __syncthreads();
            if (mine.meets(start, COLUMNS)) {
                float weights[1][TILES][4], changes[1][TILES][4], slopes[TILES][4];
                product_of_rows(weights, keys + warp * 16 * ROW_LENGTH, queries);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float score = score_of(weights[0][tile][i], arguments.scale, arguments.cap, slopes[tile][i]);
                        int column = tile * 8 + (lane & 3) * 2 + (i & 1), at = start + column;
                        bool seen = at >= query_first[i >> 1] && at < query_end[i >> 1];
                        weights[0][tile][i] = seen ? power_of_two(score - sums[column]) : 0.0f;
                    }
                if (VALUES) add_product(value_sum, weights, gradients);
                if (KEYS) {
                    product_of_rows(changes, values + warp * 16 * ROW_LENGTH, gradients);
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            int column = tile * 8 + (lane & 3) * 2 + (i & 1);
                            float change = changes[0][tile][i] - deltas[column];
                            changes[0][tile][i] = weights[0][tile][i] * change * slopes[tile][i];
                        }
                    add_product(key_sum, changes, queries);
                }
            }
            __syncthreads();
        }
    }
    const Strides &gs = arguments.key_gradient_strides;
    long long to = batch * gs.batch + kv_head * gs.head;
    if (KEYS) write_rows(arguments.key_gradient + to, gs.seq, first + warp * 16, seq, head_dim, key_sum[0], 1.0f, 1.0f);
    if (VALUES)
        write_rows(arguments.value_gradient + to, gs.seq, first + warp * 16, seq, head_dim, value_sum[0], 1.0f, 1.0f);
}

// A thread's registers hold one sum of a wide head's rows, not two: then the scores are computed twice.
extern "C" __global__ void __launch_bounds__(THREADS) attention_key_value_gradient(Arguments arguments) {
#if HEAD_DIM <= 128
    key_value_gradient<true, true>(arguments);
#else
    key_value_gradient<false, true>(arguments);
    __syncthreads();
    key_value_gradient<true, false>(arguments);
#endif
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
