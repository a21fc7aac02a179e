// sample.cu - the next token of each sequence: the largest of (score - largest score) / temperature + Gumbel noise over
// the tokens that top-k, top-p and min-p keep; at temperature 0 the largest score. Of equals the lowest index. Scores
// are logits less penalties, and what each sequence wants is read here, on the device.
//
// Two kernels. `slices` reads the logits once, a warp at a slice of 256 tokens, and leaves of each slice its largest
// score and the token it would choose; `finish`, a block per sequence, chooses among the slices. Unless tokens are to
// be filtered that is all. Else `finish` looks for the edge of what is kept without sorting: tokens have a distance
// from the largest score, fixed point in 32 bits, and a histogram over 8 bits of it at a time says which 256th of the
// range has the edge. The few tokens left after the first 8 bits go to a list in shared memory, and the row is read no
// more; only where the list is too short, at a hot temperature, say, it is read again each time.
//
// Results repeat bit for bit, and depend on nothing but the sequence: what is summed are integers (probabilities in
// units of 2^-40), the largest value is the same in any order, and slices do not depend on the number of blocks.
#include <algorithm>
#include <optional>
#include <type_traits>

#include "common/argmax.h"
#include "common/op.h"
#include "common/philox.h"
#include "common/ptx.h"
#include "common/vector.h"

namespace {

constexpr int max_V = 1 << 23;  // times 2^40 is less than 2^64
constexpr int octet = 8;        // consecutive tokens that a thread takes at a time
constexpr int slice = 32 * octet;
constexpr int bins = 256, capacity = 4096;  // of the histogram; of the list, in tokens

constexpr float farthest = 31.999998f;  // times 2^27 is below 2^32; probabilities are 0 by then, and nobody wins there

struct Slice {
    Candidate best;  // a candidate, its value relative to `largest` where there is noise
    float largest;
};

struct Options {
    const float* temperature_B;
    const int32_t* top_k_B;
    const float *top_p_B, *min_p_B;
    const int64_t *seed_B, *step_B;
    const float *repetition_B, *presence_B, *frequency_B;  // these and the next two are null without penalties
    const bool* prompt_mask_BV;
    const int32_t* counts_BV;
};

template <class T>
struct Params : Options {
    const T* logits_BV;
    int64_t stride;  // elements from row to row
    bool aligned;    // rows start at multiples of 16 bytes
    int B, V, N;     // N: slices of a sequence
    Slice* slices_BN;
    int64_t* tokens_B;
};

// One sequence: its row of scores and its options.
template <class T>
struct Sequence {
    const Params<T>& p;
    const int b;
    const float temperature = p.temperature_B[b];
    const int top_k = p.top_k_B[b];
    const float top_p = p.top_p_B[b], min_p = p.min_p_B[b];
    const bool greedy = temperature == 0, filtered = !greedy && (top_k > 0 || top_p < 1 || min_p > 0);
    const float per_temperature = 1 / temperature;  // infinite for the lowest temperatures
    const uint2 key = {uint32_t(p.seed_B[b]), uint32_t(uint64_t(p.seed_B[b]) >> 32)};
    const uint32_t step = uint32_t(p.step_B[b]);

    struct Octet {
        float v[octet];
    };

    // The scores of 8 tokens, -infinity past the end of the row and for NaN.
    __device__ Octet scores(int first) const {
        const T* row = p.logits_BV + b * p.stride;
        Octet s;
        if (p.aligned && first + octet <= p.V) {
            constexpr int size = Vector<T>::size;
            for (int i = 0; i < octet / size; ++i) {
                const Vector<T> vector = load(row, first / size + i);
                for (int j = 0; j < size / 2; ++j) {
                    const float2 pair = vector.get(j);
                    s.v[i * size + 2 * j] = pair.x, s.v[i * size + 2 * j + 1] = pair.y;
                }
            }
        } else {
            for (int j = 0; j < octet; ++j) s.v[j] = first + j < p.V ? float(row[first + j]) : -INFINITY;
        }
        if (p.counts_BV) penalise(s, first);
        for (float& v : s.v) v = fmaxf(v, -INFINITY);
        return s;
    }

    __device__ void penalise(Octet& s, int first) const {
        const int32_t* counts = p.counts_BV + b * int64_t(p.V);
        const bool* prompt_mask = p.prompt_mask_BV + b * int64_t(p.V);
        const float repetition = p.repetition_B[b], presence = p.presence_B[b], frequency = p.frequency_B[b];
        for (int j = 0; j < octet && first + j < p.V; ++j) {
            const int count = counts[first + j];
            float& v = s.v[j];
            if (prompt_mask[first + j] || count > 0) v = v > 0 ? v / repetition : v * repetition;
            v = v - presence * (count > 0) - frequency * count;
        }
    }

