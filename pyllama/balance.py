"""Keeping a mixture's experts evenly used: losses that ask for it, loads that tell of it, biases that see to it.

T tokens, B sequences, E experts, N experts per token, M layers with experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyllama.config import ModelConfig, MoEConfig
from pyllama.layers.ffn import MoE, Routing
from pyllama.ops.registry import cast, compute_dtype
from pyllama.save import is_sharded


def switch_loss(
    routings: Sequence[Routing], experts: MoEConfig, sequences: int, group: dist.ProcessGroup | None
) -> Tensor:
    """The Switch Transformer's loss (Fedus et al., arXiv:2101.03961, eq. 4) over the tokens of all layers at once.

    As transformers' `load_balancing_loss_func`: shares of tokens, which add up to N, and softmax for every router.
    """
    logits_TE = torch.cat([_logits(routing) for routing in routings])
    experts_TN = torch.cat([routing.experts for routing in routings])
    return experts.top_k * _imbalance(logits_TE.softmax(dim=-1), experts_TN, 1, group)


def sequence_loss(
    routings: Sequence[Routing], experts: MoEConfig, sequences: int, group: dist.ProcessGroup | None
) -> Tensor:
    """DeepSeek's loss for each sequence (arXiv:2405.04434, eq. 23 to 25; arXiv:2412.19437, eq. 17 to 20).

    The mean over sequences, each by itself, of the sum over layers. Sigmoids count by their share of a token's sum.
    """
    return torch.stack([_imbalance(_scores(r, experts), r.experts, sequences, None) for r in routings]).sum()


def batch_loss(
    routings: Sequence[Routing], experts: MoEConfig, sequences: int, group: dist.ProcessGroup | None
) -> Tensor:
    """The same over all tokens of the batch, as DeepSeek's code has it for `seq_aux: false`: the sum over layers."""
    return torch.stack([_imbalance(_scores(r, experts), r.experts, 1, group) for r in routings]).sum()


Loss = Callable[[Sequence[Routing], MoEConfig, int, dist.ProcessGroup | None], Tensor]
LOSSES: dict[str, Loss] = {"switch": switch_loss, "sequence": sequence_loss, "batch": batch_loss}


def load_balancing_loss(
    routings: Sequence[Routing], config: ModelConfig, sequences: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, float] | tuple[None, float]:
    """The loss that the configuration names (`MoEConfig.aux_loss`), and its weight; None without experts.

    routings: of each layer with experts, in order, with logits. sequences: B, of equal length, which the tokens are.
    group: processes whose loads count together, so that data-parallel training has the loss of a single process with
    all their tokens (Qiu et al., arXiv:2501.11873); None: each process has its own. Sequences are alone anyway.
    """
    if not routings:
        return None, 0.0
    experts = _experts(config)[0]
    return LOSSES[experts.aux_loss](routings, experts, sequences, group), experts.aux_loss_coef


