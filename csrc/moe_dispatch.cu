// moe_dispatch.cu - a stable counting sort of (token, choice) pairs by expert.
//
// A warp counts the experts of a run of consecutive pairs, all counts are summed to the first place of each warp's
// pairs of each expert, and then the warp goes through its run again and gives out places. Integers only and no race,
// so results are the same every time. Up to `chunk` pairs are one block's; more take a launch before that counts for
// all blocks, since a block needs to know what those before it have.
#include <algorithm>

#include "common/op.h"
#include "common/reduce.h"

namespace {

constexpr int max_threads = 512, max_warps = max_threads / 32, max_experts = 512;
constexpr int chunk = 8192;

struct Params {
    const int* indices_M;
    int *rows_M, *offsets, *positions_M;  // offsets: [E + 1]
    int* counts_CE;                       // of each of C chunks, if there are several
    int M, N, E, chunks;

    // An expert that is not there would be counted somewhere in memory; only the eager body can say so.
    __device__ int expert(int pair) const { return min(max(indices_M[pair], 0), E - 1); }
};

__global__ void __launch_bounds__(max_threads) count_kernel(const Params p) {
    struct Counts {
        int of[max_experts];
    };
    auto& counts = shared<Counts>();
    for (int e = threadIdx.x; e < p.E; e += blockDim.x) counts.of[e] = 0;
    __syncthreads();
    const int first = blockIdx.x * chunk, end = min(first + chunk, p.M);
    for (int pair = first + threadIdx.x; pair < end; pair += blockDim.x) atomicAdd(&counts.of[p.expert(pair)], 1);
    __syncthreads();
    for (int e = threadIdx.x; e < p.E; e += blockDim.x) p.counts_CE[blockIdx.x * p.E + e] = counts.of[e];
}

// blockDim.x is a thread for each expert at least.
__global__ void __launch_bounds__(max_threads) moe_dispatch_kernel(const Params p) {
    struct Counts {
        int of[max_warps][max_experts];  // then: the warp's next place for a pair of the expert
    };
    auto& counts = shared<Counts>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int begin = blockIdx.x * chunk, end = min(begin + chunk, p.M);
    const int run = (end - begin + 32 * warps - 1) / (32 * warps) * 32;
    const int first = begin + warp * run, last = min(first + run, end);

    for (int e = lane; e < p.E; e += 32) counts.of[warp][e] = 0;
    __syncwarp();
    for (int pair = first + lane; pair < last; pair += 32) atomicAdd(&counts.of[warp][p.expert(pair)], 1);
    __syncthreads();

    const int e = threadIdx.x;
    int before = 0, total = 0;  // of the expert: in earlier chunks, in all
    if (e < p.E) {
        if (p.chunks == 1)
            for (int w = 0; w < warps; ++w) total += counts.of[w][e];
        for (int c = 0; p.chunks > 1 && c < p.chunks; ++c) {
            const int count = p.counts_CE[c * p.E + e];
            total += count;
            if (c < int(blockIdx.x)) before += count;
        }
    }
    const int start = sum_before(total);
    if (e < p.E) {
        int place = start + before;
        for (int w = 0; w < warps; ++w) {
            const int count = counts.of[w][e];
            counts.of[w][e] = place;
            place += count;
        }
        if (blockIdx.x == 0) p.offsets[e] = start;
        if (blockIdx.x == 0 && e == 0) p.offsets[p.E] = p.M;
    }
    __syncthreads();

    for (int base = first; base < last; base += 32) {
        const int pair = base + lane;
        const unsigned active = __ballot_sync(~0u, pair < last);
        int expert = 0;
        unsigned same = 0;
        if (pair < last) {
            expert = p.expert(pair);
            same = __match_any_sync(active, expert);
            const int place = counts.of[warp][expert] + __popc(same & ((1u << lane) - 1));
            p.positions_M[pair] = place;
            p.rows_M[place] = pair / p.N;
        }
        __syncwarp();  // all have read the expert's place
        if (pair < last && same >> lane == 1) counts.of[warp][expert] += __popc(same);  // the last of them
        __syncwarp();
    }
}

std::tuple<Tensor, Tensor, Tensor> moe_dispatch(const Tensor& indices, int64_t num_experts) {
    Arguments arguments("moe_dispatch");
    arguments.tensor("indices", indices, ScalarType::Int, {"T", "N"});
    if (num_experts < 1 || num_experts > max_experts)
        arguments.fail("num_experts is ", num_experts, ", but must be in 1 to ", max_experts);
    const int64_t T = arguments["T"], N = arguments["N"], M = T * N;
    if (M > INT_MAX - chunk) arguments.fail("indices has ", M, " choices, but must have fewer than 2^31 - ", chunk);

    Tensor rows = torch::stable::new_empty(indices, {M}),
           offsets = torch::stable::new_empty(indices, {num_experts + 1});
    Tensor positions = torch::stable::new_empty(indices, {T, N});
    const int chunks = std::max(int((M + chunk - 1) / chunk), 1);
    const DeviceScope device(indices);
    Params p{};
    p.indices_M = arguments.data<int>("indices", indices);
    p.rows_M = static_cast<int*>(rows.mutable_data_ptr());
    p.offsets = static_cast<int*>(offsets.mutable_data_ptr());
    p.positions_M = static_cast<int*>(positions.mutable_data_ptr());
    p.M = int(M), p.N = int(N), p.E = int(num_experts), p.chunks = chunks;
    Tensor counts = torch::stable::new_empty(indices, {chunks > 1 ? chunks : 0, num_experts});
    p.counts_CE = static_cast<int*>(counts.mutable_data_ptr());
    if (chunks > 1) launch(count_kernel, {dim3(chunks), dim3(max_threads), 0, device.stream}, p);
    const int threads = std::min((std::max(p.M, p.E) + 31) / 32 * 32, max_threads);
    launch(moe_dispatch_kernel, {dim3(chunks), dim3(threads), 0, device.stream}, p);
    return {rows, offsets, positions};
}

}  // namespace

PYLLAMA_KERNEL(moe_dispatch);
