// norm_rope_store.cu - one pass over the QKV product: RMSNorm over each query and key head, RoPE, queries back in
// place, keys and values to their places in the paged cache. In float32, rounded once; values are copied.
//
// The parts of qkv that held keys and values are left as they were.
#include "common/op.h"
#include "common/reduce.h"
#include "common/rotary.h"
#include "common/rows.h"
#include "common/vector.h"

namespace {

template <class T>
struct Params {
    T* qkv_TF;  // F = (H + 2G) K
    int64_t qkv_stride;
    T* cache_P2GSK;
    const int* positions_T;
    const int* slots_T;       // page * S + place, or -1
    const float* cos_sin_PR;  // or null, and R = 0
    int64_t cos_sin_stride;
    const T* q_weight_K;  // or null
    const T* k_weight_K;  // or null
    float eps;
    int tokens, H, G, K, S, R;
};

// Head h of a token's H + 2G: queries, keys, values.
template <class T>
struct Head {
    bool exists, query, value;
    const T* weight_K;
    T* x_K;

    __device__ Head(const Params<T>& p, int64_t token, int h) {
        exists = token < p.tokens && h < p.H + 2 * p.G;
        query = h < p.H;
        value = h >= p.H + p.G;
        weight_K = query ? p.q_weight_K : value ? nullptr : p.k_weight_K;
        x_K = p.qkv_TF + token * p.qkv_stride + h * p.K;
    }
};

template <class T, bool interleaved>
__global__ void __launch_bounds__(256) kernel(const Params<T> p) {
    wait_for_previous_kernels();
    const int64_t token = int64_t(blockIdx.x) * blockDim.z + threadIdx.z;
    const HeadPart<T> part(threadIdx.x, p.K, p.R);
    const int first_head = blockIdx.y * heads_per_lane * blockDim.y + threadIdx.y;
    const bool here = token < p.tokens;
    const int position = here && p.R > 0 ? p.positions_T[token] : 0;
    const int slot = here ? p.slots_T[token] : -1;

    Vector<T> kept[heads_per_lane][2];
#pragma unroll
    for (int i = 0; i < heads_per_lane; ++i) {
        const Head<T> head(p, token, first_head + i * blockDim.y);
        if (head.exists && part.has_first) kept[i][0] = load(head.x_K, part.first);
        if (head.exists && part.has_second) kept[i][1] = load(head.x_K, part.second);
    }
    Angles<T, interleaved> angles;
    if (here && part.rotated) angles.load(p.cos_sin_PR + position * p.cos_sin_stride, p.R, part);

#pragma unroll
    for (int i = 0; i < heads_per_lane; ++i) {
        const int h = first_head + i * blockDim.y;
        const Head<T> head(p, token, h);
        HeadValues<T> values(kept[i][0], kept[i][1]);
        if (p.q_weight_K || p.k_weight_K) {  // the same for all threads, which meet in the sum
            float sum = 0;
            for (const float x : values.x) sum += x * x;
            const float scale = rsqrtf(__fdividef(lanes_sum(sum, blockDim.x), p.K) + p.eps);
            if (head.weight_K && part.has_first) {
                const Vector<T> first = load(head.weight_K, part.first);
                const Vector<T> second = part.has_second ? load(head.weight_K, part.second) : Vector<T>{};
                const HeadValues<T> weight(first, second);
                for (int j = 0; j < 2 * values.size; ++j) values.x[j] *= scale * weight.x[j];
            }
        }
        if (part.rotated && !head.value) angles.rotate(values);
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

void norm_rope_store_(Tensor qkv, Tensor kv_cache, const Tensor& positions, const Tensor& slots,
                      const std::optional<Tensor>& cos_sin, const std::optional<Tensor>& q_weight,
                      const std::optional<Tensor>& k_weight, double eps, bool interleaved) {
    Arguments arguments("norm_rope_store_");
    arguments.tensor("qkv", qkv, {"T", "features"});
    arguments.tensor("kv_cache", kv_cache, {"P", "2", "G", "S", "K"});
    arguments.tensor("positions", positions, ScalarType::Int, {"T"});
    arguments.tensor("slots", slots, ScalarType::Int, {"T"});
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

    if (qkv.numel() == 0) return;
    const DeviceScope device(qkv);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        Params<T> p{};
        p.qkv_TF = static_cast<T*>(qkv.mutable_data_ptr());
        p.qkv_stride = qkv.stride(0);
        p.cache_P2GSK = const_cast<T*>(arguments.data<T>("kv_cache", kv_cache));
        p.positions_T = arguments.data<int>("positions", positions);
        p.slots_T = arguments.data<int>("slots", slots);
        if (cos_sin) p.cos_sin_PR = static_cast<const float*>(cos_sin->const_data_ptr());
        if (cos_sin) p.cos_sin_stride = cos_sin->stride(0);
        if (q_weight) p.q_weight_K = arguments.data<T>("q_weight", *q_weight);
        if (k_weight) p.k_weight_K = arguments.data<T>("k_weight", *k_weight);
        p.eps = float(eps);
        p.tokens = int(arguments["T"]), p.H = int(H), p.G = int(G), p.K = int(K);
        p.S = int(arguments["S"]), p.R = int(R);
        const HeadTile tile = choose_head_tile(p.tokens, p.H + 2 * p.G, head_lanes<T>(p.K));
        launch(interleaved ? kernel<T, true> : kernel<T, false>, {tile.grid, tile.block, 0, device.stream, true}, p);
    });
}

}  // namespace

PYLLAMA_KERNEL(norm_rope_store_);
