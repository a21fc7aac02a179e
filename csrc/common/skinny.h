// skinny.h - products of at most 16 tokens with a weight, out[t][f] = sum of x[t][d] weight[f][d], at the speed at
// which memory gives the weight; x may be normalised (RMSNorm) on the way.
//
// A block has 16 rows of the weight, a warp every eighth chunk of 32 features of them. The weight goes from memory into
// mma.sync's first operand, 16 bytes of a row a thread: the order of features within a product is free, so these are
// what a thread has of two steps of 16. Eight chunks of a warp are on their way at any time, 64 KB of a block, the
// first of them before the kernels ahead have ended. Tokens are the columns of the second operand; columns without a
// token hold anything, which stays in its column. So a token's result does not depend on how many others there are.
#pragma once

#include <algorithm>

#include "common/op.h"
#include "common/prefetch.h"
#include "common/ptx.h"
#include "common/reduce.h"
#include "common/softmax.h"
#include "common/vector.h"

namespace skinny {

constexpr int max_tokens = 16, warps = 8, threads = warps * 32;
constexpr int rows = 16;               // of the weight, of a block
constexpr int chunk = 32;              // features of one row that four threads have, 8 each
constexpr int depth = 8;               // chunks of a warp on their way
constexpr int stride = warps * chunk;  // features from a warp's chunk to its next

// Chunks of a warp that a row of D features has.
__device__ inline int steps(int D) { return (D + stride - 1) / stride; }

template <class T>
struct Product {
    const T* x_TD;
    int64_t x_stride;  // elements from token to token
    int tokens;
    const T* norm_weight_D;  // null: x as it is
    float eps;
    T* normed_TD;        // null, or where x goes as it is normalised
    const T* weight_FD;  // with gated results [2F, D], the gate's rows first
    int D, F;            // multiples of 8; F columns of the result
    bool early;          // the weight may be read before the kernels ahead have ended
    Prefetch next;       // what a later product reads
};

// What the threads of a block share. Tokens are so far apart that the eight threads that read at once meet no bank
// twice.
template <class T, int NT>
struct Shared {
    static constexpr int columns = NT * 8, apart = depth * chunk + 32;
    T x[warps][columns * apart];
    float sums[warps][rows][columns], squares[warps][columns];
};

// Two rows of a weight on their way through a thread's registers, and the sums of their products.
template <class T, int NT>
struct Tile {
    using Memory = Shared<T, NT>;
    Memory& s = *dynamic_shared<Memory>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, part = lane % 4;
    uint4 low[depth], high[depth];  // rows `row` and `row` + 8
    float sum[NT][4] = {};

    // Feature of the thread's part of the warp's chunk number `step`.
    __device__ int feature(int step) const { return step * stride + warp * chunk + part * 8; }

    // A row's part of a chunk; null and what lies beyond D are zeros.
    __device__ static uint4 fetch(const T* row_D, int at, int D) {
        return row_D && at < D ? load_once(row_D + at) : uint4{};
    }

    // The first chunks, by fetch(place, step).
    template <class F>
    __device__ void begin(F fetch) {
#pragma unroll
        for (int i = 0; i < depth; ++i) fetch(i, i);
    }

    // All chunks in order: x(token, step) gives the thread's 16 bytes of x, which go through shared memory, a round of
    // chunks at a time; use(place, step) multiplies; fetch(place, step) brings the chunk that comes `depth` later.
    template <class Fetch, class X, class Use>
    __device__ void run(int steps, int tokens, Fetch fetch, X x, Use use) {
        for (int begin = 0; begin < steps; begin += depth) {
            __syncwarp();  // the chunks before are no longer needed
#pragma unroll 1
            for (int t = 0; t < tokens; ++t) store(s.x[warp] + t * Memory::apart, lane, x(t, begin + lane / 4));
            __syncwarp();
#pragma unroll
            for (int i = 0; i < depth; ++i) {
                use(i, begin + i);
                fetch(i, begin + i + depth);
            }
        }
    }

    // sum += chunk `i` of the weight times that of x.
    __device__ void multiply(float (&sum)[NT][4], int i) const {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const uint4 x = load(s.x[warp] + (n * 8 + row) * Memory::apart, i * 4 + part).bits;
            mma<T>(sum[n], {low[i].x, high[i].x, low[i].y, high[i].y}, {x.x, x.y});
            mma<T>(sum[n], {low[i].z, high[i].z, low[i].w, high[i].w}, {x.z, x.w});
        }
    }

