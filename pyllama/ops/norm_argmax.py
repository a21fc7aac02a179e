"""The head and the greedy choice, for few tokens. T tokens, D hidden size, V vocabulary."""

from torch import Tensor

from pyllama.ops.norm_linear import of_normalised
from pyllama.ops.registry import op


@op(
    "(Tensor(a!) tokens, Tensor x, Tensor? norm_weight, float eps, Tensor weight, Tensor? counters=None, "
    "bool early=False) -> ()",
    tokens="int64: T",
    x="T D",
    norm_weight="D",
    weight="V D",
    counters="int32: C",
)
def norm_argmax_(
    tokens: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    counters: Tensor | None = None,
    early: bool = False,
) -> None:
    """`tokens = norm_linear(x, norm_weight, eps, weight).argmax(-1)`, in place; the logits are stored nowhere.

    tokens: int64 [T], where the result goes, of equals the lowest; x: [T, D], of which the kernel takes at most 16
    tokens, rows may be strided; norm_weight: [D], None takes x as it is; weight: [V, D]. counters: int32, 2 T + 1 at
    least, zeros that are zeros again at the end; None makes them, at the cost of another launch. early: as in
    norm_linear. For inference: raises RuntimeError where a gradient would be due, ValueError for shapes or data types
    that do not fit.
    """
    if weight.shape[0] == 0:
        raise ValueError("norm_argmax_: weight has no rows, but must have the vocabulary's")
    tokens.copy_(of_normalised(x, norm_weight, eps, weight, None).argmax(dim=-1))
