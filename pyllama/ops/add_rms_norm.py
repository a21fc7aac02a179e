"""Residual addition and RMSNorm in one pass over memory, in place. D hidden size."""

from torch import Tensor

from pyllama.ops.registry import op
from pyllama.ops.rms_norm import normalised


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
    types that do not fit and for one tensor given as both.
    """
    same_storage = x.untyped_storage()._cdata == residual.untyped_storage()._cdata
    if same_storage and x.storage_offset() == residual.storage_offset():
        raise ValueError("add_rms_norm_: x and residual are the same memory, but both are written: give two tensors")
    residual.add_(x)
    x.copy_(normalised(residual, weight, eps))
