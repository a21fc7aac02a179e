// mla_rope_store.cu - RoPE of latent attention's queries, in place, and its entry of the paged cache: the latent after
// RMSNorm and the rotated key. In float32, rounded once. A warp has some heads of a token's queries, or its entry.
#include "common/op.h"
#include "common/ptx.h"
#include "common/reduce.h"
#include "common/vector.h"

namespace {

constexpr int warps = 4;  // of a block
constexpr int heads = 4;  // of a warp

template <class T>
struct Params {
    T* q_THK;
    int64_t q_token, q_head;
    const T* latent_TL;
    int64_t latent_stride;
    T* cache_PSL;
    const T* weight;  // [rank]
    const int *positions_T, *slots_T;
    const float* cos_sin_PR;
    int64_t cos_sin_stride;
    float eps;
    int H, K, rank, R;
};

// Rotates R elements from `from` into `to`; lanes have neighbouring pairs.
template <class T, bool interleaved>
__device__ void rotate(const T* from, T* to, const float* cos_sin_R, int R) {
    for (int i = threadIdx.x; i < R / 2; i += 32) {
        const int a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + R / 2;
        const float x = float(from[a]), y = float(from[b]), cos = cos_sin_R[i], sin = cos_sin_R[i + R / 2];
        to[a] = T(x * cos - y * sin);
        to[b] = T(y * cos + x * sin);
    }
}

template <class T, bool interleaved>
__global__ void __launch_bounds__(32 * warps) mla_rope_store_kernel(const Params<T> p) {
    wait_for_previous_kernels();
    const int64_t token = blockIdx.x;
    const int unit = int(blockIdx.y) * warps + threadIdx.y;  // 0: the entry, then the queries
    const float* cos_sin_R = p.cos_sin_PR + p.positions_T[token] * p.cos_sin_stride;
    if (unit > 0) {
        for (int h = (unit - 1) * heads; h < min(unit * heads, p.H); ++h) {
            T* q_R = p.q_THK + token * p.q_token + h * p.q_head + p.K - p.R;
            rotate<T, interleaved>(q_R, q_R, cos_sin_R, p.R);
        }
        return;
    }
    const int slot = p.slots_T[token];
    if (slot < 0) return;
    const T* latent = p.latent_TL + token * p.latent_stride;
    T* entry = p.cache_PSL + int64_t(slot) * (p.rank + p.R);
    float sum = 0;
    for (int i = threadIdx.x; i < p.rank / Vector<T>::size; i += 32) {
        const Vector<T> v = load(latent, i);
        for (int j = 0; j < v.pairs; ++j) sum += v.get(j).x * v.get(j).x + v.get(j).y * v.get(j).y;
    }
    const float scale = rsqrtf(__fdividef(lanes_sum(sum, 32), p.rank) + p.eps);
    for (int i = threadIdx.x; i < p.rank / Vector<T>::size; i += 32) {
        const Vector<T> v = load(latent, i), weight = load(p.weight, i);
        Vector<T> scaled;
        for (int j = 0; j < v.pairs; ++j)
            scaled.set(j, {v.get(j).x * scale * weight.get(j).x, v.get(j).y * scale * weight.get(j).y});
        store(entry, i, scaled);
    }
    rotate<T, interleaved>(latent + p.rank, entry + p.rank, cos_sin_R, p.R);
}

void mla_rope_store_(Tensor q, const Tensor& latent, Tensor kv_cache, const Tensor& weight, const Tensor& positions,
                     const Tensor& slots, const Tensor& cos_sin, double eps, bool interleaved) {
    Arguments arguments("mla_rope_store_");
    arguments.tensor("q", q, {"T", "H", "K"});
    arguments.tensor("latent", latent, {"T", "L"});
    arguments.tensor("kv_cache", kv_cache, {"P", "S", "L"});
    arguments.tensor("weight", weight, {"rank"});
    arguments.tensor("positions", positions, ScalarType::Int, {"T"});
    arguments.tensor("slots", slots, ScalarType::Int, {"T"});
    arguments.tensor("cos_sin", cos_sin, ScalarType::Float, {"max_positions", "R"});
    const int64_t tokens = arguments["T"], H = arguments["H"], K = arguments["K"], L = arguments["L"];
    const int64_t rank = arguments["rank"], R = arguments["R"];
    if (rank + R != L || R > K)
        arguments.fail("weight has rank = ", rank, " and cos_sin R = ", R, ", but they must add up to L = ", L,
                       ", the size of an entry of kv_cache, and R must be at most q's K = ", K);
    if (R % 8 != 0 || rank % 8 != 0 || L > INT_MAX)
        arguments.fail("rank is ", rank, " and R ", R, ", but both must be multiples of 8");
    if (q.numel() > 0 && q.stride(2) != 1) arguments.fail("q must have contiguous rows: call .contiguous() on it");
    arguments.rows("latent", latent);
    if (tokens == 0) return;
    const DeviceScope device(q);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        Params<T> p{};
        p.q_THK = static_cast<T*>(q.mutable_data_ptr());
        p.q_token = q.stride(0), p.q_head = q.stride(1);
        p.latent_TL = static_cast<const T*>(latent.const_data_ptr());
        p.latent_stride = latent.stride(0);
        arguments.aligned_data<T>("kv_cache", kv_cache);
        p.cache_PSL = static_cast<T*>(kv_cache.mutable_data_ptr());
        p.weight = arguments.aligned_data<T>("weight", weight);
        p.positions_T = arguments.data<int>("positions", positions);
        p.slots_T = arguments.data<int>("slots", slots);
        p.cos_sin_PR = arguments.data<float>("cos_sin", cos_sin);
        p.cos_sin_stride = R;
        p.eps = float(eps);
        p.H = int(H), p.K = int(K), p.rank = int(rank), p.R = int(R);
        const int units = 1 + int((H + heads - 1) / heads);
        const dim3 grid{unsigned(tokens), unsigned((units + warps - 1) / warps)};
        launch(interleaved ? mla_rope_store_kernel<T, true> : mla_rope_store_kernel<T, false>,
               {grid, dim3(32, warps), 0, device.stream, true}, p);
    });
}

}  // namespace

PYLLAMA_KERNEL(mla_rope_store_);
