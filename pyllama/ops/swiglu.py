"""SwiGLU activation (Shazeer, arXiv:2002.05202). F feed-forward size."""

import torch.nn.functional as functional
from torch import Tensor

from pyllama.ops.registry import cast, compute_dtype, op


@op("(Tensor x) -> Tensor", x="... features")
def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up. x: [..., 2F], gate first, then up; result: [..., F].

    Computed in float32 or wider and rounded once. Raises ValueError for an odd last dimension.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu: x's last dimension is {x.shape[-1]}, but must be even: 2F, gate and up")
    return silu_gate(x)


def silu_gate(x: Tensor) -> Tensor:
    """`swiglu` as a plain function, for other ops' bodies."""
    gate, up = cast(x, compute_dtype(x)).chunk(2, dim=-1)
    return cast(functional.silu(gate).mul_(up), x.dtype)
