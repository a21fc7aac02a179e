"""The router of a mixture of experts: which experts see a token, and with which weight.

T tokens, E experts, N experts per token. Covers Mixtral (softmax, renormalised; arXiv:2401.04088), DeepSeek-V2
(softmax, groups by maximum; arXiv:2405.04434) and DeepSeek-V3 (sigmoid, correction bias, groups by top-2 sum;
arXiv:2412.19437).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyllama.ops.registry import cast, compute_dtype, op


@op(
    '(Tensor logits, int top_k, Tensor? bias=None, str scoring="softmax", int[]? groups=None, '
    "bool renormalize=True, float scale=1.0) -> (Tensor weights, Tensor indices)",
    logits="T E",
    bias="float: E",
)
def topk_gate(
    logits: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    scoring: str = "softmax",
    groups: Sequence[int] | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Score the experts, choose the top_k best of each token, and weigh them.

    logits: [T, E]; result: weights [T, top_k], float32 or wider, and indices int32 [T, top_k], best first; of equals
    the lower index. Scores are the softmax or the sigmoid of the logits. The choice is by score + bias ([E],
    DeepSeek-V3's correction), the weights are the scores alone. groups, three numbers (None is 1, 1, 1): the experts
    form so many groups of equal size, of which a token sees so many, the best; a group is worth the sum of so many of
    its best scores. renormalize divides the weights by their sum (+ 1e-20); scale multiplies them at the end.
    Raises ValueError for shapes or values that do not fit.
    """
    weights_TN, indices_TN = routed("topk_gate", logits, top_k, bias, scoring, groups, renormalize, scale)
    return weights_TN, indices_TN.to(torch.int32)


def routed(
    op: str,
    logits: Tensor,
    top_k: int,
    bias: Tensor | None,
    scoring: str,
    groups: Sequence[int] | None,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`topk_gate` as a plain function, for other ops' bodies: named `op` in errors, indices int64."""
    T, E = logits.shape
    num_groups, top_groups, group_top_k = _checked(op, E, top_k, scoring, groups)
    size = E // num_groups
    logits_TE = cast(logits, compute_dtype(logits))
    scores_TE = logits_TE.softmax(-1) if scoring == "softmax" else logits_TE.sigmoid()
    choice_TE = scores_TE if bias is None else scores_TE + bias
    if top_groups < num_groups:
        groups_TGe = choice_TE.view(T, num_groups, size)
        worth_TG = groups_TGe.topk(group_top_k, dim=-1).values.sum(-1)
        chosen_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter_(1, _best(worth_TG, top_groups), True)
        choice_TE = groups_TGe.masked_fill(~chosen_TG.unsqueeze(-1), float("-inf")).view(T, E)
    indices_TN = _best(choice_TE, top_k)
    weights_TN = scores_TE.gather(1, indices_TN)
    if renormalize:
        weights_TN = weights_TN / (weights_TN.sum(-1, keepdim=True) + 1e-20)
    if scale != 1.0:
        weights_TN = weights_TN * scale
    return weights_TN, indices_TN


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values, of equals the lower index (which torch.topk does not promise)."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _checked(op: str, E: int, top_k: int, scoring: str, groups: Sequence[int] | None) -> tuple[int, int, int]:
    """`groups`, checked with the other options of a router."""
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"{op}: scoring is {scoring!r}, but must be 'softmax' or 'sigmoid'")
    if groups is not None and len(groups) != 3:
        raise ValueError(
            f"{op}: groups has {len(groups)} numbers, but must have 3: of groups, of those chosen, of experts that a "
            "group's worth sums"
        )
    num_groups, top_groups, group_top_k = groups or (1, 1, 1)
    if num_groups < 1 or E % num_groups:
        raise ValueError(f"{op}: groups[0] is {num_groups}, but must divide the number of experts E = {E}")
    size = E // num_groups
    if not 1 <= top_groups <= num_groups or not 1 <= group_top_k <= size:
        raise ValueError(
            f"{op}: groups[1] is {top_groups} and groups[2] {group_top_k}, but must be in 1 to groups[0] = "
            f"{num_groups} and in 1 to the {size} experts of a group"
        )
    if not 1 <= top_k <= top_groups * size:
        raise ValueError(f"{op}: top_k is {top_k}, but must be in 1 to {top_groups * size}, the experts at choice")
    return num_groups, top_groups, group_top_k
