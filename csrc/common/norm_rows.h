// norm_rows.h - RMSNorm of rows, alone or of the sum of two tensors: what rms_norm.cu and add_rms_norm.cu launch.
//
// A row stays in its threads' registers between the sum of its squares and the scaling, so that it is read once: up to
// 65536 columns in 16 bits, half as many in float32 or of a sum; what a row has beyond is read twice. Every thread has
// at least four loads in flight, of one row or, where rows are short, of several.
#pragma once

#include <algorithm>

#include "common/op.h"
#include "common/ptx.h"
#include "common/reduce.h"
#include "common/rows.h"
#include "common/vector.h"

template <class T>
struct NormRows {
    T* x_TD;  // written only where there is a residual
    Rows x_rows;
    T* residual_TD;  // becomes residual + x, and what is normalised; the result goes to x
    Rows residual_rows;
    const T* weight_D;
    T* y_TD;  // without a residual: the result, contiguous
    int D;    // a multiple of 8
    float eps;
};

template <class T>
__device__ Vector<T> sum_of(const Vector<T>& a, const Vector<T>& b) {
    Vector<T> result;
    for (int i = 0; i < a.pairs; ++i) {
        const float2 f = a.get(i), g = b.get(i);
        result.set(i, {f.x + g.x, f.y + g.y});
    }
    return result;
}

// Threads of a block at most, which is what its registers suffice for.
constexpr int most_threads(int kept, bool add) { return kept < 8 || add ? 512 : 1024; }

// blockDim: threads of a row, rows at a time. A thread keeps `kept` vectors of each of its rows: thread t of a row has
// vectors t, t + threads, t + 2 * threads, ...
template <class T, int kept, bool add>
__global__ void __launch_bounds__(most_threads(kept, add)) norm_rows(const NormRows<T> p) {
    constexpr int rows = kept < 4 ? 4 / kept : 1;  // of a thread
    constexpr bool early = kept <= 4;              // whether there are registers for the weight from the start
    const int first = threadIdx.x, step = blockDim.x, vectors = p.D / Vector<T>::size;
    const auto row_of = [&](int r) { return int((blockIdx.x * rows + r) * blockDim.y + threadIdx.y); };
    const auto exists = [&](int row, int at) { return unsigned(row) < unsigned(p.x_rows.count) && at < vectors; };

    T *x[rows], *residual[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
        x[r] = p.x_TD + p.x_rows.offset(row_of(r));
        residual[r] = p.residual_TD + p.residual_rows.offset(row_of(r));
    }
    Vector<T> v[rows * kept], weight[kept];
#pragma unroll
    for (int begin = 0; begin < rows * kept; begin += 4) {  // loads first, since a sum waits for them
        Vector<T> more[4];
#pragma unroll
        for (int j = begin; j < begin + 4; ++j) {
            const int r = j / kept, at = first + j % kept * step;
            if (exists(row_of(r), at)) v[j] = load(x[r], at);
            if (add && exists(row_of(r), at)) more[j - begin] = load(residual[r], at);
        }
#pragma unroll
        for (int j = begin; add && j < begin + 4; ++j) v[j] = sum_of(v[j], more[j - begin]);
    }
#pragma unroll
    for (int i = 0; i < kept; ++i)
        if (early && first + i * step < vectors) weight[i] = load(p.weight_D, first + i * step);

#pragma unroll
    for (int r = 0; r < rows; ++r) {
        const int row = row_of(r), rest = kept < 8 ? vectors : first + kept * step;
        T* y = add ? x[r] : p.y_TD + int64_t(row) * p.D;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kept; ++i) {
            Vector<T>& mine = v[r * kept + i];
            if (add && exists(row, first + i * step)) store(residual[r], first + i * step, mine);
            sum += sum_of_squares(mine);
            forget_derived(mine.bits);
        }
        for (int at = rest; exists(row, at); at += step) {
            const Vector<T> more = add ? sum_of(load(x[r], at), load(residual[r], at)) : load(x[r], at);
            if (add) store(residual[r], at, more);
            sum += sum_of_squares(more);
        }
        sum = rows > 1 ? lanes_sum(sum, step) : row_sum(sum);
        const float scale = rsqrtf(__fdividef(sum, p.D) + p.eps);
#pragma unroll
        for (int i = 0; i < kept; ++i) {
            const int at = first + i * step;
            if (exists(row, at)) store(y, at, scaled(v[r * kept + i], scale, early ? weight[i] : load(p.weight_D, at)));
        }
        for (int at = rest; exists(row, at); at += step)
            store(y, at, scaled(load(add ? residual[r] : x[r], at), scale, load(p.weight_D, at)));
    }
}

template <class T, bool add, int kept>
void launch_norm_rows(const NormRows<T>& p, cudaStream_t stream) {
    const int vectors = p.D / Vector<T>::size;
    const int threads = std::min(whole_threads((vectors + kept - 1) / kept), most_threads(kept, add));
    const int at_a_time = std::max(128 / threads, 1), rows = at_a_time * std::max(4 / kept, 1);
    const dim3 grid((int64_t(p.x_rows.count) + rows - 1) / rows), block(threads, at_a_time);
    launch(norm_rows<T, kept, add>, {grid, block, 0, stream}, p);
}

// How many vectors of a row a thread keeps: one or two of several short rows, eight of rows that four do not hold.
template <class T, bool add>
void run_norm_rows(const NormRows<T>& p, cudaStream_t stream) {
    const int vectors = p.D / Vector<T>::size;
    if (vectors <= 8) return launch_norm_rows<T, add, 1>(p, stream);
    if (vectors <= 16) return launch_norm_rows<T, add, 2>(p, stream);
    if (vectors <= 4 * 512) return launch_norm_rows<T, add, 4>(p, stream);
    return launch_norm_rows<T, add, 8>(p, stream);
}

// The size of the rows that are normalised, checked.
inline int norm_size(const Arguments& arguments) {
    constexpr int max_D = 65536;
    const int64_t D = arguments["D"];
    if (D == 0 || D % 8 != 0 || D > max_D)
        arguments.fail("D, the last dimension of x, is ", D, ", but must be a multiple of 8 up to ", max_D);
    return int(D);
}
