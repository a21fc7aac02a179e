"""The matrix product of layers and eager bodies. T tokens, D input features, F output features, P parts of F."""

import torch
import torch.nn.functional as functional
from torch import Tensor

MOST = 512  # tokens


def product(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; what `F.linear` gives, in less time for up to some hundred tokens on a CPU."""
    T, D = x_TD.shape
    P = parts(T, weight_FD)
    if P == 1:
        return functional.linear(x_TD, weight_FD, bias_F)
    out_TF = rows_first(torch.bmm(x_TD.expand(P, T, D), weight_FD.view(P, len(weight_FD) // P, D).mT))
    return out_TF if bias_F is None else out_TF.add_(bias_F)


def parts(T: int, weight: Tensor) -> int:
    """Into how many parts to cut the rows of `weight`, [..., F, D], to multiply it with T tokens; 1: not at all.

    On a CPU, BLAS multiplies one token with one thread and splits more of them badly (LOG.md has the figures), so each
    thread gets its own part, as long as that has more rows than there are tokens. Without gradients only: their
    products are large.
    """
    if T > MOST or weight.dtype is not torch.float32 or torch.is_grad_enabled() or weight.device.type != "cpu":
        return 1
    if torch.compiler.is_compiling() or not weight.is_contiguous():
        return 1
    P, F = torch.get_num_threads(), weight.shape[-2]
    return P if F % P == 0 and T * P <= F else 1


def rows_first(out_PTf: Tensor) -> Tensor:
    """The parts' results side by side, [T, F]."""
    return out_PTf.transpose(0, 1).flatten(1)
