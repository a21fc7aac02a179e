// grouped.h - one matrix product per group of rows: grouped_linear.cu and grouped_swiglu.cu. Row m of the result is
// x[rows[m]] @ weight[e]^T, where expert e owns rows offsets[e] to offsets[e + 1].
//
// The groups' sizes are on the device only, so that blocks stay and make their own list of work: each counts every
// group's tiles, and takes tile blockIdx.x, blockIdx.x + gridDim.x, ... A group's tiles lie together, those that share
// a part of the weight first. Rows are gathered as they are copied to shared memory. D input features, F columns of the
// result; with SwiGLU the weight has F rows of the gate, then F of the up part, and a tile takes 16 of both by turns,
// so that a warp has what belongs together in the same registers.
#pragma once

#include <algorithm>

#include "common/activation.h"
#include "common/op.h"
#include "common/reduce.h"
#include "common/softmax.h"

constexpr int max_groups = 512;  // their list and the largest tile fit into 99 KB

template <class T>
struct Grouped {
    const T* x_TD;
    const T* weight_EFD;
    const int* offsets;    // [E + 1]
    const int* rows_M;     // or null: x's own
    const float* scale_M;  // or null: the result's rows are multiplied by it
    T* out_MF;
    int M, D, F, E;
};

// The list of work: of each group, the tiles of all groups before it.
template <int rows>
struct TileList {
    struct Shared {
        int first[max_groups + 1];
    };
    Shared& s = shared<Shared>();
    int E, columns;  // columns of tiles

    // All threads of the block; blockDim.x of them are whole warps.
    __device__ TileList(const int* offsets, int E, int columns) : E(E), columns(columns) {
        const int thread = threadIdx.x, share = (E + blockDim.x - 1) / blockDim.x;
        const auto tiles = [&](int e) { return (offsets[e + 1] - offsets[e] + rows - 1) / rows * columns; };
        const int begin = min(thread * share, E), end = min(begin + share, E);
        int sum = 0;
        for (int e = begin; e < end; ++e) sum += tiles(e);
        int first = sum_before(sum);
        for (int e = begin; e < end; ++e) {
            s.first[e] = first;
            first += tiles(e);
        }
        if (end == E && begin < end) s.first[E] = first;
        __syncthreads();
    }

    __device__ int size() const { return s.first[E]; }

    struct Tile {
        int group, row, column;  // in tiles of the group
    };
    __device__ Tile operator[](int i) const {
        int low = 0, high = E;  // the group is among low to high - 1
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (s.first[middle] <= i)
                low = middle;
            else
                high = middle;
        }
        const int tall = (s.first[low + 1] - s.first[low]) / columns, within = i - s.first[low];
        return {low, within % tall, within / tall};
    }
};

