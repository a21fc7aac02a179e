// async.cpp - cp.async, mbarrier, TMA and the tensor cores.
#include "emulator.h"

namespace emu {
namespace {

Mbarrier& mbarrier(uint64_t* bar) {
    auto& m = *(Mbarrier*)bar;
    if (m.expected <= 0) fail("mbarrier used before mbarrier.init");
    return m;
}

bool mbar_update(uint64_t* bar, int arrivals, int tx) {  // true when it completes a phase
    Mbarrier& m = mbarrier(bar);
    if (arrivals > m.pending) fail("more arrivals on an mbarrier than it was initialised for");
    release((char*)bar + m.phase);
    m.pending -= arrivals, m.tx += tx;
    if (m.tx > 0xfffff || m.tx < -0xfffff) fail("mbarrier: more than 2^20 - 1 bytes pending");
    if (m.pending || m.tx) return false;
    m.phase ^= 1, m.pending = m.expected;
    auto& q = W->mbar_waiters;
    for (Fiber* f : q)
        if (f->bar == bar) W->wake(f->warp, 1u << f->lane);
    q.erase(std::remove_if(q.begin(), q.end(), [&](Fiber* f) { return f->bar == bar; }), q.end());
    return true;
}

char* swizzled(char* p, uint32_t bytes) {  // 128 B: 16-byte chunk index ^= row index, modulo 8; 16 B: none
    auto a = (uintptr_t)p;
    return (char*)(a ^ (a >> 3 & (bytes - 1) & 0x70));
}

// Moves a box between global and shared memory; calls move(shared, global or null, bytes).
template <class F>
void for_each_chunk(const TensorMap& m, char* smem, const int (&at)[4], F move) {
    const uint32_t e = m.stride[0], chunk = std::min<uint32_t>(16, m.box[0] * e);
    for (uint32_t i3 = 0; i3 < m.box[3]; ++i3)
        for (uint32_t i2 = 0; i2 < m.box[2]; ++i2)
            for (uint32_t i1 = 0; i1 < m.box[1]; ++i1) {
                auto in = [&](int d, uint32_t i) { return uint32_t(at[d]) + i < m.dim[d]; };
                bool row = in(1, i1) && in(2, i2) && in(3, i3);
                const char* src = m.base + int64_t(at[1] + int(i1)) * int64_t(m.stride[1]) +
                                  int64_t(at[2] + int(i2)) * int64_t(m.stride[2]) +
                                  int64_t(at[3] + int(i3)) * int64_t(m.stride[3]);
                for (uint32_t b = 0; b < m.box[0] * e; b += chunk, smem += chunk) {
                    char* to = swizzled(smem, m.swizzle);
                    const int x = at[0] + int(b / e), n = int(chunk / e);
                    const bool whole = row && x >= 0 && x + n <= int(m.dim[0]);
                    for (int k = 0; k < n; k += whole ? n : 1)
                        move(to + k * e, row && uint32_t(x + k) < m.dim[0] ? (char*)src + int64_t(x + k) * e : nullptr,
                             whole ? chunk : e);
                }
            }
}

uint32_t box_bytes(const TensorMap& m) { return m.box[0] * m.box[1] * m.box[2] * m.box[3] * m.stride[0]; }
const TensorMap& tensor_map(const CUtensorMap* map) { return *(const TensorMap*)map; }

void check_box(const void* smem, const TensorMap& m, uint32_t align) {
    if (shared_offset(smem) % align)
        fail("TMA: misaligned shared memory (16 bytes in bulk, 128 in boxes, 8 swizzled rows)");
    check_addressable(smem, box_bytes(m), "TMA outside of shared memory");
}

void load(void* dst, const TensorMap& m, const int (&at)[4], uint64_t* bar, uint32_t align) {
    check_box(dst, m, align);
    mbarrier(bar);
    if (W->tma)
        for_each_chunk(m, (char*)dst, at, [](char*, char* global, uint32_t n) {
            if (global) note(__tsan_read_range, global, n);
        });
    std::memset(dst, 0xff, box_bytes(m));  // nothing to read until the barrier completes
    note(__tsan_write_range, dst, box_bytes(m));
    release((char*)bar + 2);
    W->loads.push_back({m, (char*)dst, {at[0], at[1], at[2], at[3]}, bar, 0});
}

void store(const Tma& s) {
    as(W->tma, [&] {
        acquire(&W->fence_key);
        for_each_chunk(s.map, s.smem, s.at, [](char* smem, char* global, uint32_t n) {
            if (!global) return;
            if (W->tma) __tsan_read_range(smem, n), __tsan_write_range(global, n);
            std::memcpy(global, smem, n);
        });
        release(&W->store_key);
    });
    acquire(&W->store_key);
}

float bf16(uint16_t x) { return emu_bits<float>(uint32_t(x) << 16); }
float fp16(uint16_t x) { return __half2float(emu_bits<__half>(x)); }

struct MmaDeposit {
    uint32_t a[4], b[2];
    float c[4];
};

template <bool half>
void mma_warp(void* p, unsigned) {
    auto* l = (MmaDeposit*)p;
    alignas(32) float a[16][16], b[16][8], c[16][8];
    auto put = [](float& lo, float& hi, uint32_t x) {
        lo = half ? fp16(uint16_t(x)) : bf16(uint16_t(x)), hi = half ? fp16(x >> 16) : bf16(x >> 16);
    };
    for (int i = 0; i < 32; ++i) {
        int g = i / 4, t = i % 4 * 2;
        for (int h = 0; h < 4; ++h)
            put(a[g + h % 2 * 8][t + h / 2 * 8], a[g + h % 2 * 8][t + h / 2 * 8 + 1], l[i].a[h]);
        for (int h = 0; h < 2; ++h) put(b[t + h * 8][g], b[t + h * 8 + 1][g], l[i].b[h]);
        for (int h = 0; h < 4; ++h) c[g + h / 2 * 8][t + h % 2] = l[i].c[h];
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    for (int i = 0; i < 32; ++i)
        for (int h = 0; h < 4; ++h) l[i].c[h] = c[i / 4 + h / 2 * 8][i % 4 * 2 + h % 2];
}

// One element of a wgmma operand in shared memory: (mn, k) through a matrix descriptor.
uint16_t wgmma_operand(uint64_t desc, bool mn_major, int mn, int k) {
    uint32_t start = (desc & 0x3fff) << 4, lead = (desc >> 16 & 0x3fff) << 4, stride = (desc >> 32 & 0x3fff) << 4;
    const int kind = desc >> 62, width = kind ? 256 >> kind : 16, run = width / 2;  // of a row, in bytes and elements
    if (desc >> 49 & 7) fail("wgmma: descriptor base offset is not emulated");
    if (!kind && mn_major) std::swap(lead, stride);
    uint32_t off = mn_major ? mn % run * 2 + mn / run * lead + k % 8 * width + k / 8 * stride
                            : mn % 8 * width + mn / 8 * stride + (kind ? k * 2 : k % 8 * 2 + k / 8 * lead);
    off += start;
    if (off + 2 > W->dynamic) fail("wgmma reads past the end of dynamic shared memory");
    char* p = swizzled(W->arena + off, width);
    if (W->tensor && (uintptr_t)p % 16 == 0) __tsan_read_range(p, 16);
    return *(uint16_t*)p;
}

void wgmma_multiply(Wgmma& o, int warp) {
    float a[16][16];
    std::vector<float> b(16 * o.n);
    auto value = [&](uint16_t x) { return o.half ? fp16(x) : bf16(x); };
    as(W->tensor, [&] {
        acquire(&W->fence_key);
        for (int m = 0; m < 16; ++m)
            for (int k = 0; k < 16; ++k) {
                int lane = m % 8 * 4 + k % 8 / 2, reg = m / 8 + k / 8 * 2;
                a[m][k] = value(o.a_in_regs ? uint16_t(o.a[lane][reg] >> k % 2 * 16)
                                            : wgmma_operand(o.desc_a, o.a_mn, warp % 4 * 16 + m, k));
            }
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < o.n; ++n) b[k * o.n + n] = value(wgmma_operand(o.desc_b, o.b_mn, n, k));
        release(&W->tensor_key);
    });
    o.product.assign(16 * o.n, 0);
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < o.n; ++n) o.product[m * o.n + n] += a[m][k] * b[k * o.n + n];
    o.computed = true;
}

struct WgmmaDeposit {
    float* d;
    uint32_t a[4];
    uint64_t desc_a, desc_b;
    short n;
    bool half, a_in_regs, a_mn, b_mn, accumulate;
};

// Operands are read either now or when the result lands, by chance: both must be correct.
// Until then the accumulator registers hold NaN.
void wgmma_issue(void* p, unsigned) {
    auto* l = (WgmmaDeposit*)p;
    Warp& w = W->warps[W->self->warp];
    auto o = std::make_unique<Wgmma>();
    o->desc_a = l->desc_a, o->desc_b = l->desc_b, o->n = l->n, o->half = l->half, o->a_in_regs = l->a_in_regs;
    o->a_mn = l->a_mn, o->b_mn = l->b_mn, o->accumulate = l->accumulate, o->computed = false;
    o->group = w.wgmma_group;
    bool chained = false;
    for (auto& other : w.wgmma) chained |= other->d[0] == l->d;
    for (int i = 0; i < 32; ++i) {
        if (l[i].desc_a != l->desc_a || l[i].desc_b != l->desc_b || l[i].n != l->n || l[i].accumulate != l->accumulate)
            fail("wgmma: operands differ between lanes of a warp");
        o->d[i] = l[i].d;
        std::memcpy(o->a[i], l[i].a, 16);
        if (!chained) o->saved.insert(o->saved.end(), l[i].d, l[i].d + o->n / 2);
        std::memset(l[i].d, 0xff, o->n / 2 * 4);
    }
    if (W->random && W->rng() & 1) wgmma_multiply(*o, W->self->warp);
    w.wgmma.push_back(std::move(o));
}

void wgmma_land(Warp& w, int warp) {
    auto o = std::move(w.wgmma.front());
    w.wgmma.erase(w.wgmma.begin());
    if (!o->computed) wgmma_multiply(*o, warp);
    int half = o->n / 2;
    Wgmma* next = nullptr;
    for (auto& other : w.wgmma)
        if (!next && other->d[0] == o->d[0]) next = other.get();
    for (int i = 0; i < 32; ++i) {
        for (int r = 0; r < half; ++r) {
            int m = i / 4 + r / 2 % 2 * 8, n = r / 4 * 8 + i % 4 * 2 + r % 2;
            float& c = o->saved[i * half + r];
            c = o->product[m * o->n + n] + (o->accumulate ? c : 0);
        }
        if (!next) std::memcpy(o->d[i], &o->saved[i * half], half * 4);
    }
    if (next) next->saved = std::move(o->saved);
}

void wgmma_retire(void* newest_allowed, unsigned) {
    Warp& w = W->warps[W->self->warp];
    while (!w.wgmma.empty() && w.wgmma.front()->group < w.wgmma_group - *(int*)newest_allowed)
        wgmma_land(w, W->self->warp);
}

}  // namespace

