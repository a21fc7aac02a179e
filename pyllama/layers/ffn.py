"""Feed-forward layers. T tokens, D hidden size, F feed-forward size, E experts, N experts per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyllama.config import MLPConfig, MoEConfig
from pyllama.layers.linear import Linear
from pyllama.ops.grouped_linear import grouped_linear
from pyllama.ops.grouped_swiglu import grouped_swiglu
from pyllama.ops.moe_combine import moe_combine
from pyllama.ops.moe_dispatch import moe_dispatch
from pyllama.ops.product import product
from pyllama.ops.registry import cast, compute_dtype
from pyllama.ops.swiglu import swiglu
from pyllama.ops.topk_gate import topk_gate


class Routing(NamedTuple):
    """What a router decided; the load-balancing loss is computed from it."""

    logits: Tensor  # [T, E]
    experts: Tensor  # int32 [T, N]


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one product, with their rows stacked."""

    def __init__(self, config: MLPConfig, hidden_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * config.size, bias=config.bias)
        self.down = Linear(config.size, hidden_size, bias=config.bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, None]:
        return self.down(swiglu(self.gate_up(x_TD))), None


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

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        config = self.config
        if config.float32_router and x_TD.dtype.itemsize < 4:
            logits_TE = product(x_TD.float(), self.router.weight.float())
        else:
            logits_TE = self.router(x_TD)
        weights_TN, experts_TN = topk_gate(
            logits_TE,
            config.top_k,
            None if self.correction_bias is None else cast(self.correction_bias, compute_dtype(self.correction_bias)),
            config.scoring,
            config.num_groups,
            config.top_groups,
            config.group_top_k,
            config.renormalize,
            config.scale,
        )
        rows, offsets, positions_TN = moe_dispatch(experts_TN, config.num_experts)
        hidden = grouped_swiglu(x_TD, self.gate_up, offsets, rows)
        out_TD = moe_combine(grouped_linear(hidden, self.down, offsets), positions_TN, weights_TN)
        if self.shared is not None:
            shared_TD, _ = self.shared(x_TD)
            if self.shared_gate is not None:
                shared_TD = self.shared_gate(x_TD).sigmoid() * shared_TD
            out_TD = out_TD + shared_TD
        return out_TD, Routing(logits_TE, experts_TN)
