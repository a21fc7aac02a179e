"""The products of a layer, with what happens before and after each. T tokens, D input features, F output features.

One function per product. For few tokens it is one op, whose time is that of reading the weight; for more, and wherever
gradients are due, the plain composition, which is also that op's eager body. The op reads the weight early (see
`norm_linear`): a hook that writes weights on the GPU right before their layer runs must wait for the end of its writes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyllama.layers.norm import RMSNorm
from pyllama.ops.linear_add import linear_add_
from pyllama.ops.norm_argmax import norm_argmax_
from pyllama.ops.norm_linear import norm_linear
from pyllama.ops.norm_swiglu import norm_swiglu
from pyllama.ops.product import add_product_, product
from pyllama.ops.swiglu import swiglu

FEW = 16  # tokens, as many as the kernels take; to be lowered to where measurements say that the two ways cross


def few(x_TD: Tensor) -> bool:
    """Whether an op for few tokens serves: for inference, by a shape, so that graphs and torch.compile can tell."""
    return x_TD.shape[0] <= FEW and not torch.is_grad_enabled()


def normed_product(x_TD: Tensor, norm: RMSNorm | None, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """norm(x) @ weight.T + bias."""
    if few(x_TD):
        return norm_linear(x_TD, *_norm(norm), weight_FD, bias_F, early=True)
    return product(x_TD if norm is None else norm(x_TD), weight_FD, bias_F)


def normed_argmax_(
    tokens_T: Tensor, x_TD: Tensor, norm: RMSNorm | None, weight_VD: Tensor, counters: Tensor | None = None
) -> None:
    """tokens = the argmax of norm(x) @ weight.T, in place; for inference. counters: see `norm_argmax_`."""
    if few(x_TD):
        norm_argmax_(tokens_T, x_TD, *_norm(norm), weight_VD, counters, early=True)
    else:
        tokens_T.copy_(normed_product(x_TD, norm, weight_VD).argmax(dim=-1))


class Linear(nn.Linear):
    """A linear layer: torch's, with the project's products. dropout: of what `add_to` adds, in training."""

    def __init__(self, features: int, out_features: int, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__(features, out_features, bias)
        self.dropout = dropout

    def forward(self, x_TD: Tensor) -> Tensor:
        return product(x_TD, self.weight, self.bias)

    def normed(self, x_TD: Tensor, norm: RMSNorm | None) -> Tensor:
        """self(norm(x))."""
        return normed_product(x_TD, norm, self.weight, self.bias)

    def swiglu(self, x_TD: Tensor, norm: RMSNorm | None) -> Tensor:
        """swiglu(self(norm(x))): gate and up are this layer's rows."""
        if few(x_TD):
            return norm_swiglu(x_TD, *_norm(norm), self.weight, self.bias, early=True)
        return swiglu(self(x_TD if norm is None else norm(x_TD)))

    def add_to(self, residual_TF: Tensor, x_TD: Tensor, next_weight: Tensor | None = None) -> Tensor:
        """residual + self(x); without gradients in place. next_weight: of a product that soon follows, to be brought to
        the GPU's cache while this one waits; not if a hook has yet to bring it to where x is."""
        if torch.is_grad_enabled():
            return residual_TF + F.dropout(self(x_TD), self.dropout, self.training)
        if few(x_TD):
            here = next_weight is not None and (next_weight.device, next_weight.dtype) == (x_TD.device, x_TD.dtype)
            prefetch = next_weight if here else None
            linear_add_(residual_TF, x_TD, self.weight, self.bias, early=True, prefetch=prefetch)
        else:
            add_product_(residual_TF, x_TD, self.weight, self.bias)
        return residual_TF


def _norm(norm: RMSNorm | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight, norm.eps)
