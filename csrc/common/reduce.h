// reduce.h - sums over threads: of those that share a row, of those before.
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

// The sum of v over the threads before this one. All threads of a block call it, which are whole warps along x, once
// between two barriers.
__device__ inline int sum_before(int v) {
    struct Sums {
        int warp[32];
    };
    auto& sums = shared<Sums>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = v;  // up to this lane, its own included
    for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += other;
    }
    if (lane == 31) sums.warp[warp] = sum;
    __syncthreads();
    int before = sum - v;
    for (int w = 0; w < warp; ++w) before += sums.warp[w];
    return before;
}
