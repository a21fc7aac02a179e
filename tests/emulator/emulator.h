// emulator.h - state of the emulator, shared by execution.cpp, async.cpp and launch.cpp.
// Both are compiled without sanitizers and tell them about fibers through weak symbols, so the same
// objects serve plain, AddressSanitizer and ThreadSanitizer builds.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "host_cuda.h"

#define WEAK __attribute__((weak))
extern "C" {
WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
WEAK void __asan_poison_memory_region(const volatile void*, size_t);
WEAK void __asan_unpoison_memory_region(const volatile void*, size_t);
WEAK void* __asan_region_is_poisoned(void*, size_t);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_destroy_fiber(void*);
WEAK void __tsan_switch_to_fiber(void*, unsigned flags);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
WEAK void __tsan_ignore_thread_begin();
WEAK void __tsan_ignore_thread_end();
WEAK void __tsan_read_range(void*, unsigned long);
WEAK void __tsan_write_range(void*, unsigned long);
}  // extern "C"
#undef WEAK

namespace emu {

constexpr size_t stack_size = 256 << 10, arena_size = 256 << 10, fresh_stack = 4 << 10, max_shared = 227 << 10;
constexpr int max_threads = 1024;

struct Copy {  // one cp.async
    void* dst;
    uint4 data;
    int group;
};

struct Tma {
    TensorMap map;  // a copy: the kernel parameter lives on the stack of a thread that may exit
    char* smem;
    int at[4];
    uint64_t* bar;  // loads
    int group;      // stores
};

struct Wgmma {  // one warp's quarter of a wgmma
    float* d[32];
    uint32_t a[32][4];
    uint64_t desc_a, desc_b;
    int n, group;
    bool half, a_in_regs, a_mn, b_mn, accumulate, computed;
    std::vector<float> product, saved;  // 16 x n; saved: 32 x n/2 accumulators, if not chained
};

struct Fiber {
    void* sp = nullptr;
    char* stack = nullptr;  // lowest address
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;
    void* tsan = nullptr;
    uint3 tid{};
    int warp = 0, lane = 0;
    bool exited = false;
    int quiet = 0;               // nested Quiet scopes
    const char* what = nullptr;  // why it waits
    Site site{};
    uint64_t* bar = nullptr;
    std::vector<Copy> copies;
    std::vector<Tma> stores;
    int copy_group = 0, store_group = 0;
};

struct Collective {
    unsigned mask, arrived, generation;
    const char* what;
    Site site;
    alignas(16) char slots[2][32 * 64];
};

struct Warp {
    unsigned ready = 0;
    int collectives = 0;
    Collective collective[8];
    Collective& find(unsigned mask);
    std::vector<std::unique_ptr<Wgmma>> wgmma;
    int wgmma_group = 0;
};

struct Barrier {
    int expected, arrived, value, result;
    unsigned generation;
    const char* what;
    Site site;
    unsigned waiting[32];  // lanes, per warp
    char tsan_key[2];
};

struct Mbarrier {  // the 64 bits that live in shared memory
    int16_t expected, pending;
    int32_t tx : 31;
    uint32_t phase : 1;
};

struct Static {
    const void* key;
    char* at;
};

struct Worker {
    char *mapped = nullptr, *arena = nullptr;
    std::vector<Fiber> fibers{max_threads};
    std::vector<Warp> warps{32};
    Barrier barriers[16];
    Fiber main, *self = nullptr;
    // What ThreadSanitizer takes the TMA unit and the tensor cores for: threads that see generic
    // writes to shared memory only through fence.proxy.async.
    void *tma = nullptr, *tensor = nullptr;
    char fence_key, tensor_key, store_key, block_key, end_key;  // of the block: its start, its threads' ends
    Body body = nullptr;
    const void* arguments = nullptr;
    int threads = 0, alive = 0;
    size_t dynamic = 0, static_top = 0;
    std::vector<Static> statics;
    std::vector<Tma> loads;  // in flight
    std::vector<Fiber*> mbar_waiters;
    std::vector<uint64_t*> mbarriers;
    unsigned ready_ranks = 0;  // bit r: warp order[r] has a ready lane
    int order[32], rank[32];
    uint64_t random_state = 1;
    bool random = false, overlapped = false, waited = false;
    std::exception_ptr error;
    Stats stats{};

    Worker();
    ~Worker();
    Worker(const Worker&) = delete;
    void run_block(uint3 block);
    void switch_to(Fiber* to);
    Fiber* pick();
    void block(const char* what, Site site);
    void wake(int warp, unsigned lanes);
    void shuffle_priorities();
    void finish_one_load();
    void check_end();
    [[noreturn]] void deadlock();
    uint32_t rng() {
        random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
        return uint32_t(random_state >> 20);
    }
};

inline thread_local Worker* W = nullptr;

// Programmatic dependent launch in ThreadSanitizer's eyes: threads start with what start_key has seen, which is all but
// the launch ahead, as that let them start when it had itself seen the ends of those before it. Of its end they learn
// from stream_key, in grid_dependency_wait.
inline char start_key, stream_key;

// ThreadSanitizer sees each CUDA thread as a thread of its own and the happens-before edges that
// CUDA defines: what the runtime itself touches must not count.
struct Quiet {
    Quiet() {
        if (__tsan_ignore_thread_begin) __tsan_ignore_thread_begin(), ++W->self->quiet;
    }
    ~Quiet() {
        if (__tsan_ignore_thread_end) __tsan_ignore_thread_end(), --W->self->quiet;
    }
};
inline void release(void* key) {
    if (__tsan_release) __tsan_release(key);
}
inline void acquire(void* key) {
    if (__tsan_acquire) __tsan_acquire(key);
}
inline void note(void (*access)(void*, unsigned long), const void* p, size_t n) {  // from a Quiet scope
    if (!access) return;
    __tsan_ignore_thread_end();
    access((void*)p, n);
    __tsan_ignore_thread_begin();
}
template <class F>
void as(void* unit, F f) {  // f as ThreadSanitizer's thread `unit`
    void* self = unit ? __tsan_get_current_fiber() : nullptr;
    if (unit) __tsan_switch_to_fiber(unit, 1);
    f();
    if (unit) __tsan_switch_to_fiber(self, 1);
}
inline bool differ(Site a, Site b) { return a.line != b.line || (a.file != b.file && std::strcmp(a.file, b.file)); }

inline std::string str(uint3 v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}
inline std::string str(Site s) {
    const char* slash = std::strrchr(s.file, '/');
    return std::string(slash ? slash + 1 : s.file) + ":" + std::to_string(s.line);
}
inline void set_poisoned(void* p, size_t n, bool bad) {
    if (n && __asan_poison_memory_region) (bad ? __asan_poison_memory_region : __asan_unpoison_memory_region)(p, n);
}
inline void check_addressable(const void* p, size_t n, const char* what) {
    if (__asan_region_is_poisoned && __asan_region_is_poisoned(const_cast<void*>(p), n)) fail(what);
}

}  // namespace emu