void Worker::check_end() {
    if (overlapped && !waited) fail("a block of an overlapped launch ends without wait_for_previous_kernels");
    if (!loads.empty()) fail("block ends with a TMA load in flight");
    for (uint64_t* bar : mbarriers)
        if (mbarrier(bar).pending != mbarrier(bar).expected || mbarrier(bar).tx)
            fail("block ends in the middle of an mbarrier phase: check the arrival count");
}

void Worker::finish_one_load() {
    size_t i = random ? rng() % loads.size() : 0;
    Tma t = loads[i];
    loads.erase(loads.begin() + i);
    const TensorMap& m = t.map;
    const uint32_t bytes = box_bytes(m);
    for_each_chunk(m, t.smem, t.at, [](char* smem, char* global, uint32_t n) {
        if (global)
            std::memcpy(smem, global, n);
        else
            std::memset(smem, 0, n);
    });
    stats.tma_bytes += bytes;
    as(tma, [&] {
        acquire((char*)t.bar + 2);
        if (tma) __tsan_write_range(t.smem, bytes);
        mbar_update(t.bar, 0, -int(bytes));
    });
}

void cp_async(void* dst, uint4 data) {
    Quiet quiet;
    W->self->copies.push_back({dst, data, W->self->copy_group});
    W->stats.cp_async += 16;
}
void cp_async_commit() { ++W->self->copy_group; }
void cp_async_wait(int newest_allowed) {
    Quiet quiet;
    Fiber& f = *W->self;
    size_t done = 0;
    for (; done < f.copies.size() && f.copies[done].group < f.copy_group - newest_allowed; ++done)
        *(uint4*)f.copies[done].dst = f.copies[done].data;
    f.copies.erase(f.copies.begin(), f.copies.begin() + done);
}

