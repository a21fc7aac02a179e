// mla_paged_attention.cu - attention over a paged cache whose entries are key and value of all heads at once
// (DeepSeek-V2's latent attention, absorbed; arXiv:2405.04434): any mixture of prompts and single tokens.
//
// An entry is copied to shared memory once and serves as key and, its first part, as value. Eight warps have 64 rows
// (heads of queries, in order): for the scores a warp has 16 rows and half of the keys, for the values 16 rows and half
// of the columns; the weights go from one to the other through shared memory. Keys are split among blocks as in
// common/attention.h.
#include "common/attention_kernels.h"

namespace {

template <class T>
struct Latents {
    const T* cache;
    const int *block_table, *seq_lens;  // [B, max_pages], [B]
    int max_pages, L, page_bits;        // S = 1 << page_bits

    struct Head {
        const Latents& all;
        const int* pages;
        __device__ const T* key(int i) const {
            const int64_t page = pages[i >> all.page_bits];
            return all.cache + ((page << all.page_bits) + (i & ((1 << all.page_bits) - 1))) * all.L;
        }
        __device__ const T* value(int i) const { return key(i); }
    };
    __device__ int length(int b) const { return seq_lens[b]; }
    __device__ Head head(int b, int) const { return {*this, block_table + int64_t(b) * max_pages}; }
};

// The largest entry and value; smaller ones are filled up with zeros, or not stored.
constexpr int max_entry = 576, max_rank = 512;

template <class T>
struct Tiles {
    static constexpr int rows = 64, keys = 32, threads = 256, K = max_entry, V = max_rank;
    union Shared {
        struct {
            T q[rows * K], entries[2][keys * K], weights[rows * keys];
            float top[2][rows];  // of half of the keys each
        } tiles;
        struct {
            float out[rows * padded<V>], stats[rows * 2];
        } sums;
    };
};

// Copies `count` rows of L elements, the rest of a row is zeros; of(row) is a row's start, or null for zeros. A warp
// copies whole rows, so that it looks up a page once for each.
template <class P, int count, class T, class F>
__device__ void copy_entries(T* tile, int L, const T* any, F of) {
#pragma unroll 4
    for (int row = threadIdx.x / 32; row < count; row += P::threads / 32) {
        const T* from = of(row);
#pragma unroll
        for (int chunk = threadIdx.x % 32; chunk < P::K / 8; chunk += 32) {
            const bool there = from && chunk * 8 < L;
            cp_async16(chunk_at<P::K>(tile, row, chunk), there ? from + chunk * 8 : any, there ? 16 : 0);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(Tiles<T>::threads) mla_kernel(const Problem<T> p, const Latents<T> source, int rank) {
    wait_for_previous_kernels();
    using P = Tiles<T>;
    constexpr int K = P::K, V = P::V, keys = P::keys;
    auto& s = *dynamic_shared<typename P::Shared>();
    const int lane = threadIdx.x % 32, half = threadIdx.x / 32 % 2, first_row = threadIdx.x / 64 * 16;
    const Work work = divide(p, source, find_place(p, blockIdx.x, P::rows), P::rows, blockIdx.z);
    if (work.sequence < 0) return;
    const auto head = source.head(work.sequence, 0);

    copy_entries<P, P::rows>(s.tiles.q, source.L, p.q, [&](int row) {
        const int i = work.first + row;
        return row < work.rows ? p.q + (work.token + i / p.R) * p.q_token + i % p.R * p.q_head : nullptr;
    });
    const auto copy = [&](int first) {
        copy_entries<P, keys>(s.tiles.entries[(first - work.begin) / keys % 2], source.L, p.q,
                              [&](int row) { return first + row < work.end ? head.key(first + row) : nullptr; });
        cp_async_commit();
    };

    float out[V / 16][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // sum: of the thread's own keys
    copy(work.begin);
    for (int first = work.begin; first < work.end; first += keys) {
        cp_async_wait<0>();
        __syncthreads();  // these entries are here, the ones before and their weights are no longer needed
        copy(first + keys);
        T* entries = s.tiles.entries[(first - work.begin) / keys % 2];

        float scores[2][4] = {};
#pragma unroll 4
        for (int step = 0; step < (source.L + 15) / 16; ++step) {
            uint32_t a[4], b[4];
            load_a<K>(a, s.tiles.q, first_row, step, lane);
            ldmatrix_x4(b, chunk_at<K>(entries, half * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
            mma<T>(scores[0], a, {b[0], b[1]});
            mma<T>(scores[1], a, {b[2], b[3]});
        }
        float best[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first_row + lane / 4 + h * 8;
            const int last = work.position + (work.first + row) / p.R - first - half * 16 - lane % 4 * 2;
            best[h] = -INFINITY;
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = scores[j][h * 2 + e];
                    score = j * 8 + e > last ? -INFINITY : score * p.scale;
                    best[h] = fmaxf(best[h], score);
                }
            best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 1));
            best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 2));
            if (lane % 4 == 0) s.tiles.top[half][row] = best[h];
        }
        __syncthreads();  // both halves have their largest scores
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first_row + lane / 4 + h * 8;
            best[h] = fmaxf(fmaxf(s.tiles.top[0][row], s.tiles.top[1][row]), top[h]);
            const float base = best[h] == -INFINITY ? 0 : best[h], shrink = exp2_approx(top[h] - base);
            top[h] = best[h];
            sum[h] *= shrink;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float low = exp2_approx(scores[j][h * 2] - base), high = exp2_approx(scores[j][h * 2 + 1] - base);
                sum[h] += low + high;
                *reinterpret_cast<uint32_t*>(chunk_at<keys>(s.tiles.weights, row, half * 2 + j) + lane % 4 * 2) =
                    pack<T>(low, high);
            }
#pragma unroll
            for (int j = 0; j < V / 16; ++j) out[j][h * 2] *= shrink, out[j][h * 2 + 1] *= shrink;
        }
        __syncthreads();  // the weights are here
#pragma unroll
        for (int step = 0; step < keys / 16; ++step) {
            uint32_t a[4];
            load_a<keys>(a, s.tiles.weights, first_row, step, lane);
#pragma unroll
            for (int j = 0; j < V / 16; j += 2) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, chunk_at<K>(entries, step * 16 + lane % 16, half * (V / 16) + j + lane / 16));
                mma<T>(out[j], a, {b[0], b[1]});
                mma<T>(out[j + 1], a, {b[2], b[3]});
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        const int row = first_row + lane / 4 + h * 8;
        if (lane % 4 == 0) s.tiles.top[half][row] = sum[h];  // the sums of both halves meet here
    }
    __syncthreads();
    for (int h = 0; h < 2; ++h) {
        const int row = first_row + lane / 4 + h * 8;
        sum[h] = s.tiles.top[0][row] + s.tiles.top[1][row];
    }
    __syncthreads();
    for (int h = 0; h < 2; ++h) {
        const int row = first_row + lane / 4 + h * 8;
        for (int j = 0; j < V / 16; ++j)
            *reinterpret_cast<float2*>(s.sums.out + row * padded<V> + half * (V / 2) + j * 8 + lane % 4 * 2) = {
                out[j][h * 2], out[j][h * 2 + 1]};
        if (half == 0 && lane % 4 == 0) s.sums.stats[row * 2] = top[h], s.sums.stats[row * 2 + 1] = sum[h];
    }
    __syncthreads();
    write_part<V>(p, work, blockIdx.x, P::rows, blockIdx.z, s.sums.out, s.sums.stats, 1, rank);
}

