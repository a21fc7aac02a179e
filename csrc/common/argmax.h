// argmax.h - a value and its index as one number: the larger number has the higher value, of equal values the lower
// index. So an argmax is a maximum of integers, the same in any order.
#pragma once

#include "common/device.h"

using Candidate = uint64_t;

__device__ inline Candidate candidate(float value, int index) {
    const uint32_t bits = __float_as_uint(value + 0.0f);  // which makes -0 equal to 0
    return Candidate(bits >> 31 ? ~bits : bits | 1u << 31) << 32 | ~uint32_t(index);
}
__device__ inline float value_of(Candidate c) {
    const uint32_t high = c >> 32;
    return __uint_as_float(high >> 31 ? high & ~(1u << 31) : ~high);
}
__device__ inline int index_of(Candidate c) { return int(~uint32_t(c)); }

// The largest of a warp's, given to each of its lanes.
__device__ inline Candidate warp_max(Candidate c) {
    for (int d = 16; d > 0; d /= 2) c = max(c, __shfl_xor_sync(~0u, c, d));
    return c;
}

// The largest of a block's, given to each of its threads, which are whole warps along x.
__device__ inline Candidate block_max(Candidate c) {
    struct Partial {
        Candidate warp[32];
    };
    auto& partial = shared<Partial>();
    const int lane = threadIdx.x % 32;
    c = warp_max(c);
    if (lane == 0) partial.warp[threadIdx.x / 32] = c;
    __syncthreads();
    c = warp_max(lane < int(blockDim.x / 32) ? partial.warp[lane] : 0);
    __syncthreads();
    return c;
}