    // (score - largest) / temperature, without infinity - infinity and 0 * infinity.
    __device__ float relative(float score, float largest) const {
        return score == largest ? 0.0f : (score - largest) * per_temperature;
    }

    __device__ Octet relative(Octet s, float largest) const {
        for (float& v : s.v) v = relative(v, largest);
        return s;
    }

    // The better of `best` and the tokens of an octet. Noise has bounds: most tokens cannot win, and get none.
    __device__ void compete(Candidate& best, const Octet& x, int first) const {
        for (int quad = 0; quad < octet; quad += 4) {
            const float wins = value_of(best) - highest_gumbel;
            if (x.v[quad] < wins && x.v[quad + 1] < wins && x.v[quad + 2] < wins && x.v[quad + 3] < wins) continue;
            const uint4 bits = noise((first + quad) / 4);
            const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
            for (int j = 0; j < 4; ++j)
                if (const int i = first + quad + j; i < p.V)
                    best = max(best, candidate(x.v[quad + j] + gumbel(words[j]), i));
        }
    }

    // The same for one token.
    __device__ void compete(Candidate& best, float x, int index) const {
        if (x < value_of(best) - highest_gumbel) return;
        const uint4 bits = noise(index / 4);
        const uint32_t low = index & 1 ? bits.y : bits.x, high = index & 1 ? bits.w : bits.z;
        best = max(best, candidate(x + gumbel(index & 2 ? high : low), index));
    }

    // What compete() starts from: less than what the likeliest token gets.
    __device__ static Candidate nobody() { return candidate(lowest_gumbel, INT_MAX); }

    __device__ uint4 noise(int quad) const { return philox({uint32_t(quad), step, 0, 0}, key); }
};

template <class T>
__global__ void __launch_bounds__(512) slices(const Params<T> p, int blocks) {
    wait_for_previous_kernels();
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const Sequence<T> sequence{p, int(blockIdx.x / blocks)};
    for (int n = blockIdx.x % blocks * warps + threadIdx.x / 32; n < p.N; n += blocks * warps) {
        const int first = n * slice + lane * octet;
        const auto scores = sequence.scores(first);
        float largest = -INFINITY;
        for (const float v : scores.v) largest = fmaxf(largest, v);
        for (int d = 16; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));

        Candidate best = sequence.nobody();
        if (sequence.greedy) {
            best = 0;
            for (int j = 0; j < octet; ++j) best = max(best, candidate(scores.v[j], first + j));
        } else if (!sequence.filtered) {
            sequence.compete(best, sequence.relative(scores, largest), first);
        }
        best = warp_max(best);
        if (lane == 0) p.slices_BN[int64_t(sequence.b) * p.N + n] = {best, largest};
    }
}

// How far below the likeliest token a token is, in units of 2^-27; x is relative(score). Equal distances are ties.
__device__ uint32_t distance(float x) { return uint32_t(fminf(fmaxf(-x, 0.0f), farthest) * 0x1p27f); }

// A sum of 64 bits in shared memory that threads add to; atomics are fast there on 32 bits only.
struct Sum {
    uint32_t low, high;

    __device__ uint64_t value() const { return uint64_t(high) << 32 | low; }
    __device__ void add(uint64_t v) {
        const uint32_t before = atomicAdd(&low, uint32_t(v)), carry = before + uint32_t(v) < before;
        if (const uint32_t more = uint32_t(v >> 32) + carry) atomicAdd(&high, more);
    }
};

// Where a filter's edge is, as far as it is known.
struct Edge {
    int bin;          // of the range of distances looked at last; past the last one, if all together weigh less
    uint64_t nearer;  // weight of all before that bin
    uint64_t wanted;  // the weight at which the edge is; 0 at first
};

struct Shared {
    Sum weights[bins];
    Edge edge;
    int listed;  // tokens that wanted to be in the list
    struct Token {
        float x;
        int index;
    } list[capacity];
};

// The tokens of a sequence that filters still keep: those of the row up to a distance, or those of the list.
template <class T>
struct Kept {
    const Sequence<T>& sequence;
    const float largest;
    uint32_t limit = ~0u;  // the greatest distance that is kept
    bool listed = false;

