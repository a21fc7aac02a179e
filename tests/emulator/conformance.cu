// Prints what each primitive computes, bit by bit. Build with g++ and with nvcc (sm_90a), run both and
// compare the two outputs with diff: this is what ties the emulator to the hardware.
// conformance [seed]: of the schedule of the emulated threads, on which nothing may depend.
#include <cstdio>
#include <cstdlib>

#include "common/hopper.h"

#ifdef __CUDACC__
static void* allocate(size_t n) {
    void* p = nullptr;
    if (cudaMallocManaged(&p, n)) std::abort();
    return p;
}
static void finish() {
    if (cudaError_t e = cudaDeviceSynchronize()) std::printf("CUDA: %s\n", cudaGetErrorString(e)), std::exit(1);
}
static void schedule(const char*) {}  // the device's own
#else
static void* allocate(size_t n) { return std::aligned_alloc(256, (n + 255) / 256 * 256); }
static void finish() {}
static void schedule(const char* seed) { emu::options().seed = std::strtoull(seed, nullptr, 10); }
#endif

using bf16 = __nv_bfloat16;
constexpr int words = 1 << 17;

__device__ uint32_t bits(float x) { return __float_as_uint(x); }
__device__ int small(int i) { return (i * 7 + i / 5 * 3) % 11 - 5; }  // exact in bf16, sums exact in float

__global__ void warp(uint32_t* out) {
    const int lane = threadIdx.x;
    auto put = [&](uint32_t v) { *out = v, out += 32; };
    out += lane;
    for (int width = 32; width >= 4; width /= 2) {
        put(__shfl_sync(~0u, lane, 5, width));
        put(__shfl_sync(~0u, lane, lane * 3, width));
        put(__shfl_xor_sync(~0u, lane, 3, width));
        put(__shfl_xor_sync(~0u, lane, 17, width));
        put(__shfl_up_sync(~0u, lane, 3, width));
        put(__shfl_down_sync(~0u, lane, 3, width));
    }
    put(__ballot_sync(~0u, lane % 3 == 0));
    put(__any_sync(~0u, lane == 7));
    put(__all_sync(~0u, lane != 7));
    put(__match_any_sync(~0u, lane % 5));
    put(__reduce_add_sync(~0u, lane));
    put(__reduce_max_sync(~0u, -lane));
    put(__reduce_xor_sync(~0u, unsigned(lane * lane)));
    if (lane < 16) put(__shfl_xor_sync(0xffffu, lane, 1));
    put(__brev(lane));
    put(__clz(lane));
    put(__ffs(lane));
    put(__syncthreads_count(lane % 3));
    put(__syncthreads_or(lane == 9));
    put(__syncthreads_and(lane == 9));
}

struct Matrices {
    uint16_t m[4][64];
    uint4 copied[32];
};
__global__ void matrices(uint32_t* out, const uint4* in) {
    auto& s = shared<Matrices>();
    const int lane = threadIdx.x;
    auto put = [&](uint32_t v) { *out = v, out += 32; };
    out += lane;
    for (int i = lane; i < 256; i += 32) s.m[i / 64][i % 64] = uint16_t(i);
    cp_async16(&s.copied[lane], in + lane, lane % 4 ? 16 : 0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const void* row = &s.m[lane / 8][lane % 8 * 8];
    uint32_t r4[4], r2[2], r1;
    ldmatrix_x4(r4, row);
    for (uint32_t r : r4) put(r);
    ldmatrix_x4_trans(r4, row);
    for (uint32_t r : r4) put(r);
    ldmatrix_x2(r2, row);
    for (uint32_t r : r2) put(r);
    ldmatrix_x2_trans(r2, row);
    for (uint32_t r : r2) put(r);
    ldmatrix_x1(r1, row);
    put(r1);
    ldmatrix_x1_trans(r1, row);
    put(r1);
    prefetch_l2(in);
    const uint4 once = load_once(in + lane);
    put(once.x), put(once.w);
    auto stored = [&] {  // what stmatrix wrote, each lane its 16 bytes
        __syncwarp();
        for (int i = 0; i < 4; ++i) put(reinterpret_cast<uint32_t*>(&s.m[lane / 8][lane % 8 * 8])[i]);
        __syncwarp();
    };
    auto* to = &s.m[lane / 8][(lane % 8 ^ 3) * 8];
    uint32_t v4[4], v2[2], v1[1];
    for (int i = 0; i < 4; ++i) v4[i] = (lane * 8 + i * 2) | (lane * 8 + i * 2 + 1) << 16;
    v2[0] = v4[1], v2[1] = v4[3], v1[0] = v4[2];
    stmatrix_x4(to, v4), stored();
    stmatrix_x4_trans(to, v4), stored();
    stmatrix_x2(to, v2), stored();
    stmatrix_x2_trans(to, v2), stored();
    stmatrix_x1(to, v1), stored();
    stmatrix_x1_trans(to, v1), stored();
    const uint4 c = s.copied[31 - lane];
    put(c.x), put(c.w);

    uint32_t a[4], b[2], ha[4], hb[2];
    float d[4], h[4];
    for (int i = 0; i < 4; ++i) {
        const int x = small(lane * 8 + i * 2), y = small(lane * 8 + i * 2 + 1);
        a[i] = pack_bf16(float(x), float(y));
        const __half2 p = __floats2half2_rn(float(x), float(y));
        ha[i] = *reinterpret_cast<const uint32_t*>(&p);
        if (i < 2) b[i] = a[i] ^ 0x80000000u, hb[i] = ha[i] ^ 0x80000000u;
        d[i] = h[i] = float(small(lane + i * 32));
    }
    mma_bf16(d, a, b);
    mma_f16(h, ha, hb);
    for (float x : d) put(bits(x));
    for (float x : h) put(bits(x));
}

struct Tma {
    bf16 box[2][8 * 64];
    uint64_t bar;
};
__global__ void tma(uint32_t* out, const __grid_constant__ CUtensorMap two, const __grid_constant__ CUtensorMap three,
                    const __grid_constant__ CUtensorMap store) {
    auto& s = *dynamic_shared<Tma>();
    if (threadIdx.x == 0) {
        mbar_init(&s.bar, 1);
        fence_mbarrier_init();
        mbar_arrive_expect(&s.bar, sizeof s.box);
        tma_load_2d(s.box[0], &two, 16, -2, &s.bar);  // two rows above the tensor, columns past its end
        tma_load_3d(s.box[1], &three, 0, 3, 1, &s.bar);
    }
    __syncthreads();
    mbar_wait(&s.bar, 0);
    for (int i = threadIdx.x; i < 2 * 8 * 32; i += 32) out[i] = reinterpret_cast<uint32_t*>(s.box)[i];
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store_2d(&store, s.box[1], 8, 4);  // partly outside
        tma_store_commit();
        tma_store_wait<0>();
    }
}

