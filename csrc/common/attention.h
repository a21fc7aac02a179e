// attention.h - causal attention with grouped queries over ragged sequences: the problem, its division among blocks,
// and the kernels, which attention.cu and paged_attention.cu instantiate for their places of keys and values.
//
// The R = H / G query heads of a key/value head see the same keys, so they are rows of one product: row i of a sequence
// is head i % R of its query i / R. A block computes a tile of rows for one key/value head, over all keys or over one
// of the parts into which keys are split to fill the device. Parts leave their sums in a workspace, and the block that
// is done last merges them in the order of the parts, so that results repeat bit for bit.
#pragma once

#include "common/last_block.h"
#include "common/softmax.h"

constexpr int max_splits = 64;
constexpr int key_step = 64;  // parts begin at multiples of it

template <class T>
struct Problem {
    const T* q;  // [T, H, K], strided
    int64_t q_token, q_head;
    T* out;  // [T, H, V], tokens so far apart
    int64_t out_token;
    const int* cu_seqlens_q;  // [B + 1]; null: one query each
    int B, G, R;
    int window;  // a query sees so many keys, its own included
    float scale;
    int splits;                    // the most parts
    float *part_out, *part_stats;  // workspace, if splits > 1: [tiles, G, splits, rows, V] and [.., 2]
    unsigned* done;                // [tiles, G], zeros; null: a kernel of its own merges

    __device__ int queries(int b) const { return cu_seqlens_q ? cu_seqlens_q[b + 1] - cu_seqlens_q[b] : 1; }
};

// Where the keys and values of all sequences are, each sequence's rows end to end.
template <class T>
struct Contiguous {
    const T *k, *v;
    int64_t k_token, k_head, v_token, v_head;
    const int* cu_seqlens_k;

    struct Head {
        const Contiguous& all;  // a kernel's argument, which takes no registers
        const T *k, *v;
        __device__ const T* key(int i) const { return k + i * all.k_token; }
        __device__ const T* value(int i) const { return v + i * all.v_token; }
    };
    __device__ int length(int b) const { return cu_seqlens_k[b + 1] - cu_seqlens_k[b]; }
    __device__ Head head(int b, int g) const {
        const int64_t first = cu_seqlens_k[b];
        return {*this, k + first * k_token + g * k_head, v + first * v_token + g * v_head};
    }
};

// Pages [P, 2, G, S, K], in the order of each sequence's row of the block table.
template <class T>
struct Paged {
    const T* cache;
    const int *block_table, *seq_lens;               // [B, max_pages], [B]
    int max_pages, K, page_bits;                     // S = 1 << page_bits
    int64_t head_stride, value_offset, page_stride;  // S K, G S K, 2 G S K

    struct Head {
        const Paged& all;  // a kernel's argument, which takes no registers
        const T* cache;
        const int* pages;
        __device__ const T* key(int i) const {
            return cache + pages[i >> all.page_bits] * all.page_stride + (i & ((1 << all.page_bits) - 1)) * all.K;
        }
        __device__ const T* value(int i) const { return key(i) + all.value_offset; }
    };
    __device__ int length(int b) const { return seq_lens[b]; }
    __device__ Head head(int b, int g) const {
        return {*this, cache + g * head_stride, block_table + int64_t(b) * max_pages};
    }
};

// What a block computes.
struct Work {
    int sequence;     // < 0: nothing
    int first, rows;  // rows of the sequence, at most a tile
    int64_t token;    // the sequence's first query
    int position;     // of that query among the keys; negative: it sees none
    int begin, end;   // keys
    int parts;        // into how many the keys are split
};

// Which rows a tile has.
struct Place {
    int sequence = -1;  // none
    int first = 0;      // row of the sequence
};

// The place of a tile, where each sequence has as many as its queries need.
template <class T>
__device__ Place find_place(const Problem<T>& p, int tile, int tile_rows) {
    const int lane = threadIdx.x % 32;
    Place place;
    for (int base = 0, tiles = 0; base < p.B && place.sequence < 0; base += 32) {  // each lane has a sequence
        const int b = base + lane;
        const int queries = b < p.B ? p.queries(b) : 0;
        const int own = (queries * p.R + tile_rows - 1) / tile_rows;
        int before = own;
        for (int d = 1; d < 32; d *= 2) {
            const int left = __shfl_up_sync(~0u, before, d);
            if (lane >= d) before += left;
        }
        const int total = __shfl_sync(~0u, before, 31);
        const unsigned found = __ballot_sync(~0u, tiles + before > tile);
        if (found) {
            const int owner = __ffs(found) - 1;
            place.sequence = base + owner;
            place.first = (tile - tiles - __shfl_sync(~0u, before - own, owner)) * tile_rows;
        }
        tiles += total;
    }
    return place;
}

template <class T, class Source>
__device__ Work divide(const Problem<T>& p, const Source& source, Place place, int tile_rows, int split) {
    Work work{};
    work.sequence = place.sequence, work.first = place.first;
    if (work.sequence < 0) return work;
    const int b = work.sequence, keys = source.length(b);
    const int queries = p.queries(b);
    work.token = p.cu_seqlens_q ? p.cu_seqlens_q[b] : b;
    work.rows = min(queries * p.R - work.first, tile_rows);
    if (work.rows <= 0) work.sequence = -1;
    work.position = keys - queries;
    // Keys that some row sees, of them this block's part.
    const int oldest = work.position + work.first / p.R - p.window + 1;
    const int newest = work.position + (work.first + work.rows - 1) / p.R;
    const int begin = max(oldest, 0) / key_step * key_step, end = max(newest + 1, begin);
    const int steps = (end - begin + key_step - 1) / key_step;
    const int part = max((steps + p.splits - 1) / p.splits, 1) * key_step;
    work.parts = max((end - begin + part - 1) / part, 1);
    work.begin = begin + split * part;
    work.end = min(work.begin + part, end);
    if (split >= work.parts) work.sequence = -1;
    return work;
}

