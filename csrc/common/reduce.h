// reduce.h - sums over the threads of a block that share a row.
#pragma once

#include "common/device.h"

// The sum of v over each `lanes` lanes of a warp, given to each of them; lanes is a power of two. All of a warp call
// it.
__device__ inline float lanes_sum(float v, int lanes) {
    for (int d = lanes / 2; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    return v;
}

// The sum of v over the threads of equal threadIdx.y, given to each of them. All threads of the block call
// it, once between two barriers. blockDim.x is a power of two up to 32 or a multiple of 32; the block is
// whole warps.
__device__ inline float row_sum(float v) {
    struct Partial {
        float warp[32];
    };
    const int threads = blockDim.x;
    v = lanes_sum(v, min(threads, 32));
    if (threads <= 32) return v;

    auto& partial = shared<Partial>();
    const int thread = threadIdx.y * threads + threadIdx.x, lane = thread % 32, warps = threads / 32;
    if (lane == 0) partial.warp[thread / 32] = v;
    __syncthreads();
    return lanes_sum(lane < warps ? partial.warp[threadIdx.y * warps + lane] : 0.0f, 32);
}