    // Adds up the warps' sums: give(row, token, sum) in as many threads as there are pairs, token by token.
    template <class F>
    __device__ void reduce(int tokens, int rows_given, F give) {
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                *reinterpret_cast<float2*>(&s.sums[warp][row + h * 8][n * 8 + part * 2]) = {sum[n][h * 2],
                                                                                            sum[n][h * 2 + 1]};
        __syncthreads();
        for (int i = threadIdx.x; i < tokens * rows_given; i += threads) give(i % rows_given, i / rows_given);
    }
    __device__ float total(int row, int token) const {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < warps; ++w) sum += s.sums[w][row][token];
        return sum;
    }
};

// The factor that normalises token `lane` % 16, from the sums of squares that a block has found.
template <class M>
__device__ float norm_factor(const M& s, int tokens, int D, float eps) {
    const int t = threadIdx.x % max_tokens;
    float sum = 0;
    if (t < tokens)
#pragma unroll
        for (int w = 0; w < warps; ++w) sum += s.squares[w][t];
    return rsqrtf(__fdividef(sum, D) + eps);
}

// The product, for this block's rows: finish(token, column, sum, 0), or with gated results (.., gate, up).
template <int NT, bool gated, class T, class F>
__device__ void multiply(const Product<T>& p, F finish) {
    Tile<T, NT> tile;
    constexpr int width = gated ? rows / 2 : rows;  // columns of the result
    const int tokens = p.tokens, first = blockIdx.x * width;
    const int low_column = first + tile.row, high_column = gated ? low_column : low_column + 8;
    const T* low = low_column < p.F ? p.weight_FD + int64_t(low_column) * p.D : nullptr;
    const T* high = high_column < p.F ? p.weight_FD + (int64_t(gated ? p.F : 0) + high_column) * p.D : nullptr;
    const auto fetch = [&](int i, int step) {
        tile.low[i] = tile.fetch(low, tile.feature(step), p.D);
        tile.high[i] = tile.fetch(high, tile.feature(step), p.D);
    };
    if (!p.early) wait_for_previous_kernels();
    tile.begin(fetch);
    p.next.begin(blockIdx.x, gridDim.x);
    if (p.early) wait_for_previous_kernels();

    const int steps = skinny::steps(p.D);
    const auto x_at = [&](int token, int at) {
        return at < p.D ? load(p.x_TD + token * p.x_stride, at / 8) : Vector<T>{};
    };
    float factor = 0;  // of token lane % 16
    if (p.norm_weight_D) {
        for (int t = 0; t < tokens; ++t) {
            float sum = 0;
#pragma unroll 4
            for (int step = tile.lane / 4; step < steps; step += depth)
                sum += sum_of_squares(x_at(t, tile.feature(step)));
            sum = lanes_sum(sum, 32);
            if (tile.lane == 0) tile.s.squares[tile.warp][t] = sum;
        }
        __syncthreads();
        factor = norm_factor(tile.s, tokens, p.D, p.eps);
    }
    const auto normed_at = [&](int token, int at) {
        const Vector<T> x = x_at(token, at);
        if (!p.norm_weight_D) return x;
        const float own = __shfl_sync(~0u, factor, token);
        if (at >= p.D) return x;
        const Vector<T> normed = scaled(x, own, load(p.norm_weight_D, at / 8));
        if (p.normed_TD && blockIdx.x == 0) store(p.normed_TD + int64_t(token) * p.D, at / 8, normed);
        return normed;
    };
    tile.run(
        steps, tokens, fetch, [&](int token, int step) { return normed_at(token, tile.feature(step)); },
        [&](int i, int) { tile.multiply(tile.sum, i); });
    tile.reduce(tokens, width, [&](int row, int token) {
        if (first + row < p.F)
            finish(token, first + row, tile.total(row, token), gated ? tile.total(row + 8, token) : 0.0f);
    });
}

