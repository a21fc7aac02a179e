"""The chosen experts' down products, weighted and added to the residual stream, for few tokens. T tokens, D hidden
size, F feed-forward size, E experts, N experts per token."""

import torch
from torch import Tensor

from pyllama.ops.experts_swiglu import of_choices
from pyllama.ops.registry import cast, compute_dtype, nothing, op


@op(
    "(Tensor(a!) residual, Tensor x, Tensor weight, Tensor indices, Tensor weights, bool early=False) -> ()",
    fake=nothing,
    residual="T D",
    x="T N F",
    weight="E D F",
    indices="int32: T N",
    weights="float: T N",
)
def experts_add_(
    residual: Tensor, x: Tensor, weight: Tensor, indices: Tensor, weights: Tensor, early: bool = False
) -> None:
    """residual[t] += sum over n of weights[t, n] * weight[indices[t, n]] @ x[t, n], in place.

    residual: [T, D], at most 16 tokens in the kernel; x: [T, N, F]; weight: [E, D, F]; indices: int32 [T, N], in 0 to
    E - 1; weights: [T, N], float32 in the kernel. The kernel rounds the sum once. early: it may read indices, weights
    and weight while the kernel ahead in the stream still runs, so that must not be one that writes them. For inference:
    raises RuntimeError where a gradient would be due, ValueError for shapes or data types that do not fit.
    """
    compute = compute_dtype(x)
    out_TND = cast(of_choices(x, weight, indices), compute)
    residual.add_(cast(torch.bmm(cast(weights, compute).unsqueeze(1), out_TND).squeeze(1), x.dtype))
