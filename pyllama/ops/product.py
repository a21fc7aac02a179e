"""The matrix product of layers and eager bodies. T tokens, D input features, F output features, P parts of F."""

import torch
import torch.nn.functional as functional
from torch import Tensor

# torch's own way to oneDNN with plain weights. It is not public, so a build without it goes without.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

# Multiplications from which it pays: oneDNN's way to its kernel takes some 20 us, and for every new number of tokens it
# first compiles one, in nearly a millisecond.
ONE_TOKEN, MORE_TOKENS = 2_000_000, 100_000_000


def product(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; what `F.linear` gives, in less time on a CPU.

    There `F.linear` is BLAS, which multiplies one token with one thread and is slower than oneDNN with hundreds (LOG.md
    has the figures). Without gradients only.
    """
    T, D = x_TD.shape
    if own_way(weight_FD):
        if pays(T, weight_FD.numel()):
            return _onednn(x_TD, weight_FD, bias_F, "none", [], "")  # type: ignore[misc]  # it is not None
        if (P := parts(T, weight_FD)) > 1:
            out_TF = rows_first(torch.bmm(x_TD.expand(P, T, D), weight_FD.view(P, len(weight_FD) // P, D).mT))
            return out_TF if bias_F is None else out_TF.add_(bias_F)
    return functional.linear(x_TD, weight_FD, bias_F)


def add_product_(residual_TF: Tensor, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> None:
    """residual += x @ weight.T + bias, in place; where BLAS multiplies, it adds the product as it writes it."""
    if own_way(weight_FD):
        residual_TF.add_(product(x_TD, weight_FD, bias_F))
        return
    residual_TF.addmm_(x_TD, weight_FD.mT)
    if bias_F is not None:
        residual_TF.add_(bias_F)


def pays(T: int, size: int) -> bool:
    """Whether oneDNN is to multiply T tokens with a weight of `size` elements."""
    return _onednn is not None and T * size >= (ONE_TOKEN if T == 1 else MORE_TOKENS)


def own_way(weight: Tensor) -> bool:
    """Whether another way than BLAS's own is open to products with `weight`."""
    return (
        weight.dtype is torch.float32
        and not torch.is_grad_enabled()
        and weight.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and weight.is_contiguous()
    )


def parts(T: int, weight: Tensor) -> int:
    """Into how many parts to cut the rows of `weight`, [..., F, D], so that each thread multiplies T tokens with its
    own; 1: not at all."""
    P, F = torch.get_num_threads(), weight.shape[-2]
    return P if F % P == 0 and T * P <= F else 1


def rows_first(out_PTf: Tensor) -> Tensor:
    """The parts' results side by side, [T, F]."""
    return out_PTf.transpose(0, 1).flatten(1)