// The sums of several parts of the keys, for one row and four columns; out and stats: of part 0.
struct Merged {
    float4 out;
    float top, sum;
};
__device__ inline Merged merge(const float* out, int64_t out_stride, const float* stats, int64_t stats_stride,
                               int parts) {
    Merged all{{0, 0, 0, 0}, -INFINITY, 0};
    for (int i = 0; i < parts; ++i) all.top = fmaxf(all.top, stats[i * stats_stride]);
    const float base = all.top == -INFINITY ? 0 : all.top;
    for (int i = 0; i < parts; ++i) {
        const float factor = exp2_approx(stats[i * stats_stride] - base);
        const float4 v = *reinterpret_cast<const float4*>(out + i * out_stride);
        all.sum += factor * stats[i * stats_stride + 1];
        all.out.x += factor * v.x, all.out.y += factor * v.y, all.out.z += factor * v.z, all.out.w += factor * v.w;
    }
    return all;
}

// The row's four columns of the result; a row that saw no key is 0.
template <class T>
__device__ void store_row(const Problem<T>& p, const Work& work, int g, int row, int column, int V, float4 v,
                          float sum) {
    const int i = work.first + row;
    T* out = p.out + (work.token + i / p.R) * p.out_token + (g * p.R + i % p.R) * V + column;
    const float r = sum > 0 ? 1 / sum : 0;
    *reinterpret_cast<uint2*>(out) = {pack<T>(v.x * r, v.y * r), pack<T>(v.z * r, v.w * r)};
}

// Rows of sums in shared memory are so far apart, for the sake of its banks.
template <int V>
constexpr int padded = V + 8;

// Row of the workspace where a tile's parts begin.
template <class T>
__device__ int64_t first_part_row(const Problem<T>& p, int tile, int tile_rows) {
    return (int64_t(tile) * p.G + blockIdx.y) * p.splits * tile_rows;
}

// A block's sums, in shared memory as `parts` parts (what each warp found for the same rows): writes the result, or
// this block's part of it to the workspace. Whole blocks call it, after a barrier. Of V columns the result has the
// first `width`.
template <int V, class T>
__device__ void write_part(const Problem<T>& p, const Work& work, int tile, int tile_rows, int split, const float* out,
                           const float* stats, int parts, int width = V) {
    const int columns = width / 4;
    const int64_t first = first_part_row(p, tile, tile_rows);
    for (int i = threadIdx.x; i < work.rows * columns; i += blockDim.x) {
        const int row = i / columns, column = i % columns * 4;
        const Merged m =
            merge(out + row * padded<V> + column, tile_rows * padded<V>, stats + row * 2, tile_rows * 2, parts);
        if (work.parts == 1) {
            store_row(p, work, blockIdx.y, row, column, width, m.out, m.sum);
            continue;
        }
        const int64_t at = first + split * tile_rows + row;
        store_vector(p.part_out + at * V + column, m.out);
        if (column == 0) *reinterpret_cast<float2*>(p.part_stats + at * 2) = {m.top, m.sum};
    }
}

// Merges a tile's parts; the callers are threads 0 to threads - 1.
template <int V, class T>
__device__ void merge_parts(const Problem<T>& p, const Work& work, int tile, int tile_rows, int thread, int threads,
                            int width = V) {
    const int columns = width / 4;
    const int64_t first = first_part_row(p, tile, tile_rows);
    for (int i = thread; i < work.rows * columns; i += threads) {
        const int row = i / columns, column = i % columns * 4;
        const int64_t at = first + row;
        const Merged m =
            merge(p.part_out + at * V + column, tile_rows * V, p.part_stats + at * 2, tile_rows * 2, work.parts);
        store_row(p, work, blockIdx.y, row, column, width, m.out, m.sum);
    }
}

// write_part, after which the last block to write a part of a tile merges all.
template <int V, class T>
__device__ void write_rows(const Problem<T>& p, const Work& work, int tile, int tile_rows, int split, const float* out,
                           const float* stats, int parts) {
    write_part<V>(p, work, tile, tile_rows, split, out, stats, parts);
    if (work.parts == 1) return;
    if (!last_block(p.done + tile * p.G + blockIdx.y, work.parts)) return;
    merge_parts<V>(p, work, tile, tile_rows, threadIdx.x, blockDim.x);
}

// A thread's rows to shared memory, as write_rows takes them.
template <int V, int MI>
__device__ void store_sums(const Softmax<MI, V>& softmax, float* out, float* stats, int row, int lane) {
    for (int mi = 0; mi < MI; ++mi)
        for (int h = 0; h < 2; ++h) {
            const int r = row + mi * 16 + lane / 4 + h * 8;
            for (int j = 0; j < V / 8; ++j)
                *reinterpret_cast<float2*>(out + r * padded<V> + j * 8 + lane % 4 * 2) = {
                    softmax.out[mi][j][h * 2], softmax.out[mi][j][h * 2 + 1]};
            if (lane % 4 == 0) stats[r * 2] = softmax.top[mi][h], stats[r * 2 + 1] = softmax.sum[mi][h];
        }
}
