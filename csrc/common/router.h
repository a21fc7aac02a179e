// router.h - which experts see a token, and with which weight. A warp has a token, its lanes the experts' scores in
// registers; all exchange is by shuffles and warp-wide maxima.
//
// A group of experts belongs to 32 / groups neighbouring lanes, expert i of it to lane i % lanes: so the groups' worth
// are sums over equal parts of the warp, found at once.
#pragma once

#include <string>

#include "common/argmax.h"
#include "common/op.h"
#include "common/reduce.h"

constexpr int max_experts = 512;
constexpr int max_chosen = 32;  // experts of a token

struct Gate {
    const float* bias_E;  // or null
    float* weights_TN;
    int* indices_TN;
    int count, E, N;   // count: of tokens
    int group, lanes;  // of a group: experts, lanes
    int top_groups, group_top_k;
    bool sigmoid, renormalize;
    float scale;
};

// A value as a number that rises with it and is never 0, which stands for what cannot be chosen.
__device__ inline uint32_t key_of(float value) { return uint32_t(candidate(value, 0) >> 32); }

template <int kept>
struct Router {
    const Gate& p;
    const int lane = threadIdx.x % 32, within = lane % p.lanes, first = lane / p.lanes * p.group + within;
    float score[kept];
    uint32_t key[kept];  // of the choice: score + bias

    __device__ explicit Router(const Gate& p) : p(p) {}

    __device__ int expert(int i) const { return first + i * p.lanes; }
    __device__ bool exists(int i) const { return within + i * p.lanes < p.group; }

    template <class T>
    __device__ void read(const T* logits_E) {
        float best = -INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < kept; ++i) {
            score[i] = exists(i) ? float(logits_E[expert(i)]) : -INFINITY;
            best = fmaxf(best, score[i]);
        }
        if (p.sigmoid) {
#pragma unroll
            for (int i = 0; i < kept; ++i) score[i] = 1 / (1 + expf(-score[i]));
        } else {
            for (int d = 16; d > 0; d /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, d));
#pragma unroll
            for (int i = 0; i < kept; ++i) sum += score[i] = expf(score[i] - best);
            sum = lanes_sum(sum, 32);
#pragma unroll
            for (int i = 0; i < kept; ++i) score[i] /= sum;
        }
#pragma unroll
        for (int i = 0; i < kept; ++i)
            key[i] = exists(i) ? key_of(score[i] + (p.bias_E ? p.bias_E[expert(i)] : 0.0f)) : 0;
    }

    // The best of the lane's choices, of equals the first, with its place.
    __device__ Candidate best_of_lane() const {
        Candidate best = 0;
#pragma unroll
        for (int i = 0; i < kept; ++i) best = max(best, Candidate(key[i]) << 32 | ~uint32_t(expert(i)));
        return best;
    }

    // Takes away what lies in the groups that are not among the best.
    __device__ void limit_groups() {
        float worth = 0;
        uint32_t left[kept];
#pragma unroll
        for (int i = 0; i < kept; ++i) left[i] = key[i];
        for (int n = 0; n < p.group_top_k; ++n) {
            Candidate best = best_of_lane();
            for (int d = p.lanes / 2; d > 0; d /= 2) best = max(best, __shfl_xor_sync(~0u, best, d));
            worth += value_of(best);
            take(best);
        }
        // How many groups are better, or as good and earlier.
        const int groups = 32 / p.lanes, group = lane / p.lanes;
        int better = 0;
        for (int g = 0; g < groups; ++g) {
            const uint32_t mine = key_of(worth), other = __shfl_sync(~0u, mine, g * p.lanes);
            better += other > mine || (other == mine && g < group);
        }
#pragma unroll
        for (int i = 0; i < kept; ++i) key[i] = better < p.top_groups ? left[i] : 0;
    }

    __device__ void take(Candidate chosen) {
#pragma unroll
        for (int i = 0; i < kept; ++i)
            if (expert(i) == index_of(chosen)) key[i] = 0;
    }

    // The score of an expert, in whichever lane asks; all lanes call it with the same expert.
    __device__ float score_of(int chosen) const {
        float mine = 0;
        bool here = false;
#pragma unroll
        for (int i = 0; i < kept; ++i)
            if (exists(i) && expert(i) == chosen) mine = score[i], here = true;
        return __shfl_sync(~0u, mine, __ffs(__ballot_sync(~0u, here)) - 1);
    }

    __device__ void choose(float* weights_N, int* indices_N) {
        float weight = 0;  // of choice `lane`
        int index = 0;
        for (int n = 0; n < p.N; ++n) {
            const Candidate mine = best_of_lane();
            const uint32_t highest = __reduce_max_sync(~0u, uint32_t(mine >> 32));
            const uint32_t last = uint32_t(mine >> 32) == highest ? uint32_t(mine) : 0;
            const Candidate best = Candidate(highest) << 32 | __reduce_max_sync(~0u, last);
            take(best);
            const float chosen = score_of(index_of(best));
            if (lane == n) weight = chosen, index = index_of(best);
        }
        if (p.renormalize) weight /= lanes_sum(weight, 32) + 1e-20f;
        if (lane < p.N) weights_N[lane] = weight * p.scale, indices_N[lane] = index;
    }
};

