// moe_combine.cu - each token's weighted sum of its experts' results, gathered from the sorted rows, in float32,
// rounded once. A thread sums 16 bytes' worth of columns.
#include <algorithm>

#include "common/op.h"
#include "common/vector.h"

namespace {

constexpr int max_threads = 256;
constexpr int loads = 4;  // in flight

template <class T>
struct Params {
    const T* x_MD;
    const int* positions_TN;
    const float* weights_TN;
    T* y_TD;
    int N, D;
};

template <class T>
__global__ void __launch_bounds__(max_threads) moe_combine_kernel(const Params<T> p) {
    const int64_t token = blockIdx.x;
    const int at = blockIdx.y * blockDim.x + threadIdx.x;
    if (at >= p.D / Vector<T>::size) return;
    const int* positions = p.positions_TN + token * p.N;
    const float* weights = p.weights_TN + token * p.N;

    float2 sum[Vector<T>::pairs] = {};
    for (int first = 0; first < p.N; first += loads) {
        Vector<T> v[loads];
        float weight[loads] = {};
#pragma unroll
        for (int i = 0; i < loads; ++i)
            if (first + i < p.N) {
                weight[i] = weights[first + i];
                v[i] = load(p.x_MD + int64_t(positions[first + i]) * p.D, at);
            }
#pragma unroll
        for (int i = 0; i < loads; ++i)
#pragma unroll
            for (int j = 0; j < v[i].pairs; ++j) {
                const float2 f = v[i].get(j);
                sum[j].x = fmaf(weight[i], f.x, sum[j].x), sum[j].y = fmaf(weight[i], f.y, sum[j].y);
            }
    }
    Vector<T> y;
#pragma unroll
    for (int j = 0; j < y.pairs; ++j) y.set(j, sum[j]);
    store(p.y_TD + token * p.D, at, y);
}

Tensor moe_combine(const Tensor& x, const Tensor& positions, const Tensor& weights) {
    Arguments arguments("moe_combine");
    arguments.tensor("x", x, {"M", "D"});
    arguments.tensor("positions", positions, ScalarType::Int, {"T", "N"});
    arguments.tensor("weights", weights, ScalarType::Float, {"T", "N"});
    const int64_t T = arguments["T"], N = arguments["N"], D = arguments["D"];
    if (D % 8 != 0 || D >= 1 << 26)
        arguments.fail("D, the hidden size, is ", D, ", but must be a multiple of 8 below 2^26");
    if (T > INT_MAX) arguments.fail("T, the number of tokens, is ", T, ", but must be below 2^31");

    Tensor y = torch::stable::new_empty(x, {T, D});
    if (T == 0 || D == 0) return y;
    const DeviceScope device(x);
    arguments.with_float_type([&](auto element) {
        using E = decltype(element);
        const Params<E> p{arguments.aligned_data<E>("x", x),
                          arguments.data<int>("positions", positions),
                          arguments.data<float>("weights", weights),
                          static_cast<E*>(y.mutable_data_ptr()),
                          int(N),
                          int(D)};
        const int vectors = int(D) / Vector<E>::size, threads = std::min(vectors, max_threads);
        const dim3 grid(unsigned(T), unsigned((vectors + threads - 1) / threads));
        launch(moe_combine_kernel<E>, {grid, dim3(threads), 0, device.stream}, p);
    });
    return y;
}

}  // namespace

PYLLAMA_KERNEL(moe_combine);
