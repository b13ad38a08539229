// Runs a CUDA kernel on the CPU, one fiber a thread, to check its arithmetic and its indices without a
// GPU. Takes the place of `kernels/src/cuda/primitives.cu`: what PTX does there is written out here
// from the PTX manual's tables of matrix fragments. Races are not found: fibers take turns.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <setjmp.h>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes)
#define __shared__ static

typedef unsigned short element;
#define WARP 32

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;
static unsigned char memory[256 << 10];

using std::max;
using std::min;

namespace emulation {
struct Warp {
    int arrived = 0;
    unsigned turn = 0;
    void *given[WARP];
};
struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool started = false, done = false;
};
#define STACK_BYTES (128 << 10)
static jmp_buf scheduler;
static std::vector<Fiber> fibers;
// Kept from block to block: a new one's pages would cost more than what runs on it.
static std::vector<std::unique_ptr<char[]>> stacks;
static std::vector<Warp> warps;
static int arrived, current;
static unsigned turn;

// By jumps, since `swapcontext` asks the system about signals each time.
static void yield() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) static void resume() {
    if (_setjmp(scheduler)) return;
    Fiber &fiber = fibers[current];
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

// All lanes of a warp hand in a pointer; the last one to come does the work for all.
static void together(void *mine, const std::function<void(void **)> &work) {
    Warp &warp = warps[threadIdx.x / WARP];
    warp.given[threadIdx.x % WARP] = mine;
    if (++warp.arrived == WARP) {
        work(warp.given);
        warp.arrived = 0;
        warp.turn++;
        return;
    }
    unsigned now = warp.turn;
    while (warp.turn == now) yield();
}

static std::function<void()> body;
static void enter() {
    body();
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

static void launch(Index grid, unsigned threads, std::function<void()> kernel) {
    gridDim = grid;
    blockDim = {threads, 1, 1};
    body = kernel;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                // What a block finds in shared memory is not zero.
                memset(memory, 0xff, sizeof memory);
                fibers.clear();
                fibers.resize(threads);
                warps.assign((threads + WARP - 1) / WARP, Warp());
                arrived = 0;
                while (stacks.size() < threads) stacks.emplace_back(new char[STACK_BYTES]);
                for (unsigned thread = 0; thread < threads; thread++) {
                    ucontext_t &context = fibers[thread].context;
                    getcontext(&context);
                    context.uc_stack = {stacks[thread].get(), 0, STACK_BYTES};
                    makecontext(&context, enter, 0);
                }
                for (bool running = true; running;) {
                    running = false;
                    for (current = 0; current < (int)threads; current++) {
                        if (fibers[current].done) continue;
                        running = true;
                        threadIdx = {(unsigned)current, 0, 0};
                        resume();
                    }
                }
            }
}
} // namespace emulation

static void __syncthreads() {
    using namespace emulation;
    if (++arrived == (int)blockDim.x) {
        arrived = 0;
        turn++;
        return;
    }
    unsigned now = turn;
    while (turn == now) yield();
}

template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
    T copy = value, result;
    struct Slot {
        T in, out;
    } slot = {copy, copy};
    emulation::together(&slot, [mask](void **all) {
        for (int lane = 0; lane < WARP; lane++) ((Slot *)all[lane])->out = ((Slot *)all[lane ^ mask])->in;
    });
    result = slot.out;
    return result;
}

static bool __all_sync(unsigned, bool value) {
    emulation::together(&value, [](void **all) {
        bool every = true;
        for (int lane = 0; lane < WARP; lane++) every &= *(bool *)all[lane];
        for (int lane = 0; lane < WARP; lane++) *(bool *)all[lane] = every;
    });
    return value;
}

static void atomicMin(int *at, int value) { *at = min(*at, value); }
static void atomicMax(int *at, int value) { *at = max(*at, value); }

static float minus_infinity() { return -INFINITY; }
static float power_of_two(float x) { return exp2f(x); }

static element narrowed(float x) {
#if HALF
    _Float16 half = (_Float16)x;
    element bits;
    memcpy(&bits, &half, 2);
    return bits;
#else
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#endif
}

static float widened(element x) {
#if HALF
    _Float16 half;
    memcpy(&half, &x, 2);
    return (float)half;
#else
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
#endif
}

static unsigned packed(float low, float high) { return narrowed(low) | (unsigned)narrowed(high) << 16; }

static unsigned address(const void *pointer) {
    long offset = (const unsigned char *)pointer - memory;
    if (offset < 0 || offset >= (long)sizeof memory) {
        fprintf(stderr, "not in shared memory\n");
        abort();
    }
    return (unsigned)offset;
}

static void load(unsigned (&r)[4], unsigned from, bool transposed) {
    struct Slot {
        unsigned *r, from;
    } slot = {r, from};
    emulation::together(&slot, [transposed](void **all) {
        for (int matrix = 0; matrix < 4; matrix++)
            for (int lane = 0; lane < WARP; lane++) {
                element pair[2];
                for (int i = 0; i < 2; i++) {
                    int row = lane / 4, column = lane % 4 * 2 + i;
                    if (transposed) std::swap(row, column);
                    unsigned start = ((Slot *)all[matrix * 8 + row])->from;
                    if (start % 16) abort();
                    memcpy(&pair[i], memory + start + column * 2, 2);
                }
                ((Slot *)all[lane])->r[matrix] = pair[0] | (unsigned)pair[1] << 16;
            }
    });
}
static void load_matrices(unsigned (&r)[4], unsigned from) { load(r, from, false); }
static void load_matrices_transposed(unsigned (&r)[4], unsigned from) { load(r, from, true); }

static void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Slot {
        float *c;
        const unsigned *a;
        unsigned b[2];
    } slot = {c, a, {b0, b1}};
    emulation::together(&slot, [](void **all) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < WARP; lane++) {
            Slot *slot = (Slot *)all[lane];
            int group = lane / 4, pair = lane % 4 * 2;
            for (int i = 0; i < 8; i++)
                left[group + (i / 2 % 2) * 8][pair + i % 2 + i / 4 * 8] = widened(slot->a[i / 2] >> (i % 2 * 16));
            for (int i = 0; i < 4; i++) right[pair + i % 2 + i / 2 * 8][group] = widened(slot->b[i / 2] >> (i % 2 * 16));
        }
        for (int lane = 0; lane < WARP; lane++)
            for (int i = 0; i < 4; i++) {
                int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                float sum = ((Slot *)all[lane])->c[i];
                for (int inner = 0; inner < 16; inner++) sum += left[row][inner] * right[inner][column];
                ((Slot *)all[lane])->c[i] = sum;
            }
    });
}

static void copy_16_bytes(unsigned to, const void *from, bool there) {
    if (to % 16) abort();
    if (there)
        memcpy(memory + to, from, 16);
    else
        memset(memory + to, 0, 16);
}
static void close_copies() {}
template <int LEFT> void wait_for_copies() {}