def new_loads(config: ModelConfig, sequences: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """int64 zeros [M, B, E], to which a model adds how many of each sequence's tokens went to each expert.

    With B = 1 all sequences count together. device: the model's. Raises ValueError for a model without experts.
    """
    return torch.zeros(_shape(config, sequences), dtype=torch.int64, device=device)


def _shape(config: ModelConfig, sequences: int) -> list[int]:
    experts = _experts(config)
    if not experts:
        raise ValueError("the model has no experts, so no loads can be counted")
    return [len(experts), sequences, experts[0].num_experts]


def _experts(config: ModelConfig) -> list[MoEConfig]:
    """Of the layers that have some: all alike in what is counted and balanced, as in every family."""
    experts = [layer.ffn for layer in config.layers if isinstance(layer.ffn, MoEConfig)]
    if len({(moe.num_experts, moe.top_k, moe.scoring, moe.aux_loss, moe.aux_loss_coef) for moe in experts}) > 1:
        raise ValueError("layers with unlike experts have no load-balancing loss or loads in common")
    return experts


def check_loads(loads: Tensor, config: ModelConfig, sequences: int, device: torch.device) -> None:
    """Raises ValueError where `loads` are not as `new_loads` makes them."""
    shapes = [_shape(config, count) for count in (sequences, 1)]
    if list(loads.shape) not in shapes or loads.dtype != torch.int64 or loads.device != device:
        raise ValueError(
            f"loads must be int64 [M, B, E] = {shapes[0]} on {device}, or {shapes[1]} for all together, got "
            f"{loads.dtype} {list(loads.shape)} on {loads.device}: see pyllama.balance.new_loads"
        )


def count_(loads_MBE: Tensor, experts_MTN: Tensor, sequence_T: Tensor) -> None:
    """Adds all layers' choices to their loads, in place and at once, as it may be part of a step of decoding.

    sequence_T: int64, each token's; with B = 1 it does not matter.
    """
    M, B, E = loads_MBE.shape
    place_MC = (sequence_T.clamp(max=B - 1).unsqueeze(1) * E + experts_MTN).flatten(1)  # C = T * N choices, int64
    loads_MBE.view(M, B * E).scatter_add_(1, place_MC, torch.ones_like(place_MC))


@torch.no_grad()
def update_correction_biases(
    model: nn.Module, loads: Tensor, rate: float = 0.001, group: dist.ProcessGroup | None = None
) -> None:
    """Auxiliary-loss-free load balancing (Wang et al., arXiv:2408.15664): to be called after each optimizer step.

    The bias that decides who is chosen (`MoEConfig.correction_bias`) grows by `rate` for experts with fewer tokens
    than the mean of their layer, and shrinks by it for those with more. DeepSeek-V3 has 0.001, and 0 at the end.

    loads: int64 [M, B, E], of all tokens since the last call (see `new_loads`; zero them afterwards). Where processes
    train together (`torch.distributed` is initialised), theirs are added up: of `group`, None being all. The model may
    be sharded. Raises ValueError where the model has no such biases or they are coarser than float32, which small steps
    would not move, and for loads of another shape or without a token.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    biases = [moe.correction_bias for moe in mixtures]
    if not any(bias is not None for bias in biases):
        raise ValueError("the model has no correction biases (MoEConfig.correction_bias), which loads could move")
    shape = [len(mixtures), "B", mixtures[0].config.num_experts]
    if loads.ndim != 3 or [loads.shape[0], loads.shape[2]] != [shape[0], shape[2]]:
        raise ValueError(f"loads must be [M, B, E] = {shape}, got {list(loads.shape)}")
    if any(bias is not None and torch.finfo(bias.dtype).bits < 32 for bias in biases):
        raise ValueError(
            "correction biases are coarser than float32: keep them so when you cast the model (or load it so)"
        )
    loads_ME = loads.sum(1)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loads_ME, group=group)
    if not loads_ME.any():
        raise ValueError(
            "loads have no tokens: give these to the model, on its device (a copy would be counted instead)"
        )
    loads_ME = loads_ME.double()
    for bias, step_E in zip(biases, rate * torch.sign(loads_ME.mean(1, keepdim=True) - loads_ME), strict=True):
        if bias is not None:
            step_E = step_E.to(bias.device, bias.dtype)
            bias.add_(_sharded_as(bias, step_E) if is_sharded(bias) else step_E)


def _sharded_as(like: Tensor, whole: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor  # loaded already, where there is such a tensor

    return distribute_tensor(whole, like.device_mesh, like.placements)  # type: ignore[attr-defined]


def _logits(routing: Routing) -> Tensor:
    assert routing.logits is not None  # they were asked for
    return cast(routing.logits, compute_dtype(routing.logits))


def _scores(routing: Routing, experts: MoEConfig) -> Tensor:
    """[T, E], each token's adding up to 1."""
    logits_TE = _logits(routing)
    if experts.scoring == "softmax":
        return logits_TE.softmax(dim=-1)
    scores_TE = logits_TE.sigmoid()
    return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)


def _imbalance(scores_TE: Tensor, experts_TN: Tensor, parts: int, group: dist.ProcessGroup | None) -> Tensor:
    """E * sum over experts of (share of choices that fell on it) * (its mean score): 1 where all are alike.

    The mean over `parts` equal parts of the tokens.
    """
    T, E = scores_TE.shape
    loads_PE = torch.zeros(parts, E, dtype=torch.int64, device=scores_TE.device)
    part_T = torch.arange(T, device=scores_TE.device).div(max(T // parts, 1), rounding_mode="floor")
    count_(loads_PE.unsqueeze(0), experts_TN.unsqueeze(0), part_T)
    if group is not None:
        dist.all_reduce(loads_PE, group=group)
    share_PE = loads_PE.to(scores_TE) / loads_PE.sum(1, keepdim=True)
    return E * (share_PE * scores_TE.unflatten(0, (parts, -1)).mean(1)).sum(1).mean()
