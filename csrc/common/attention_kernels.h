// attention_kernels.h - attention for 16-bit types, many queries (prefill, as in FlashAttention-2; Dao,
// arXiv:2307.08691) and one query per sequence (decode, after Flash-Decoding), and plainly for float32.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/attention.h"
#include "common/op.h"

constexpr int attention_warps = 4, attention_threads = attention_warps * 32;

// Queries of a tile, one tile of keys and one of values. Values arrive while the scores are computed, and the next keys
// while the values are multiplied.
template <class T, int K_, int V_>
struct Prefill {
    static constexpr int K = K_, V = V_;
    static constexpr int MI = K <= 128 ? 2 : 1;  // blocks of 16 rows per warp, as many as registers hold
    static constexpr int rows = attention_warps * MI * 16, keys = 64, threads = attention_threads;
    union Shared {
        struct {
            T q[rows * K], k[keys * K], v[keys * V];
        } tiles;
        struct {
            float out[rows * padded<V>], stats[rows * 2];
        } sums;
    };
};

template <class P, class T, class Source>
__global__ void __launch_bounds__(attention_threads) prefill(const Problem<T> p, const Source source) {
    wait_for_previous_kernels();
    constexpr int K = P::K, V = P::V, MI = P::MI, keys = P::keys;
    auto& s = *dynamic_shared<typename P::Shared>();
    const int warp = threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    const int tile = gridDim.x - 1 - blockIdx.x;  // those with the most keys first
    const Work work = divide(p, source, find_place(p, tile, P::rows), P::rows, blockIdx.z);
    if (work.sequence < 0) return;
    const auto head = source.head(work.sequence, blockIdx.y);

    const T* q = p.q + work.token * p.q_token + int64_t(blockIdx.y) * p.R * p.q_head;
    copy_rows<K, P::rows, attention_threads>(s.tiles.q, threadIdx.x, p.q, [&](int row) {
        const int i = work.first + row;
        return row < work.rows ? q + i / p.R * p.q_token + i % p.R * p.q_head : nullptr;
    });
    const auto copy_keys = [&](int first) {
        copy_rows<K, keys, attention_threads>(s.tiles.k, threadIdx.x, p.q, [&](int row) {
            return first + row < work.end ? head.key(first + row) : nullptr;
        });
        cp_async_commit();
    };
    const auto copy_values = [&](int first) {
        copy_rows<V, keys, attention_threads>(s.tiles.v, threadIdx.x, p.q, [&](int row) {
            return first + row < work.end ? head.value(first + row) : nullptr;
        });
        cp_async_commit();
    };

    const int oldest = work.position + work.first / p.R;
    const int newest = work.position + (work.first + work.rows - 1) / p.R;

    Softmax<MI, V> softmax;
    copy_keys(work.begin);
    for (int first = work.begin; first < work.end; first += keys) {
        cp_async_wait<0>();
        __syncthreads();  // these keys are here, and the last values are no longer needed
        copy_values(first);
        forget(lane);  // or the compiler keeps addresses from round to round, for which there are no registers

        float scores[MI][keys / 8][4] = {};
        add_scores<T, K, MI, keys>(scores, s.tiles.k, 0, lane, [&](uint32_t (&a)[4], int mi, int step) {
            load_a<K>(a, s.tiles.q, (warp * MI + mi) * 16, step, lane);
        });
        if (first + keys - 1 > oldest || first <= newest - p.window) {
#pragma unroll
            for (int mi = 0; mi < MI; ++mi)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = work.first + (warp * MI + mi) * 16 + lane / 4 + h * 8;
                    const int last = work.position + row / p.R - first - lane % 4 * 2;  // key that it sees, from here
#pragma unroll
                    for (int j = 0; j < keys / 8; ++j)
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                            if (j * 8 + e > last || j * 8 + e <= last - p.window) scores[mi][j][h * 2 + e] = -INFINITY;
                }
        }
        uint32_t weights[MI][keys / 16][4];
        softmax.template weigh<T, keys>(weights, scores, p.scale);

        cp_async_wait<0>();
        __syncthreads();  // the values are here, and the keys are no longer needed
        copy_keys(first + keys);
        softmax.template add_values<keys>(weights, s.tiles.v, 0, lane);
    }
    softmax.finish();
    cp_async_wait<0>();
    __syncthreads();
    store_sums(softmax, s.sums.out, s.sums.stats, warp * MI * 16, lane);
    __syncthreads();
    write_rows<V>(p, work, tile, P::rows, blockIdx.z, s.sums.out, s.sums.stats, 1);
}