// For float32, in plain arithmetic: a warp has one column of the result at a time.
template <int NT, bool gated, class F>
__device__ void multiply(const Product<float>& p, F finish) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = gated ? rows / 2 : rows;
    wait_for_previous_kernels();
    for (int t = 0; t < p.tokens; ++t) {
        const float* x = p.x_TD + t * p.x_stride;
        float squares = 0;
        for (int d = lane; p.norm_weight_D && d < p.D; d += 32) squares += x[d] * x[d];
        const float factor = rsqrtf(__fdividef(lanes_sum(squares, 32), p.D) + p.eps);
        const auto x_at = [&](int d) { return p.norm_weight_D ? x[d] * factor * p.norm_weight_D[d] : x[d]; };
        if (p.normed_TD && blockIdx.x == 0 && warp == 0)
            for (int d = lane; d < p.D; d += 32) p.normed_TD[int64_t(t) * p.D + d] = x_at(d);
        for (int row = warp; row < width && int(blockIdx.x) * width + row < p.F; row += warps) {
            const int column = blockIdx.x * width + row;
            const float *low = p.weight_FD + int64_t(column) * p.D, *high = low + int64_t(p.F) * p.D;
            float sum = 0, up = 0;
            for (int d = lane; d < p.D; d += 32) {
                sum = fmaf(x_at(d), low[d], sum);
                if (gated) up = fmaf(x_at(d), high[d], up);
            }
            sum = lanes_sum(sum, 32), up = lanes_sum(up, 32);
            if (lane == 0) finish(t, column, sum, up);
        }
    }
}

// Calls f with how many blocks of 8 columns the tokens take.
template <class T, class F>
void with_columns(int64_t tokens, F f) {
    if constexpr (!std::is_same_v<T, float>)
        if (tokens > 8) return f(std::integral_constant<int, 2>{});
    f(std::integral_constant<int, 1>{});
}

// Bytes of shared memory that a launch asks for.
template <class T, int NT>
constexpr size_t memory() {
    return std::is_same_v<T, float> ? 0 : sizeof(Shared<T, NT>);
}

inline unsigned blocks(int64_t F, bool gated) {
    return unsigned((F + rows / (gated ? 2 : 1) - 1) / (rows / (gated ? 2 : 1)));
}

template <class T, int NT, bool gated, class Finish>
__global__ void __launch_bounds__(threads, 2) kernel(const Product<T> p, const Finish finish) {
    multiply<NT, gated>(p, [&](int token, int column, float sum, float up) { finish(token, column, sum, up); });
}

// A product of its own; Finish is what happens to the results.
template <bool gated, class T, class Finish>
void run(const Product<T>& p, const Finish& finish, cudaStream_t stream) {
    with_columns<T>(p.tokens, [&](auto NT) {
        constexpr int n = decltype(NT)::value;
        launch(kernel<T, n, gated, Finish>, {dim3(blocks(p.F, gated)), dim3(threads), memory<T, n>(), stream, true}, p,
               finish);
    });
}

// Checks the tensors of a product; `weight_rows` names those of the weight.
inline void check_tensors(Arguments& arguments, const Tensor& x, const std::optional<Tensor>& norm_weight,
                          const Tensor& weight, const std::optional<Tensor>& bias, const char* weight_rows) {
    arguments.tensor("x", x, {"T", "D"});
    if (norm_weight) arguments.tensor("norm_weight", *norm_weight, {"D"});
    arguments.tensor("weight", weight, {weight_rows, "D"});
    if (bias) arguments.tensor("bias", *bias, {weight_rows});
}

// The product of checked tensors: x [T, D], weight [F, D] ([2F, D] of gated results).
template <class T>
Product<T> product(const Arguments& arguments, const Tensor& x, const std::optional<Tensor>& norm_weight, double eps,
                   const Tensor& weight, bool gated, bool early) {
    Product<T> p{};
    p.x_TD = static_cast<const T*>(x.const_data_ptr());
    p.x_stride = arguments.rows("x", x).stride;
    p.tokens = int(x.size(0));
    p.norm_weight_D = norm_weight ? arguments.aligned_data<T>("norm_weight", *norm_weight) : nullptr;
    p.eps = float(eps);
    p.weight_FD = arguments.aligned_data<T>("weight", weight);
    p.D = int(x.size(1));
    p.F = int(weight.size(0) / (gated ? 2 : 1));
    p.early = early;
    return p;
}

// The sizes that kernels take: T tokens of D features, F columns of the result.
inline void check_sizes(const Arguments& arguments, int64_t T, int64_t D, int64_t F) {
    if (T > max_tokens)
        arguments.fail("T, the number of tokens, is ", T, ", but must be at most ", max_tokens,
                       ": more are for torch's products");
    if (D == 0 || D % 8 != 0 || D > INT_MAX / 2)
        arguments.fail("D, the features of x, are ", D, ", but must be a multiple of 8 above 0");
    if (F > INT_MAX / 2) arguments.fail("the result has ", F, " columns, but must have less than 2^30");
}

}  // namespace skinny