void mbar_init(uint64_t* bar, uint32_t count) {
    Quiet quiet;
    shared_offset(bar);
    W->mbarriers.push_back(bar);
    *(Mbarrier*)bar = {int16_t(count), int16_t(count), 0, 0};
}
void mbar_arrive(uint64_t* bar, uint32_t count, uint32_t expect_tx) {
    Quiet quiet;
    if (expect_tx) mbarrier(bar).tx += expect_tx;
    if (mbar_update(bar, count, 0) && W->random) yield();  // let a waiter overtake this thread
}
void mbar_wait(uint64_t* bar, uint32_t parity, Site site) {
    Quiet quiet;
    while (mbarrier(bar).phase == parity) {
        W->self->bar = bar;
        W->mbar_waiters.push_back(W->self);
        W->block(parity ? "mbar_wait parity 1" : "mbar_wait parity 0", site);
    }
    acquire((char*)bar + parity);
    as(W->tensor, [&] { acquire((char*)bar + parity); });
    if (W->random && !(W->rng() & 7)) yield();
}

void tma_load(void* dst, const CUtensorMap* map, const int (&at)[4], uint64_t* bar) {
    Quiet quiet;
    load(dst, tensor_map(map), at, bar, 8 * tensor_map(map).swizzle);
}
void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
    Quiet quiet;
    check_bulk(src, bytes);
    load(dst, {(char*)src, {16}, {bytes / 16, 1, 1, 1}, {bytes / 16, 1, 1, 1}, 1, 16}, {}, bar, 16);
}
void prefetch(const void* p) {
    ++W->stats.prefetches, W->stats.prefetched += (uintptr_t)p;
    if (__asan_region_is_poisoned && __asan_region_is_poisoned(const_cast<void*>(p), 1))
        fail("prefetch: nobody's memory");
}
void check_bulk(const void* src, uint32_t bytes) {
    if ((uintptr_t)src % 16 || bytes % 16) fail("bulk copy: address or size is not a multiple of 16");
}
void tma_store(const CUtensorMap* map, const void* src, const int (&at)[4]) {
    Quiet quiet;
    const TensorMap& m = tensor_map(map);
    check_box(src, m, 8 * m.swizzle);
    W->self->stores.push_back({m, (char*)src, {at[0], at[1], at[2], at[3]}, nullptr, W->self->store_group});
}
void tma_store_commit() { ++W->self->store_group; }
void tma_store_wait(int newest_allowed) {
    Quiet quiet;
    auto& q = W->self->stores;
    size_t done = 0;
    while (done < q.size() && q[done].group < W->self->store_group - newest_allowed) store(q[done++]);
    q.erase(q.begin(), q.begin() + done);
}

