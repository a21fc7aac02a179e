// decode_attention.cu - a step of decoding between the QKV product and the output product: RMSNorm of queries and keys,
// RoPE, keys and values to the paged cache, attention, whose result takes the queries' place. One kernel, that of
// common/attention_kernels.h, with the queries as they come from the product: each block turns those it has, and the
// block that has the newest key writes it before it reads it.
#include "common/attention_kernels.h"
#include "common/rope_store.h"

namespace {

template <class T, bool interleaved>
struct TurnedQueries {
    RopeStore<T> p;

    // The block's queries to shared memory, and its key/value head's newest key and value to the cache, if they are
    // among the keys that it reads.
    template <class P, class Head>
    __device__ void bring(const Problem<T>& problem, const Head& head, const Work& work, T* tile) const {
        constexpr int width = P::K <= 32 ? 2 : P::K <= 64 ? 4 : 8;  // lanes of a head, with two vectors each
        const int g = blockIdx.y, newest = work.position;
        const bool stored = newest >= 0 && newest < p.max_pages * p.S;  // beyond the block table is nobody's
        const HeadPart<T> part(threadIdx.x % width, P::K, p.R);
        Angles<T, interleaved> angles;
        if (part.rotated) angles.load(p.cos_sin_PR + p.positions_T[work.token] * p.cos_sin_stride, p.R, part);
        const int heads = work.rows + (stored && work.end == newest + 1 ? 2 : 0);
        for (int first = 0; first < heads; first += P::threads / width) {
            const int i = first + threadIdx.x / width;
            const bool exists = i < heads, query = i<work.rows, value = i> work.rows;
            const int h = query ? g * problem.R + work.first + i : p.H + (value ? p.G : 0) + g;
            const T* x_K = p.qkv_TF + work.token * p.qkv_stride + h * P::K;
            const T* weight_K = query ? p.q_weight_K : value ? nullptr : p.k_weight_K;
            Vector<T> kept[2];
            if (exists && part.has_first) kept[0] = load(x_K, part.first);
            if (exists && part.has_second) kept[1] = load(x_K, part.second);
            const HeadValues<T> values = treated(p, kept[0], kept[1], weight_K, !value, part, angles, width);
            if (!exists || !part.has_first) continue;
            if (query) {
                *reinterpret_cast<uint4*>(chunk_at<P::K>(tile, i, part.first)) = values.vector(0).bits;
                if (part.has_second)
                    *reinterpret_cast<uint4*>(chunk_at<P::K>(tile, i, part.second)) = values.vector(1).bits;
            } else {
                T* to_K = const_cast<T*>(value ? head.value(newest) : head.key(newest));
                store(to_K, part.first, values.vector(0));
                if (part.has_second) store(to_K, part.second, values.vector(1));
            }
        }
        __syncthreads();
    }
};

void decode_attention_(Tensor qkv, Tensor kv_cache, const Tensor& block_table, const Tensor& seq_lens,
                       const Tensor& positions, const std::optional<Tensor>& cos_sin,
                       const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight, double eps,
                       bool interleaved, std::optional<int64_t> window, const std::optional<Tensor>& counters) {
    Arguments arguments("decode_attention_");
    arguments.tensor("qkv", qkv, {"B", "features"});
    arguments.tensor("block_table", block_table, ScalarType::Int, {"B", "max_pages"});
    arguments.tensor("seq_lens", seq_lens, ScalarType::Int, {"B"});
    arguments.tensor("positions", positions, ScalarType::Int, {"B"});
    if (counters) arguments.tensor("counters", *counters, ScalarType::Int, {"C"});
    check_rope_store(arguments, qkv, kv_cache, cos_sin, q_weight, k_weight);
    check_window(arguments, window);
    const int64_t G = arguments["G"], K = arguments["K"], S = arguments["S"], max_pages = arguments["max_pages"];
    page_bits(arguments, S);

    if (qkv.numel() == 0) return;
    const DeviceScope device(qkv);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        auto store = make_rope_store<T>(arguments, qkv, kv_cache, cos_sin, q_weight, k_weight, eps);
        store.positions_T = arguments.data<int>("positions", positions);
        store.seq_lens_B = arguments.data<int>("seq_lens", seq_lens);
        store.block_table = arguments.data<int>("block_table", block_table);
        store.max_pages = int(max_pages);
        const Paged<T> source = paged_source<T>(arguments, kv_cache, block_table, seq_lens);
        Problem<T> p{};
        p.q = p.out = store.qkv_TF;
        p.q_token = p.out_token = store.qkv_stride, p.q_head = K;
        p.B = int(arguments["B"]), p.G = int(G), p.R = store.H / int(G);
        p.window = window_or_all(window);
        p.scale = exponent_scale(1 / std::sqrt(double(K)));
        p.splits = 1;
        if constexpr (std::is_same_v<T, float>) {
            if (K > plain_columns) arguments.fail("K, the head size, is ", K, ", but must be at most ", plain_columns);
            run_rope_store(store, interleaved, device.stream);
            run_plain(p, source, qkv, int(K), int(K), device.stream);
        } else {
            if (p.R > Decode<T, 64, 64>::rows)
                arguments.fail("H / G, the queries of a key, are ", p.R, ", but must be at most ",
                               Decode<T, 64, 64>::rows, " (norm_rope_store_ and paged_attention take more)");
            const Counters done(arguments, counters, qkv, int64_t(p.B) * G);
            p.done = done.data;
            const bool found = with_head_size<32, 64, 96, 128>(K, [&](auto size) {
                constexpr int k = decltype(size)::value;
                if (interleaved)
                    run_decode<T, k, k>(p, source, TurnedQueries<T, true>{store}, qkv, max_pages * S, device.stream);
                else
                    run_decode<T, k, k>(p, source, TurnedQueries<T, false>{store}, qkv, max_pages * S, device.stream);
            });
            if (!found)
                arguments.fail("K, the head size, is ", K, ", but must be 32, 64, 96 or 128 (norm_rope_store_ and ",
                               "paged_attention take more)");
        }
    });
}

}  // namespace

PYLLAMA_KERNEL(decode_attention_);
