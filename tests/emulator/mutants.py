"""Bugs to plant in the kernels, one at a time: the op tests must notice each under at least one flavour.

That shows what the tests are worth. `tests/test_mutants.py` plants them, in `make nightly`.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str  # of csrc/
    bug: str
    old: str  # text of the file
    new: str
    nth: int = 0  # which occurrence of `old`
    op: str = ""  # whose tests are to notice it; the file's own, if it is a kernel


MUTANTS = [
    Mutant("common/norm_rows.h", "last vector of a row left out", "vectors = p.D / Vector<T>::size;",
           "vectors = p.D / Vector<T>::size - 1;", op="rms_norm"),
    Mutant("common/norm_rows.h", "rows past the end not skipped", "unsigned(row) < unsigned(p.x_rows.count) && ", "",
           op="rms_norm"),
    Mutant("common/norm_rows.h", "only what registers hold is summed",
           "for (int at = rest; exists(row, at); at += step) {",
           "for (int at = rest; false; at += step) {", op="rms_norm"),
    Mutant("common/norm_rows.h", "sum over the neighbouring row too", "lanes_sum(sum, step)",
           "lanes_sum(sum, 2 * step)",
           op="rms_norm"),
    Mutant("common/norm_rows.h", "first row of a thread in place of its others", "p.x_rows.offset(row_of(r))",
           "p.x_rows.offset(row_of(0))", op="rms_norm"),
    Mutant("common/norm_rows.h", "weight of the wrong columns", "weight[i] = load(p.weight_D, first + i * step)",
           "weight[i] = load(p.weight_D, first)", op="rms_norm"),
    Mutant("common/rows.h", "groups of rows taken for one", "if (group == count)",
           "if (group <= count)", op="rms_norm"),
    Mutant("common/norm_rows.h", "result goes to the residual", "add ? x[r] : p.y_TD", "add ? residual[r] : p.y_TD",
           op="add_rms_norm"),
    Mutant("common/norm_rows.h", "residual's rows as far apart as x's", "p.residual_rows.offset(", "p.x_rows.offset(",
           op="add_rms_norm"),
    Mutant("common/norm_rows.h", "sum of what registers do not hold is not stored",
           "if (add) store(residual[r], at, more);", "", op="add_rms_norm"),
    Mutant("common/norm_rows.h", "normalises x in place of the sum", "load(add ? residual[r] : x[r], at)",
           "load(x[r], at)",
           op="add_rms_norm"),
    Mutant("add_rms_norm.cu", "one tensor as both is accepted", "x.const_data_ptr() == residual.const_data_ptr()",
           "false"),
    Mutant("common/rotary.h", "pairs with the next vector", "rotated ? half : half_rest",
           "rotated ? 1 : half_rest", op="rope"),
    Mutant("common/rotary.h", "vector past an odd number", "has_first && second < vectors", "has_first", op="rope"),
    Mutant("common/rotary.h", "turns the other way", "x * cos[i] - y * sin[i]", "x * cos[i] + y * sin[i]", op="rope"),
    Mutant("common/rotary.h", "angles of the first vector for both", "i == 0 ? part.first : part.second", "part.first",
           op="rope"),
    Mutant("rope.cu", "only the first block's heads", "blockIdx.y * heads_per_lane", "0 * heads_per_lane"),
    Mutant("rope.cu", "tokens past the end not skipped", "token >= p.tokens || ", ""),
    Mutant("norm_rope_store.cu", "padding is stored", "(!head.query && slot < 0)", "false"),
    Mutant("norm_rope_store.cu", "keys get the queries' weight", "nullptr : p.k_weight_K", "nullptr : p.q_weight_K"),
    Mutant("norm_rope_store.cu", "values are rotated", "part.rotated && !head.value", "part.rotated"),
    Mutant("norm_rope_store.cu", "pages without room for values", "int64_t(page) * 2 * p.G", "int64_t(page) * p.G"),
    Mutant("norm_rope_store.cu", "sum over other heads too", "lanes_sum(sum, blockDim.x)", "lanes_sum(sum, 32)"),
    Mutant("swiglu.cu", "reads past a row's end", "if (at < vectors) gate[i]", "gate[i]"),
    Mutant("swiglu.cu", "gate and up exchanged", "silu(g.x) * u.x", "silu(u.x) * g.x"),
    Mutant("swiglu.cu", "inf / inf at large gates", "__fdividef(x, 1.0f + __expf(-x))",
           "x * __fdividef(__expf(x), 1.0f + __expf(x))"),
    Mutant("swiglu.cu", "rows past the end not skipped", "if (row >= p.rows.count) return;", ""),
    Mutant("swiglu.cu", "pieces overlap", "piece * loads * blockDim.x", "piece * blockDim.x"),
    Mutant("common/reduce.h", "missing __syncthreads in the reduction", "__syncthreads();", "", op="rms_norm"),
    Mutant("common/reduce.h", "reads partial sums that nobody wrote", "lane < warps ? ", "lane < 32 ? ", op="rms_norm"),
    Mutant("common/reduce.h", "shared write past the end", "partial.warp[thread / 32] = v",
           "partial.warp[thread / 32 + 32] = v", op="rms_norm"),
    Mutant("common/reduce.h", "barrier in a divergent branch",
           "if (lane == 0) partial.warp[thread / 32] = v;\n    __syncthreads();",
           "if (lane == 0) { partial.warp[thread / 32] = v; __syncthreads(); }", op="rms_norm"),
]  # fmt: skip
