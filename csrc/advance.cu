// advance.cu - one more token of each decoding sequence: position, length, and place in the paged cache. A thread does
// a sequence. One of length 0 is an unused place of the batch and stays as it is.
#include "common/op.h"
#include "common/ptx.h"

namespace {

constexpr int threads = 128;

struct Params {
    int *positions_B, *seq_lens_B, *slots_B;
    const int* block_table;  // [B, max_pages]
    int B, max_pages, S;
};

__global__ void __launch_bounds__(threads) advance_kernel(const Params p) {
    wait_for_previous_kernels();
    const int b = blockIdx.x * threads + threadIdx.x;
    if (b >= p.B) return;
    const int position = p.seq_lens_B[b], column = position / p.S;
    p.positions_B[b] = position;
    if (position > 0) p.seq_lens_B[b] = position + 1;
    p.slots_B[b] = position > 0 && column < p.max_pages
                       ? p.block_table[int64_t(b) * p.max_pages + column] * p.S + position % p.S
                       : -1;
}

void advance_(const Tensor& positions, const Tensor& seq_lens, const Tensor& slots, const Tensor& block_table,
              int64_t page_size) {
    Arguments arguments("advance_");
    arguments.tensor("positions", positions, ScalarType::Int, {"B"});
    arguments.tensor("seq_lens", seq_lens, ScalarType::Int, {"B"});
    arguments.tensor("slots", slots, ScalarType::Int, {"B"});
    arguments.tensor("block_table", block_table, ScalarType::Int, {"B", "max_pages"});
    if (page_size < 1) arguments.fail("page_size is ", page_size, ", but must be at least 1");
    const int B = int(arguments["B"]);
    if (B == 0) return;
    const DeviceScope device(positions);
    const Params p{arguments.mutable_data<int>("positions", positions),
                   arguments.mutable_data<int>("seq_lens", seq_lens),
                   arguments.mutable_data<int>("slots", slots),
                   arguments.data<int>("block_table", block_table),
                   B,
                   int(arguments["max_pages"]),
                   int(page_size)};
    launch(advance_kernel, {dim3((B + threads - 1) / threads), dim3(threads), 0, device.stream, true}, p);
}

}  // namespace

PYLLAMA_KERNEL(advance_);
