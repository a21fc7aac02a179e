// host_cuda.h - the CUDA execution model for g++: one fiber per CUDA thread.
//
// Kernel sources include device.h, which includes this header when the compiler is not nvcc.
// Everything here either has CUDA's own name and meaning, or lives in namespace emu.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

// ---------------------------------------------------------------------------------------------
// Language keywords that the toolkit's headers leave undefined or empty for a host compiler.
#undef __shared__
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // red zones exist for plain statics only; the runtime then uses one worker
#else
#define __shared__ static thread_local  // a block runs on one OS thread
#endif
#undef __launch_bounds__
#define __launch_bounds__(...)
#if defined(__SANITIZE_THREAD__)
#undef __global__
#define __global__ __attribute__((flatten))  // GCC does not instrument *p = f() for a struct, unless f is inlined
#endif

inline __constinit thread_local uint3 threadIdx{}, blockIdx{}, blockDim{}, gridDim{};
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------
// The emulator. Definitions are in execution.cpp, async.cpp and launch.cpp, which are never compiled with a sanitizer.
namespace emu {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Where a thread waits, for deadlock reports. Default arguments capture the caller's line.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* f = __builtin_FILE(), int l = __builtin_LINE()) { return {f, l}; }
};

struct Options {
    uint64_t seed;  // 0: threads run in index order; otherwise a random schedule, repeatable
    int workers;    // OS threads that run blocks
    bool overlap;   // ThreadSanitizer: overlapped launches see previous ones only after grid_dependency_wait (slow)
};
Options& options();

struct Stats {  // of the last launch, summed over its blocks
    uint64_t switches, barriers, collectives, mma, wgmma, ldmatrix, ldmatrix_conflicts, cp_async, tma_bytes, prefetches,
        prefetched;  // the sum of their addresses
};
Stats& stats();

using Body = void (*)(const void* arguments);
void launch(dim3 grid, dim3 block, size_t smem, bool overlap, Body body, const void* arguments);
void synchronize();  // what the host wrote so far is seen by later overlapped launches before their
                     // grid_dependency_wait

// Not instrumented: the threads of an overlapped launch are not ordered after the host's writes.
template <class... P, size_t... i>
__attribute__((no_sanitize("thread"))) void call(const std::tuple<void (*)(P...), P...>& c, std::index_sequence<i...>) {
    std::get<0>(c)(std::get<i + 1>(c)...);
}
template <class... P>
__attribute__((no_sanitize("thread"))) void call(const void* c) {
    call<P...>(*static_cast<const std::tuple<void (*)(P...), P...>*>(c), std::index_sequence_for<P...>());
}

// Inside a kernel -----------------------------------------------------------------------------
[[noreturn]] void fail(const char* what);
int lane_id();
void yield();                                                                  // let any other ready thread go first
int barrier(int id, int count, int value, bool wait, const char* what, Site);  // returns the sum of value
uint32_t shared_offset(const void*);                                           // offset in the block's shared memory
void* shared_pointer(uint32_t offset);                                         // its inverse, modulo 2^18
void* shared_dynamic();
void* shared_static(const void* key, size_t size, size_t align);

// A warp-wide exchange: every lane of mask deposits `size` bytes, the last one to arrive runs
// `last` (if any) on the 32 deposits, then each lane gets the deposits back.
using Leader = void (*)(void* deposits, unsigned mask);
const void* exchange(unsigned mask, const void* mine, size_t size, Leader last, const char* what, Site);

void warp_barrier(unsigned mask, Site);

template <class T>
const T* exchange(unsigned mask, const T& mine, const char* what, Site s, Leader last = nullptr) {
    return static_cast<const T*>(exchange(mask, &mine, sizeof(T), last, what, s));
}

template <class T>
T poison() {  // what an undefined read returns: NaN for floats
    T t;
    std::memset(static_cast<void*>(&t), 0xff, sizeof t);
    return t;
}

template <class T>
T shuffle(unsigned mask, T v, int src, bool in_range, const char* what, Site s) {
    const T* all = exchange(mask, v, what, s);
    if (!in_range) return v;
    return (mask >> src & 1) ? all[src] : poison<T>();
}

