"""The router of a mixture of experts, for few tokens. T tokens, D hidden size, E experts, N experts per token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyllama.ops.product import product
from pyllama.ops.registry import cast, compute_dtype, op
from pyllama.ops.rms_norm import normalised
from pyllama.ops.topk_gate import routed


@op(
    "(Tensor x, Tensor norm_weight, float eps, Tensor weight, int top_k, Tensor? bias=None, str scoring="
    '"softmax", int[]? groups=None, bool renormalize=True, float scale=1.0, Tensor? counters=None, bool early=False)'
    " -> (Tensor normed, Tensor weights, Tensor indices)",
    x="T D",
    norm_weight="D",
    weight="E D",
    bias="float: E",
    counters="int32: C",
)
def norm_gate(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    scoring: str = "softmax",
    groups: Sequence[int] | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    counters: Tensor | None = None,
    early: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`normed = rms_norm(x, norm_weight, eps)` and `topk_gate(linear(normed, weight), top_k, ...)`, in one kernel.

    x: [T, D], at most 16 tokens in the kernel; norm_weight: [D]; weight: [E, D]; result: normed [T, D], weights [T, N],
    float32 or wider, and indices int32 [T, N], N being top_k. The logits are sums in float32 or wider, not rounded.
    bias to scale: as in topk_gate. counters: int32, at least one, zeros that are zeros again at the end; None makes
    them, at the cost of another launch. early: as in norm_linear. Raises ValueError for shapes or values that do not
    fit.
    """
    normed_TD = normalised(x, norm_weight, eps)
    compute = compute_dtype(x)
    logits_TE = product(cast(normed_TD, compute), cast(weight, compute))
    weights_TN, indices_TN = routed("norm_gate", logits_TE, top_k, bias, scoring, groups, renormalize, scale)
    return normed_TD.contiguous(), weights_TN, indices_TN.to(torch.int32)