// Transposes four words in each of the four lanes of a quad.
__device__ inline void transpose_quad(uint32_t (&w)[4], int lane) {
#pragma unroll
    for (int d = 1; d <= 2; d *= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (!(i & d)) {
                const uint32_t other = __shfl_xor_sync(~0u, lane & d ? w[i] : w[i + d], d);
                (lane & d ? w[i] : w[i + d]) = other;
            }
}

// The shape of a block's work: rows_ rows of x and columns_ rows of the weight, 64 features at a time, `stages` of them
// on their way. A warp has rows_ / warps_m rows and 32 columns.
template <class Type, int rows_, int warps_m_, int warps_n_, int stages_>
struct TensorTile {
    using T = Type;
    static constexpr int rows = rows_, warps_m = warps_m_, warps_n = warps_n_, columns = warps_n * 32, depth = 64;
    static constexpr int stages = stages_, threads = warps_m * warps_n * 32, MI = rows / warps_m / 16;
    static constexpr int blocks = 512 / threads;  // on a multiprocessor at least
    struct Shared {
        T x[stages][rows * depth], weight[stages][columns * depth];
    };
};

template <class P, bool gated>
__global__ void __launch_bounds__(P::threads, P::blocks) grouped_tensor(const Grouped<typename P::T> p) {
    using T = typename P::T;
    constexpr int width = gated ? P::columns / 2 : P::columns;  // of the result
    constexpr int step = P::threads / 8;  // a thread copies the same 16 bytes of every step-th row
    auto& s = *dynamic_shared<typename P::Shared>();
    const int thread = threadIdx.x, lane = thread % 32, chunk = thread % 8;
    const int warp_m = thread / 32 / P::warps_n, warp_n = thread / 32 % P::warps_n;
    const TileList<P::rows> list(p.offsets, p.E, (p.F + width - 1) / width);
    const int rounds = (p.D + P::depth - 1) / P::depth;

    for (int i = blockIdx.x; i < list.size(); i += gridDim.x) {
        const auto tile = list[i];
        const int begin = p.offsets[tile.group] + tile.row * P::rows, end = p.offsets[tile.group + 1];
        const T* weight = p.weight_EFD + int64_t(tile.group) * (gated ? 2 : 1) * p.F * p.D;

        const T* x_at[P::rows / step];  // null: zeros
#pragma unroll
        for (int j = 0; j < P::rows / step; ++j) {
            const int m = begin + thread / 8 + j * step;
            x_at[j] = m < end ? p.x_TD + int64_t(p.rows_M ? p.rows_M[m] : m) * p.D + chunk * 8 : nullptr;
        }
        // Row j of the thread's rows of the weight: 16 columns of the result further on for each 32, or step columns.
        const int n = thread / 8, part = gated ? n / 16 : 0, column = tile.column * width + (gated ? n % 16 : n);
        const T* weight_at = weight + (int64_t(part) * p.F + column) * p.D + chunk * 8;
        const auto columns_on = [](int j) { return !gated ? j * step : j * step / 32 * 16; };
        const auto parts_on = [](int j) { return gated ? j * step / 16 % 2 : 0; };
        const auto copy = [&](int round) {
            const int stage = round % P::stages, at = round * P::depth;
            const bool inside = at + chunk * 8 < p.D;
#pragma unroll
            for (int j = 0; j < P::rows / step; ++j) {
                const bool valid = inside && x_at[j];
                cp_async16(chunk_at<P::depth>(s.x[stage], thread / 8 + j * step, chunk), valid ? x_at[j] + at : p.x_TD,
                           valid ? 16 : 0);
            }
#pragma unroll
            for (int j = 0; j < P::columns / step; ++j) {
                const bool valid = inside && column + columns_on(j) < p.F;
                const T* row = weight_at + int64_t(parts_on(j) * p.F + columns_on(j)) * p.D;
                cp_async16(chunk_at<P::depth>(s.weight[stage], thread / 8 + j * step, chunk),
                           valid ? row + at : p.weight_EFD, valid ? 16 : 0);
            }
        };

        float sum[P::MI][4][4] = {};
        for (int round = 0; round < P::stages - 1; ++round) {
            if (round < rounds) copy(round);
            cp_async_commit();
        }
        for (int round = 0; round < rounds; ++round) {
            cp_async_wait<P::stages - 2>();
            __syncthreads();  // this stage is here, and the one before it is no longer needed
            if (round + P::stages - 1 < rounds) copy(round + P::stages - 1);
            cp_async_commit();
            const int stage = round % P::stages, row = warp_m * P::MI * 16;
            add_scores<T, P::depth, P::MI, 32>(
                sum, s.weight[stage], warp_n * 32, lane,
                [&](uint32_t (&a)[4], int mi, int at) { load_a<P::depth>(a, s.x[stage], row + mi * 16, at, lane); });
        }
        cp_async_wait<0>();
        __syncthreads();  // the next tile's copies overwrite what was read

        const int quad = lane % 4;
#pragma unroll
        for (int mi = 0; mi < P::MI; ++mi) {
            float scale[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int m = begin + (warp_m * P::MI + mi) * 16 + h * 8 + lane / 4;
                scale[h] = p.scale_M && m < end ? p.scale_M[m] : 1.0f;
            }
            // Four words each: of one row the columns of four blocks of 8, or of two rows those of two.
#pragma unroll
            for (int part = 0; part < (gated ? 1 : 2); ++part) {
                uint32_t words[4];
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    const int h = gated ? w / 2 : part, j = gated ? w % 2 : w;
                    float low = sum[mi][j][h * 2], high = sum[mi][j][h * 2 + 1];
                    if (gated) low = silu(low) * sum[mi][j + 2][h * 2], high = silu(high) * sum[mi][j + 2][h * 2 + 1];
                    words[w] = pack<T>(low * scale[h], high * scale[h]);
                }
                transpose_quad(words, lane);
                const int h = gated ? quad / 2 : part, block = gated ? quad % 2 : quad;
                const int m = begin + (warp_m * P::MI + mi) * 16 + h * 8 + lane / 4;
                const int column = tile.column * width + warp_n * (gated ? 16 : 32) + block * 8;
                if (m < end && column < p.F)
                    *reinterpret_cast<uint4*>(p.out_MF + int64_t(m) * p.F + column) = {words[0], words[1], words[2],
                                                                                       words[3]};
            }
        }
    }
}