// Queries as they are in memory, to shared memory.
struct StoredQueries {
    template <class P, class T, class Head>
    __device__ void bring(const Problem<T>& p, const Head&, const Work& work, T* tile) const {
        const T* q = p.q + work.token * p.q_token + (int64_t(blockIdx.y) * p.R + work.first) * p.q_head;
        copy_rows<P::K, P::rows, P::threads>(tile, threadIdx.x, p.q,
                                             [&](int row) { return row < work.rows ? q + row * p.q_head : nullptr; });
    }
};

// One query per sequence: 16 rows, most of them empty. Each warp has every fourth stretch of 16 keys and copies them
// for itself, several stretches ahead, so that warps never wait for each other before the end.
template <class T, int K_, int V_>
struct Decode {
    static constexpr int K = K_, V = V_, rows = 16, keys = 16, threads = attention_threads;
    static constexpr int stages = K <= 64 ? 4 : K <= 192 ? 3 : 2;  // 99 KB a block suffice up to K = 128, 163 for all
    static constexpr bool keep_queries = K <= 128;                 // in registers
    struct Stage {
        T k[keys * K], v[keys * V];
    };
    union Shared {
        struct {
            Stage stages[attention_warps][Decode::stages];
            T q[keep_queries ? 8 : rows * K];
        } tiles;
        struct {
            float out[attention_warps * rows * padded<V>], stats[attention_warps * rows * 2];
        } sums;
    };
};

template <class P, class T, class Source, class Queries>
__global__ void __launch_bounds__(attention_threads, 2)
    decode(const Problem<T> p, const Source source, const Queries queries) {
    wait_for_previous_kernels();
    constexpr int K = P::K, V = P::V, keys = P::keys;
    auto& s = *dynamic_shared<typename P::Shared>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int per = (p.R + P::rows - 1) / P::rows;  // tiles of a sequence
    const Place place{int(blockIdx.x) / per, int(blockIdx.x) % per * P::rows};
    const Work work = divide(p, source, place, P::rows, blockIdx.z);
    if (work.sequence < 0) return;
    const auto head = source.head(work.sequence, blockIdx.y);

    // Queries that go to registers arrive in a stage that has nothing yet.
    T* queries_tile = P::keep_queries ? s.tiles.stages[attention_warps - 1][P::stages - 1].k : s.tiles.q;
    queries.template bring<P>(p, head, work, queries_tile);
    cp_async_commit();
    const auto first_of = [&](int step) { return work.begin + (step * attention_warps + warp) * keys; };
    const auto copy = [&](int step) {
        auto& stage = s.tiles.stages[warp][step % P::stages];
        const int first = first_of(step);
        const auto in = [&](int row) { return first + row < work.end; };
        if (first < work.end) {
            copy_rows<K, keys, 32>(stage.k, lane, p.q,
                                   [&](int row) { return in(row) ? head.key(first + row) : nullptr; });
            copy_rows<V, keys, 32>(stage.v, lane, p.q,
                                   [&](int row) { return in(row) ? head.value(first + row) : nullptr; });
        }
        cp_async_commit();
    };
    for (int step = 0; step < P::stages - 1; ++step) copy(step);
    cp_async_wait<P::stages - 1>();
    __syncthreads();  // the queries are here
    uint32_t kept[K / 16][4];
    if constexpr (P::keep_queries) {
        for (int step = 0; step < K / 16; ++step) load_a<K>(kept[step], queries_tile, 0, step, lane);
        __syncthreads();  // their stage is free
    }

    const int last = work.position, oldest = last - p.window + 1;  // keys that the query sees
    Softmax<1, V> softmax;
    for (int step = 0; first_of(step) < work.end; ++step) {
        cp_async_wait<P::stages - 2>();
        __syncwarp();  // these keys are here, and the stage before is no longer needed
        copy(step + P::stages - 1);
        auto& stage = s.tiles.stages[warp][step % P::stages];
        float scores[1][keys / 8][4] = {};
        add_scores<T, K, 1, keys>(scores, stage.k, 0, lane, [&](uint32_t (&a)[4], int, int i) {
            if constexpr (P::keep_queries)
                for (int e = 0; e < 4; ++e) a[e] = kept[i][e];
            else
                load_a<K>(a, queries_tile, 0, i, lane);
        });
#pragma unroll
        for (int j = 0; j < keys / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int key = first_of(step) + j * 8 + lane % 4 * 2 + e % 2;
                if (key > last || key < oldest) scores[0][j][e] = -INFINITY;
            }
        uint32_t weights[1][keys / 16][4];
        softmax.template weigh<T, keys>(weights, scores, p.scale);
        softmax.template add_values<keys>(weights, stage.v, 0, lane);
    }
    softmax.finish();
    cp_async_wait<0>();
    __syncthreads();
    store_sums(softmax, s.sums.out, s.sums.stats, warp * P::rows, lane);
    __syncthreads();
    write_rows<V>(p, work, blockIdx.x, P::rows, blockIdx.z, s.sums.out, s.sums.stats, attention_warps);
}

