"""The chosen experts' gate and up products with SwiGLU, for few tokens. T tokens, D hidden size, F feed-forward size,
E experts, N experts per token."""

from collections import Counter

import torch
from torch import Tensor

from pyllama.ops.grouped_linear import products
from pyllama.ops.registry import op
from pyllama.ops.swiglu import silu_gate


def _by_choice(x: Tensor, weight: Tensor, indices: Tensor, early: bool = False) -> Tensor:
    return x.new_empty(*indices.shape, weight.shape[1] // 2)


@op(
    "(Tensor x, Tensor weight, Tensor indices, bool early=False) -> Tensor",
    fake=_by_choice,
    x="T D",
    weight="E features D",
    indices="int32: T N",
)
def experts_swiglu(x: Tensor, weight: Tensor, indices: Tensor, early: bool = False) -> Tensor:
    """swiglu(weight[indices[t, n]] @ x[t]) of every token and choice.

    x: [T, D], at most 16 tokens in the kernel; weight: [E, 2F, D], each expert's gate, then its up part; indices: int32
    [T, N], in 0 to E - 1, a token's all different; result: [T, N, F]. An expert's weight is read once for all tokens
    that chose it. early: the kernel may read indices and weight while the kernel ahead in the stream still runs, so
    that must not be one that writes them. Raises ValueError for shapes that do not fit.
    """
    if weight.shape[1] % 2:
        raise ValueError(f"experts_swiglu: weight has {weight.shape[1]} rows, but must have 2F, gate and up")
    T, N = indices.shape
    return silu_gate(of_choices(x.unsqueeze(1).expand(T, N, -1), weight, indices))


def of_choices(x_TND: Tensor, weight_EFD: Tensor, indices_TN: Tensor) -> Tensor:
    """Each choice's row times its expert's weight, [T, N, F]; for other ops' bodies. Reads values."""
    chosen: list[int] = indices_TN.flatten().tolist()
    order = sorted(range(len(chosen)), key=chosen.__getitem__)
    rows_M = torch.tensor(order, dtype=torch.int64, device=x_TND.device)
    out_MF = products(x_TND.flatten(0, 1).index_select(0, rows_M), weight_EFD, Counter(sorted(chosen)))
    return torch.empty_like(out_MF).index_copy(0, rows_M, out_MF).view(*indices_TN.shape, weight_EFD.shape[1])