// Merges the parts of a tile: up to 8 MB, too much for the one block that is done last.
template <class T>
__global__ void __launch_bounds__(Tiles<T>::threads)
    merge_kernel(const Problem<T> p, const Latents<T> source, int rank) {
    wait_for_previous_kernels();
    using P = Tiles<T>;
    const Work work = divide(p, source, find_place(p, blockIdx.x, P::rows), P::rows, 0);
    if (work.sequence < 0 || work.parts == 1) return;
    merge_parts<P::V>(p, work, blockIdx.x, P::rows, blockIdx.z * P::threads + threadIdx.x, gridDim.z * P::threads,
                      rank);
}

Tensor mla_paged_attention(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                           const Tensor& cu_seqlens_q, const Tensor& seq_lens, int64_t max_seqlen_q, int64_t rank,
                           double scale) {
    Arguments arguments("mla_paged_attention");
    arguments.tensor("q", q, {"T", "H", "L"});
    arguments.tensor("kv_cache", kv_cache, {"P", "S", "L"});
    arguments.tensor("block_table", block_table, ScalarType::Int, {"B", "max_pages"});
    arguments.tensor("cu_seqlens_q", cu_seqlens_q, ScalarType::Int, {"B+1"});
    arguments.tensor("seq_lens", seq_lens, ScalarType::Int, {"B"});
    arguments.rows_of_heads("q", q);
    const int64_t H = arguments["H"], L = arguments["L"], S = arguments["S"], max_pages = arguments["max_pages"];
    if (rank < 1 || rank > L)
        arguments.fail("rank is ", rank, ", but must be in 1 to L = ", L, ", the size of an entry");
    if (rank % 8 != 0 || rank > max_rank || L % 8 != 0 || L > max_entry)
        arguments.fail("rank is ", rank, " and L ", L, ", but must be multiples of 8 up to ", max_rank, " and ",
                       max_entry);
    const int bits = page_bits(arguments, S);

    Tensor out = torch::stable::new_empty(q, {q.size(0), H, rank});
    if (q.numel() == 0 || arguments["B"] == 0) return out;
    const DeviceScope device(q);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        auto p = make_problem<T>(arguments, q, cu_seqlens_q, 1, scale, std::nullopt);
        p.out = static_cast<T*>(out.mutable_data_ptr());
        p.out_token = out.stride(0);
        const Latents<T> source{arguments.aligned_data<T>("kv_cache", kv_cache),
                                arguments.data<int>("block_table", block_table),
                                arguments.data<int>("seq_lens", seq_lens),
                                int(max_pages),
                                int(L),
                                bits};
        if constexpr (std::is_same_v<T, float>) {
            run_plain<max_entry>(p, source, q, int(L), int(rank), device.stream);
        } else {
            using P = Tiles<T>;
            const int64_t tiles = max_seqlen_q == 1 ? p.B * ((H + P::rows - 1) / P::rows)  // few, so that it matters
                                                    : count_tiles(q.size(0), p.R, p.B, P::rows);
            launch_tiles<P>(mla_kernel<T>, merge_kernel<T>, p, q, tiles, max_pages * S, device.stream, source,
                            int(rank));
        }
    });
    return out;
}

}  // namespace

PYLLAMA_KERNEL(mla_paged_attention);