// float32, one warp for each row: every lane has a key for the scores, and every 32nd column of the values.
constexpr int plain_columns = 256;
template <class Source, int columns>
__global__ void __launch_bounds__(32) plain(const Problem<float> p, const Source source, int K, int V) {
    wait_for_previous_kernels();
    struct Row {
        float q[columns], weights[32];
    };
    auto& s = shared<Row>();
    const int lane = threadIdx.x;
    const Work work = divide(p, source, find_place(p, blockIdx.x, 1), 1, 0);
    if (work.sequence < 0) return;
    const auto head = source.head(work.sequence, blockIdx.y);
    const int token = work.first / p.R, h = work.first % p.R, position = work.position + token;
    const float* q = p.q + (work.token + token) * p.q_token + (int64_t(blockIdx.y) * p.R + h) * p.q_head;
    for (int i = lane; i < K; i += 32) s.q[i] = q[i];

    float out[columns / 32] = {}, top = -INFINITY, sum = 0;
    for (int first = work.begin; first < work.end; first += 32) {
        __syncwarp();
        const int key = first + lane;
        float score = -INFINITY;
        if (key <= position && key > position - p.window) {
            const float* k = head.key(key);
            score = 0;
            for (int i = 0; i < K; ++i) score += s.q[i] * k[i];
            score *= p.scale;
        }
        float best = score;
        for (int d = 16; d > 0; d /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, d));
        best = fmaxf(best, top);
        const float base = best == -INFINITY ? 0 : best, shrink = exp2_approx(top - base),
                    weight = exp2_approx(score - base);
        top = best;
        sum = sum * shrink + weight;
        s.weights[lane] = weight;
        __syncwarp();
        for (float& o : out) o *= shrink;
        for (int j = 0; j < min(32, work.end - first); ++j) {
            const float* v = head.value(first + j);
#pragma unroll
            for (int i = 0; i < columns / 32; ++i)
                if (i * 32 + lane < V) out[i] += s.weights[j] * v[i * 32 + lane];
        }
    }
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    float* y = p.out + (work.token + token) * p.out_token + (blockIdx.y * p.R + h) * V;
#pragma unroll
    for (int i = 0; i < columns / 32; ++i)
        if (i * 32 + lane < V) y[i * 32 + lane] = sum > 0 ? out[i] / sum : 0;
}

// Into how many parts to split the keys: enough for two blocks on every multiprocessor, no part smaller than a step.
inline int choose_splits(int64_t blocks, int64_t max_keys) {
    const int64_t wanted = 2 * multiprocessors() / blocks, steps = (max_keys + key_step - 1) / key_step;
    return int(std::clamp<int64_t>(std::min(wanted, steps), 1, max_splits));
}

// Launches `kernel` for `tiles` tiles of P::rows rows, with a workspace where keys are split. Its blocks merge the
// parts, counting on p.done or on zeros made here, or `merge` does, if given, with a thread for every four columns.
template <class P, class T, class... Rest>
void launch_tiles(void (*kernel)(Problem<T>, Rest...), std::decay_t<void (*)(Problem<T>, Rest...)> merge, Problem<T> p,
                  const Tensor& like, int64_t tiles, int64_t max_keys, cudaStream_t stream, const Rest&... rest) {
    p.splits = choose_splits(tiles * p.G, max_keys);
    std::optional<Tensor> sums, done;
    if (p.splits > 1) {
        const int64_t rows = tiles * p.G * p.splits * P::rows;
        sums = torch::stable::new_empty(like, {rows * (P::V + 2)}, ScalarType::Float);
        if (!merge && !p.done) done = torch::stable::new_zeros(like, {tiles * p.G}, ScalarType::Int);
        p.part_out = static_cast<float*>(sums->mutable_data_ptr());
        p.part_stats = p.part_out + rows * P::V;
        if (done) p.done = static_cast<unsigned*>(done->mutable_data_ptr());
    }
    dim3 grid(unsigned(tiles), unsigned(p.G), unsigned(p.splits));
    launch(kernel, {grid, dim3(P::threads), sizeof(typename P::Shared), stream, true}, p, rest...);
    if (!merge || p.splits == 1) return;
    grid.z = P::rows * P::V / 4 / P::threads;
    launch(merge, {grid, dim3(P::threads), 0, stream, true}, p, rest...);
}