template <class T, class F>
T reduce(unsigned mask, T v, F f, const char* what, Site s) {
    const T* all = exchange(mask, v, what, s);
    bool first = true;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) v = first ? all[i] : f(v, all[i]), first = false;
    return v;
}

template <class T, class F>
T atomic_update(T* p, F f) {
    T old, next;
    __atomic_load(p, &old, __ATOMIC_SEQ_CST);
    do next = f(old);
    while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return old;
}

// Asynchronous copies and matrix products; see ptx.h for the PTX twins.
void cp_async(void* dst, uint4 data);
void cp_async_commit();
void cp_async_wait(int newest_allowed);

void mbar_init(uint64_t* bar, uint32_t count);
void mbar_arrive(uint64_t* bar, uint32_t count, uint32_t expect_tx);
void mbar_wait(uint64_t* bar, uint32_t parity, Site);

// What CUtensorMap holds on the host.
struct TensorMap {
    char* base;
    uint64_t stride[4];  // bytes; stride[0] is the element size
    uint32_t dim[4], box[4];
    uint32_t rank, swizzle;  // swizzle: 32, 64 or 128 bytes; 16: none
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
void tma_load(void* dst, const CUtensorMap* map, const int (&at)[4], uint64_t* bar);
void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar);
void prefetch(const void* p);
void check_bulk(const void* src, uint32_t bytes);
void tma_store(const CUtensorMap* map, const void* src, const int (&at)[4]);
void tma_store_commit();
void tma_store_wait(int newest_allowed);

void check_rows(const char* const* rows, int matrices);  // of ldmatrix and stmatrix
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool half, Site);
void wgmma(float* d, int n, bool half, const uint32_t* a_regs, uint64_t desc_a, uint64_t desc_b, bool a_mn_major,
           bool b_mn_major, bool accumulate, Site);
void wgmma_commit();
void fence_proxy_async();
void grid_dependency_wait();
void wgmma_wait(int newest_allowed, Site);

}  // namespace emu

// ---------------------------------------------------------------------------------------------
// Synchronisation
#define EMU_SITE emu::Site site = emu::Site::here()

