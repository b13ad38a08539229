// Checks kernels/src/attention/flash.cu against plain sums in f64; see `run`.
#include "emulation.h"

#include FLASH

#include <random>

struct Case {
    int batch, seq, heads, kv_heads, head_dim, causal, window;
    float cap;
};

static std::vector<element> drawn(size_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<element> values(count);
    for (auto &value : values) value = narrowed(normal(random));
    return values;
}

static double worst(const char *name, const std::vector<element> &found, const std::vector<double> &expected) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        double delta = widened(found[i]) - expected[i];
        if (std::isnan(delta)) return INFINITY;
        difference += delta * delta;
        size += expected[i] * expected[i];
    }
    double relative = sqrt(difference / size);
    printf("  %s %.1e", name, relative);
    return relative;
}

static bool check(const Case &c) {
    size_t tokens = (size_t)c.batch * c.seq, wide = tokens * c.heads * c.head_dim, narrow = tokens * c.kv_heads * c.head_dim;
    auto query = drawn(wide, 1), key = drawn(narrow, 2), value = drawn(narrow, 3), gradient = drawn(wide, 4);
    std::vector<int> segments(tokens);
    for (int b = 0; b < c.batch; b++)
        for (int i = 0; i < c.seq; i++) segments[b * c.seq + i] = i >= c.seq - 3 - b ? 0 : 1 + (i > c.seq / 3) + (i > c.seq / 2 + b);
    // What no kernel writes would be seen.
    std::vector<element> output(wide, 0x7fff), dq(wide, 0x7fff), dk(narrow, 0x7fff), dv(narrow, 0x7fff);
    std::vector<float> sums(tokens * c.heads, NAN), deltas(tokens * c.heads, NAN);
    std::vector<int> bounds(4 * tokens, -1);
    Strides q = {(long long)c.seq * c.heads * c.head_dim, (long long)c.heads * c.head_dim, c.head_dim};
    Strides k = {(long long)c.seq * c.kv_heads * c.head_dim, (long long)c.kv_heads * c.head_dim, c.head_dim};
    float scale = 1 / sqrtf(c.head_dim);
    Arguments arguments = {query.data(), key.data(), value.data(), output.data(), sums.data(), bounds.data(),
                           bounds.data() + tokens, bounds.data() + 2 * tokens, bounds.data() + 3 * tokens,
                           gradient.data(), deltas.data(), dq.data(), dk.data(), dv.data(), q, k, k, q, q, k,
                           c.seq, c.heads, c.kv_heads, c.head_dim, scale, c.cap};
    auto tiles = [&](int rows) { return (unsigned)((c.seq + rows - 1) / rows); };
    unsigned heads = c.heads, kv_heads = c.kv_heads, batch = c.batch;
    using emulation::launch;
    launch({batch, 1, 1}, BOUND_THREADS, [&] { attention_bounds(arguments, segments.data(), c.seq, c.causal, c.window); });
    launch({tiles(ROWS), heads, batch}, THREADS, [&] { attention_forward(arguments); });
    launch({tiles(4), heads, batch}, 4 * WARP, [&] { attention_deltas(arguments); });
    launch({tiles(ROWS), heads, batch}, THREADS, [&] { attention_query_gradient(arguments); });
    launch({tiles(ROWS), kv_heads, batch}, THREADS, [&] { attention_key_value_gradient(arguments); });
    bool same = true;
#if HEAD_DIM <= 128 && !CAPPED
    std::vector<element> tall_output(wide, 0x7fff), tall_dq(wide, 0x7fff);
    std::vector<float> tall_sums(tokens * c.heads, NAN);
    Arguments tall = arguments;
    tall.output = tall_output.data(), tall.sums = tall_sums.data(), tall.query_gradient = tall_dq.data();
    launch({tiles(2 * ROWS), heads, batch}, THREADS, [&] { attention_forward_tall(tall); });
    launch({tiles(2 * ROWS), heads, batch}, THREADS, [&] { attention_query_gradient_tall(tall); });
    same = tall_output == output && tall_sums == sums && tall_dq == dq;
#endif

    std::vector<double> out(wide), eq(wide), ek(narrow), ev(narrow);
    for (int b = 0; b < c.batch; b++)
        for (int h = 0; h < c.heads; h++)
            for (int i = 0; i < c.seq; i++) {
                int g = h / (c.heads / c.kv_heads), mine = segments[b * c.seq + i];
                auto at = [&](int j, int d) { return ((size_t)(b * c.seq + j) * c.heads + h) * c.head_dim + d; };
                auto kat = [&](int j, int d) { return ((size_t)(b * c.seq + j) * c.kv_heads + g) * c.head_dim + d; };
                std::vector<double> weight(c.seq), slope(c.seq);
                double total = 0;
                for (int j = 0; j < c.seq; j++) {
                    bool seen = mine > 0 && segments[b * c.seq + j] == mine && (!c.causal || j <= i) &&
                                (!c.window || abs(i - j) < c.window);
                    if (!seen) continue;
                    double score = 0;
                    for (int d = 0; d < c.head_dim; d++) score += widened(query[at(i, d)]) * widened(key[kat(j, d)]);
                    score *= scale, slope[j] = scale;
                    if (CAPPED) {
                        double bounded = tanh(score / c.cap);
                        score = c.cap * bounded, slope[j] *= 1 - bounded * bounded;
                    }
                    total += weight[j] = exp(score);
                }
                double delta = 0;
                for (int d = 0; d < c.head_dim; d++) {
                    for (int j = 0; j < c.seq; j++)
                        if (weight[j] > 0) out[at(i, d)] += weight[j] / total * widened(value[kat(j, d)]);
                    delta += out[at(i, d)] * widened(gradient[at(i, d)]);
                }
                for (int j = 0; j < c.seq; j++) {
                    if (weight[j] == 0) continue;
                    double p = weight[j] / total, change = -delta;
                    for (int d = 0; d < c.head_dim; d++) {
                        ev[kat(j, d)] += p * widened(gradient[at(i, d)]);
                        change += widened(gradient[at(i, d)]) * widened(value[kat(j, d)]);
                    }
                    for (int d = 0; d < c.head_dim; d++) {
                        eq[at(i, d)] += p * change * slope[j] * widened(key[kat(j, d)]);
                        ek[kat(j, d)] += p * change * slope[j] * widened(query[at(i, d)]);
                    }
                }
            }
    printf("%d x %d, heads %d/%d of %d, causal %d, window %d, cap %.0f:", c.batch, c.seq, c.heads, c.kv_heads, c.head_dim,
           c.causal, c.window, c.cap);
    double most = worst("output", output, out);
    most = max(most, worst("query", dq, eq));
    most = max(most, worst("key", dk, ek));
    most = max(most, worst("value", dv, ev));
    printf("%s%s\n", most < 1e-2 ? "" : "  WRONG", same ? "" : "  DIFFERS IN TALL TILES");
    return most < 1e-2 && same;
}

int main() {
    float cap = CAPPED ? 2 : 0;
    Case cases[] = {
        {1, 64, 1, 1, HEAD_DIM, 0, 0, cap},      {2, 197, 4, 2, HEAD_DIM, 1, 0, cap},
        {2, 150, 2, 2, HEAD_DIM - 8, 0, 0, cap}, {1, 260, 3, 1, HEAD_DIM, 1, 50, cap},
        {1, 133, 2, 1, HEAD_DIM, 0, 17, cap},    {1, 30, 1, 1, HEAD_DIM, 1, 0, cap},
        {1, HEAD_DIM <= 64 ? 1500 : 330, 1, 1, HEAD_DIM, 1, 0, cap},
    };
    bool right = true;
    for (auto &c : cases) right &= check(c);
    return right ? 0 : 1;
}