// For float32, in plain arithmetic: exact tests and small models. A thread has one element of the result.
constexpr int plain_tile = 16;

template <bool gated>
__global__ void __launch_bounds__(plain_tile* plain_tile) grouped_plain(const Grouped<float> p) {
    struct Tiles {
        float x[plain_tile][plain_tile], weight[gated ? 2 : 1][plain_tile][plain_tile + 1];
    };
    auto& s = shared<Tiles>();
    const int row = threadIdx.x / plain_tile, column = threadIdx.x % plain_tile;
    const TileList<plain_tile> list(p.offsets, p.E, (p.F + plain_tile - 1) / plain_tile);

    for (int i = blockIdx.x; i < list.size(); i += gridDim.x) {
        const auto tile = list[i];
        const int m = p.offsets[tile.group] + tile.row * plain_tile + row, first = tile.column * plain_tile;
        const bool mine = m < p.offsets[tile.group + 1];
        const float* x = mine ? p.x_TD + int64_t(p.rows_M ? p.rows_M[m] : m) * p.D : nullptr;
        const float* weight = p.weight_EFD + int64_t(tile.group) * (gated ? 2 : 1) * p.F * p.D;
        float sum[gated ? 2 : 1] = {};
        for (int begin = 0; begin < p.D; begin += plain_tile) {
            const int at = begin + column;
            s.x[row][column] = mine && at < p.D ? x[at] : 0;
            for (int part = 0; part < (gated ? 2 : 1); ++part) {
                const int64_t f = int64_t(part) * p.F + first + row;
                s.weight[part][row][column] = first + row < p.F && at < p.D ? weight[f * p.D + at] : 0;
            }
            __syncthreads();
            for (int k = 0; k < plain_tile; ++k)
                for (int part = 0; part < (gated ? 2 : 1); ++part)
                    sum[part] = fmaf(s.x[row][k], s.weight[part][column][k], sum[part]);
            __syncthreads();
        }
        if (mine && first + column < p.F) {
            const float value = gated ? silu(sum[0]) * sum[gated] : sum[0];
            p.out_MF[int64_t(m) * p.F + first + column] = value * (p.scale_M ? p.scale_M[m] : 1.0f);
        }
    }
}

// As many blocks as there can be tiles, whatever the groups' sizes, and `most` at most.
template <class T>
unsigned grouped_blocks(const Grouped<T>& p, int rows, int columns, int64_t most) {
    const int64_t tiles = (int64_t(p.M) / rows + std::min(p.E, p.M)) * ((p.F + columns - 1) / columns);
    return unsigned(std::min(tiles, most));
}

