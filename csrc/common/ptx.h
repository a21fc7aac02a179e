// ptx.h - one small function per PTX instruction, each with its host twin beside it.
#pragma once
#include "common/device.h"

#ifdef __CUDACC__
#define PTX(device, host) asm volatile device
#define SITE
#else
#define PTX(device, host) host
#define SITE , emu::Site site = emu::Site::here()
#endif

__device__ inline uint32_t smem_addr(const void* p) {
#ifdef __CUDACC__
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
    return emu::shared_offset(p);
#endif
}

// ---- barriers --------------------------------------------------------------------------------

__device__ inline void bar_sync(int id, int threads SITE) {
    PTX(("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"), emu::barrier(id, threads, 0, true, "bar_sync", site));
}
__device__ inline void bar_arrive(int id, int threads SITE) {
    PTX(("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"),
        emu::barrier(id, threads, 0, false, "bar_arrive", site));
}

// ---- programmatic dependent launch (sm_90; before it launches do not overlap) -----------------

// In a kernel that is launched with `overlap`: waits until the kernels before it have ended and what they wrote can be
// read, then lets the next kernel start. Every block calls it. Before it, a block may read what the kernel ahead does
// not write, and nothing else: the next kernel starts only now, so that all before this one have ended by then.
__device__ inline void wait_for_previous_kernels() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    PTX(("griddepcontrol.wait;" :: : "memory"), emu::grid_dependency_wait());
    PTX(("griddepcontrol.launch_dependents;" :: : "memory"), (void)0);
#endif
}

// ---- cp.async (sm_80) ------------------------------------------------------------------------

#ifndef __CUDACC__
inline void emu_cp_async16(void* dst, const void* src, int valid) {  // lands at the wait; NaN until then
    const uint4 data = valid ? *static_cast<const uint4*>(src) : uint4{};
    auto* d = static_cast<uint4*>(dst);
    d->x = d->y = d->z = d->w = ~0u;
    emu::cp_async(dst, data);
}
#endif

// Copies 16 bytes, or writes 16 bytes of zeros when valid is 0 (src is then not read).
__device__ inline void cp_async16(void* dst, const void* src, int valid = 16) {
    PTX(("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_addr(dst)), "l"(src), "r"(valid) : "memory"),
        emu_cp_async16(dst, src, valid));
}
__device__ inline void cp_async_commit() { PTX(("cp.async.commit_group;" :: : "memory"), emu::cp_async_commit()); }
template <int newest_allowed>
__device__ inline void cp_async_wait() {
    PTX(("cp.async.wait_group %0;" ::"n"(newest_allowed) : "memory"), emu::cp_async_wait(newest_allowed));
}

// ---- global memory ---------------------------------------------------------------------------

// 16 bytes that nobody writes while the kernel runs, not to be kept in L1.
__device__ inline uint4 load_once(const void* p) {
    uint4 v;
    PTX(("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z),
         "=r"(v.w) : "l"(p)),
        v = *static_cast<const uint4*>(p));
    return v;
}
// 16 bytes at once, where the compiler would store four by four.
__device__ inline void store_vector(void* p, float4 v) {
    PTX(("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory"),
        *static_cast<float4*>(p) = v);
}
// What was computed from v before is computed again where it is needed after, instead of taking registers in between.
__device__ inline void forget_derived(uint4& v) { PTX(("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)), (void)v); }
// The line of the L2 cache that has this address.
__device__ inline void prefetch_l2(const void* p) { PTX(("prefetch.global.L2 [%0];" ::"l"(p)), emu::prefetch(p)); }

// Hides from the compiler what it knows of x: what follows from x is computed again, not kept in registers.
__device__ inline void forget(int& x) { PTX(("" : "+r"(x)), (void)x); }

// 2^x, to two units in the last place; 0 below 2^-126.
__device__ inline float exp2_approx(float x) {
    float y;
    PTX(("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)), y = std::exp2(x));
    return y;
}

// ---- ldmatrix --------------------------------------------------------------------------------

#ifndef __CUDACC__
template <int count, bool trans>
void emu_ldmatrix(uint32_t* r, const void* row, emu::Site site) {
    const auto* rows = emu::exchange(~0u, static_cast<const char*>(row), "ldmatrix", site);
    emu::check_rows(rows, count);
    const int lane = emu::lane_id(), g = lane / 4, t = lane % 4 * 2;
    for (int m = 0; m < count; ++m) {
        const char* const* base = rows + m * 8;
        if (trans) {
            auto at = [&](int k) { return uint32_t(((const uint16_t*)base[t + k])[g]); };
            r[m] = at(0) | at(1) << 16;
        } else {
            r[m] = *(const uint32_t*)(base[g] + t * 2);
        }
    }
}
#endif

// Four (two, one) 8x8 matrices of 16-bit elements; lane i gives the address of row i%8 of matrix i/8.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row SITE) {
    PTX(("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]),
         "=r"(r[3]) : "r"(smem_addr(row)) : "memory"),
        (emu_ldmatrix<4, false>(r, row, site)));
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row SITE) {
    PTX(("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]),
         "=r"(r[3]) : "r"(smem_addr(row)) : "memory"),
        (emu_ldmatrix<4, true>(r, row, site)));
}
__device__ inline void ldmatrix_x2(uint32_t (&r)[2], const void* row SITE) {
    PTX(("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
         "=r"(r[1]) : "r"(smem_addr(row)) : "memory"),
        (emu_ldmatrix<2, false>(r, row, site)));
}
__device__ inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row SITE) {
    PTX(("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
         "=r"(r[1]) : "r"(smem_addr(row)) : "memory"),
        (emu_ldmatrix<2, true>(r, row, site)));
}
__device__ inline void ldmatrix_x1(uint32_t& r, const void* row SITE) {
    PTX(("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(smem_addr(row)) : "memory"),
        (emu_ldmatrix<1, false>(&r, row, site)));
}
__device__ inline void ldmatrix_x1_trans(uint32_t& r, const void* row SITE) {
    PTX(("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(smem_addr(row)) : "memory"),
        (emu_ldmatrix<1, true>(&r, row, site)));
}

// ---- mma.sync m16n8k16, d += a b -------------------------------------------------------------

__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] SITE) {
    PTX(("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
         "{%0, %1, %2, %3};" : "+f"(d[0]),
         "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
        emu::mma_16816(d, a, b, false, site));
}
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] SITE) {
    PTX(("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
         "{%0, %1, %2, %3};" : "+f"(d[0]),
         "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
        emu::mma_16816(d, a, b, true, site));
}
__device__ inline uint32_t pack_bf16(float lo, float hi) {
    __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<uint32_t*>(&v);
}
