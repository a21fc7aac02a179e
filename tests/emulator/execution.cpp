// execution.cpp - fibers, their scheduler, barriers, warp collectives and shared memory.
#include <sys/mman.h>

#include "emulator.h"

extern "C" {
// Saves the callee-saved registers on the stack, stores sp in *save and continues at `load`.
void emu_switch(void** save, void* load);
}
#if defined(__x86_64__)
constexpr int saved_words = 6;
asm(R"(.text
.hidden emu_switch
.globl emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size emu_switch, .-emu_switch
)");
#elif defined(__aarch64__)
constexpr int saved_words = 20, return_word = 11;
asm(R"(.text
.hidden emu_switch
.globl emu_switch
.type emu_switch, %function
emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0];  stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]; stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96];   stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0];  ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]; ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96];   ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emu_switch, .-emu_switch
)");
#endif

namespace emu {

constexpr size_t mapped_size = max_threads * stack_size + 2 * arena_size;

// ---- fibers and scheduling -------------------------------------------------------------------

void fiber_main() {
    Worker& w = *W;
    if (__sanitizer_finish_switch_fiber) {  // the first fiber of a launch learns where the OS thread's stack is
        const void* bottom;
        size_t size;
        __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
        if (!w.main.stack) w.main.stack = (char*)bottom, w.main.stack_bytes = size;
    }
    Fiber* next = &w.main;
    try {
        acquire(&start_key);
        acquire(&w.block_key);
        w.body(w.arguments);
        release(&w.end_key);
        Quiet quiet;
        if (!w.self->stores.empty()) fail("thread exits with a TMA store in flight");
        w.self->exited = true;
        if (--w.alive)
            next = w.pick();
        else
            w.check_end();
    } catch (...) {
        release(&w.end_key);
        w.error = std::current_exception();
    }
    w.switch_to(next);
    std::abort();
}

Worker::Worker() {
    mapped =
        (char*)mmap(nullptr, mapped_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw Error("cannot map fiber stacks");
    arena = (char*)(((uintptr_t)mapped + arena_size - 1) & -arena_size);  // offset = low 18 bits
    char* stack = mapped + 2 * arena_size;
    for (Fiber& f : fibers) {
        mprotect(stack, 4096, PROT_NONE);
        f.stack = stack + 4096, f.stack_bytes = stack_size - 4096, stack += stack_size;
    }
}

Worker::~Worker() {
    for (size_t i = max_threads; i--;)
        if (fibers[i].tsan) __tsan_destroy_fiber(fibers[i].tsan);
    if (tma) __tsan_destroy_fiber(tma), __tsan_destroy_fiber(tensor);
    munmap(mapped, mapped_size);
}

void Worker::switch_to(Fiber* to) {
    Fiber* from = self;
    if (to == from) return;
    self = to;
    ++stats.switches;
    threadIdx = to->tid;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to->tsan, 1);  // 1: no happens-before edge
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(from->exited ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
    emu_switch(&from->sp, to->sp);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
}

void Worker::wake(int warp, unsigned lanes) {
    warps[warp].ready |= lanes;
    if (lanes) ready_ranks |= 1u << rank[warp];
}

// Warps run by priority and priorities change now and then (probabilistic concurrency testing):
// some warp runs as far ahead of the others as the synchronisation allows.
void Worker::shuffle_priorities() {
    int n = (threads + 31) / 32, i = rng() % n, j = rng() % n;
    std::swap(order[i], order[j]);
    ready_ranks = 0;
    for (int r = 0; r < n; ++r) rank[order[r]] = r, ready_ranks |= warps[order[r]].ready ? 1u << r : 0;
}

Fiber* Worker::pick() {
    if (random) {
        uint32_t x = rng();
        if (!loads.empty() && x % 16 == 0) finish_one_load();
        if (x >> 8 & 63) {
        } else
            shuffle_priorities();
    }
    while (!ready_ranks) {
        if (loads.empty()) deadlock();
        finish_one_load();
    }
    int r = __builtin_ctz(ready_ranks), turn = random ? rng() & 31 : 0;
    Warp& w = warps[order[r]];
    unsigned rotated = w.ready >> turn | w.ready << (-turn & 31);
    int lane = (__builtin_ctz(rotated) + turn) & 31;
    w.ready &= ~(1u << lane);
    if (!w.ready) ready_ranks &= ~(1u << r);
    return &fibers[order[r] * 32 + lane];
}

void Worker::block(const char* what, Site site) {
    self->what = what, self->site = site;
    switch_to(pick());
    self->what = nullptr;
}

void Worker::deadlock() {
    std::string m = "deadlock in block " + str(blockIdx) + " of " + std::to_string(threads) + " threads:";
    auto state = [&](int i) {
        Fiber& f = fibers[i];
        return f.exited ? std::string("have exited") : "wait at " + std::string(f.what) + " (" + str(f.site) + ")";
    };
    for (int i = 0, j; i < threads; i = j) {
        std::string s = state(i);
        for (j = i + 1; j < threads && state(j) == s;) ++j;
        m += "\n  threads " + std::to_string(i) + "-" + std::to_string(j - 1) + " " + s;
    }
    throw Error(m);
}

void Worker::run_block(uint3 index) {
    self = &main;
    Quiet quiet;
    blockIdx = index;
    alive = threads, error = nullptr, waited = false;
    loads.clear(), mbar_waiters.clear(), mbarriers.clear(), statics.clear();
    std::memset(barriers, 0, sizeof barriers);
    set_poisoned(arena, arena_size, true);
    set_poisoned(arena, dynamic, false);
    std::memset(arena, 0xff, dynamic);  // NaN
    static_top = (dynamic + 15) / 16 * 16;
    if (__tsan_get_current_fiber) main.tsan = __tsan_get_current_fiber();
    if (__tsan_create_fiber && !tma) tma = __tsan_create_fiber(0), tensor = __tsan_create_fiber(0);
    int n = (threads + 31) / 32;
    ready_ranks = 0;
    for (int w = 0; w < n; ++w) {
        order[w] = rank[w] = w;
        warps[w].collectives = 0, warps[w].ready = 0, warps[w].wgmma_group = 0;
        warps[w].wgmma.clear();
        wake(w, w * 32 + 32 <= threads ? ~0u : (1u << threads % 32) - 1);
    }
    for (int i = 0; random && i < n; ++i) shuffle_priorities();
    for (int i = 0; i < threads; ++i) {
        Fiber& f = fibers[i];
        f.tid = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        f.warp = i / 32, f.lane = i % 32, f.exited = false, f.fake_stack = nullptr;
        f.copies.clear(), f.stores.clear();
        f.copy_group = f.store_group = 0;
        if (__tsan_create_fiber && !f.tsan) f.tsan = __tsan_create_fiber(0);
        void** top = (void**)(f.stack + f.stack_bytes);
        std::memset((char*)top - fresh_stack, 0xff, fresh_stack);  // uninitialised locals are NaN
#if defined(__x86_64__)
        top[-1] = nullptr, top[-2] = (void*)&fiber_main;
        f.sp = top - 2 - saved_words;
#else
        f.sp = top - saved_words;
        ((void**)f.sp)[return_word] = (void*)&fiber_main;
#endif
    }
    release(&block_key);  // orders the blocks of one worker, which reuse its shared memory
    switch_to(pick());
    if (error) {  // leave the abandoned fibers fit for the next block
        for (int i = 0; tma && i < threads; ++i)
            as(fibers[i].tsan, [&] {
                for (; fibers[i].quiet; --fibers[i].quiet) __tsan_ignore_thread_end();
                release(&end_key);
            });
        for (int i = 0; i < threads; ++i) set_poisoned(fibers[i].stack, fibers[i].stack_bytes, false);
    }
    acquire(&end_key);
    if (error) std::rethrow_exception(error);
}

// ---- what kernels call -----------------------------------------------------------------------

void fail(const char* what) { throw Error("block " + str(blockIdx) + " thread " + str(threadIdx) + ": " + what); }

int lane_id() { return W->self->lane; }

void yield() {
    Quiet quiet;
    W->wake(W->self->warp, 1u << W->self->lane);
    W->block("yield", {"", 0});
}

int barrier(int id, int count, int value, bool wait, const char* what, Site site) {
    Quiet quiet;
    Barrier& b = W->barriers[id];
    Fiber& f = *W->self;
    if (id < 0 || id > 15) fail("named barrier outside of 0..15");
    if (count % 32 || count > W->threads) fail("barrier count is not a multiple of 32 or exceeds the block");
    int expected = count ? count : W->threads;
    if (!b.arrived)
        b.expected = expected, b.what = what, b.site = site, b.value = 0;
    else if (b.expected != expected)
        fail("threads disagree on the count of a barrier");
    else if (!count && differ(b.site, site))
        throw Error("block " + str(blockIdx) + " thread " + str(threadIdx) + ": divergent " + what + " at " +
                    str(site) + ", while others wait at " + str(b.site));
    int g = b.generation & 1;
    release(&b.tsan_key[g]);
    b.value += value;
    ++b.arrived;
    if (b.arrived >= b.expected) {
        ++W->stats.barriers;
        ++b.generation;
        b.result = b.value, b.arrived = 0;
        for (int w = 0; w * 32 < W->threads; ++w) W->wake(w, b.waiting[w]), b.waiting[w] = 0;
        if (W->random && wait) yield();
    } else if (wait) {
        b.waiting[f.warp] |= 1u << f.lane;
        W->block(what, site);
    }
    if (wait) acquire(&b.tsan_key[g]);
    return b.result;
}

Collective& Warp::find(unsigned mask) {
    for (int i = 0; i < collectives; ++i)
        if (collective[i].mask == mask) return collective[i];
    if (collectives == 8) fail("more than 8 different masks in a warp");
    Collective& c = collective[collectives++];
    c.mask = mask, c.arrived = c.generation = 0;
    return c;
}

const void* exchange(unsigned mask, const void* mine, size_t size, Leader last, const char* what, Site site) {
    Quiet quiet;
    Fiber& f = *W->self;
    unsigned bit = 1u << f.lane;
    if (!(mask & bit)) fail("the calling lane is not in the mask of a warp collective");
    Collective* c = &W->warps[f.warp].find(mask);
    if (!c->arrived)
        c->what = what, c->site = site;
    else if (differ(c->site, site))
        throw Error("block " + str(blockIdx) + " thread " + str(threadIdx) + ": divergent " + what + " at " +
                    str(site) + ", while other lanes wait at " + c->what + " (" + str(c->site) + ")");
    char* slots = c->slots[c->generation & 1];
    std::memcpy(slots + f.lane * size, mine, size);
    c->arrived |= bit;
    if (c->arrived == mask) {
        ++W->stats.collectives;
        if (last) last(slots, mask);
        c->arrived = 0, ++c->generation;
        W->wake(f.warp, mask & ~bit);
        if (W->random && !(W->rng() & 7)) yield();
    } else {
        W->block(what, site);
    }
    return slots;
}

void warp_barrier(unsigned mask, Site site) {
    Quiet quiet;
    Collective& c = W->warps[W->self->warp].find(mask);
    char* key = c.slots[c.generation & 1];
    release(key);
    exchange(mask, 0, "__syncwarp", site);
    acquire(key);
}

uint32_t shared_offset(const void* p) {
    auto off = (char*)p - W->arena;
    if (off < 0 || off >= (ptrdiff_t)arena_size)
        fail("not a pointer to shared memory from shared<T>() or dynamic_shared<T>()");
    return uint32_t(off);
}
void* shared_pointer(uint32_t offset) { return W->arena + offset % arena_size; }
void* shared_dynamic() { return W->arena; }

void* shared_static(const void* key, size_t size, size_t align) {
    Quiet quiet;
    for (const Static& s : W->statics)
        if (s.key == key) return s.at;
    size_t red_zone = __asan_poison_memory_region ? 64 : 0;
    size_t at = (W->static_top + red_zone + align - 1) & -align;
    if (at + size > arena_size) fail("more than 227 KiB of shared memory");
    W->static_top = at + size;
    set_poisoned(W->arena + at, size, false);
    std::memset(W->arena + at, 0xff, size);
    W->statics.push_back({key, W->arena + at});
    return W->arena + at;
}

}  // namespace emu
