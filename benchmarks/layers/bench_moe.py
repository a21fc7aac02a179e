"""moe: the whole layer, from the norm before its router to the residual stream with the experts' results.

Beside it a plain loop over the experts (torch), sorted rows with `grouped_mm` (compiled), and transformers' layer
with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import product
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.layers.weights import SMALL, Normed, around_1, call, matrix, skeleton
from benchmarks.ops import bench_grouped_linear as linear
from benchmarks.ops.bench_grouped_linear import BALANCE, LAST
from benchmarks.ops.bench_grouped_swiglu import gated
from benchmarks.ops.bench_norm_gate import config_of, routed, router_of, tokens
from benchmarks.ops.bench_rms_norm import EPS
from benchmarks.ops.bench_rms_norm import formula as rms_norm
from benchmarks.shapes import Scope
from pyllama.config import MLPConfig, MoEConfig
from pyllama.layers.ffn import MoE


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        if not model.E:
            continue
        sizes = {"D": model.D, "F": model.F_expert, "shared": model.F_shared, **router_of(model)}
        shared = f" + {model.F_shared}" if model.F_shared else ""
        for T in scope.tokens:
            what = f"{T} x {model.N} of {model.E}, {model.D} x {model.F_expert}{shared}"
            yield Case(name, what, {"T": T, **sizes})


def inputs(dtype: torch.dtype, T: int, D: int, F: int, shared: int, **sizes: Any) -> tuple[Any, ...]:
    """The layer's config, tokens, weights of norm, router and experts; those that it may lack, or None."""
    mlp = MLPConfig(shared) if shared else None
    config, E = config_of(**sizes, size=F, float32_router=bool(shared), shared=mlp), sizes["E"]
    norm, router = around_1(dtype, D), matrix(dtype, E, D)
    gate_up, down = matrix(dtype, E, 2 * F, D), matrix(dtype, E, D, F)
    bias = torch.randn(E, dtype=dtype) / 16 if config.correction_bias else None
    shared_gate_up = matrix(dtype, 2 * shared, D) if shared else None
    shared_down = matrix(dtype, D, shared) if shared else None
    return config, SMALL * tokens(config, T, router), norm, router, gate_up, down, bias, shared_gate_up, shared_down


def work(dtype: torch.dtype, T: int, D: int, F: int, E: int, N: int, shared: int, **router: Any) -> Work:
    """Weights of as many experts as can have been chosen."""
    moved = (D + E * D + 3 * D * (min(T * N, E) * F + shared) + 2 * T * D) * dtype.itemsize
    flops = 2 * T * D * (E + 3 * (N * F + shared))
    return Work(moved=moved, flops=flops, limit="product" if flops > BALANCE * moved else "read")


def pyllama(
    config: MoEConfig,
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    gate_up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
) -> Tensor:
    """On a copy of x, whose time counts: the layer writes into it, and its experts must be the same in every round."""
    weights = {
        "norm.weight": norm,
        "layer.router.weight": router,
        "layer.gate_up": gate_up,
        "layer.down": down,
        "layer.correction_bias": bias,
        "layer.shared.gate_up.weight": shared_gate_up,
        "layer.shared.down.weight": shared_down,
    }
    out: Tensor = call(skeleton(Normed, MoE, config, x.shape[1]), weights, x.clone())[0]
    return out


def with_shared(out: Tensor, x: Tensor, gate_up: Tensor | None, down: Tensor | None) -> Tensor:
    return out if gate_up is None or down is None else out + gated(x @ gate_up.T) @ down.T


def loop(
    config: MoEConfig,
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    gate_up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    *shared: Any,
) -> Tensor:
    """Expert by expert, each with its tokens."""
    normed = functional.rms_norm(x, norm.shape, norm, EPS)
    shares, experts = routed(config, normed, router, bias)
    out = x
    for e in experts.unique().tolist():
        tokens, places = torch.where(experts == e)
        of_expert = gated(normed[tokens] @ gate_up[e].T) @ down[e].T
        out = out.index_add(0, tokens, (of_expert * shares[tokens, places].unsqueeze(1)).to(x.dtype))
    return with_shared(out, normed, *shared)


