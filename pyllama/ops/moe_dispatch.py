"""Sorting tokens by expert. T tokens, E experts, N experts per token, M = T * N sorted rows."""

import torch
from torch import Tensor

from pyllama.ops.registry import op


def _empty(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return indices.new_empty(indices.numel()), indices.new_empty(num_experts + 1), indices.new_empty(indices.shape)


@op(
    "(Tensor indices, int num_experts) -> (Tensor rows, Tensor offsets, Tensor positions)",
    fake=_empty,
    differentiable=False,
    indices="int32: T N",
)
def moe_dispatch(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A stable counting sort of the T * N (token, choice) pairs by expert.

    indices: int32 [T, N], experts in [0, num_experts). Results, all int32: rows [T*N], the token of each sorted row;
    offsets [E + 1], where expert e owns sorted rows offsets[e] to offsets[e + 1]; positions [T, N], the sorted row of
    each pair. Raises ValueError for shapes or values that do not fit.
    """
    T, N = indices.shape
    if num_experts < 1:
        raise ValueError(f"moe_dispatch: num_experts is {num_experts}, but must be at least 1")
    experts_M, order_M = indices.flatten().sort(stable=True)
    if T * N:
        ends = experts_M[:: max(T * N - 1, 1)].tolist()
        least, most = ends[0], ends[-1]
        if least < 0 or most >= num_experts:
            wrong = least if least < 0 else most
            raise ValueError(f"moe_dispatch: indices has expert {wrong}, but must be in 0 to {num_experts - 1}")
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=indices.device)
    offsets = torch.searchsorted(experts_M, bounds, out_int32=True)
    rows_M = order_M.div(max(N, 1), rounding_mode="floor").to(torch.int32)
    sorted_M = torch.arange(T * N, dtype=torch.int32, device=indices.device)
    positions_M = torch.empty_like(sorted_M).scatter_(0, order_M, sorted_M)
    return rows_M, offsets, positions_M.view(T, N)
