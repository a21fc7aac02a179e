"""The gate and up products of a feed-forward layer with SwiGLU, for few tokens. T tokens, D hidden size, F feed-forward
size."""

from torch import Tensor

from pyllama.ops.norm_linear import of_normalised
from pyllama.ops.registry import op
from pyllama.ops.swiglu import silu_gate


@op(
    "(Tensor x, Tensor? norm_weight, float eps, Tensor weight, Tensor? bias=None, bool early=False) -> Tensor",
    x="T D",
    norm_weight="D",
    weight="features D",
    bias="features",
)
def norm_swiglu(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """`swiglu(norm_linear(x, norm_weight, eps, weight, bias))`, without rounding in between.

    weight: [2F, D], gate first, then up; bias: [2F]; result: [T, F]; the other arguments are norm_linear's. Raises
    ValueError for shapes or data types that do not fit.
    """
    if weight.shape[0] % 2:
        raise ValueError(f"norm_swiglu: weight has {weight.shape[0]} rows, but must have 2F, gate and up")
    return silu_gate(of_normalised(x, norm_weight, eps, weight, bias))
