// hopper.h - sm_90a instructions: mbarrier, TMA, wgmma. Include only in sources built for sm_90a.
#pragma once
#include "common/ptx.h"

// ---- mbarrier --------------------------------------------------------------------------------

__device__ inline void mbar_init(uint64_t* bar, uint32_t arrivals) {
    PTX(("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(bar)), "r"(arrivals) : "memory"),
        emu::mbar_init(bar, arrivals));
}
__device__ inline void mbar_arrive(uint64_t* bar) {
    PTX(("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(bar)) : "memory"), emu::mbar_arrive(bar, 1, 0));
}
__device__ inline void mbar_arrive_expect(uint64_t* bar, uint32_t bytes) {
    PTX(("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(bar)), "r"(bytes) : "memory"),
        emu::mbar_arrive(bar, 1, bytes));
}
// Waits until the phase of the given parity has completed.
__device__ inline void mbar_wait(uint64_t* bar, uint32_t parity SITE) {
    PTX(("{\n.reg .pred p;\n"
         "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
         "@!p bra again;\n}" ::"r"(smem_addr(bar)),
         "r"(parity) : "memory"),
        emu::mbar_wait(bar, parity, site));
}
__device__ inline void fence_mbarrier_init() { PTX(("fence.mbarrier_init.release.cluster;" :: : "memory"), (void)0); }
__device__ inline void fence_proxy_async() {
    PTX(("fence.proxy.async.shared::cta;" :: : "memory"), emu::fence_proxy_async());
}

// ---- TMA -------------------------------------------------------------------------------------

__device__ inline void tma_load_2d(void* dst, const CUtensorMap* map, int x, int y, uint64_t* bar) {
    PTX(("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
         "[%4];" ::"r"(smem_addr(dst)),
         "l"(map), "r"(x), "r"(y), "r"(smem_addr(bar)) : "memory"),
        emu::tma_load(dst, map, {x, y, 0, 0}, bar));
}
__device__ inline void tma_load_3d(void* dst, const CUtensorMap* map, int x, int y, int z, uint64_t* bar) {
    PTX(("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
         "[%5];" ::"r"(smem_addr(dst)),
         "l"(map), "r"(x), "r"(y), "r"(z), "r"(smem_addr(bar)) : "memory"),
        emu::tma_load(dst, map, {x, y, z, 0}, bar));
}
__device__ inline void tma_store_2d(const CUtensorMap* map, const void* src, int x, int y) {
    PTX(("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
         "r"(smem_addr(src)), "r"(x), "r"(y) : "memory"),
        emu::tma_store(map, src, {x, y, 0, 0}));
}
__device__ inline void tma_store_commit() {
    PTX(("cp.async.bulk.commit_group;" :: : "memory"), emu::tma_store_commit());
}
template <int newest_allowed>
__device__ inline void tma_store_wait() {
    PTX(("cp.async.bulk.wait_group %0;" ::"n"(newest_allowed) : "memory"), emu::tma_store_wait(newest_allowed));
}
__device__ inline void tma_prefetch(const CUtensorMap* map) {
    PTX(("prefetch.tensormap [%0];" ::"l"(map) : "memory"), (void)map);
}

// Contiguous bytes: addresses and size are multiples of 16.
__device__ inline void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
    PTX(("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
             smem_addr(dst)),
         "l"(src), "r"(bytes), "r"(smem_addr(bar)) : "memory"),
        emu::bulk_load(dst, src, bytes, bar));
}
__device__ inline void bulk_prefetch_l2(const void* src, uint32_t bytes) {
    PTX(("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src), "r"(bytes) : "memory"), emu::check_bulk(src, bytes));
}

// ---- stmatrix --------------------------------------------------------------------------------

#ifndef __CUDACC__
template <bool trans, int count>
void emu_stmatrix(void* row, const uint32_t (&r)[count], emu::Site site) {
    const auto* rows = emu::exchange(~0u, static_cast<char*>(row), "stmatrix", site);
    emu::check_rows(rows, count);
    const int lane = emu::lane_id(), g = lane / 4, t = lane % 4 * 2;
    for (int m = 0; m < count; ++m) {
        char* const* base = rows + m * 8;
        if (trans) {
            for (int k = 0; k < 2; ++k) ((uint16_t*)base[t + k])[g] = uint16_t(r[m] >> 16 * k);
        } else {
            *(uint32_t*)(base[g] + t * 2) = r[m];
        }
    }
}
#endif

// The inverse of ldmatrix.
__device__ inline void stmatrix_x4(void* row, const uint32_t (&r)[4] SITE) {
    PTX(("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_addr(row)), "r"(r[0]), "r"(r[1]),
         "r"(r[2]), "r"(r[3]) : "memory"),
        emu_stmatrix<false>(row, r, site));
}
__device__ inline void stmatrix_x4_trans(void* row, const uint32_t (&r)[4] SITE) {
    PTX(("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_addr(row)), "r"(r[0]),
         "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"),
        emu_stmatrix<true>(row, r, site));
}
__device__ inline void stmatrix_x2(void* row, const uint32_t (&r)[2] SITE) {
    PTX(("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(smem_addr(row)), "r"(r[0]),
         "r"(r[1]) : "memory"),
        emu_stmatrix<false>(row, r, site));
}
__device__ inline void stmatrix_x2_trans(void* row, const uint32_t (&r)[2] SITE) {
    PTX(("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(smem_addr(row)), "r"(r[0]),
         "r"(r[1]) : "memory"),
        emu_stmatrix<true>(row, r, site));
}
__device__ inline void stmatrix_x1(void* row, const uint32_t (&r)[1] SITE) {
    PTX(("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(smem_addr(row)), "r"(r[0]) : "memory"),
        emu_stmatrix<false>(row, r, site));
}
__device__ inline void stmatrix_x1_trans(void* row, const uint32_t (&r)[1] SITE) {
    PTX(("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(smem_addr(row)), "r"(r[0]) : "memory"),
        emu_stmatrix<true>(row, r, site));
}

// ---- wgmma m64nNk16 --------------------------------------------------------------------------

// Matrix descriptor of a tile with the given swizzle (128, 64, 32 bytes, or 0). Rows of a K-major tile, and runs of
// m or n of an MN-major one, are as long as the swizzle. stride: bytes from one group of 8 rows (MN-major: 8 k) to the
// next. lead: MN-major only, bytes from one run of m or n to the next. Without swizzle the tile consists of contiguous
// 8 x 8 matrices: stride is the step in m or n, lead that in k.
template <int swizzle = 128>
__device__ inline uint64_t wgmma_desc(const void* tile, uint32_t stride, uint32_t lead = 16) {
    constexpr uint64_t kind = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
    return uint64_t(smem_addr(tile) >> 4 & 0x3fff) | uint64_t(lead >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           kind << 62;
}
__device__ inline void wgmma_fence() { PTX(("wgmma.fence.sync.aligned;" :: : "memory"), (void)0); }
__device__ inline void wgmma_commit() { PTX(("wgmma.commit_group.sync.aligned;" :: : "memory"), emu::wgmma_commit()); }
template <int newest_allowed>
__device__ inline void wgmma_wait(
#ifndef __CUDACC__
    emu::Site site = emu::Site::here()
#endif
) {
    PTX(("wgmma.wait_group.sync.aligned %0;" ::"n"(newest_allowed) : "memory"), emu::wgmma_wait(newest_allowed, site));
}

#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R8(i) R4(i), R4(i + 4)
#define R16(i) R8(i), R8(i + 8)
#define R32(i) R16(i), R16(i + 16)
#define R48(i) R32(i), R16(i + 32)
#define R64(i) R32(i), R32(i + 32)
#define R96(i) R64(i), R32(i + 64)
#define R128(i) R64(i), R64(i + 64)
#define D4 "%0, %1, %2, %3"
#define D8 D4 ", %4, %5, %6, %7"
#define D16 D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define D32 D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D48 D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define D64 D48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define D96                                                                                \
    D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
        ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define D128                                                                                           \
    D96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
        ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d = a b (+ d): a 64 x 16, b 16 x n. Operands in shared memory, by descriptor; or a in registers, laid out as in
// mma m16n8k16. r: accumulators per thread; i0 ... i6: numbers of the asm operands after them.
#define WGMMA(name, type, half, n, r, i0, i1, i2, i3, i4, i5, i6)                                          \
    template <bool a_mn_major = false, bool b_mn_major = false>                                            \
    __device__ inline void name(float (&d)[r], uint64_t a, uint64_t b, bool accumulate SITE) {             \
        PTX(("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\n"                                             \
             "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" D##r                     \
             "}, %" #i0 ", %" #i1 ", p, 1, 1, "                                                            \
             "%" #i3 ", %" #i4 ";\n}" : R##r(0) : "l"(a),                                                  \
             "l"(b), "r"(int(accumulate)), "n"(a_mn_major), "n"(b_mn_major)),                              \
            emu::wgmma(d, n, half, nullptr, a, b, a_mn_major, b_mn_major, accumulate, site));              \
    }                                                                                                      \
    template <bool b_mn_major = false>                                                                     \
    __device__ inline void name(float (&d)[r], const uint32_t (&a)[4], uint64_t b, bool accumulate SITE) { \
        PTX(("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\n"                                             \
             "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" D##r                     \
             "}, {%" #i0 ", %" #i1 ", %" #i2 ", "                                                          \
             "%" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}" : R##r(0) : "r"(a[0]),                           \
             "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(b_mn_major)),              \
            emu::wgmma(d, n, half, a, 0, b, false, b_mn_major, accumulate, site));                         \
    }
#define WGMMA_N(...) WGMMA(wgmma, "bf16", false, __VA_ARGS__) WGMMA(wgmma_f16, "f16", true, __VA_ARGS__)
WGMMA_N(8, 4, 4, 5, 6, 7, 8, 9, 10)
WGMMA_N(16, 8, 8, 9, 10, 11, 12, 13, 14)
WGMMA_N(32, 16, 16, 17, 18, 19, 20, 21, 22)
WGMMA_N(64, 32, 32, 33, 34, 35, 36, 37, 38)
WGMMA_N(96, 48, 48, 49, 50, 51, 52, 53, 54)
WGMMA_N(128, 64, 64, 65, 66, 67, 68, 69, 70)
WGMMA_N(192, 96, 96, 97, 98, 99, 100, 101, 102)
WGMMA_N(256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef WGMMA_N
#undef WGMMA
#undef R4
#undef D4
#undef R8
#undef D8
#undef R16
#undef D16
#undef R32
#undef D32
#undef R48
#undef D48
#undef R64
#undef D64
#undef R96
#undef D96
#undef R128
#undef D128

template <int registers>
__device__ inline void setmaxnreg_inc() {
    PTX(("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)), (void)0);
}
template <int registers>
__device__ inline void setmaxnreg_dec() {
    PTX(("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)), (void)0);
}

// ---- host: tensor maps -----------------------------------------------------------------------

// A row-major tensor of 16-bit elements and up to 3 dimensions, innermost first; strides in elements. Boxes go to
// shared memory with a swizzle of 128, 64 or 32 bytes, and then are as wide as that, or without (0).
inline CUtensorMap tensor_map(const void* base, int rank, const uint64_t (&dim)[3], const uint64_t (&stride)[2],
                              const uint32_t (&box)[3], int swizzle = 128) {
    CUtensorMap map{};
#ifdef __CUDACC__
    void* encode = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
    if (!encode) throw std::runtime_error("cuTensorMapEncodeTiled not found");
    const cuuint64_t dims[3] = {dim[0], dim[1], dim[2]}, bytes[2] = {stride[0] * 2, stride[1] * 2};
    const cuuint32_t ones[3] = {1, 1, 1};
    CUresult r = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(base), dims, bytes, box, ones,
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
        : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
        : swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                        : CU_TENSOR_MAP_SWIZZLE_NONE,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled failed");
#else
    if (uintptr_t(base) % 16 || stride[0] * 2 % 16 || (rank > 2 && stride[1] * 2 % 16))
        throw emu::Error("tensor map: base or stride is not a multiple of 16 bytes");
    if (box[0] > 256 || box[1] > 256 || box[2] > 256 || box[0] % 8) throw emu::Error("tensor map: invalid box");
    if (swizzle && box[0] * 2 != uint32_t(swizzle))
        throw emu::Error("tensor map: the box must be as wide as the swizzle");
    auto& m = reinterpret_cast<emu::TensorMap&>(map);
    m = {(char*)base,    {2, stride[0] * 2, stride[1] * 2, 0}, {1, 1, 1, 1}, {1, 1, 1, 1},
         uint32_t(rank), uint32_t(swizzle ? swizzle : 16)};
    for (int i = 0; i < rank; ++i) m.dim[i] = uint32_t(dim[i]), m.box[i] = box[i];
#endif
    return map;
}
