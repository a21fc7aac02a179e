"""The matrix product of layers and eager bodies. T tokens, D input features, F output features, P threads."""

import torch
import torch.nn.functional as functional
from torch import Tensor

FEW = 64  # tokens


def product(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; what `F.linear` gives, in less time for few tokens on a CPU.

    There BLAS multiplies one token with one thread and splits a few more badly (benchmarks/cpu_generate.py shows
    it), so each thread gets its own part of the weight's rows. Without gradients only: their products are large.
    """
    T, D = x_TD.shape
    if (
        T <= FEW
        and x_TD.device.type == "cpu"
        and x_TD.dtype is torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    ):
        F, P = weight_FD.shape[0], torch.get_num_threads()
        if P > 1 and F % P == 0 and weight_FD.is_contiguous():
            out_PTf = torch.bmm(x_TD.expand(P, T, D), weight_FD.view(P, F // P, D).transpose(1, 2))
            out_TF = out_PTf.transpose(0, 1).reshape(T, F)
            return out_TF if bias_F is None else out_TF.add_(bias_F)
    return functional.linear(x_TD, weight_FD, bias_F)
