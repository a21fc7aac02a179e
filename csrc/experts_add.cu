// experts_add.cu - residual += the weighted sum over a token's experts of their down products, for few tokens, as in
// common/skinny.h; in place, rounded once. A block has 16 columns of one token, and goes through its experts' rows end
// to end.
#include "common/router.h"
#include "common/skinny.h"

namespace {

template <class T>
struct Params {
    T* residual_TD;
    int64_t stride;  // elements from token to token
    const T* x_TNF;
    const T* weight_EDF;
    const int* indices_TN;
    const float* weights_TN;
    int N, E, D, F;
    bool early;  // choices and weights may be read before the kernel ahead has ended
};

// What a block knows of its token's experts.
struct Experts {
    int index[max_chosen];  // none: -1
    float weight[max_chosen];
};

template <class T>
__device__ void read_experts(const Params<T>& p, int token, Experts& experts) {
    if (int(threadIdx.x) < p.N) {
        const int expert = __ldcg(p.indices_TN + token * p.N + threadIdx.x);
        experts.index[threadIdx.x] = unsigned(expert) < unsigned(p.E) ? expert : -1;
        experts.weight[threadIdx.x] = __ldcg(p.weights_TN + token * p.N + threadIdx.x);
    }
    __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(skinny::threads, 2) experts_add_kernel(const Params<T> p) {
    const int token = blockIdx.y, first = blockIdx.x * skinny::rows;
    auto& experts = shared<Experts>();
    if (!p.early) wait_for_previous_kernels();
    read_experts(p, token, experts);

    skinny::Tile<T, 1> tile;
    const int per = skinny::steps(p.F), low = first + tile.row, high = low + 8;
    const auto row_at = [&](int n, int column) {
        const int expert = n < p.N ? experts.index[n] : -1;
        return expert >= 0 && column < p.D ? p.weight_EDF + (int64_t(expert) * p.D + column) * p.F : nullptr;
    };
    const auto fetch = [&](int i, int step) {
        const int n = step / per, at = tile.feature(step - n * per);
        tile.low[i] = tile.fetch(row_at(n, low), at, p.F);
        tile.high[i] = tile.fetch(row_at(n, high), at, p.F);
    };
    tile.begin(fetch);
    if (p.early) wait_for_previous_kernels();
    const T* x = p.x_TNF + int64_t(token) * p.N * p.F;
    float own[1][4] = {};  // of one expert
    tile.run(
        per * p.N, 1, fetch,
        [&](int, int step) {
            const int n = step / per, at = tile.feature(step - n * per);
            return n < p.N && at < p.F && experts.index[n] >= 0 ? load(x + int64_t(n) * p.F, at / 8) : Vector<T>{};
        },
        [&](int i, int step) {
            tile.multiply(own, i);
            const int n = step / per;
            if (step - n * per < per - 1 || n >= p.N) return;
            for (int e = 0; e < 4; ++e)
                tile.sum[0][e] = fmaf(experts.weight[n], own[0][e], tile.sum[0][e]), own[0][e] = 0;
        });
    tile.reduce(1, skinny::rows, [&](int row, int) {
        if (first + row >= p.D) return;
        T& place = p.residual_TD[token * p.stride + first + row];
        place = T(float(place) + tile.total(row, 0));
    });
}

// For float32, in plain arithmetic: a warp has one column.
__global__ void __launch_bounds__(skinny::threads, 2) experts_add_plain(const Params<float> p) {
    const int lane = threadIdx.x % 32, token = blockIdx.y;
    auto& experts = shared<Experts>();
    wait_for_previous_kernels();
    read_experts(p, token, experts);
    for (int row = threadIdx.x / 32; row < skinny::rows; row += skinny::warps) {
        const int column = blockIdx.x * skinny::rows + row;
        if (column >= p.D) return;
        float sum = 0;
        for (int n = 0; n < p.N; ++n) {
            if (experts.index[n] < 0) continue;
            const float* x = p.x_TNF + (int64_t(token) * p.N + n) * p.F;
            const float* weight = p.weight_EDF + (int64_t(experts.index[n]) * p.D + column) * p.F;
            float own = 0;
            for (int f = lane; f < p.F; f += 32) own = fmaf(x[f], weight[f], own);
            sum = fmaf(experts.weight[n], own, sum);
        }
        sum = lanes_sum(sum, 32);
        if (lane == 0) p.residual_TD[token * p.stride + column] += sum;
    }
}

template <class T>
void run(const Params<T>& p, const dim3& grid, cudaStream_t stream) {
    launch(experts_add_kernel<T>, {grid, dim3(skinny::threads), skinny::memory<T, 1>(), stream, true}, p);
}
void run(const Params<float>& p, const dim3& grid, cudaStream_t stream) {
    launch(experts_add_plain, {grid, dim3(skinny::threads), 0, stream, true}, p);
}

void experts_add_(Tensor residual, const Tensor& x, const Tensor& weight, const Tensor& indices, const Tensor& weights,
                  bool early) {
    Arguments arguments("experts_add_");
    arguments.tensor("residual", residual, {"T", "D"});
    arguments.tensor("x", x, {"T", "N", "F"});
    arguments.tensor("weight", weight, {"E", "D", "F"});
    arguments.tensor("indices", indices, ScalarType::Int, {"T", "N"});
    arguments.tensor("weights", weights, ScalarType::Float, {"T", "N"});
    const int64_t T = arguments["T"], D = arguments["D"], N = arguments["N"], F = arguments["F"];
    skinny::check_sizes(arguments, T, F, D);
    if (N > max_chosen) arguments.fail("N, the experts of a token, are ", N, ", but must be at most ", max_chosen);
    if (T == 0 || D == 0 || N == 0) return;
    const int64_t stride = arguments.rows("residual", residual).stride;
    const DeviceScope device(residual);
    arguments.with_float_type([&](auto element) {
        using Element = decltype(element);
        const Params<Element> p{static_cast<Element*>(residual.mutable_data_ptr()),
                                stride,
                                arguments.aligned_data<Element>("x", x),
                                arguments.aligned_data<Element>("weight", weight),
                                arguments.data<int>("indices", indices),
                                arguments.data<float>("weights", weights),
                                int(N),
                                int(arguments["E"]),
                                int(D),
                                int(F),
                                early};
        run(p, dim3(skinny::blocks(D, false), unsigned(T)), device.stream);
    });
}

}  // namespace

PYLLAMA_KERNEL(experts_add_);