// At least as many tiles as sequences of `queries` in all need, whatever their lengths.
inline int64_t count_tiles(int64_t queries, int R, int B, int rows) { return (queries * R + rows - 1) / rows + B - 1; }

template <class T, int K, int V, class Source>
void run_prefill(const Problem<T>& p, const Source& source, const Tensor& q, int64_t max_keys, cudaStream_t stream) {
    using P = Prefill<T, K, V>;
    launch_tiles<P>(prefill<P, T, Source>, nullptr, p, q, count_tiles(q.size(0), p.R, p.B, P::rows), max_keys, stream,
                    source);
}

// Tiles of a problem with one query per sequence.
template <class P, class T>
int64_t decode_tiles(const Problem<T>& p) {
    return int64_t(p.B) * ((p.R + P::rows - 1) / P::rows);
}

template <class T, int K, int V, class Source, class Queries>
void run_decode(const Problem<T>& p, const Source& source, const Queries& queries, const Tensor& like, int64_t max_keys,
                cudaStream_t stream) {
    using P = Decode<T, K, V>;
    launch_tiles<P>(decode<P, T, Source, Queries>, nullptr, p, like, decode_tiles<P>(p), max_keys, stream, source,
                    queries);
}

template <int columns = plain_columns, class Source>
void run_plain(const Problem<float>& p, const Source& source, const Tensor& q, int K, int V, cudaStream_t stream) {
    const dim3 grid(unsigned(q.size(0) * p.R), unsigned(p.G));
    launch(plain<Source, columns>, {grid, dim3(32), 0, stream, true}, p, source, K, V);
}

// Pages have 1 << page_bits(S) tokens.
inline int page_bits(const Arguments& arguments, int64_t S) {
    int bits = 0;
    while ((1 << bits) < S) ++bits;
    if (S != 1 << bits) arguments.fail("S, the page size, is ", S, ", but must be a power of two");
    return bits;
}

// The keys and values of a cache [P, 2, G, S, K], checked.
template <class T>
Paged<T> paged_source(const Arguments& arguments, const Tensor& kv_cache, const Tensor& block_table,
                      const Tensor& seq_lens) {
    const int64_t G = arguments["G"], S = arguments["S"], K = arguments["K"];
    return {arguments.aligned_data<T>("kv_cache", kv_cache),
            arguments.data<int>("block_table", block_table),
            arguments.data<int>("seq_lens", seq_lens),
            int(arguments["max_pages"]),
            int(K),
            page_bits(arguments, S),
            S * K,
            G * S * K,
            2 * G * S * K};
}

// Calls f with K as a constant, if it is one of `sizes`.
template <int... sizes, class F>
bool with_head_size(int64_t K, F f) {
    return ((K == sizes && (f(std::integral_constant<int, sizes>()), true)) || ...);
}

inline int window_or_all(std::optional<int64_t> window) {
    return int(std::min<int64_t>(window.value_or(INT_MAX / 2), INT_MAX / 2));
}
inline float exponent_scale(double scale) { return float(scale * 1.4426950408889634); }  // exponents are of 2

// What both ops check of their options; the problem, but for its result.
template <class T>
Problem<T> make_problem(const Arguments& arguments, const Tensor& q, const Tensor& cu_seqlens_q, int64_t G,
                        std::optional<double> scale, std::optional<int64_t> window) {
    const int64_t H = q.size(1), K = q.size(2);
    const double factor = scale.value_or(1 / std::sqrt(double(K)));
    if (factor <= 0) arguments.fail("scale is ", factor, ", but must be positive");
    Problem<T> p{};
    p.q = static_cast<const T*>(q.const_data_ptr());
    p.q_token = q.stride(0), p.q_head = q.stride(1);
    p.cu_seqlens_q = arguments.data<int>("cu_seqlens_q", cu_seqlens_q);
    p.B = int(arguments["B"]), p.G = int(G), p.R = int(H / G);
    p.window = window_or_all(window);
    p.scale = exponent_scale(factor);
    p.splits = 1;
    return p;
}

inline void check_window(const Arguments& arguments, std::optional<int64_t> window) {
    if (window && *window < 1) arguments.fail("window is ", *window, ", but must be at least 1 (or None)");
}

inline void check_heads(const Arguments& arguments, std::optional<int64_t> window) {
    const int64_t H = arguments["H"], G = arguments["G"];
    if (G == 0 || H % G != 0) arguments.fail("q has H = ", H, " heads, but must have a multiple of the keys' G = ", G);
    check_window(arguments, window);
}