__global__ void bulk(uint32_t* out, const bf16* in) {
    auto& s = *dynamic_shared<Tma>();
    if (threadIdx.x == 0) {
        mbar_init(&s.bar, 1);
        fence_mbarrier_init();
        bulk_prefetch_l2(in, 512);
        mbar_arrive_expect(&s.bar, 512);
        bulk_load(s.box[0] + 16, in + 8, 512, &s.bar);
    }
    __syncthreads();
    wait_for_previous_kernels();
    mbar_wait(&s.bar, 0);
    for (int i = threadIdx.x; i < 128; i += 32) out[i] = reinterpret_cast<uint32_t*>(s.box[0] + 16)[i];
}

// One wgmma of each n, kind and operand source on whatever the tiles hold: what it reads where is all that matters.
// 256 rows of b and 64 of a, as wide as the swizzle; MN-major operands are the same bytes seen the other way.
template <int swizzle>
struct Wgmma {
    static constexpr int wide = swizzle ? swizzle / 2 : 16;
    bf16 a[256 * wide], b[256 * wide];
    uint64_t bar;
};
template <int n, int swizzle, bool half, bool a_mn, bool b_mn, bool registers>
__device__ void one(uint32_t* out, const Wgmma<swizzle>& s) {
    constexpr int row = swizzle ? swizzle : 16;  // bytes; a group of 8 rows is contiguous
    float d[n / 2];
    uint32_t r[4];
    for (int i = 0; i < 4; ++i) {
        const int k = (threadIdx.x * 4 + i) * 2;
        const __half2 h = __floats2half2_rn(float(small(k)), float(small(k + 1)));
        r[i] = half ? *reinterpret_cast<const uint32_t*>(&h) : pack_bf16(float(small(k)), float(small(k + 1)));
    }
    // MN-major, 16 k: two groups of 8 rows, then the next run of m or n. Without swizzle: 8 x 8 matrices, two in k.
    const uint64_t a = swizzle
                           ? (a_mn ? wgmma_desc<swizzle>(s.a, row * 8, row * 16) : wgmma_desc<swizzle>(s.a, row * 8))
                           : wgmma_desc<0>(s.a, 256, 128);
    const uint64_t b = swizzle
                           ? (b_mn ? wgmma_desc<swizzle>(s.b, row * 8, row * 16) : wgmma_desc<swizzle>(s.b, row * 8))
                           : wgmma_desc<0>(s.b, 256, 128);
    wgmma_fence();
    if constexpr (registers && half)
        wgmma_f16<b_mn>(d, r, b, false);
    else if constexpr (registers)
        wgmma<b_mn>(d, r, b, false);
    else if constexpr (half)
        wgmma_f16<a_mn, b_mn>(d, a, b, false);
    else
        wgmma<a_mn, b_mn>(d, a, b, false);
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < n / 2; ++i) out[i * 128 + threadIdx.x] = bits(d[i]);
}
template <int n, int swizzle, bool half>
__global__ void wgmmas(uint32_t* out, const __grid_constant__ CUtensorMap map) {
    auto& s = *dynamic_shared<Wgmma<swizzle>>();
    if (threadIdx.x == 0) {
        mbar_init(&s.bar, 1);
        fence_mbarrier_init();
        mbar_arrive_expect(&s.bar, sizeof s.a + sizeof s.b);
        tma_load_2d(s.a, &map, 0, 0, &s.bar);
        tma_load_2d(s.b, &map, 0, 256, &s.bar);
    }
    __syncthreads();
    mbar_wait(&s.bar, 0);
    one<n, swizzle, half, false, false, false>(out, s), out += n / 2 * 128;
    one<n, swizzle, half, false, true, false>(out, s), out += n / 2 * 128;
    one<n, swizzle, half, true, false, false>(out, s), out += n / 2 * 128;
    one<n, swizzle, half, true, true, false>(out, s), out += n / 2 * 128;
    one<n, swizzle, half, false, false, true>(out, s), out += n / 2 * 128;
    one<n, swizzle, half, false, true, true>(out, s);
}

