"""Bugs to plant in the kernels, one at a time: the op tests must notice each under at least one flavour.

That shows what the tests are worth. `tests/test_mutants.py` plants them, in `make nightly`.
"""

from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    file: str  # of csrc/
    op: str  # whose tests are to notice it
    bug: str
    old: str  # text of the file
    new: str
    nth: int = 0  # which occurrence of `old`


def planted(file: str, *bugs: tuple[str, str, str] | tuple[str, str, str, int], op: str = "") -> list[Mutant]:
    """Mutants of one file; op: by default the file's own name."""
    return [Mutant(file, op or Path(file).stem, *bug) for bug in bugs]


# fmt: off
MUTANTS = [
    *planted("common/attention.h",
        ("rows of the next sequence are written", "min(queries * p.R - work.first, tile_rows)", "tile_rows"),
    ),
    *planted("common/attention_kernels.h",
        ("keys used before they are here", "        cp_async_wait<0>();\n        __syncthreads();  // these keys",
         "        __syncthreads();  // these keys"),
        ("values overwritten while others read them",
         "__syncthreads();  // these keys are here, and the last values are no longer needed", ""),
        ("keys overwritten while others read them",
         "__syncthreads();  // the values are here, and the keys are no longer needed", ""),
        ("causal mask off by one", "j * 8 + e > last ||", "j * 8 + e > last + 1 ||"),
        ("window one key too wide", "j * 8 + e <= last - p.window", "j * 8 + e < last - p.window"),
        ("a tile on the diagonal is not masked", "first + keys - 1 > oldest", "first > oldest"),
        ("sums overwrite tiles in use", "    cp_async_wait<0>();\n    __syncthreads();\n    store_sums",
         "    store_sums"),
        ("dynamic shared memory too small", "sizeof(typename P::Shared)", "sizeof(typename P::Shared) - 64"),
        op="attention",
    ),
    *planted("common/softmax.h",
        ("bank conflicts' permutation differs between write and read",
         "return tile + row * columns + (chunk ^ swizzle) * 8;",
         "return tile + row * columns + (chunk ^ swizzle ^ (threadIdx.x >> 5 & 1)) * 8;"),
        ("values not transposed", "ldmatrix_x4_trans(b", "ldmatrix_x4(b"),
        ("what there was is not scaled to the new largest score", "sum[mi][h] *= shrink;", ""),
        ("columns of the neighbours are not added", "sum[mi][h] += __shfl_xor_sync(~0u, sum[mi][h], 2);", ""),
        op="attention",
    ),
    *planted("common/attention.h",
        ("the last block does not wait for its own threads", "__threadfence();\n    __syncthreads();",
         "__threadfence();"),
        ("a plain count of the blocks that are done", "atomicAdd(p.done + unit, 1u)", "p.done[unit]++"),
        ("the first block merges", "unsigned(work.parts) - 1;", "0u;"),
        ("a part too few is merged", "tile_rows * V, p.part_stats + at * 2, tile_rows * 2, work.parts)",
         "tile_rows * V, p.part_stats + at * 2, tile_rows * 2, work.parts - 1)"),
        ("parts are not brought to one scale", "const float factor = exp2f(", "const float factor = ("),
        op="paged_attention",
    ),
    *planted("common/attention_kernels.h",
        ("queries used before they are here", "cp_async_wait<P::stages - 1>();", ""),
        ("a stage used before it is here", "cp_async_wait<P::stages - 2>();", "cp_async_wait<P::stages - 1>();"),
        ("missing __syncwarp between copies and use",
         "__syncwarp();  // these keys are here, and the stage before is no longer needed", ""),
        ("keys past the end are copied", "return first + row < work.end; };", "return true; };"),
        ("the decoding window is off by one", "oldest = last - p.window + 1;", "oldest = last - p.window;"),
        op="paged_attention",
    ),
    *planted("common/reduce.h",
        ("missing __syncthreads in the reduction", "__syncthreads();", ""),
        ("reads partial sums that nobody wrote", "lane < warps ? ", "lane < 32 ? "),
        ("shared write past the end", "partial.warp[thread / 32] = v", "partial.warp[thread / 32 + 32] = v"),
        ("barrier in a divergent branch", "if (lane == 0) partial.warp[thread / 32] = v;\n    __syncthreads();",
         "if (lane == 0) { partial.warp[thread / 32] = v; __syncthreads(); }"),
        op="rms_norm",
    ),
    *planted("rms_norm.cu",
        ("last vector of a row left out", "p.D / Vector<T>::size : 0", "p.D / Vector<T>::size - 1 : 0"),
        ("rows past the end not skipped", "row < p.rows.count ? p.D / Vector<T>::size : 0", "p.D / Vector<T>::size"),
        ("only what registers hold is summed", "for (int i = rest; i < vectors; i += step) sum +=",
         "for (int i = rest; i < 0; i += step) sum +="),
    ),
    *planted("common/argmax.h",
        ("of equals the highest index", "<< 32 | ~uint32_t(index);", "<< 32 | uint32_t(index);"),
        ("missing __syncthreads in block_max", "    __syncthreads();\n    c = warp_max(lane", "    c = warp_max(lane"),
        ("block_max's memory reused without a barrier", "partial.warp[lane] : 0);\n    __syncthreads();",
         "partial.warp[lane] : 0);"),
        op="sample",
    ),
    *planted("common/philox.h",
        ("nine rounds", "round < 10", "round < 9"),
        op="sample",
    ),
    *planted("sample.cu",
        ("missing __syncthreads after clearing the histogram", "s.weights[i] = {};\n            __syncthreads();",
         "s.weights[i] = {};"),
        ("histogram read before all have added",
         "            __syncthreads();\n            if (threadIdx.x < 32) find_bin(edge, wanted);",
         "            if (threadIdx.x < 32) find_bin(edge, wanted);"),
        ("edge read before it is written", "find_bin(edge, wanted);\n            __syncthreads();",
         "find_bin(edge, wanted);"),
        ("carry of the 64-bit sum lost", "const uint32_t more = uint32_t(v >> 32) + carry",
         "const uint32_t more = uint32_t(v >> 32)"),
        ("plain add instead of atomicAdd", "before = atomicAdd(&low, uint32_t(v)),",
         "before = (low += uint32_t(v)) - uint32_t(v),"),
        ("list filled past its end", "if (!full) s.list[at] = {x, index};", "s.list[at] = {x, index};"),
        ("a list that lacks tokens is used", "listed = s.listed <= capacity;", "listed = true;"),
        ("the k-th token is dropped", "return uint64_t(sequence.top_k);", "return uint64_t(sequence.top_k) - 1;"),
        ("edge one too far", "edge.nearer + up_to >= edge.wanted", "edge.nearer + up_to > edge.wanted"),
        ("top-p of all tokens, not of those that top-k keeps",
         "if (first + j < sequence.p.V && distance(x.v[j]) <= limit) f(", "if (first + j < sequence.p.V) f("),
        ("vector loads from unaligned rows", "p.aligned && first + octet <= p.V", "first + octet <= p.V"),
        ("read past the end of the row", "p.aligned && first + octet <= p.V", "p.aligned && first < p.V"),
        ("noise bound too tight", "if (x < value_of(best) - highest_gumbel) return;",
         "if (x < value_of(best)) return;"),
        ("slices' values not brought to one reference", "candidate(value_of(s.best) + behind,",
         "candidate(value_of(s.best),"),
        ("last slice left out", "n < p.N; n += blocks * warps", "n < p.N - (p.N > 1); n += blocks * warps"),
        ("the key's high word left out", "uint32_t(uint64_t(p.seed_B[b]) >> 32)", "0u"),
        ("frequency penalty counts once", "frequency * count;", "frequency * (count > 0);"),
        ("strided rows read as contiguous", "p.logits_BV + b * p.stride", "p.logits_BV + b * int64_t(p.V)"),
    ),
]
# fmt: on
