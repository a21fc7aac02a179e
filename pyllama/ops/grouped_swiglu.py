"""The experts' gate and up products with SwiGLU. M rows, D hidden size, F feed-forward size, E experts."""

from torch import Tensor

from pyllama.ops.grouped_linear import grouped_linear
from pyllama.ops.registry import op
from pyllama.ops.swiglu import swiglu


def _rows_by_half(x: Tensor, weight: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0] if rows is None else rows.shape[0], weight.shape[1] // 2)


@op(
    "(Tensor x, Tensor weight, Tensor offsets, Tensor? rows=None) -> Tensor",
    fake=_rows_by_half,
    x="tokens D",
    weight="E features D",
    offsets="int32: E+1",
    rows="int32: M",
)
def grouped_swiglu(x: Tensor, weight: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:
    """`swiglu(grouped_linear(x, weight, offsets, rows))`: what mixtures of experts compute first.

    weight: [E, 2F, D], each expert's gate, then its up part; result: [M, F]; the other arguments are grouped_linear's.
    Raises ValueError for shapes that do not fit.
    """
    if weight.shape[1] % 2:
        raise ValueError(f"grouped_swiglu: weight has {weight.shape[1]} rows, but must have 2F, gate and up")
    return swiglu(grouped_linear(x, weight, offsets, rows))
