"""A product of few tokens, normalised on the way. T tokens, D input features, F output features."""

from torch import Tensor

from pyllama.ops.product import product
from pyllama.ops.registry import op
from pyllama.ops.rms_norm import normalised


@op(
    "(Tensor x, Tensor? norm_weight, float eps, Tensor weight, Tensor? bias=None, bool early=False) -> Tensor",
    x="T D",
    norm_weight="D",
    weight="F D",
    bias="F",
)
def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """`linear(rms_norm(x, norm_weight, eps), weight, bias)`: a step of decoding, at the speed of reading the weight.

    x: [T, D], of which the kernel takes at most 16 tokens, rows may be strided; norm_weight: [D], None takes x as it
    is; weight: [F, D]; bias: [F]; result: [T, F]. What is normalised is rounded to the data type, as rms_norm's result
    is; sums are in float32 or wider. early: the kernel may read weights while the kernel ahead in the stream still
    runs, so that must not be one that writes them. Raises ValueError for shapes or data types that do not fit.
    """
    return of_normalised(x, norm_weight, eps, weight, bias)


def of_normalised(x: Tensor, norm_weight: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`norm_linear` as a plain function, for other ops' bodies."""
    return product(x if norm_weight is None else normalised(x, norm_weight, eps), weight, bias)
