// last_block.h - the last block to be done goes on with what all have left.
#pragma once

#include "common/device.h"

// Whether this block is the last of `blocks` to come here, and so sees what the others wrote before. `done` is 0 at
// first, and again at the end. All threads of the block call it.
__device__ inline bool last_block(unsigned* done, unsigned blocks) {
    struct Last {
        bool here;
    };
    auto& last = shared<Last>();
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last.here = atomicInc(done, blocks - 1) == blocks - 1;
    __syncthreads();
    if (last.here) __threadfence();
    return last.here;
}
