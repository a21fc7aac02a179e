"""mla: the whole layer of latent attention: one prompt in prefill, and decode over a paged cache ("absorbed").

With the norm before it, and added to the residual stream: in place by pyllama's, whose time depends on no value.
Beside it the same in plain torch, and in prefill transformers' layer with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.layers.weights import SMALL, Normed, around_1, call, matrix, skeleton
from benchmarks.ops.bench_attention import LAST, causal_flops
from benchmarks.ops.bench_mla_paged_attention import BALANCE, S
from benchmarks.ops.bench_rms_norm import EPS
from benchmarks.ops.bench_rms_norm import formula as rms_norm
from benchmarks.ops.bench_rope import angles
from benchmarks.shapes import Scope
from pyllama.batch import Batch
from pyllama.config import MLAConfig, RopeConfig
from pyllama.layers.mla import MLA
from pyllama.layers.rope import Rotation


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        if not model.rank:
            continue
        sizes = {"D": model.D, "H": model.H, "K": model.K, "V": model.V_head, "R": model.R}
        ranks = {"rank": model.rank, "q_rank": model.q_rank}
        heads = f"{model.H} heads"
        for m in scope.prompts:
            yield Case(name, f"prefill {m}, {heads}", {"B": 1, "n": m, "m": m, **sizes, **ranks})
        for B in scope.batches:
            for m in scope.contexts:
                yield Case(name, f"decode {B} x {m}, {heads}", {"B": B, "n": 1, "m": m, **sizes, **ranks})


def inputs(
    dtype: torch.dtype, B: int, n: int, m: int, D: int, H: int, K: int, V: int, R: int, rank: int, q_rank: int
) -> tuple[Any, ...]:
    """The layer's config, each sequence's last n of m tokens, the cache, what is new; weights, of the norm before it
    first, None without q_rank."""
    config = MLAConfig(H, q_rank or None, rank, K - R, V, RopeConfig(10000.0, R, True), K**-0.5, norm_eps=EPS)
    pages = -(-m // S)
    batch = Batch.from_lengths([n] * B, [m] * B, torch.randperm(B * pages).int().view(B, pages), S)
    if n > 1:
        assert batch.cached  # read from the device here, once, as for all layers of a model
    return (
        config,
        SMALL * torch.randn(B * n, D, dtype=dtype),
        torch.randn(B * pages, S, rank + R, dtype=dtype),
        batch,
        angles(m, R),
        around_1(dtype, D),
        matrix(dtype, q_rank + rank + R, D),
        around_1(dtype, q_rank) if q_rank else None,
        matrix(dtype, H * K, q_rank or D),
        around_1(dtype, rank),
        matrix(dtype, H * (K - R + V), rank),
        matrix(dtype, D, H * V),
    )


def work(
    dtype: torch.dtype, B: int, n: int, m: int, D: int, H: int, K: int, V: int, R: int, rank: int, q_rank: int
) -> Work:
    """The weights, the hidden states, the cache: written in prefill, read in decode."""
    weights = D * (q_rank + rank + R) + (q_rank or D) * H * K + rank * H * (K - R + V) + D * H * V
    moved = (D + weights + 2 * B * n * D + B * m * (rank + R)) * dtype.itemsize
    pairs = causal_flops(n, m, H, K, V) if n > 1 else causal_flops(n, m, H, rank + R, rank)
    flops = 2 * B * n * weights + B * pairs
    return Work(moved=moved, flops=flops, limit="product" if flops > BALANCE * moved else "read")


def pyllama(
    config: MLAConfig,
    x: Tensor,
    cache: Tensor,
    batch: Batch,
    cos_sin: Tensor,
    norm: Tensor,
    down: Tensor,
    q_norm: Tensor | None,
    q_up: Tensor,
    kv_norm: Tensor,
    kv_up: Tensor,
    out: Tensor,
) -> Tensor:
    weights = {
        "norm.weight": norm,
        "layer.down.weight": down,
        "layer.q_norm.weight": q_norm,
        "layer.q_up.weight": q_up,
        "layer.kv_norm.weight": kv_norm,
        "layer.kv_up.weight": kv_up,
        "layer.out.weight": out,
    }
    layer = skeleton(Normed, MLA, config, x.shape[1], EPS)
    return call(layer, weights, x, batch, Rotation(cos_sin, batch.positions), cache)  # type: ignore[no-any-return]


def rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Pairs of neighbours, [T, ..., R], by the angles [T, R]."""
    cos, sin = (t.view(len(x), *[1] * (x.dim() - 2), -1) for t in cos_sin.chunk(2, dim=-1))
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def formula(
    config: MLAConfig,
    x: Tensor,
    cache: Tensor,
    batch: Batch,
    cos_sin: Tensor,
    norm: Tensor,
    down: Tensor,
    q_norm: Tensor | None,
    q_up: Tensor,
    kv_norm: Tensor,
    kv_up: Tensor,
    out: Tensor,
    last: int = 0,
) -> Tensor:
    """New entries are put beside the cached ones, not into the cache. last: of so many tokens only; 0: of all."""
    H, C, N = config.num_heads, config.kv_rank, config.nope_dim
    normed = rms_norm(x, norm)
    q, latent, key = (normed @ down.T).split([config.q_rank or 0, C, config.rope.dim], dim=1)
    q = (normed[-last:] if q_norm is None else rms_norm(q[-last:], q_norm)) @ q_up.T
    q_nope, q_rope = q.unflatten(1, (H, -1)).split([N, config.rope.dim], dim=-1)
    turns = cos_sin[batch.positions]
    q_rope = rotated(q_rope, turns[-last:])
    entry = torch.cat((rms_norm(latent, kv_norm), rotated(key, turns)), dim=-1)
    up_k, up_v = kv_up.unflatten(0, (H, -1)).split([N, config.v_dim], dim=1)
    if batch.max_seqlen > 1:  # one sequence, all of it new
        key_nope, value = (torch.einsum("tc,hnc->htn", entry[:, :C], up) for up in (up_k, up_v))
        keys = torch.cat((key_nope, entry[None, :, C:].expand(H, -1, -1)), dim=-1)
        queries = torch.cat((q_nope, q_rope), dim=-1).transpose(0, 1)
        unseen = len(x) - last if last else 0  # tokens before the queries
        mask = torch.ones(len(q), len(x), dtype=torch.bool, device=x.device).tril(unseen) if last else None
        result = functional.scaled_dot_product_attention(
            queries[None], keys[None], value[None], mask, is_causal=mask is None, scale=config.scale
        )[0].transpose(0, 1)
    else:  # the new token is the last of every sequence, and all are of one length
        cached = cache[batch.block_table.long()].flatten(1, 2)[:, : len(cos_sin) - 1]
        entries = torch.cat((cached, entry.unsqueeze(1)), dim=1)
        queries = torch.cat((torch.einsum("bhn,hnc->bhc", q_nope, up_k), q_rope), dim=-1)
        keys = entries[:, None]
        seen = functional.scaled_dot_product_attention(queries[:, None], keys, keys[..., :C], scale=config.scale)
        result = torch.einsum("bhc,hvc->bhv", seen[:, 0], up_v)
    return x[-last:] + result.flatten(1) @ out.T


