"""norm_gate: the norm before a mixture of experts and its router, for few tokens, as real models have them.

With correction bias, groups and all that `MoEConfig` knows of routers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from benchmarks.bench import TOLERANCE, Bench, Case, Work
from benchmarks.layers.weights import around_1, matrix
from benchmarks.ops.bench_rms_norm import EPS
from benchmarks.ops.bench_rms_norm import formula as rms_norm
from benchmarks.shapes import Model, Scope
from pyllama.config import MoEConfig
from pyllama.ops.norm_gate import norm_gate

FAVOUR = 10.0  # what the logits of a token's experts have more than others', so that rounding changes no choice

Routed = tuple[Tensor, Tensor, Tensor]  # the normalised tokens, their experts' weights, the experts


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for T in scope.few:
            if model.E:
                yield Case(name, f"{T} x {model.N} of {model.E}, {model.D}", {"T": T, "D": model.D, **router_of(model)})


def router_of(model: Model) -> dict[str, int]:
    """The sizes that `config_of` takes."""
    groups = {"groups": model.groups, "top": model.top_groups}
    return {"E": model.E, "N": model.N, "sigmoid": model.sigmoid, "sum_1": model.sum_1, **groups}


def config_of(
    E: int, N: int, sigmoid: bool, sum_1: bool, groups: int, top: int, size: int = 0, **more: Any
) -> MoEConfig:
    return MoEConfig(
        num_experts=E,
        top_k=N,
        size=size,
        scoring="sigmoid" if sigmoid else "softmax",
        renormalize=sum_1,
        correction_bias=sigmoid,
        num_groups=groups,
        top_groups=top,
        group_top_k=2 if sigmoid else 1,
        **more,
    )


def inputs(dtype: torch.dtype, T: int, D: int, **router: Any) -> tuple[Any, ...]:
    """The config, tokens, weights of norm and router, the bias if there is one, and what counts blocks."""
    config, weight = config_of(**router), matrix(dtype, router["E"], D)
    bias = torch.randn(config.num_experts) / 16 if config.correction_bias else None
    return config, tokens(config, T, weight), around_1(dtype, D), weight, bias, torch.zeros(1, dtype=torch.int32)


def tokens(config: MoEConfig, T: int, router: Tensor) -> Tensor:
    """[T, D], each token of which favours experts of as many groups as it may see."""
    E, D = router.shape
    x = torch.randn(T, D, dtype=router.dtype)
    seen = torch.rand(T, config.num_groups).argsort(-1) < config.top_groups
    among = seen.repeat_interleave(E // config.num_groups, dim=1)
    for experts in torch.rand(T, E).masked_fill(~among, -1).topk(config.top_k, dim=-1).indices.T:
        x += FAVOUR * router[experts]
    return x


def work(dtype: torch.dtype, T: int, D: int, E: int, N: int, **router: Any) -> Work:
    return Work(moved=(E * D + D + 2 * T * D) * dtype.itemsize + 8 * T * N, flops=2 * T * E * D, limit="read")


def pyllama(
    config: MoEConfig, x: Tensor, norm: Tensor, router: Tensor, bias: Tensor | None, counters: Tensor
) -> Routed:
    groups = (config.num_groups, config.top_groups, config.group_top_k)
    options = (config.top_k, bias, config.scoring, groups, config.renormalize, config.scale)
    return norm_gate(x, norm, EPS, router, *options, counters, early=True)


def scored(config: MoEConfig, x: Tensor, router: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[T, E]: the experts' scores, and what the choice is by."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ router.to(wide).T if config.float32_router else (x @ router.T).to(wide)
    scores = logits.sigmoid() if config.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if config.top_groups < config.num_groups:
        by_group = choice.unflatten(1, (config.num_groups, -1))
        best = by_group.topk(config.group_top_k, dim=-1).values.sum(-1).topk(config.top_groups, dim=-1).indices
        unseen = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(1, best, False)
        choice = by_group.masked_fill(unseen.unsqueeze(-1), float("-inf")).flatten(1)
    return scores, choice


def weights_of(config: MoEConfig, scores: Tensor, experts: Tensor) -> Tensor:
    weights = scores.gather(1, experts)
    return weights / weights.sum(-1, keepdim=True) if config.renormalize else weights


def routed(config: MoEConfig, x: Tensor, router: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[T, N]: weights and experts."""
    scores, choice = scored(config, x, router, bias)
    experts = choice.topk(config.top_k, dim=-1).indices
    return weights_of(config, scores, experts), experts


def formula(
    config: MoEConfig, x: Tensor, norm: Tensor, router: Tensor, bias: Tensor | None, counters: Tensor
) -> Routed:
    normed = rms_norm(x, norm)
    return normed, *routed(config, normed, router, bias)


def eager(config: MoEConfig, x: Tensor, norm: Tensor, router: Tensor, bias: Tensor | None, counters: Tensor) -> Routed:
    normed = functional.rms_norm(x, norm.shape, norm, EPS)
    return normed, *routed(config, normed, router, bias)


def right(
    result: Routed, config: MoEConfig, x: Tensor, norm: Tensor, router: Tensor, bias: Tensor | None, counters: Tensor
) -> Tensor:
    """Of each token what is normalised, whether its experts are as good as the best, and their weights; rounding may
    swap experts that are equally good."""
    normed, weights, experts = result
    expected = rms_norm(x.double(), norm.double())
    scores, choice = scored(config, expected, router.double(), None if bias is None else bias.double())
    best = choice.topk(config.top_k, dim=-1).values
    found = choice.gather(1, experts.long()).sort(-1, descending=True).values
    off = (
        (normed - expected) / expected.abs().max(),
        found - best,
        weights - weights_of(config, scores, experts.long()),
    )
    return torch.cat(off, dim=1).abs() <= TOLERANCE[x.dtype]


BENCH = Bench(
    op="norm_gate",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=pyllama,
    formula=formula,
    torch=eager,
    right=right,
)
