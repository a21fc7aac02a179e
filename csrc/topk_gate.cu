// topk_gate.cu - the router of a mixture of experts: common/router.h, a warp for each token.
#include "common/router.h"

namespace {

constexpr int tokens = 4;  // of a block

template <class T, int kept>
__global__ void __launch_bounds__(32 * tokens) topk_gate_kernel(const T* logits_TE, const Gate p) {
    const int64_t token = int64_t(blockIdx.x) * tokens + threadIdx.y;
    if (token < p.count) route<kept>(p, logits_TE, token);  // a whole warp
}

template <class T>
void run(const T* logits_TE, const Gate& p, cudaStream_t stream) {
    const auto with = [&](auto kernel) {
        launch(kernel, {dim3((p.count - 1) / tokens + 1), dim3(32, tokens), 0, stream}, logits_TE, p);
    };
    const int needed = kept_scores(p);
    if (needed <= 1) return with(topk_gate_kernel<T, 1>);
    if (needed <= 2) return with(topk_gate_kernel<T, 2>);
    if (needed <= 4) return with(topk_gate_kernel<T, 4>);
    if (needed <= 8) return with(topk_gate_kernel<T, 8>);
    with(topk_gate_kernel<T, 16>);
}

std::tuple<Tensor, Tensor> topk_gate(const Tensor& logits, int64_t top_k, const std::optional<Tensor>& bias,
                                     const std::string& scoring, const std::optional<std::vector<int64_t>>& groups,
                                     bool renormalize, double scale) {
    Arguments arguments("topk_gate");
    arguments.tensor("logits", logits, {"T", "E"});
    if (bias) arguments.tensor("bias", *bias, ScalarType::Float, {"E"});
    const int64_t T = arguments["T"], E = arguments["E"];
    Gate gate = make_gate(arguments, T, E, top_k, bias, scoring, groups, renormalize, scale);

    Tensor weights = torch::stable::new_empty(logits, {T, top_k}, ScalarType::Float);
    Tensor indices = torch::stable::new_empty(logits, {T, top_k}, ScalarType::Int);
    if (T == 0) return {weights, indices};
    gate.weights_TN = static_cast<float*>(weights.mutable_data_ptr());
    gate.indices_TN = static_cast<int*>(indices.mutable_data_ptr());
    const DeviceScope device(logits);
    arguments.with_float_type(
        [&](auto element) { run(arguments.data<decltype(element)>("logits", logits), gate, device.stream); });
    return {weights, indices};
}

}  // namespace

PYLLAMA_KERNEL(topk_gate);
