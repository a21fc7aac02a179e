// activation.h - the nonlinear function of feed-forward layers.
#pragma once

#include "common/device.h"

// silu(x) = x / (1 + exp(-x)); where exp(-x) overflows, x / inf = 0 is right.
__device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
