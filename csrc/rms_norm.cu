// rms_norm.cu - y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich,
// arXiv:1910.07467), in float32, rounded once at the end.
//
// A row stays in its threads' registers between the sum and the scaling, so that x is read once: up to 16384
// columns in float32, 32768 in 16 bits; what a row has beyond is read twice. Short rows share a block.
#include <algorithm>

#include "common/op.h"
#include "common/reduce.h"
#include "common/rows.h"
#include "common/vector.h"

namespace {

constexpr int max_D = 65536;
constexpr int registers = 4;  // vectors that a thread keeps, and loads that it has in flight

template <class T>
struct Params {
    const T* x_TD;
    Rows rows;  // of x
    const T* weight_D;
    T* y_TD;  // contiguous
    int D;    // a multiple of 8
    float eps;
};

template <class T>
__device__ float sum_of_squares(const Vector<T>& v) {
    float sum = 0;
    for (int i = 0; i < v.pairs; ++i) {
        const float2 f = v.get(i);
        sum += f.x * f.x + f.y * f.y;
    }
    return sum;
}

template <class T>
__device__ Vector<T> scaled(const Vector<T>& v, float scale, const Vector<T>& weight) {
    Vector<T> result;
    for (int i = 0; i < v.pairs; ++i) {
        const float2 f = v.get(i), w = weight.get(i);
        result.set(i, {f.x * scale * w.x, f.y * scale * w.y});
    }
    return result;
}

// blockDim: threads of a row, rows of a block. Thread t of a row has its vectors t, t + threads, t + 2 * threads,
// ...
template <class T>
__global__ void __launch_bounds__(1024) kernel(const Params<T> p) {
    const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    const int vectors = row < p.rows.count ? p.D / Vector<T>::size : 0;  // the last block may have no row for it
    const int first = threadIdx.x, step = blockDim.x, rest = first + registers * step;
    const T* x = p.x_TD + p.rows.offset(row);
    T* y = p.y_TD + row * p.D;

    Vector<T> kept[registers];
#pragma unroll
    for (int i = 0; i < registers; ++i)
        if (first + i * step < vectors) kept[i] = load(x, first + i * step);

    float sum = 0;
#pragma unroll
    for (int i = 0; i < registers; ++i) sum += sum_of_squares(kept[i]);
    for (int i = rest; i < vectors; i += step) sum += sum_of_squares(load(x, i));

    const float scale = rsqrtf(row_sum(sum) / p.D + p.eps);
#pragma unroll
    for (int i = 0; i < registers; ++i) {
        const int at = first + i * step;
        if (at < vectors) store(y, at, scaled(kept[i], scale, load(p.weight_D, at)));
    }
    for (int i = rest; i < vectors; i += step) store(y, i, scaled(load(x, i), scale, load(p.weight_D, i)));
}

struct Tile {
    int threads;  // of a row: a power of two up to 32, or whole warps
    int rows;     // of a block
};

Tile choose_tile(int vectors) {
    const int needed = (vectors + registers - 1) / registers;
    int threads = 1;
    while (threads < needed && threads < 32) threads *= 2;
    if (needed > 32) threads = std::min((needed + 31) / 32 * 32, 1024);
    return {threads, std::max(128 / threads, 1)};
}

template <class T>
void run(const Params<T>& p, cudaStream_t stream) {
    const Tile tile = choose_tile(p.D / Vector<T>::size);
    const dim3 grid((int64_t(p.rows.count) + tile.rows - 1) / tile.rows), block(tile.threads, tile.rows);
    launch(kernel<T>, {grid, block, 0, stream}, p);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    Arguments arguments("rms_norm");
    arguments.tensor("x", x, {"...", "D"});
    arguments.tensor("weight", weight, {"D"});
    const int64_t D = arguments["D"];
    if (D == 0 || D % 8 != 0 || D > max_D)
        arguments.fail("D, the last dimension of x, is ", D, ", but must be a multiple of 8 up to ", max_D);
    const Rows rows = arguments.rows("x", x);
    arguments.rows("weight", weight);

    Tensor y = torch::stable::new_empty(x, x.sizes());
    if (rows.count == 0) return y;
    const DeviceScope device(x);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        run<T>({static_cast<const T*>(x.const_data_ptr()), rows, static_cast<const T*>(weight.const_data_ptr()),
                static_cast<T*>(y.mutable_data_ptr()), int(D), float(eps)},
               device.stream);
    });
    return y;
}

}  // namespace

PYLLAMA_KERNEL(rms_norm);
