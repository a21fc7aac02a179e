// attention.cu - causal attention with grouped queries over ragged sequences whose keys and values lie end to end; the
// kernels are those of common/attention_kernels.h. float32 has a plain one, for exact tests and small models.
#include "common/attention_kernels.h"

namespace {

template <int K_, int V_>
struct HeadSize {
    static constexpr int K = K_, V = V_;
};

// Calls f with the head size among those compiled.
template <class F>
void with_head_size(const Arguments& arguments, int64_t K, int64_t V, F f) {
    if (K == 32 && V == 32) return f(HeadSize<32, 32>());
    if (K == 64 && V == 64) return f(HeadSize<64, 64>());
    if (K == 96 && V == 96) return f(HeadSize<96, 96>());
    if (K == 128 && V == 128) return f(HeadSize<128, 128>());
    if (K == 192 && V == 128) return f(HeadSize<192, 128>());
    if (K == 192 && V == 192) return f(HeadSize<192, 192>());
    if (K == 256 && V == 256) return f(HeadSize<256, 256>());
    arguments.fail(
        "K = ", K, " and V = ", V,
        ", the head sizes, but must be both 32, 64, 96, 128, 192 or 256, or 192 and 128 (pyllama.eager() runs any)");
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                 const Tensor& cu_seqlens_k, int64_t /*max_seqlen_q*/, int64_t max_seqlen_k,
                 std::optional<double> scale, std::optional<int64_t> window) {
    Arguments arguments("attention");
    arguments.tensor("q", q, {"T", "H", "K"});
    arguments.tensor("k", k, {"keys", "G", "K"});
    arguments.tensor("v", v, {"keys", "G", "V"});
    arguments.tensor("cu_seqlens_q", cu_seqlens_q, ScalarType::Int, {"B+1"});
    arguments.tensor("cu_seqlens_k", cu_seqlens_k, ScalarType::Int, {"B+1"});
    check_heads(arguments, window);
    const int64_t K = arguments["K"], V = arguments["V"], G = arguments["G"];
    for (const auto& [name, t] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) arguments.rows_of_heads(name, *t);

    Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), V});
    if (q.size(0) == 0 || arguments["B"] == 0) return out;
    const DeviceScope device(q);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        auto p = make_problem<T>(arguments, q, cu_seqlens_q, G, scale, window);
        p.out = static_cast<T*>(out.mutable_data_ptr());
        p.out_token = out.stride(0);
        const Contiguous<T> source{static_cast<const T*>(k.const_data_ptr()),
                                   static_cast<const T*>(v.const_data_ptr()),
                                   k.stride(0),
                                   k.stride(1),
                                   v.stride(0),
                                   v.stride(1),
                                   arguments.data<int>("cu_seqlens_k", cu_seqlens_k)};
        if constexpr (std::is_same_v<T, float>) {
            if (K > plain_columns || V > plain_columns)
                arguments.fail("K = ", K, " and V = ", V, ", the head sizes, but must be at most ", plain_columns);
            run_plain(p, source, q, int(K), int(V), device.stream);
        } else {
            with_head_size(arguments, K, V, [&](auto size) {
                run_prefill<T, decltype(size)::K, decltype(size)::V>(p, source, q, max_seqlen_k, device.stream);
            });
        }
    });
    return out;
}

}  // namespace

PYLLAMA_KERNEL(attention);
