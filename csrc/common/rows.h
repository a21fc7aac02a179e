// rows.h - a tensor as rows of its last dimension, which is contiguous: all of one distance, or in equal groups, as the
// heads are that were cut out of a longer row.
#pragma once

#include "common/device.h"

struct Rows {
    int count = 1;
    int group = 1;             // rows of a group
    int64_t stride = 0;        // elements from row to row of a group
    int64_t group_stride = 0;  // elements from group to group

    __device__ int64_t offset(int row) const { return row / group * group_stride + row % group * stride; }
};
