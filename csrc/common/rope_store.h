// rope_store.h - what stands between the QKV product and attention over a paged cache: RMSNorm over each query and key
// head, RoPE, queries back in place, keys and values to their places in the cache. In float32, rounded once; values are
// copied.
#pragma once

#include "common/op.h"
#include "common/reduce.h"
#include "common/rotary.h"
#include "common/vector.h"

template <class T>
struct RopeStore {
    T* qkv_TF;  // F = (H + 2G) K
    int64_t qkv_stride;
    T* cache_P2GSK;
    const int* positions_T;
    const int* slots_T;  // page * S + place, or -1; null: token b is the last of seq_lens[b], none where that is 0
    const int *seq_lens_B, *block_table;
    int max_pages;
    const float* cos_sin_PR;  // or null, and R = 0
    int64_t cos_sin_stride;
    const T* q_weight_K;  // or null
    const T* k_weight_K;  // or null
    float eps;
    int tokens, H, G, K, S, R;

    __device__ int slot(int64_t token) const {
        if (slots_T) return slots_T[token];
        const int last = seq_lens_B[token] - 1;
        return last < 0 || last >= max_pages * S ? -1 : block_table[token * max_pages + last / S] * S + last % S;
    }
};

// Head h of a token's H + 2G: queries, keys, values.
template <class T>
struct PassedHead {
    bool exists, query, value;
    const T* weight_K;
    T* x_K;

    __device__ PassedHead(const RopeStore<T>& p, int64_t token, int h) {
        exists = token < p.tokens && h < p.H + 2 * p.G;
        query = h < p.H;
        value = h >= p.H + p.G;
        weight_K = query ? p.q_weight_K : value ? nullptr : p.k_weight_K;
        x_K = p.qkv_TF + token * p.qkv_stride + h * p.K;
    }
};

// A head after RMSNorm (with a weight) and RoPE (if `turned`). All of a warp call it; `lanes` of them have a head.
template <class T, bool interleaved>
__device__ HeadValues<T> treated(const RopeStore<T>& p, const Vector<T>& first, const Vector<T>& second,
                                 const T* weight_K, bool turned, const HeadPart<T>& part,
                                 const Angles<T, interleaved>& angles, int lanes) {
    HeadValues<T> values(first, second);
    if (p.q_weight_K || p.k_weight_K) {  // the same for all threads, which meet in the sum
        float sum = 0;
        for (const float x : values.x) sum += x * x;
        const float scale = rsqrtf(__fdividef(lanes_sum(sum, lanes), p.K) + p.eps);
        if (weight_K && part.has_first) {
            const Vector<T> none{};
            const HeadValues<T> weight(load(weight_K, part.first),
                                       part.has_second ? load(weight_K, part.second) : none);
            for (int j = 0; j < 2 * values.size; ++j) values.x[j] *= scale * weight.x[j];
        }
    }
    if (part.rotated && turned) angles.rotate(values);
    return values;
}

template <class T, bool interleaved>
__global__ void __launch_bounds__(256) rope_store(const RopeStore<T> p) {
    wait_for_previous_kernels();
    const int64_t token = int64_t(blockIdx.x) * blockDim.z + threadIdx.z;
    const HeadPart<T> part(threadIdx.x, p.K, p.R);
    const int first_head = blockIdx.y * heads_per_lane * blockDim.y + threadIdx.y;
    const bool here = token < p.tokens;
    const int position = here && p.R > 0 ? p.positions_T[token] : 0;
    const int slot = here ? p.slot(token) : -1;

    Vector<T> kept[heads_per_lane][2];
#pragma unroll
    for (int i = 0; i < heads_per_lane; ++i) {
        const PassedHead<T> head(p, token, first_head + i * blockDim.y);
        if (head.exists && part.has_first) kept[i][0] = load(head.x_K, part.first);
        if (head.exists && part.has_second) kept[i][1] = load(head.x_K, part.second);
    }
    Angles<T, interleaved> angles;
    if (here && part.rotated) angles.load(p.cos_sin_PR + position * p.cos_sin_stride, p.R, part);

#pragma unroll
    for (int i = 0; i < heads_per_lane; ++i) {
        const int h = first_head + i * blockDim.y;
        const PassedHead<T> head(p, token, h);
        const HeadValues<T> values =
            treated(p, kept[i][0], kept[i][1], head.weight_K, !head.value, part, angles, blockDim.x);
        if (!head.exists || !part.has_first || (!head.query && slot < 0)) continue;
        T* to_K = head.x_K;
        if (!head.query) {
            const int page = slot / p.S, place = slot - page * p.S;
            to_K = p.cache_P2GSK + ((int64_t(page) * 2 * p.G + h - p.H) * p.S + place) * p.K;  // keys, then values
        }
        store(to_K, part.first, values.vector(0));
        if (part.has_second) store(to_K, part.second, values.vector(1));
    }
}