// A token's choice, by a whole warp.
template <int kept, class T>
__device__ void route(const Gate& p, const T* logits_TE, int64_t token) {
    Router<kept> router(p);
    router.read(logits_TE + token * p.E);
    if (p.top_groups * p.lanes < 32) router.limit_groups();
    router.choose(p.weights_TN + token * p.N, p.indices_TN + token * p.N);
}

// How many experts' scores a lane has at most.
__host__ __device__ inline int kept_scores(const Gate& p) { return (p.group + p.lanes - 1) / p.lanes; }

// What a router's arguments say, checked; all but where logits are and results go. groups: how many there are, how many
// of them a token sees, and how many experts' scores a group's worth sums.
inline Gate make_gate(const Arguments& arguments, int64_t tokens, int64_t E, int64_t top_k,
                      const std::optional<Tensor>& bias, const std::string& scoring,
                      const std::optional<std::vector<int64_t>>& groups, bool renormalize, double scale) {
    if (scoring != "softmax" && scoring != "sigmoid")
        arguments.fail("scoring is '", scoring, "', but must be 'softmax' or 'sigmoid'");
    if (E > max_experts) arguments.fail("E, the number of experts, is ", E, ", but must be at most ", max_experts);
    if (tokens > INT_MAX) arguments.fail("T, the number of tokens, is ", tokens, ", but must be below 2^31");
    if (groups && groups->size() != 3)
        arguments.fail("groups has ", groups->size(),
                       " numbers, but must have 3: of groups, of those chosen, of experts that a group's worth sums");
    const int64_t all = groups ? (*groups)[0] : 1, top = groups ? (*groups)[1] : 1, summed = groups ? (*groups)[2] : 1;
    if (all < 1 || E % all) arguments.fail("groups[0] is ", all, ", but must divide the number of experts E = ", E);
    if (all > 32 || 32 % all != 0)
        arguments.fail("groups[0] is ", all, ", but must be 1, 2, 4, 8, 16 or 32 (pyllama.eager() takes any)");
    const int64_t size = E / all;
    if (top < 1 || top > all || summed < 1 || summed > size)
        arguments.fail("groups[1] is ", top, " and groups[2] ", summed, ", but must be in 1 to groups[0] = ", all,
                       " and in 1 to the ", size, " experts of a group");
    if (top_k < 1 || top_k > top * size)
        arguments.fail("top_k is ", top_k, ", but must be in 1 to ", top * size, ", the experts at choice");
    if (top_k > max_chosen) arguments.fail("top_k is ", top_k, ", but must be at most ", max_chosen);
    Gate gate{};
    gate.bias_E = bias ? arguments.data<float>("bias", *bias) : nullptr;
    gate.count = int(tokens), gate.E = int(E), gate.N = int(top_k);
    gate.group = int(size), gate.lanes = int(32 / all);
    gate.top_groups = int(top), gate.group_top_k = int(summed);
    gate.sigmoid = scoring == "sigmoid", gate.renormalize = renormalize;
    gate.scale = float(scale);
    return gate;
}
