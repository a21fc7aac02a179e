// softmax.h - attention's arithmetic on tensor cores, for 16-bit types: tiles in shared memory, scores, online softmax
// (Milakov & Gimelshein, arXiv:1805.02867), weighted values. One warp has MI blocks of 16 query rows; of each, a
// thread has two: lane / 4 and 8 more, in the layout of mma.sync's accumulators.
#pragma once

#include <type_traits>

#include "common/ptx.h"

// Of a tile with rows of `columns` elements, the 16-byte chunk of a row: chunks change places, so that the eight rows
// that ldmatrix reads at once lie in different banks.
template <int columns, class T>
__device__ inline T* chunk_at(T* tile, int row, int chunk) {
    const int swizzle = columns % 64 == 0 ? row & 7 : row >> 1 & 3;
    return tile + row * columns + (chunk ^ swizzle) * 8;
}

template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __half>)
        mma_f16(d, a, b);
    else
        mma_bf16(d, a, b);
}

template <class T>
__device__ inline uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 v = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&v);
    } else {
        return pack_bf16(low, high);
    }
}

// Copies `count` rows of `columns` elements into a tile; of(row) is a row's start, or null for a row of zeros. The
// callers are threads 0 to threads - 1.
template <int columns, int count, int threads, class T, class F>
__device__ inline void copy_rows(T* tile, int thread, const T* any, F of) {
    constexpr int chunks = columns / 8;
#pragma unroll 4
    for (int i = thread; i < count * chunks; i += threads) {
        const T* row = of(i / chunks);
        cp_async16(chunk_at<columns>(tile, i / chunks, i % chunks), row ? row + i % chunks * 8 : any, row ? 16 : 0);
    }
}

// a: the 16 x 16 block of a tile from `row` and 16 * step on, as mma.sync's first operand.
template <int columns, class T>
__device__ inline void load_a(uint32_t (&a)[4], T* tile, int row, int step, int lane) {
    ldmatrix_x4(a, chunk_at<columns>(tile, row + lane % 16, step * 2 + lane / 16));
}

// s[mi][j] += q k^T for keys 8 j to 8 j + 7 of the tile, from `row` on; q(mi, step) gives queries as first operands.
template <class T, int K, int MI, int N, class Q>
__device__ inline void add_scores(float (&s)[MI][N / 8][4], T* keys, int row, int lane, Q q) {
#pragma unroll
    for (int step = 0; step < K / 16; ++step) {
        uint32_t a[MI][4];
#pragma unroll
        for (int mi = 0; mi < MI; ++mi) q(a[mi], mi, step);
#pragma unroll
        for (int j = 0; j < N / 8; j += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, chunk_at<K>(keys, row + j * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
#pragma unroll
            for (int mi = 0; mi < MI; ++mi) {
                mma<T>(s[mi][j], a[mi], {b[0], b[1]});
                mma<T>(s[mi][j + 1], a[mi], {b[2], b[3]});
            }
        }
    }
}

// What a warp knows of its rows so far: the largest score, the sum of the weights and that of the weighted values, both
// relative to the largest score. Exponents are of 2; `scale` turns scores into them.
template <int MI, int V>
struct Softmax {
    float out[MI][V / 8][4] = {};
    float top[MI][2], sum[MI][2];  // of scaled scores; sum: of the thread's own columns

    __device__ Softmax() {
        for (int mi = 0; mi < MI; ++mi)
            for (int h = 0; h < 2; ++h) top[mi][h] = -INFINITY, sum[mi][h] = 0;
    }

    // Turns scores into weights, as mma.sync's first operands, and what there was to the new largest score.
    template <class T, int N>
    __device__ void weigh(uint32_t (&weights)[MI][N / 16][4], float (&s)[MI][N / 8][4], float scale) {
#pragma unroll
        for (int mi = 0; mi < MI; ++mi)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float best = -INFINITY;
#pragma unroll
                for (int j = 0; j < N / 8; ++j) best = fmaxf(best, fmaxf(s[mi][j][h * 2], s[mi][j][h * 2 + 1]));
                best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
                best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
                best = fmaxf(best * scale, top[mi][h]);
                const float base = best == -INFINITY ? 0 : best;  // a row that sees no key yet
                const float shrink = exp2_approx(top[mi][h] - base);
                top[mi][h] = best;
                sum[mi][h] *= shrink;
#pragma unroll
                for (int j = 0; j < N / 8; ++j) {
                    const float low = exp2_approx(fmaf(s[mi][j][h * 2], scale, -base));
                    const float high = exp2_approx(fmaf(s[mi][j][h * 2 + 1], scale, -base));
                    sum[mi][h] += low + high;
                    weights[mi][j / 2][j % 2 * 2 + h] = pack<T>(low, high);
                }
#pragma unroll
                for (int j = 0; j < V / 8; ++j) out[mi][j][h * 2] *= shrink, out[mi][j][h * 2 + 1] *= shrink;
            }
    }

    // out += weights * values, N of them from `row` of the tile on.
    template <int N, class T>
    __device__ void add_values(const uint32_t (&weights)[MI][N / 16][4], T* values, int row, int lane) {
#pragma unroll
        for (int step = 0; step < N / 16; ++step)
#pragma unroll
            for (int j = 0; j < V / 8; j += 2) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, chunk_at<V>(values, row + step * 16 + lane % 16, j + lane / 16));
#pragma unroll
                for (int mi = 0; mi < MI; ++mi) {
                    mma<T>(out[mi][j], weights[mi][step], {b[0], b[1]});
                    mma<T>(out[mi][j + 1], weights[mi][step], {b[2], b[3]});
                }
            }
    }

    // Adds up the columns of the four threads that share a row.
    __device__ void finish() {
        for (int mi = 0; mi < MI; ++mi)
            for (int h = 0; h < 2; ++h) {
                sum[mi][h] += __shfl_xor_sync(~0u, sum[mi][h], 1);
                sum[mi][h] += __shfl_xor_sync(~0u, sum[mi][h], 2);
            }
    }
};