void check_rows(const char* const* rows, int matrices) {
    if (W->self->lane) return;
    for (int m = 0; m < matrices; ++m) {  // eight 16-byte rows should fall in eight different bank groups
        unsigned groups = 0;
        for (int i = 0; i < 8; ++i) {
            if (uintptr_t(rows[m * 8 + i]) % 16) fail("ldmatrix or stmatrix: misaligned row");
            groups |= 1u << (uintptr_t(rows[m * 8 + i]) / 16 % 8);
        }
        ++W->stats.ldmatrix, W->stats.ldmatrix_conflicts += groups != 255;
    }
}

void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool half, Site site) {
    Quiet quiet;
    MmaDeposit m;
    std::memcpy(m.a, a, sizeof a), std::memcpy(m.b, b, sizeof b), std::memcpy(m.c, d, sizeof d);
    const MmaDeposit* all = exchange(~0u, m, "mma", site, half ? mma_warp<true> : mma_warp<false>);
    std::memcpy(d, all[W->self->lane].c, sizeof d);
    W->stats.mma += W->self->lane == 0;
}

void wgmma(float* d, int n, bool half, const uint32_t* a_regs, uint64_t desc_a, uint64_t desc_b, bool a_mn, bool b_mn,
           bool accumulate, Site site) {
    Quiet quiet;
    WgmmaDeposit x{d, {}, desc_a, desc_b, short(n), half, a_regs != nullptr, a_mn, b_mn, accumulate};
    if (a_regs) std::memcpy(x.a, a_regs, 16);
    exchange(~0u, x, "wgmma", site, wgmma_issue);
    W->stats.wgmma += W->self->lane == 0;
}
void wgmma_commit() {
    exchange(~0u, 0, "wgmma_commit", {"", 0}, [](void*, unsigned) { ++W->warps[W->self->warp].wgmma_group; });
}
void wgmma_wait(int newest_allowed, Site site) {
    exchange(~0u, newest_allowed, "wgmma_wait", site, wgmma_retire);
    acquire(&W->tensor_key);
}
void fence_proxy_async() { release(&W->fence_key); }
void grid_dependency_wait() {
    W->waited = true;
    acquire(&stream_key);
}

}  // namespace emu
