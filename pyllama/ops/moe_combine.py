"""The weighted sum of the experts' results. M sorted rows, T tokens, N experts per token, D hidden size."""

import torch
from torch import Tensor

from pyllama.ops.registry import cast, compute_dtype, op


@op(
    "(Tensor x, Tensor positions, Tensor weights) -> Tensor",
    x="M D",
    positions="int32: T N",
    weights="float: T N",
)
def moe_combine(x: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """Token t gets the sum over n of weights[t, n] * x[positions[t, n]].

    x: [M, D]; positions: int32 [T, N], rows of x; weights: [T, N], any floating-point type; result: [T, D] in x's
    type, summed in float32 or wider. Raises ValueError for shapes that do not fit.
    """
    T, N = positions.shape
    compute = compute_dtype(x)
    x_TND = cast(x.index_select(0, positions.flatten()), compute).view(T, N, x.shape[1])
    return cast(torch.bmm(cast(weights, compute).unsqueeze(1), x_TND).squeeze(1), x.dtype)
