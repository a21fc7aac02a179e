"""Root mean square normalisation (Zhang & Sennrich, arXiv:1910.07467). D hidden size."""

import torch.nn.functional as F
from torch import Tensor

from pyllama.ops.registry import cast, compute_dtype, op


@op("(Tensor x, Tensor weight, float eps) -> Tensor", x="... D", weight="D")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension.

    x: [..., D]; weight: [D], same data type. Computed in float32 or wider and rounded once, at the end.
    Raises ValueError for shapes or data types that do not fit.
    """
    compute = compute_dtype(x)
    out = F.rms_norm(cast(x, compute), weight.shape, cast(weight, compute), eps)
    return cast(out, x.dtype).contiguous()
