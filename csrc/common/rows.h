// rows.h - a tensor as rows of its last dimension, which is contiguous: all of one distance, or in equal groups, as the
// heads are that were cut out of a longer row.
#pragma once

#include "common/device.h"

struct Rows {
    int count = 1;
    int group = 1;             // rows of a group
    int64_t stride = 0;        // elements from row to row of a group
    int64_t group_stride = 0;  // elements from group to group

    __device__ int64_t offset(int row) const {
        if (group == count) return row * stride;  // spares the division
        return row / group * group_stride + row % group * stride;
    }
};

// So many threads side by side that n are among them and shuffles work: a power of two up to 32, or whole warps.
inline int whole_threads(int n) {
    if (n > 32) return (n + 31) / 32 * 32;
    int threads = 1;
    while (threads < n) threads *= 2;
    return threads;
}
