// norm_argmax.cu - few tokens, normalised, times the head's weight, and of each one's logits the largest: the product
// of common/skinny.h, whose blocks add their rows' best to one number a token. Logits are rounded as norm_linear's are,
// but not stored; the last block to be done gives the tokens.
#include "common/argmax.h"
#include "common/last_block.h"
#include "common/skinny.h"

namespace {

struct Choice {
    int64_t* tokens_T;
    unsigned long long* best_T;  // candidates, 0 before and after
    unsigned* done;
};

// NaN is above all, as in torch, whatever its sign.
template <class T>
__device__ float rounded(float logit) {
    return logit != logit ? __uint_as_float(0x7fffffffu) : float(T(logit));
}

template <class T, int NT>
__global__ void __launch_bounds__(skinny::threads, 2)
    norm_argmax_kernel(const skinny::Product<T> p, const Choice choice) {
    struct Logits {
        float of[skinny::rows][skinny::max_tokens];
    };
    auto& logits = shared<Logits>();
    const int first = blockIdx.x * skinny::rows, rows = min(skinny::rows, p.F - first), token = threadIdx.x;
    skinny::multiply<NT, false>(
        p, [&](int token, int row, float sum, float) { logits.of[row - first][token] = rounded<T>(sum); });
    __syncthreads();
    if (token < p.tokens) {  // in one warp, whose atomics are one access
        Candidate best = 0;
        for (int row = 0; row < rows; ++row) best = max(best, candidate(logits.of[row][token], first + row));
        atomicMax(choice.best_T + token, static_cast<unsigned long long>(best));
    }
    if (last_block(choice.done, gridDim.x) && token < p.tokens)
        choice.tokens_T[token] = index_of(atomicExch(choice.best_T + token, 0ull));
}

void norm_argmax_(Tensor tokens, const Tensor& x, const std::optional<Tensor>& norm_weight, double eps,
                  const Tensor& weight, const std::optional<Tensor>& counters, bool early) {
    Arguments arguments("norm_argmax_");
    skinny::check_tensors(arguments, x, norm_weight, weight, std::nullopt, "V");
    arguments.tensor("tokens", tokens, ScalarType::Long, {"T"});
    if (counters) arguments.tensor("counters", *counters, ScalarType::Int, {"C"});
    const int64_t T = arguments["T"], V = arguments["V"];
    skinny::check_sizes(arguments, T, arguments["D"], V);
    if (V == 0) arguments.fail("weight has no rows, but must have the vocabulary's");
    if (T == 0) return;
    const DeviceScope device(x);
    const Counters numbers(arguments, counters, x, 2 * T + 1);
    if (reinterpret_cast<uintptr_t>(numbers.data) % sizeof(Candidate) != 0)
        arguments.fail("counters must begin at a multiple of 8 bytes: call .clone() on it");
    const Choice choice{arguments.mutable_data<int64_t>("tokens", tokens),
                        reinterpret_cast<unsigned long long*>(numbers.data), numbers.data + 2 * T};
    arguments.with_float_type([&](auto element) {
        using E = decltype(element);
        const auto p = skinny::product<E>(arguments, x, norm_weight, eps, weight, false, early);
        skinny::with_columns<E>(T, [&](auto NT) {
            constexpr int n = decltype(NT)::value;
            launch(
                norm_argmax_kernel<E, n>,
                {dim3(skinny::blocks(p.F, false)), dim3(skinny::threads), skinny::memory<E, n>(), device.stream, true},
                p, choice);
        });
    });
}

}  // namespace

PYLLAMA_KERNEL(norm_argmax_);
