// swiglu.cu - silu(gate) * up, the two halves of each row (Shazeer, arXiv:2002.05202), in float32, rounded once.
#include <algorithm>

#include "common/activation.h"
#include "common/op.h"
#include "common/rows.h"
#include "common/vector.h"

namespace {

constexpr int loads = 2;  // of gate and of up that a thread has in flight
constexpr int block_threads = 256;

template <class T>
struct Params {
    const T* x_T2F;
    Rows rows;  // of x
    T* y_TF;    // contiguous
    int F;      // a multiple of 8
    int pieces;
};

template <class T>
__device__ Vector<T> product(const Vector<T>& gate, const Vector<T>& up) {
    Vector<T> result;
    for (int i = 0; i < gate.pairs; ++i) {
        const float2 g = gate.get(i), u = up.get(i);
        result.set(i, {silu(g.x) * u.x, silu(g.y) * u.y});
    }
    return result;
}

// A block has blockDim.y rows, and of each of them one piece of `loads` times blockDim.x vectors.
template <class T>
__global__ void __launch_bounds__(block_threads) kernel(const Params<T> p) {
    const int group = blockIdx.x / p.pieces, piece = blockIdx.x - group * p.pieces, vectors = p.F / Vector<T>::size;
    const int64_t row = int64_t(group) * blockDim.y + threadIdx.y;
    if (row >= p.rows.count) return;
    const int first = piece * loads * blockDim.x + threadIdx.x;
    const T* x = p.x_T2F + p.rows.offset(row);
    T* y = p.y_TF + row * p.F;

    Vector<T> gate[loads], up[loads];
#pragma unroll
    for (int i = 0; i < loads; ++i) {
        const int at = first + i * blockDim.x;
        if (at < vectors) gate[i] = load(x, at), up[i] = load(x + p.F, at);
    }
#pragma unroll
    for (int i = 0; i < loads; ++i) {
        const int at = first + i * blockDim.x;
        if (at < vectors) store(y, at, product(gate[i], up[i]));
    }
}

template <class T>
void run(Params<T> p, cudaStream_t stream) {
    const auto shares = [](int n, int size) { return (n + size - 1) / size; };
    const int vectors = p.F / Vector<T>::size;
    p.pieces = shares(vectors, loads * block_threads);
    const int threads = shares(vectors, loads * p.pieces), rows = std::max(block_threads / threads, 1);
    launch(kernel<T>, {dim3(int64_t(p.pieces) * shares(p.rows.count, rows)), dim3(threads, rows), 0, stream}, p);
}

Tensor swiglu(const Tensor& x) {
    Arguments arguments("swiglu");
    arguments.tensor("x", x, {"...", "features"});
    const int64_t features = arguments["features"], F = features / 2;
    if (features == 0 || features % 16 != 0 || features > INT_MAX)
        arguments.fail("x's last dimension is ", features, ", but must be 2F with F a multiple of 8");
    const Rows rows = arguments.rows("x", x);

    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = F;
    Tensor y = torch::stable::new_empty(x, sizes);
    if (rows.count == 0) return y;
    const DeviceScope device(x);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        run<T>({static_cast<const T*>(x.const_data_ptr()), rows, static_cast<T*>(y.mutable_data_ptr()), int(F), 0},
               device.stream);
    });
    return y;
}

}  // namespace

PYLLAMA_KERNEL(swiglu);