inline void __syncthreads(EMU_SITE) { emu::barrier(0, 0, 0, true, "__syncthreads", site); }
inline int __syncthreads_count(int p, EMU_SITE) {
    return emu::barrier(0, 0, p != 0, true, "__syncthreads_count", site);
}
inline int __syncthreads_or(int p, EMU_SITE) { return emu::barrier(0, 0, p != 0, true, "__syncthreads_or", site) != 0; }
inline int __syncthreads_and(int p, EMU_SITE) {
    return emu::barrier(0, 0, p == 0, true, "__syncthreads_and", site) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, EMU_SITE) { emu::warp_barrier(mask, site); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { emu::yield(); }
[[noreturn]] inline void __trap() { emu::fail("__trap()"); }

// Warp shuffles, votes, reductions
template <class T>
T __shfl_sync(unsigned mask, T v, int src, int width = 32, EMU_SITE) {
    int first = emu::lane_id() & -width;
    return emu::shuffle(mask, v, first | (src & (width - 1)), true, "__shfl_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, EMU_SITE) {
    int lane = emu::lane_id(), src = lane ^ x;
    return emu::shuffle(mask, v, src, src <= (lane | (width - 1)), "__shfl_xor_sync", site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32, EMU_SITE) {
    int lane = emu::lane_id(), src = lane + int(d);
    return emu::shuffle(mask, v, src, src <= (lane | (width - 1)), "__shfl_down_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32, EMU_SITE) {
    int lane = emu::lane_id(), src = lane - int(d);
    return emu::shuffle(mask, v, src, src >= (lane & -width), "__shfl_up_sync", site);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMU_SITE) {
    const int* all = emu::exchange(mask, p, "__ballot_sync", site);
    unsigned r = 0;
    for (int i = 0; i < 32; ++i) r |= (mask >> i & 1 && all[i]) ? 1u << i : 0;
    return r;
}
inline int __any_sync(unsigned mask, int p, EMU_SITE) { return __ballot_sync(mask, p, site) != 0; }
inline int __all_sync(unsigned mask, int p, EMU_SITE) { return __ballot_sync(mask, !p, site) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T v, EMU_SITE) {
    const T* all = emu::exchange(mask, v, "__match_any_sync", site);
    unsigned r = 0;
    for (int i = 0; i < 32; ++i) r |= (mask >> i & 1 && all[i] == v) ? 1u << i : 0;
    return r;
}
#define EMU_REDUCE(name, T, expr)                                                     \
    inline T name(unsigned mask, T v, EMU_SITE) {                                     \
        return emu::reduce(mask, v, [](T a, T b) -> T { return expr; }, #name, site); \
    }
EMU_REDUCE(__reduce_add_sync, int, a + b)
EMU_REDUCE(__reduce_add_sync, unsigned, a + b)
EMU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMU_REDUCE(__reduce_max_sync, int, a > b ? a : b)
EMU_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMU_REDUCE(__reduce_and_sync, unsigned, a& b)
EMU_REDUCE(__reduce_or_sync, unsigned, a | b)
EMU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef EMU_REDUCE
inline unsigned __activemask() { emu::fail("__activemask has no portable meaning: pass the mask"); }

// Atomics
template <class T>
using emu_same = typename std::common_type<T>::type;  // no deduction
template <class T>
T atomicAdd(T* p, emu_same<T> v) {
    return emu::atomic_update(p, [=](T o) { return T(o + v); });
}
template <class T>
T atomicSub(T* p, emu_same<T> v) {
    return emu::atomic_update(p, [=](T o) { return T(o - v); });
}
template <class T>
T atomicMax(T* p, emu_same<T> v) {
    return emu::atomic_update(p, [=](T o) { return o < v ? v : o; });
}
template <class T>
T atomicMin(T* p, emu_same<T> v) {
    return emu::atomic_update(p, [=](T o) { return v < o ? v : o; });
}
template <class T>
T atomicAnd(T* p, emu_same<T> v) {
    return emu::atomic_update(p, [=](T o) { return o & v; });
}
template <class T>
T atomicOr(T* p, emu_same<T> v) {
    return emu::atomic_update(p, [=](T o) { return o | v; });
}
template <class T>
T atomicXor(T* p, emu_same<T> v) {
    return emu::atomic_update(p, [=](T o) { return o ^ v; });
}
template <class T>
T atomicExch(T* p, emu_same<T> v) {
    return emu::atomic_update(p, [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, emu_same<T> c, emu_same<T> v) {
    return emu::atomic_update(p, [=](T o) { return o == c ? v : o; });
}
inline unsigned atomicInc(unsigned* p, unsigned m) {
    return emu::atomic_update(p, [=](unsigned o) { return o >= m ? 0 : o + 1; });
}

// Loads, stores, bit and math intrinsics
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, emu_same<T> v) {
    *p = v;
}
template <class T>
void __stcg(T* p, emu_same<T> v) {
    *p = v;
}

template <class To, class From>
To emu_bits(From f) {
    static_assert(sizeof(To) == sizeof(From));
    To t;
    std::memcpy(static_cast<void*>(&t), &f, sizeof t);
    return t;
}
inline int __float_as_int(float x) { return emu_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emu_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
    return r;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline void __sincosf(float x, float* s, float* c) { *s = std::sin(x), *c = std::cos(x); }
inline float __saturatef(float x) { return x < 0 || x != x ? 0 : x > 1 ? 1 : x; }
#define EMU_MINMAX(T)                                   \
    constexpr T min(T a, T b) { return b < a ? b : a; } \
    constexpr T max(T a, T b) { return a < b ? b : a; } \
    static_assert(true)  // takes the semicolon
EMU_MINMAX(int);
EMU_MINMAX(unsigned);
EMU_MINMAX(long);
EMU_MINMAX(unsigned long);
EMU_MINMAX(long long);
EMU_MINMAX(unsigned long long);
#undef EMU_MINMAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
