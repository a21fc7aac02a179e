// experts_swiglu.cu - the chosen experts' gate and up products with SwiGLU, for few tokens, as in common/skinny.h.
//
// A block has 8 columns of one expert, for all tokens that chose it: of the tokens' choices, that of the first of them
// does the work, and the others' blocks have nothing to do.
#include "common/activation.h"
#include "common/router.h"
#include "common/skinny.h"

namespace {

constexpr int width = skinny::rows / 2;  // columns of a block

template <class T>
struct Params {
    const T* x_TD;
    int64_t x_stride;  // elements from token to token
    const T* weight_E2FD;
    const int* indices_TN;
    T* out_TNF;
    int tokens, N, E, D, F;
    bool early;  // choices and weights may be read before the kernel ahead has ended
};

// The choices of one expert, in the order of the tokens.
struct Choices {
    int pair[skinny::max_tokens];  // token * N + choice
};

// How many they are; 0 where another block does them. A token's experts are all different.
template <class T>
__device__ int gather(const Params<T>& p, int expert, Choices& choices) {
    const int lane = threadIdx.x % 32;
    int own = -1;
    for (int n = 0; n < p.N && lane < p.tokens; ++n)
        if (__ldcg(p.indices_TN + lane * p.N + n) == expert) own = lane * p.N + n;
    const unsigned who = __ballot_sync(~0u, own >= 0);
    if (own >= 0 && threadIdx.x < 32) choices.pair[__popc(who & ((1u << lane) - 1))] = own;
    __syncthreads();
    return choices.pair[0] == int(blockIdx.y) ? __popc(who) : 0;
}

template <class T, int NT>
__global__ void __launch_bounds__(skinny::threads, 2) experts_swiglu_kernel(const Params<T> p) {
    auto& choices = shared<Choices>();
    if (!p.early) wait_for_previous_kernels();
    const int expert = __ldcg(p.indices_TN + blockIdx.y), tokens = gather(p, expert, choices);
    const bool idle = tokens == 0 || unsigned(expert) >= unsigned(p.E);

    skinny::Tile<T, NT> tile;
    const int first = blockIdx.x * width, column = first + tile.row;
    const T* gate = !idle && column < p.F ? p.weight_E2FD + (int64_t(expert) * 2 * p.F + column) * p.D : nullptr;
    const T* up = gate ? gate + int64_t(p.F) * p.D : nullptr;
    const auto fetch = [&](int i, int step) {
        tile.low[i] = tile.fetch(gate, tile.feature(step), p.D);
        tile.high[i] = tile.fetch(up, tile.feature(step), p.D);
    };
    tile.begin(fetch);
    if (p.early) wait_for_previous_kernels();
    if (idle) return;
    tile.run(
        skinny::steps(p.D), tokens, fetch,
        [&](int i, int step) {
            const int at = tile.feature(step);
            return at < p.D ? load(p.x_TD + choices.pair[i] / p.N * p.x_stride, at / 8) : Vector<T>{};
        },
        [&](int i, int) { tile.multiply(tile.sum, i); });
    tile.reduce(tokens, width, [&](int row, int i) {
        if (first + row < p.F)
            p.out_TNF[int64_t(choices.pair[i]) * p.F + first + row] =
                T(silu(tile.total(row, i)) * tile.total(row + width, i));
    });
}

// For float32, in plain arithmetic: a warp has one column of one choice at a time.
__global__ void __launch_bounds__(skinny::threads, 2) experts_swiglu_plain(const Params<float> p) {
    const int lane = threadIdx.x % 32, column = blockIdx.x * width + threadIdx.x / 32;
    wait_for_previous_kernels();
    const int expert = p.indices_TN[blockIdx.y];
    if (column >= p.F || unsigned(expert) >= unsigned(p.E)) return;
    const float* x = p.x_TD + blockIdx.y / p.N * p.x_stride;
    const float* gate = p.weight_E2FD + (int64_t(expert) * 2 * p.F + column) * p.D;
    float sum = 0, up = 0;
    for (int d = lane; d < p.D; d += 32) {
        sum = fmaf(x[d], gate[d], sum);
        up = fmaf(x[d], gate[int64_t(p.F) * p.D + d], up);
    }
    sum = lanes_sum(sum, 32), up = lanes_sum(up, 32);
    if (lane == 0) p.out_TNF[int64_t(blockIdx.y) * p.F + column] = silu(sum) * up;
}

template <class T>
void run(const Params<T>& p, const dim3& grid, cudaStream_t stream) {
    skinny::with_columns<T>(p.tokens, [&](auto NT) {
        constexpr int n = decltype(NT)::value;
        launch(experts_swiglu_kernel<T, n>, {grid, dim3(skinny::threads), skinny::memory<T, n>(), stream, true}, p);
    });
}
void run(const Params<float>& p, const dim3& grid, cudaStream_t stream) {
    launch(experts_swiglu_plain, {grid, dim3(skinny::threads), 0, stream, true}, p);
}

Tensor experts_swiglu(const Tensor& x, const Tensor& weight, const Tensor& indices, bool early) {
    Arguments arguments("experts_swiglu");
    arguments.tensor("x", x, {"T", "D"});
    arguments.tensor("weight", weight, {"E", "features", "D"});
    arguments.tensor("indices", indices, ScalarType::Int, {"T", "N"});
    const int64_t T = arguments["T"], D = arguments["D"], N = arguments["N"], E = arguments["E"];
    const int64_t F = arguments["features"] / 2;
    if (arguments["features"] % 2)
        arguments.fail("weight has ", arguments["features"], " rows, but must have 2F, gate and up");
    skinny::check_sizes(arguments, T, D, F);
    if (N > E || N > max_chosen)
        arguments.fail("N, the experts of a token, are ", N, ", but must be at most ",
                       std::min<int64_t>(E, max_chosen));

    Tensor out = torch::stable::new_empty(x, {T, N, F});
    if (out.numel() == 0) return out;
    const DeviceScope device(x);
    arguments.with_float_type([&](auto element) {
        using Element = decltype(element);
        const Params<Element> p{static_cast<const Element*>(x.const_data_ptr()),
                                arguments.rows("x", x).stride,
                                arguments.aligned_data<Element>("weight", weight),
                                arguments.data<int>("indices", indices),
                                static_cast<Element*>(out.mutable_data_ptr()),
                                int(T),
                                int(N),
                                int(E),
                                int(D),
                                int(F),
                                early};
        run(p, dim3(skinny::blocks(F, true), unsigned(T * N)), device.stream);
    });
    return out;
}

}  // namespace

PYLLAMA_KERNEL(experts_swiglu);
