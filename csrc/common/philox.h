// philox.h - random bits from a counter and a key alone: Philox4x32-10 (Salmon et al., "Parallel random numbers: as
// easy as 1, 2, 3", SC 2011), and Gumbel noise made of them.
#pragma once

#include "common/device.h"

// Four words of random bits.
__device__ inline uint4 philox(uint4 counter, uint2 key) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t(counter.x) * 0xD2511F53, product1 = uint64_t(counter.z) * 0xCD9E8D57;
        counter = {uint32_t(product1 >> 32) ^ counter.y ^ key.x, uint32_t(product1),
                   uint32_t(product0 >> 32) ^ counter.w ^ key.y, uint32_t(product0)};
        key.x += 0x9E3779B9, key.y += 0xBB67AE85;
    }
    return counter;
}

// -log(-log(u)) of u = (bits >> 9 + 0.5) / 2^23, which float32 holds exactly and is never 0 or 1; it lies between
// lowest_gumbel and highest_gumbel.
__device__ inline float gumbel(uint32_t bits) { return -logf(-logf((float(bits >> 9) + 0.5f) * 0x1p-23f)); }

constexpr float lowest_gumbel = -2.82f, highest_gumbel = 16.64f;