template <class T>
void run_rope_store(const RopeStore<T>& p, bool interleaved, cudaStream_t stream) {
    const HeadTile tile = choose_head_tile(p.tokens, p.H + 2 * p.G, head_lanes<T>(p.K));
    launch(interleaved ? rope_store<T, true> : rope_store<T, false>, {tile.grid, tile.block, 0, stream, true}, p);
}

// Checks what the ops' arguments must be, but for positions and slots; the problem, but for these.
template <class T>
RopeStore<T> make_rope_store(const Arguments& arguments, const Tensor& qkv, const Tensor& kv_cache,
                             const std::optional<Tensor>& cos_sin, const std::optional<Tensor>& q_weight,
                             const std::optional<Tensor>& k_weight, double eps) {
    RopeStore<T> p{};
    p.qkv_TF = static_cast<T*>(qkv.mutable_data_ptr());
    p.qkv_stride = qkv.stride(0);
    p.cache_P2GSK = arguments.mutable_data<T>("kv_cache", kv_cache);
    if (cos_sin) p.cos_sin_PR = static_cast<const float*>(cos_sin->const_data_ptr());
    if (cos_sin) p.cos_sin_stride = cos_sin->stride(0);
    if (q_weight) p.q_weight_K = arguments.data<T>("q_weight", *q_weight);
    if (k_weight) p.k_weight_K = arguments.data<T>("k_weight", *k_weight);
    p.eps = float(eps);
    p.tokens = int(qkv.size(0)), p.G = int(arguments["G"]), p.K = int(arguments["K"]), p.S = int(arguments["S"]);
    p.H = int(arguments["features"] / p.K - 2 * p.G), p.R = cos_sin ? int(arguments["R"]) : 0;
    return p;
}

inline void check_rope_store(Arguments& arguments, const Tensor& qkv, const Tensor& kv_cache,
                             const std::optional<Tensor>& cos_sin, const std::optional<Tensor>& q_weight,
                             const std::optional<Tensor>& k_weight) {
    arguments.tensor("kv_cache", kv_cache, {"P", "2", "G", "S", "K"});
    if (cos_sin) arguments.tensor("cos_sin", *cos_sin, ScalarType::Float, {"max_positions", "R"});
    if (q_weight) arguments.tensor("q_weight", *q_weight, {"K"});
    if (k_weight) arguments.tensor("k_weight", *k_weight, {"K"});
    const int64_t features = arguments["features"], G = arguments["G"], K = arguments["K"];
    const int64_t R = cos_sin ? arguments["R"] : 0, H = K == 0 ? 0 : features / K - 2 * G;
    if (H <= 0 || G == 0 || features % K != 0 || H % G != 0)
        arguments.fail("qkv has ", features, " features, but must have (H + 2G) K with G = ", G, ", K = ", K,
                       " as in kv_cache and H a multiple of G");
    check_head(arguments, K, R);
    arguments.rows("qkv", qkv);
    arguments.rows("kv_cache", kv_cache);
    if (cos_sin) arguments.rows("cos_sin", *cos_sin);
    if (q_weight) arguments.rows("q_weight", *q_weight);
    if (k_weight) arguments.rows("k_weight", *k_weight);
}
