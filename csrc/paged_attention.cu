// paged_attention.cu - causal attention with grouped queries over a paged cache of keys and values: any mixture of
// prompts and single tokens, without padding. A pass with one query per sequence runs the decoding kernel of
// common/attention_kernels.h, any other the one for prompts; float32 has a plain one.
#include "common/attention_kernels.h"

namespace {

Tensor paged_attention(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table, const Tensor& cu_seqlens_q,
                       const Tensor& seq_lens, int64_t max_seqlen_q, std::optional<double> scale,
                       std::optional<int64_t> window) {
    Arguments arguments("paged_attention");
    arguments.tensor("q", q, {"T", "H", "K"});
    arguments.tensor("kv_cache", kv_cache, {"P", "2", "G", "S", "K"});
    arguments.tensor("block_table", block_table, ScalarType::Int, {"B", "max_pages"});
    arguments.tensor("cu_seqlens_q", cu_seqlens_q, ScalarType::Int, {"B+1"});
    arguments.tensor("seq_lens", seq_lens, ScalarType::Int, {"B"});
    check_heads(arguments, window);
    arguments.rows_of_heads("q", q);
    const int64_t K = arguments["K"], G = arguments["G"], S = arguments["S"], max_pages = arguments["max_pages"];
    page_bits(arguments, S);

    Tensor out = torch::stable::new_empty(q, q.sizes());
    if (q.size(0) == 0 || arguments["B"] == 0) return out;
    const DeviceScope device(q);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        auto p = make_problem<T>(arguments, q, cu_seqlens_q, G, scale, window);
        p.out = static_cast<T*>(out.mutable_data_ptr());
        p.out_token = out.stride(0);
        const Paged<T> source = paged_source<T>(arguments, kv_cache, block_table, seq_lens);
        if constexpr (std::is_same_v<T, float>) {
            if (K > plain_columns) arguments.fail("K, the head size, is ", K, ", but must be at most ", plain_columns);
            run_plain(p, source, q, int(K), int(K), device.stream);
        } else {
            const bool found = with_head_size<32, 64, 96, 128, 192, 256>(K, [&](auto size) {
                constexpr int k = decltype(size)::value;
                if (max_seqlen_q == 1 && int(sizeof(typename Decode<T, k, k>::Shared)) + 1024 <= max_shared_memory())
                    run_decode<T, k, k>(p, source, StoredQueries{}, q, max_pages * S, device.stream);
                else
                    run_prefill<T, k, k>(p, source, q, max_pages * S, device.stream);
            });
            if (!found)
                arguments.fail("K, the head size, is ", K,
                               ", but must be 32, 64, 96, 128, 192 or 256 (pyllama.eager() runs any)");
        }
    });
    return out;
}

}  // namespace

PYLLAMA_KERNEL(paged_attention);