def formula(
    config: MoEConfig,
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    gate_up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    *shared: Any,
) -> Tensor:
    """Rows sorted by expert, for grouped_mm, which torch.compile knows in bfloat16 alone."""
    grouped = linear.grouped_mm if x.dtype is torch.bfloat16 else linear.formula
    normed = rms_norm(x, norm)
    shares, experts = routed(config, normed, router, bias)
    chosen, order = experts.flatten().sort(stable=True)
    offsets = torch.searchsorted(chosen, torch.arange(config.num_experts + 1, device=x.device), out_int32=True)
    out = grouped(gated(grouped(normed[order // config.top_k], gate_up, offsets)), down, offsets)
    of_tokens = out[order.argsort()].unflatten(0, (-1, config.top_k))
    return with_shared(x + (of_tokens * shares.unsqueeze(-1)).sum(1).to(x.dtype), normed, *shared)


def reference(
    config: MoEConfig,
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    gate_up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    *shared: Any,
) -> Tensor:
    """The last tokens, row by row."""
    out = x[-LAST:].double()
    normed = rms_norm(out, norm.double())
    shares, experts = routed(config, normed, router.double(), None if bias is None else bias.double())
    for t, n in product(range(len(out)), range(config.top_k)):
        e = experts[t, n]
        out[t] += shares[t, n] * (down[e].double() @ gated(gate_up[e].double() @ normed[t]))
    return with_shared(out, normed, *(None if weight is None else weight.double() for weight in shared))


LAYERS = {  # transformers' layer with such a router: scoring, whether weights are made to sum to 1, a shared expert
    ("softmax", True, False): ("qwen3_moe", "Qwen3Moe", "SparseMoeBlock"),
    ("softmax", False, True): ("deepseek_v2", "DeepseekV2", "Moe"),
    ("sigmoid", True, True): ("deepseek_v3", "DeepseekV3", "MoE"),
}


def prepare(_: Any, config: MoEConfig, x: Tensor, *weights: Any) -> nn.Module | None:
    found = LAYERS.get((config.scoring, config.renormalize, config.shared is not None))
    if found is None:
        return None
    file, family, layer = found
    module = import_module(f"transformers.models.{file}.modeling_{file}")
    options = getattr(module, f"{family}Config")(
        hidden_size=x.shape[1],
        moe_intermediate_size=config.size,
        num_experts=config.num_experts,
        n_routed_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        n_shared_experts=config.shared.size // config.size if config.shared else 0,
        n_group=config.num_groups,
        topk_group=config.top_groups,
        norm_topk_prob=config.renormalize,
        routed_scaling_factor=1.0,
        topk_method="greedy",
    )
    options._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        return getattr(module, family + layer)(options).eval()  # type: ignore[no-any-return]


def theirs(
    layer: nn.Module,
    config: MoEConfig,
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    gate_up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
) -> Tensor:
    shared_gate, shared_up = (None, None) if shared_gate_up is None else shared_gate_up.chunk(2)
    weights = {
        "gate.weight": router,
        "gate.e_score_correction_bias": bias,
        "experts.gate_up_proj": gate_up,
        "experts.down_proj": down,
        "shared_experts.gate_proj.weight": shared_gate,
        "shared_experts.up_proj.weight": shared_up,
        "shared_experts.down_proj.weight": shared_down,
    }
    out: Tensor = call(layer, weights, functional.rms_norm(x, norm.shape, norm, EPS)[None])
    return x + out[0]


BENCH = Bench(
    op="moe",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=pyllama,
    formula=formula,
    torch=loop,
    peers={"transformers": Peer("transformers:AutoConfig", theirs, prepare)},
    reference=reference,
    made_of=(
        *("norm_gate", "experts_swiglu", "experts_add_", "norm_swiglu", "linear_add_"),  # of few tokens
        *("rms_norm", "topk_gate", "moe_dispatch", "grouped_swiglu", "grouped_linear", "moe_combine", "swiglu"),
    ),
    gradients=(1, 2, 3, 4, 5),
    called=("torch",),
)
