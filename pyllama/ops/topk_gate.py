"""The router of a mixture of experts: which experts see a token, and with which weight.

T tokens, E experts, N experts per token. Covers Mixtral (softmax, renormalised; arXiv:2401.04088), DeepSeek-V2
(softmax, groups by maximum; arXiv:2405.04434) and DeepSeek-V3 (sigmoid, correction bias, groups by top-2 sum;
arXiv:2412.19437).
"""

import torch
from torch import Tensor

from pyllama.ops.registry import cast, compute_dtype, op


@op(
    '(Tensor logits, int top_k, Tensor? bias=None, str scoring="softmax", int num_groups=1, int top_groups=1, '
    "int group_top_k=1, bool renormalize=True, float scale=1.0) -> (Tensor weights, Tensor indices)",
    logits="T E",
    bias="float: E",
)
def topk_gate(
    logits: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    scoring: str = "softmax",
    num_groups: int = 1,
    top_groups: int = 1,
    group_top_k: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Score the experts, choose the top_k best of each token, and weigh them.

    logits: [T, E]; result: weights [T, top_k], float32 or wider, and indices int32 [T, top_k], best first; of equals
    the lower index. Scores are the softmax or the sigmoid of the logits. The choice is by score + bias ([E],
    DeepSeek-V3's correction), the weights are the scores alone. With num_groups > 1 the experts form groups of
    E / num_groups; a group is worth the sum of its group_top_k best, and only experts of the top_groups best groups
    can be chosen. renormalize divides the weights by their sum (+ 1e-20); scale multiplies them at the end.
    Raises ValueError for shapes or values that do not fit.
    """
    T, E = logits.shape
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"topk_gate: scoring is {scoring!r}, but must be 'softmax' or 'sigmoid'")
    if num_groups < 1 or E % num_groups:
        raise ValueError(f"topk_gate: num_groups is {num_groups}, but must divide the number of experts E = {E}")
    size = E // num_groups
    if not 1 <= top_groups <= num_groups or not 1 <= group_top_k <= size:
        raise ValueError(
            f"topk_gate: top_groups is {top_groups} and group_top_k {group_top_k}, but must be in 1 to "
            f"num_groups = {num_groups} and in 1 to the {size} experts of a group"
        )
    if not 1 <= top_k <= top_groups * size:
        raise ValueError(f"topk_gate: top_k is {top_k}, but must be in 1 to {top_groups * size}, the experts at choice")
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
    return weights_TN, indices_TN.to(torch.int32)


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values, of equals the lower index (which torch.topk does not promise)."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
