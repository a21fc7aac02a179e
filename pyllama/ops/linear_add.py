"""A product of few tokens, added to the residual stream. T tokens, D input features, F output features."""

from torch import Tensor

from pyllama.ops.product import add_product_
from pyllama.ops.registry import nothing, op


@op(
    "(Tensor(a!) residual, Tensor x, Tensor weight, Tensor? bias=None, bool early=False, Tensor? prefetch=None) -> ()",
    fake=nothing,
    residual="T F",
    x="T D",
    weight="F D",
    bias="F",
    prefetch="...",
)
def linear_add_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    early: bool = False,
    prefetch: Tensor | None = None,
) -> None:
    """residual += linear(x, weight, bias), in place.

    residual: [T, F]; x: [T, D], of which the kernel takes at most 16 tokens; rows of both may be strided; weight:
    [F, D]; bias: [F]; early: as in norm_linear. prefetch: contiguous, a weight that soon follows, whose first 8 MB the
    kernel brings to the L2 cache while it waits (in float32 nothing). The kernel rounds the sum once. For inference:
    raises RuntimeError where a gradient would be due, ValueError for shapes or data types that do not fit and for one
    tensor given as both.
    """
    if residual.data_ptr() == x.data_ptr() and x.numel():
        raise ValueError("linear_add_: x and residual are the same memory, but residual is written: give two tensors")
    add_product_(residual, x, weight, bias)