    // Calls f(x, index) for each token up to the limit, in some thread.
    template <class F>
    __device__ void each(F f) const {
        auto& s = shared<Shared>();
        if (listed) {
            for (int i = threadIdx.x; i < s.listed; i += blockDim.x)
                if (distance(s.list[i].x) <= limit) f(s.list[i].x, s.list[i].index);
        } else {
            for (int first = threadIdx.x * octet; first < sequence.p.V; first += blockDim.x * octet) {
                const auto x = sequence.relative(sequence.scores(first), largest);
                for (int j = 0; j < octet; ++j)
                    if (first + j < sequence.p.V && distance(x.v[j]) <= limit) f(x.v[j], first + j);
            }
        }
    }

    // Keeps a token iff those strictly nearer weigh less than wanted(weight of all).
    template <class Weight, class Wanted>
    __device__ void filter(Weight weight, Wanted wanted) {
        auto& s = shared<Shared>();
        Edge edge{};
        uint32_t start = 0;  // of the range of distances that has the edge
        for (int shift = 24; shift >= 0; shift -= 8) {
            for (int i = threadIdx.x; i < bins; i += blockDim.x) s.weights[i] = {};
            __syncthreads();
            each([&](float x, int) {
                const uint32_t bin = (distance(x) - start) >> shift;
                if (x > -farthest && bin < bins) s.weights[bin].add(weight(x));
            });
            __syncthreads();
            if (threadIdx.x < 32) find_bin(edge, wanted);
            __syncthreads();
            edge = s.edge;
            if (edge.bin == bins) return;  // only at first
            start += uint32_t(edge.bin) << shift;
            limit = min(limit, start + ((1u << shift) - 1));
            if (shift == 24 && !listed) gather();
        }
    }

    // One warp: the bin where the weight reaches what is wanted.
    template <class Wanted>
    __device__ void find_bin(Edge edge, Wanted wanted) const {
        auto& s = shared<Shared>();
        const int lane = threadIdx.x, own = lane * (bins / 32);
        uint64_t sum = 0;
        for (int i = 0; i < bins / 32; ++i) sum += s.weights[own + i].value();
        uint64_t up_to = sum;  // of this lane's bins and all before
        for (int d = 1; d < 32; d *= 2) {
            const uint64_t before = __shfl_up_sync(~0u, up_to, d);
            if (lane >= d) up_to += before;
        }
        if (edge.wanted == 0) edge.wanted = wanted(__shfl_sync(~0u, up_to, 31));
        const unsigned reached = __ballot_sync(~0u, edge.nearer + up_to >= edge.wanted);
        if (lane != (reached ? __ffs(reached) - 1 : 0)) return;
        edge.bin = reached ? own : bins;
        edge.nearer += up_to - sum;
        while (edge.bin < bins && edge.nearer + s.weights[edge.bin].value() < edge.wanted)
            edge.nearer += s.weights[edge.bin++].value();
        s.edge = edge;
    }

    __device__ void gather() {
        auto& s = shared<Shared>();
        if (threadIdx.x == 0) s.listed = 0;
        __syncthreads();
        bool full = false;  // then it is of no use, and stops
        each([&](float x, int index) {
            if (full) return;
            const int at = atomicAdd(&s.listed, 1);
            full = at >= capacity;
            if (!full) s.list[at] = {x, index};
        });
        __syncthreads();
        listed = s.listed <= capacity;
    }

    __device__ Candidate best() const {
        Candidate best = sequence.nobody();
        if (listed) {
            each([&](float x, int index) { sequence.compete(best, x, index); });
        } else {
            for (int first = threadIdx.x * octet; first < sequence.p.V; first += blockDim.x * octet) {
                auto x = sequence.relative(sequence.scores(first), largest);
                for (float& v : x.v)
                    if (distance(v) > limit) v = -INFINITY;
                sequence.compete(best, x, first);
            }
        }
        return best;
    }
};

template <class T>
__global__ void __launch_bounds__(1024) finish(const Params<T> p) {
    wait_for_previous_kernels();
    const Sequence<T> sequence{p, int(blockIdx.x)};
    const Slice* slices = p.slices_BN + int64_t(sequence.b) * p.N;
    float largest = -INFINITY;
    for (int n = threadIdx.x; n < p.N; n += blockDim.x) largest = fmaxf(largest, slices[n].largest);
    largest = value_of(block_max(candidate(largest, 0)));

    Candidate best = 0;
    if (sequence.filtered) {
        Kept<T> kept{sequence, largest};
        if (sequence.top_k > 0)
            kept.filter([](float) { return uint64_t(1); }, [&](uint64_t) { return uint64_t(sequence.top_k); });
        if (sequence.top_p < 1)
            kept.filter([](float x) { return uint64_t(expf(x) * 0x1p40f); },
                        [&](uint64_t all) { return uint64_t(fmax(ceil(double(sequence.top_p) * double(all)), 1.0)); });
        if (sequence.min_p > 0) kept.limit = min(kept.limit, distance(logf(sequence.min_p)));
        best = kept.best();
    } else {
        for (int n = threadIdx.x; n < p.N; n += blockDim.x) {
            const Slice s = slices[n];
            const float behind = sequence.greedy ? 0.0f : sequence.relative(s.largest, largest);
            best = max(best, candidate(value_of(s.best) + behind, index_of(s.best)));
        }
    }
    best = block_max(best);
    if (threadIdx.x == 0) p.tokens_B[sequence.b] = index_of(best);
}

