// norm_gate.cu - few tokens, normalised, through a router: the product of common/skinny.h, whose last block to be done
// chooses the experts (common/router.h), a warp for each token. Logits are not rounded in between.
#include "common/last_block.h"
#include "common/router.h"
#include "common/skinny.h"

namespace {

template <class T, int NT, int kept>
__global__ void __launch_bounds__(skinny::threads, 2)
    norm_gate_kernel(const skinny::Product<T> p, const Gate gate, float* logits_TE, unsigned* done) {
    skinny::multiply<NT, false>(
        p, [&](int token, int expert, float sum, float) { logits_TE[token * gate.E + expert] = sum; });
    if (!last_block(done, gridDim.x)) return;
    for (int token = threadIdx.x / 32; token < gate.count; token += skinny::warps) route<kept>(gate, logits_TE, token);
}

template <class T>
void run(const skinny::Product<T>& p, const Gate& gate, float* logits, unsigned* done, cudaStream_t stream) {
    skinny::with_columns<T>(gate.count, [&](auto NT) {
        constexpr int n = decltype(NT)::value;
        const auto with = [&](auto kernel) {
            launch(kernel,
                   {dim3(skinny::blocks(p.F, false)), dim3(skinny::threads), skinny::memory<T, n>(), stream, true}, p,
                   gate, logits, done);
        };
        if (kept_scores(gate) <= 4) return with(norm_gate_kernel<T, n, 4>);
        with(norm_gate_kernel<T, n, 16>);
    });
}

std::tuple<Tensor, Tensor, Tensor> norm_gate(const Tensor& x, const Tensor& norm_weight, double eps,
                                             const Tensor& weight, int64_t top_k, const std::optional<Tensor>& bias,
                                             const std::string& scoring,
                                             const std::optional<std::vector<int64_t>>& groups, bool renormalize,
                                             double scale, const std::optional<Tensor>& counters, bool early) {
    Arguments arguments("norm_gate");
    skinny::check_tensors(arguments, x, norm_weight, weight, std::nullopt, "E");
    if (bias) arguments.tensor("bias", *bias, ScalarType::Float, {"E"});
    if (counters) arguments.tensor("counters", *counters, ScalarType::Int, {"C"});
    const int64_t T = arguments["T"], D = arguments["D"], E = arguments["E"];
    skinny::check_sizes(arguments, T, D, E);
    Gate gate = make_gate(arguments, T, E, top_k, bias, scoring, groups, renormalize, scale);

    Tensor normed = torch::stable::new_empty(x, {T, D});
    Tensor weights = torch::stable::new_empty(x, {T, top_k}, ScalarType::Float);
    Tensor indices = torch::stable::new_empty(x, {T, top_k}, ScalarType::Int);
    if (T == 0) return {normed, weights, indices};
    gate.weights_TN = static_cast<float*>(weights.mutable_data_ptr());
    gate.indices_TN = static_cast<int*>(indices.mutable_data_ptr());
    const DeviceScope device(x);
    const Counters done(arguments, counters, x, 1);
    Tensor logits = torch::stable::new_empty(x, {T, E}, ScalarType::Float);
    arguments.with_float_type([&](auto element) {
        using Element = decltype(element);
        auto p = skinny::product<Element>(arguments, x, norm_weight, eps, weight, false, early);
        p.normed_TD = static_cast<Element*>(normed.mutable_data_ptr());
        run(p, gate, static_cast<float*>(logits.mutable_data_ptr()), done.data, device.stream);
    });
    return {normed, weights, indices};
}

}  // namespace

PYLLAMA_KERNEL(norm_gate);
