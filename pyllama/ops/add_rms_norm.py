"""Residual addition and RMSNorm in one pass over memory, in place. D hidden size."""

from torch import Tensor
import torch
import torch.nn.functional as F

from pyllama.ops.registry import op


@op(
    "(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps) -> ()",
    x="... D",
    residual="... D",
    weight="D",
)
def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """residual += x, then x = rms_norm(residual, weight, eps); both in place.

    x, residual: [..., D]; weight: [D]; one data type. The sum is rounded to that type once, and what is normalised is
    the rounded sum. For inference: raises RuntimeError where a gradient would be due, ValueError for shapes or data
    types that do not fit.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    residual.add_(x)
    x.copy_(F.rms_norm(residual.to(compute), weight.shape, weight.to(compute), eps))