struct Tile {
    int slices;             // of a sequence
    int blocks, threads;    // of `slices`: blocks of a sequence, threads of a block
    int finishing_threads;  // of `finish`
};

Tile choose_tile(int B, int V) {
    const int slices = (V + slice - 1) / slice, warps = std::min(slices, 16);
    const int enough = (slices + warps - 1) / warps, wanted = std::max(1024 / B, 1);  // of 512 threads, to fill a GPU
    return {slices, std::min(enough, wanted), 32 * warps, 32 * std::min(slices, 32)};
}

using Optional = std::optional<Tensor>;
Tensor sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
              const Tensor& min_p, const Tensor& seed, const Tensor& step, const Optional& repetition_penalty,
              const Optional& presence_penalty, const Optional& frequency_penalty, const Optional& prompt_mask,
              const Optional& counts) {
    Arguments arguments("sample");
    arguments.tensor("logits", logits, {"B", "V"});
    const int64_t B = arguments["B"], V = arguments["V"];
    if (V == 0 || V > max_V) arguments.fail("V, the vocabulary, is ", V, ", but must be 1 to ", max_V);
    if (B > INT_MAX) arguments.fail("B, the number of sequences, is ", B, ", but must be below 2^31");
    if (logits.stride(1) != 1 && V > 1) arguments.fail("logits must have contiguous rows: call .contiguous() on it");

    Options options{};
    const auto option = [&](const char* name, const Tensor& t, auto& data,
                            std::initializer_list<const char*> shape = {"B"}) {
        using Element = std::remove_const_t<std::remove_pointer_t<std::remove_reference_t<decltype(data)>>>;
        arguments.tensor(name, t, torch::headeronly::CppTypeToScalarType<Element>::value, shape);
        data = arguments.data<Element>(name, t);
    };
    option("temperature", temperature, options.temperature_B);
    option("top_k", top_k, options.top_k_B);
    option("top_p", top_p, options.top_p_B);
    option("min_p", min_p, options.min_p_B);
    option("seed", seed, options.seed_B);
    option("step", step, options.step_B);
    if (repetition_penalty && presence_penalty && frequency_penalty && prompt_mask && counts) {
        option("repetition_penalty", *repetition_penalty, options.repetition_B);
        option("presence_penalty", *presence_penalty, options.presence_B);
        option("frequency_penalty", *frequency_penalty, options.frequency_B);
        option("prompt_mask", *prompt_mask, options.prompt_mask_BV, {"B", "V"});
        option("counts", *counts, options.counts_BV, {"B", "V"});
    } else if (repetition_penalty || presence_penalty || frequency_penalty || prompt_mask || counts) {
        arguments.fail("repetition_penalty, presence_penalty, frequency_penalty, prompt_mask and counts go together: ",
                       "give all five or none");
    }

    Tensor tokens = torch::stable::new_empty(logits, {B}, ScalarType::Long);
    if (B == 0) return tokens;
    const DeviceScope device(logits);
    const Tile tile = choose_tile(int(B), int(V));
    Tensor partial = torch::stable::new_empty(logits, {B, tile.slices, int64_t(sizeof(Slice) / 8)}, ScalarType::Long);
    auto* best = static_cast<Slice*>(partial.mutable_data_ptr());
    auto* chosen = static_cast<int64_t*>(tokens.mutable_data_ptr());
    const int64_t stride = B > 1 ? logits.stride(0) : 0, bytes = logits.element_size();
    const bool aligned = reinterpret_cast<intptr_t>(logits.const_data_ptr()) % 16 == 0 && stride * bytes % 16 == 0;
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        const auto* scores = static_cast<const T*>(logits.const_data_ptr());
        const Params<T> p{options, scores, stride, aligned, int(B), int(V), tile.slices, best, chosen};
        launch(slices<T>, {dim3(p.B * tile.blocks), dim3(tile.threads), 0, device.stream, true}, p, tile.blocks);
        launch(finish<T>, {dim3(p.B), dim3(tile.finishing_threads), 0, device.stream, true}, p);
    });
    return tokens;
}

}  // namespace

PYLLAMA_KERNEL(sample);
