"""Rotary position embedding (Su et al., arXiv:2104.09864). T tokens, K head size, R rotated dimensions, R <= K."""

import torch
from torch import Tensor

from pyllama.ops.registry import cast, compute_dtype, op


@op(
    "(Tensor x, Tensor cos_sin, Tensor positions, bool interleaved=False) -> Tensor",
    x="T heads K",
    cos_sin="float32: max_positions R",
    positions="int32: T",
)
def rope(x: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first R dimensions of each head by angles that depend on the token's position.

    x: [T, heads, K]; cos_sin: float32 [max_positions, R], row p holds R/2 cosines then R/2 sines of position p's
    angles; positions: int32 [T], each in [0, max_positions). Pair i of a head is dimensions (i, i + R/2), or
    (2i, 2i + 1) when interleaved. Dimensions R to K pass unchanged. Raises ValueError for shapes that do not fit.
    """
    return rotated(x, cos_sin, positions, interleaved)


def rotated(x_THK: Tensor, cos_sin: Tensor, positions_T: Tensor, interleaved: bool) -> Tensor:
    """`rope` as a plain function, for other ops' bodies."""
    R, K = cos_sin.shape[-1], x_THK.shape[-1]
    if R % 2 or R > K:
        raise ValueError(f"rope: cos_sin's last dimension R is {R}, but must be even and at most x's K = {K}")
    compute = compute_dtype(x_THK)
    cos_T1r, sin_T1r = cast(cos_sin.index_select(0, positions_T), compute).unsqueeze(1).chunk(2, dim=-1)
    turned_THR = cast(x_THK if R == K else x_THK[..., :R], compute)
    if interleaved:
        a, b = turned_THR[..., 0::2], turned_THR[..., 1::2]
    else:
        a, b = turned_THR.chunk(2, dim=-1)
    pair = (torch.addcmul(a * cos_T1r, b, sin_T1r, value=-1), torch.addcmul(b * cos_T1r, a, sin_T1r))
    out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    out = cast(out, x_THK.dtype)
    return out if R == K else torch.cat((out, x_THK[..., R:]), dim=-1)