template <class P, bool gated>
void launch_grouped_tensor(const Grouped<typename P::T>& p, cudaStream_t stream) {
    constexpr size_t smem = sizeof(typename P::Shared);
    const int at_once = std::max(int(size_t(200) * 1024 / smem), 1) * multiprocessors();
    const unsigned blocks = grouped_blocks(p, P::rows, gated ? P::columns / 2 : P::columns, at_once);
    launch(grouped_tensor<P, gated>, {dim3(blocks), dim3(P::threads), smem, stream}, p);
}

// The tile, by how many rows a group has if they are spread evenly.
template <bool gated, class T>
void run_grouped(const Grouped<T>& p, cudaStream_t stream) {
    const int rows = p.M / p.E;
    if (rows <= 16) return launch_grouped_tensor<TensorTile<T, 16, 1, 4, 4>, gated>(p, stream);
    if (rows <= 96) return launch_grouped_tensor<TensorTile<T, 64, 2, 4, 4>, gated>(p, stream);
    launch_grouped_tensor<TensorTile<T, 128, 2, 4, 3>, gated>(p, stream);
}
template <bool gated>
void run_grouped(const Grouped<float>& p, cudaStream_t stream) {
    const unsigned blocks = grouped_blocks(p, plain_tile, plain_tile, 8 * multiprocessors());
    launch(grouped_plain<gated>, {dim3(blocks), dim3(plain_tile * plain_tile), 0, stream}, p);
}

// What grouped_linear and grouped_swiglu do, but for the names in their errors.
template <bool gated>
Tensor grouped(const char* op, const Tensor& x, const Tensor& weight, const Tensor& offsets,
               const std::optional<Tensor>& rows, const std::optional<Tensor>& scale) {
    Arguments arguments(op);
    arguments.tensor("x", x, {"tokens", "D"});
    arguments.tensor("weight", weight, {"E", "features", "D"});
    arguments.tensor("offsets", offsets, ScalarType::Int, {"E+1"});
    if (rows) arguments.tensor("rows", *rows, ScalarType::Int, {"M"});
    const int64_t E = arguments["E"], D = arguments["D"], F = weight.size(1) / (gated ? 2 : 1);
    const int64_t M = rows ? rows->size(0) : x.size(0);
    if (scale) {
        arguments.tensor("scale", *scale, ScalarType::Float, {"M"});
        if (scale->size(0) != M) arguments.fail("scale has ", scale->size(0), " rows, but the result has ", M);
    }
    if (D % 8 != 0) arguments.fail("D, the input features, are ", D, ", but must be a multiple of 8");
    if (weight.size(1) % (gated ? 16 : 8) != 0)
        arguments.fail("weight has ", weight.size(1), " rows, but must have ",
                       gated ? "2F with F a multiple of 8" : "a multiple of 8");
    if (E < 1 || E > max_groups)
        arguments.fail("E, the number of experts, is ", E, ", but must be in 1 to ", max_groups);
    if (M > INT_MAX / 2 || D > INT_MAX / 2 || F > INT_MAX / 4) arguments.fail("a dimension is 2^30 or more");

    Tensor out = torch::stable::new_empty(x, {M, F});
    if (M == 0 || F == 0) return out;
    const DeviceScope device(x);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        const Grouped<T> p{arguments.aligned_data<T>("x", x),
                           arguments.aligned_data<T>("weight", weight),
                           arguments.data<int>("offsets", offsets),
                           rows ? arguments.data<int>("rows", *rows) : nullptr,
                           scale ? arguments.data<float>("scale", *scale) : nullptr,
                           static_cast<T*>(out.mutable_data_ptr()),
                           int(M),
                           int(D),
                           int(F),
                           int(E)};
        run_grouped<gated>(p, device.stream);
    });
    return out;
}
