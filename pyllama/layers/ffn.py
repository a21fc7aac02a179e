"""Feed-forward layers. T tokens, D hidden size, F feed-forward size, E experts, N experts per token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyllama.config import MLPConfig, MoEConfig
from pyllama.layers.linear import Linear, few
from pyllama.layers.norm import RMSNorm
from pyllama.ops.experts_add import experts_add_
from pyllama.ops.experts_swiglu import experts_swiglu
from pyllama.ops.grouped_linear import grouped_linear
from pyllama.ops.grouped_swiglu import grouped_swiglu
from pyllama.ops.moe_combine import moe_combine
from pyllama.ops.moe_dispatch import moe_dispatch
from pyllama.ops.norm_gate import norm_gate
from pyllama.ops.product import product
from pyllama.ops.registry import cast, compute_dtype
from pyllama.ops.topk_gate import topk_gate


class Routing(NamedTuple):
    """What a router decided; load-balancing losses are computed from it, and loads counted."""

    logits: Tensor | None  # [T, E]; None where an op for few tokens has kept them to itself
    experts: Tensor  # int32 [T, N]


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one product, with their rows stacked."""

    def __init__(self, config: MLPConfig, hidden_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * config.size, bias=config.bias)
        self.down = Linear(config.size, hidden_size, bias=config.bias, dropout=config.dropout)

    @property
    def first_large_weight(self) -> Tensor:
        return self.gate_up.weight

    def forward(
        self, x_TD: Tensor, norm: RMSNorm | None, with_logits: bool = False, counters: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """The residual stream x with the layer's result added; norm: what comes first."""
        return self.down.add_to(x_TD, self.gate_up.swiglu(x_TD, norm)), None


class MoE(nn.Module):
    """The weighted sum of each token's chosen experts, plus the shared expert where there is one."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.router = Linear(hidden_size, config.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * config.size, hidden_size))
        self.down = nn.Parameter(torch.empty(config.num_experts, hidden_size, config.size))
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=0.02)
        bias = torch.zeros(config.num_experts)  # moved by the trainer, not by a gradient (DeepSeek-V3)
        self.correction_bias = nn.Parameter(bias, requires_grad=False) if config.correction_bias else None
        self.shared = MLP(config.shared, hidden_size) if config.shared is not None else None
        self.shared_gate = Linear(hidden_size, 1, bias=False) if config.shared_gate else None

    @property
    def first_large_weight(self) -> Tensor:
        """A router's is read early as a whole; which experts' follow is not known."""
        return self.router.weight if self.shared is None else self.shared.first_large_weight

    def forward(
        self, x_TD: Tensor, norm: RMSNorm, with_logits: bool = False, counters: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """The residual stream x with the layer's result added, and the routing, whose logits are there if asked for;
        norm: what comes first; counters: see `Packed`."""
        if few(x_TD) and not with_logits:
            return self._of_few(x_TD, norm, counters)
        config = self.config
        normed_TD = norm(x_TD)
        if config.float32_router and x_TD.dtype.itemsize < 4:
            logits_TE = product(normed_TD.float(), self.router.weight.float())
        else:
            logits_TE = self.router(normed_TD)
        weights_TN, experts_TN = topk_gate(logits_TE, **self._routing)
        rows, offsets, positions_TN = moe_dispatch(experts_TN, config.num_experts)
        hidden = grouped_swiglu(normed_TD, self.gate_up, offsets, rows)
        out_TD = moe_combine(grouped_linear(hidden, self.down, offsets), positions_TN, weights_TN)
        return self._add_shared(x_TD + out_TD, normed_TD), Routing(logits_TE if with_logits else None, experts_TN)

    def _of_few(self, x_TD: Tensor, norm: RMSNorm, counters: Tensor | None) -> tuple[Tensor, Routing]:
        """The same in three ops, the last two of which read the chosen experts' weights as they lie, and early where
        the op ahead is not the one that chose."""
        normed_TD, weights_TN, experts_TN = norm_gate(
            x_TD, norm.weight, norm.eps, self.router.weight, **self._routing, counters=counters, early=True
        )
        x_TD = self._add_shared(x_TD, normed_TD)  # first, as its weights are known while the choice is made
        hidden = experts_swiglu(normed_TD, self.gate_up, experts_TN, early=self.shared is not None)
        experts_add_(x_TD, hidden, self.down, experts_TN, weights_TN, early=True)
        return x_TD, Routing(None, experts_TN)

    @property
    def _routing(self) -> dict[str, Any]:
        """The options of the router's op."""
        config, bias = self.config, self.correction_bias
        return {
            "top_k": config.top_k,
            "bias": None if bias is None else cast(bias, compute_dtype(bias)),
            "scoring": config.scoring,
            "groups": (config.num_groups, config.top_groups, config.group_top_k),
            "renormalize": config.renormalize,
            "scale": config.scale,
        }

    def _add_shared(self, x_TD: Tensor, normed_TD: Tensor) -> Tensor:
        """x, with the result of the expert that every token passes through, if there is one; without gradients in
        place."""
        if self.shared is None:
            return x_TD
        hidden = self.shared.gate_up.swiglu(normed_TD, None)
        if self.shared_gate is None:
            return self.shared.down.add_to(x_TD, hidden)
        return x_TD + self.shared_gate(normed_TD).sigmoid() * self.shared.down(hidden)
