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
    Mutant("rms_norm.cu", "last vector of a row left out", "p.D / Vector<T>::size : 0",
           "p.D / Vector<T>::size - 1 : 0"),
    Mutant("rms_norm.cu", "rows past the end not skipped", "row < p.rows.count ? p.D / Vector<T>::size : 0",
           "p.D / Vector<T>::size"),
    Mutant("rms_norm.cu", "only what registers hold is summed", "for (int i = rest; i < vectors; i += step) sum +=",
           "for (int i = rest; i < 0; i += step) sum +="),
    Mutant("common/reduce.h", "missing __syncthreads in the reduction", "__syncthreads();", "", op="rms_norm"),
    Mutant("common/reduce.h", "reads partial sums that nobody wrote", "lane < warps ? ", "lane < 32 ? ", op="rms_norm"),
    Mutant("common/reduce.h", "shared write past the end", "partial.warp[thread / 32] = v",
           "partial.warp[thread / 32 + 32] = v", op="rms_norm"),
    Mutant("common/reduce.h", "barrier in a divergent branch",
           "if (lane == 0) partial.warp[thread / 32] = v;\n    __syncthreads();",
           "if (lane == 0) { partial.warp[thread / 32] = v; __syncthreads(); }", op="rms_norm"),
]  # fmt: skip
