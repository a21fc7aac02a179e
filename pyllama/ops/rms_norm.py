"""Root mean square normalisation (Zhang & Sennrich, arXiv:1910.07467). D hidden size."""

from torch import Tensor

from pyllama.ops.registry import cast, compute_dtype, op


@op("(Tensor x, Tensor weight, float eps) -> Tensor", x="... D", weight="D")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension.

    x: [..., D]; weight: [D], same data type. Computed in float32 or wider and rounded once, at the end.
    Raises ValueError for shapes or data types that do not fit.
    """
    return normalised(x, weight, eps).contiguous()


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` as a plain function, for other ops' bodies."""
    compute = compute_dtype(x)
    wide = cast(x, compute)
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return cast(wide * scale * cast(weight, compute), x.dtype)
