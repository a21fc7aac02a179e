// prefetch.h - while it waits, a kernel brings what a later one reads to the L2 cache.
#pragma once

#include "common/op.h"
#include "common/ptx.h"

constexpr int64_t prefetched_bytes = 8 << 20;  // what memory gives in about 2 us, of 50 MB that the L2 cache holds

struct Prefetch {
    const char* data = nullptr;
    int64_t bytes = 0;

    // This block's share. No kernel waits for it, and it reads nothing, so it may come before any wait.
    __device__ void begin(int64_t block, int64_t blocks) const {
        constexpr int line = 128;
        for (int64_t at = (block * blockDim.x + threadIdx.x) * line; at < bytes; at += blocks * blockDim.x * line)
            prefetch_l2(data + at);
    }
};

// The beginning of a weight; of none nothing.
inline Prefetch prefetch_of(const Arguments& arguments, const std::optional<Tensor>& weight) {
    if (!weight) return {};
    const char* data = static_cast<const char*>(arguments.data<void>("prefetch", *weight));
    return {data, std::min<int64_t>(weight->numel() * weight->element_size(), prefetched_bytes)};
}