int main(int count, char** arguments) {
    if (count > 1) schedule(arguments[1]);
    static auto* out = static_cast<uint32_t*>(allocate(words * 4));
    static auto* data = static_cast<bf16*>(allocate(words * 2));
    static auto* stored = static_cast<bf16*>(allocate(16 * 24 * 2));
    auto show = [&](const char* name, int n) {
        finish();
        std::printf("%s", name);
        for (int i = 0; i < n; ++i) std::printf("%s%08x", i % 32 ? " " : "\n", out[i]);
        std::printf("\n");
    };
    auto clear = [&] {
        for (int i = 0; i < words; ++i)
            out[i] = 0xdeadbeef, data[i] = __float2bfloat16_rn(float((i * 7 + i / 5 * 3) % 11 - 5));
    };
    clear();
    launch(warp, {dim3(1), dim3(32)}, out);
    show("warp", 38 * 32);
    clear();
    launch(matrices, {dim3(1), dim3(32)}, out, reinterpret_cast<const uint4*>(data));
    show("matrices", 51 * 32);

    clear();
    for (int i = 0; i < 16 * 24; ++i) stored[i] = __float2bfloat16_rn(100);
    const CUtensorMap two = tensor_map(data, 2, {72, 6, 1}, {72, 0}, {64, 8, 1});
    const CUtensorMap three = tensor_map(data, 3, {64, 8, 4}, {64, 512}, {64, 8, 1});
    const CUtensorMap store = tensor_map(stored, 2, {24, 10, 1}, {24, 0}, {64, 8, 1});
    launch(tma, {dim3(1), dim3(32), sizeof(Tma)}, out, two, three, store);
    show("tma", 512);
    for (int i = 0; i < 16 * 24; ++i) out[i] = uint32_t(__bfloat162float(stored[i]));
    show("tma store", 16 * 24);

    clear(), launch(bulk, {dim3(1), dim3(32), sizeof(Tma)}, out, data), show("bulk", 128);

    auto all = [&](auto n, auto swizzle) {
        constexpr int N = decltype(n)::value, S = decltype(swizzle)::value;
        constexpr uint32_t wide = Wgmma<S>::wide;
        clear();
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 512 * int(wide); ++i) {
                const float x = float((i * 7 + i / 5 * 3) % 11 - 5);
                if (half)
                    reinterpret_cast<__half*>(data)[i] = __float2half_rn(x);
                else
                    data[i] = __float2bfloat16_rn(x);
            }
            const CUtensorMap map = tensor_map(data, 2, {wide, 512, 1}, {wide, 0}, {wide, 256, 1}, S);
            const Launch l{dim3(1), dim3(128), sizeof(Wgmma<S>)};
            if (half)
                launch(wgmmas<N, S, true>, l, out, map);
            else
                launch(wgmmas<N, S, false>, l, out, map);
            std::printf("n %d swizzle %d %s: a b; a b^T; a^T b; a^T b^T; a in registers: b; b^T ", N, S,
                        half ? "f16" : "bf16");
            show("", 6 * N / 2 * 128);
        }
    };
    auto sizes = [&](auto swizzle) {
        using std::integral_constant;
        all(integral_constant<int, 8>(), swizzle), all(integral_constant<int, 16>(), swizzle);
        all(integral_constant<int, 32>(), swizzle), all(integral_constant<int, 64>(), swizzle);
        all(integral_constant<int, 96>(), swizzle), all(integral_constant<int, 128>(), swizzle);
        all(integral_constant<int, 192>(), swizzle), all(integral_constant<int, 256>(), swizzle);
    };
    sizes(std::integral_constant<int, 128>()), sizes(std::integral_constant<int, 64>());
    sizes(std::integral_constant<int, 32>()), sizes(std::integral_constant<int, 0>());
}
