// launch.cpp - runs a kernel's blocks on a few worker threads.
#include <atomic>
#include <mutex>
#include <numeric>
#include <thread>

#include "emulator.h"

namespace emu {

Options& options() {
    static Options options{0, int(std::thread::hardware_concurrency()), false};
    return options;
}

Stats& stats() {
    static Stats s;
    return s;
}

void synchronize() { release(&start_key); }

static std::atomic<int> overlapped_launches;

void launch(dim3 grid, dim3 block, size_t smem, bool overlap, Body body, const void* arguments) {
    const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
    if (!threads || threads > max_threads || !blocks || block.z > 64 || grid.y > 65535 || grid.z > 65535)
        throw Error("invalid launch configuration");
    if (smem > max_shared) throw Error("more than 227 KiB of dynamic shared memory");

    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> lock(one_at_a_time);
    static std::vector<std::unique_ptr<Worker>> pool;
    static void* const root = __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr;
    const Options o = options();
    const bool early = overlap && root && o.overlap;
    overlapped_launches += overlap;
    release(&stream_key);
    if (!early)
        synchronize();
    else
        pool.clear();  // what they have seen of previous launches is not for this one
    void* const seen = early ? __tsan_create_fiber(0) : nullptr;  // as much as the host has

    std::vector<uint32_t> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    uint64_t x = o.seed * 0x9e3779b97f4a7c15u + 1;
    for (size_t i = blocks; o.seed && i > 1; --i)
        x = x * 6364136223846793005u + 1442695040888963407u, std::swap(order[i - 1], order[(x >> 33) % i]);

    const size_t workers = __asan_poison_memory_region ? 1 : std::min<size_t>(std::max(o.workers, 1), blocks);
    if (pool.size() < workers) pool.resize(workers);
    std::vector<std::exception_ptr> errors(workers);
    std::atomic<size_t> next{0};
    auto work = [&](size_t worker) {
        try {
            auto& w = pool[worker];
            if (!w) w = std::make_unique<Worker>();
            W = w.get();
            W->body = body, W->arguments = arguments, W->threads = int(threads), W->dynamic = smem,
            W->random = o.seed != 0, W->overlapped = overlap, W->stats = {}, W->main.stack = nullptr;
            blockDim = {block.x, block.y, block.z}, gridDim = {grid.x, grid.y, grid.z};
            for (size_t i; (i = next++) < blocks;) {
                uint32_t b = order[i];
                W->random_state = (o.seed << 32 ^ b) * 0x9e3779b97f4a7c15u | 1;
                W->run_block({b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)});
            }
        } catch (...) {
            errors[worker] = std::current_exception();
            next = blocks;
        }
        W = nullptr;
    };
    std::vector<std::thread> others;
    as(early ? root : nullptr, [&] {  // root has seen nothing either, nor have the threads that it starts
        for (size_t i = early ? 0 : 1; i < workers; ++i) others.emplace_back(work, i);
    });
    if (!early) work(0);
    for (auto& t : others) t.join();
    if (seen) as(seen, synchronize), __tsan_destroy_fiber(seen);  // for the next launch, to which this one is ahead
    stats() = {};
    for (size_t i = 0; i < workers; ++i)
        for (size_t k = 0; pool[i] && k < sizeof(Stats) / 8; ++k)
            ((uint64_t*)&stats())[k] += ((uint64_t*)&pool[i]->stats)[k];
    for (auto& e : errors)
        if (e) std::rethrow_exception(e);
}

}  // namespace emu

// For the tests, which load the library into Python.
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulator_seed(uint64_t seed) { emu::options().seed = seed; }

// How many lines the last launch brought to the L2 cache, and the sum of their addresses.
EXPORT void emulator_prefetches(uint64_t (&found)[2]) {
    found[0] = emu::stats().prefetches, found[1] = emu::stats().prefetched;
}

// How later overlapped launches are run: see Options. Returns how many there were since the last call.
EXPORT int emulator_overlap(bool on) {
    emu::options().overlap = on;
    return emu::overlapped_launches.exchange(0);
}

// A kernel that writes `count` stretches of memory, as ThreadSanitizer sees it; they stay as they are. One kernel,
// since an overlapped launch has seen all but the one ahead of it.
EXPORT void emulator_touch(void** starts, const size_t* bytes, size_t count) {
    struct Stretches {
        void** starts;
        const size_t* bytes;
        size_t count;
    };
    const Stretches stretches{starts, bytes, count};
    emu::launch(
        dim3(1), dim3(1), 0, false,
        [](const void* arguments) {
            const auto& s = *static_cast<const Stretches*>(arguments);
            for (size_t i = 0; __tsan_write_range && i < s.count; ++i) __tsan_write_range(s.starts[i], s.bytes[i]);
        },
        &stretches);
}