def reference(
    config: MLAConfig, x: Tensor, cache: Tensor, batch: Batch, cos_sin: Tensor, *weights: Tensor | None
) -> Tensor:
    """The last tokens of the prompt; the last sequence in decode."""
    wide = [None if weight is None else weight.double() for weight in weights]
    if batch.max_seqlen > 1:
        return formula(config, x.double(), cache, batch, cos_sin.double(), *wide, last=min(LAST, len(x)))
    pages = batch.block_table[-1]
    one = replace(batch, positions=batch.positions[-1:], block_table=torch.arange(len(pages))[None].to(pages))
    return formula(config, x[-1:].double(), cache[pages.long()].double(), one, cos_sin.double(), *wide)


def prepare(_: Any, config: MLAConfig, x: Tensor, cache: Tensor, batch: Batch, *others: Any) -> nn.Module | None:
    if batch.max_seqlen == 1:
        return None
    module = import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
    options = module.DeepseekV3Config(
        hidden_size=x.shape[1],
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        q_lora_rank=config.q_rank,
        kv_lora_rank=config.kv_rank,
        qk_nope_head_dim=config.nope_dim,
        qk_rope_head_dim=config.rope.dim,
        v_head_dim=config.v_dim,
        rope_interleave=True,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        layer = module.DeepseekV3Attention(options, layer_idx=0).eval()
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if (norm := getattr(layer, name)) is not None:
            norm.variance_epsilon = config.norm_eps
    return layer  # type: ignore[no-any-return]


def theirs(
    layer: nn.Module,
    config: MLAConfig,
    x: Tensor,
    cache: Tensor,
    batch: Batch,
    cos_sin: Tensor,
    norm: Tensor,
    down: Tensor,
    q_norm: Tensor | None,
    q_up: Tensor,
    kv_norm: Tensor,
    kv_up: Tensor,
    out: Tensor,
) -> Tensor:
    cos, sin = (torch.cat((t, t), dim=-1).to(x.dtype)[None] for t in cos_sin.chunk(2, dim=-1))
    q_down, kv_down = down.tensor_split([config.q_rank or 0])
    weights = {
        "q_proj.weight": None if config.q_rank else q_up,
        "q_a_proj.weight": q_down if config.q_rank else None,
        "q_a_layernorm.weight": q_norm,
        "q_b_proj.weight": q_up if config.q_rank else None,
        "kv_a_proj_with_mqa.weight": kv_down,
        "kv_a_layernorm.weight": kv_norm,
        "kv_b_proj.weight": kv_up,
        "o_proj.weight": out,
    }
    normed = functional.rms_norm(x, norm.shape, norm, EPS)
    return x + call(layer, weights, normed[None], (cos, sin), None)[0][0]  # type: ignore[no-any-return]


BENCH = Bench(
    op="mla",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=pyllama,
    formula=formula,
    peers={"transformers": Peer("transformers:AutoConfig", theirs, prepare)},
    reference=reference,
    made_of=("rms_norm", "norm_linear", "linear_add_", "mla_rope_store_", "attention", "mla_paged_attention"),
)
