"""A model as blocks in the order in which data flows through them: what the page draws of its structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pyllama.config import (
    GQAConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MLAConfig,
    MLPConfig,
    MoEConfig,
    RopeConfig,
    YarnScaling,
)
from pyllama.inspection import ModelFacts
from pyllama.inspection.report import share
from pyllama.inspection.structure import LayerParts, Part, Run

MAX_RUNS = 24  # that are drawn
MAX_DOTS = 1024  # heads or experts; more are a number only


@dataclass(frozen=True)
class Dots:
    """Heads or experts that belong together."""

    chosen: tuple[bool, ...]
    shared: bool = False  # they have one thing in common, as query heads their key


@dataclass(frozen=True)
class Block:
    title: str
    kind: str
    parameters: int  # of all layers that it stands for
    share: str  # of the model's
    facts: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    dots: tuple[Dots, ...] = ()
    legend: str = ""  # of the dots


@dataclass(frozen=True)
class Layers:
    """So many layers that follow each other alike; a branch is what the residual stream goes around."""

    title: str  # which of those that take turns
    number: int
    branches: tuple[tuple[Block, Block], ...]


@dataclass(frozen=True)
class Stack:
    title: str
    repeats: int
    parameters: int  # of all
    share: str
    layers: tuple[Layers, ...]  # in turn


@dataclass(frozen=True)
class Diagram:
    embedding: Block
    stacks: tuple[Stack, ...]
    norm: Block
    head: Block


def diagram_of(model: ModelFacts) -> Diagram:
    tied = 0 if model.tied else model.embedding_parameters
    words = f"{model.vocab_size:,} tokens", f"{model.hidden_size:,} wide"
    source = "the embedding's weight" if model.tied else "a weight of its own"
    return Diagram(
        _block(model, "embedding", "embedding", model.embedding_parameters, words),
        tuple(_stacks(model)),
        _block(model, "norm", "norms", model.hidden_size),
        _block(model, "head", "head", tied, (f"{model.vocab_size:,} logits", source)),
    )


def _block(model: ModelFacts, title: str, kind: str, parameters: int, facts: tuple[str, ...] = ()) -> Block:
    return Block(title, kind, parameters, share(parameters, model.parameters), facts)


def _stacks(model: ModelFacts) -> Iterator[Stack]:
    shown = model.structure if len(model.structure) <= MAX_RUNS else model.structure[: MAX_RUNS - 1]
    for run in shown:
        yield _stack(model, _numbers(run.first, run.repeats * len(run.layers)), run)
    if rest := model.structure[len(shown) :]:
        parameters = sum(run.repeats * sum(map(_parameters, run.layers)) for run in rest)
        layers = _numbers(rest[0].first, model.layers - rest[0].first)
        title = f"{layers}, in {len(rest):,} more runs of unlike ones"
        yield Stack(title, 1, parameters, share(parameters, model.parameters), ())


def _stack(model: ModelFacts, title: str, run: Run) -> Stack:
    layers: list[Layers] = []
    done, period = 0, len(run.layers)
    for layer, alike in groupby(run.layers):
        start, done = done + 1, done + len(list(alike))
        turn = f"{start} of {period}" if start == done else f"{start}-{done} of {period}"
        layers.append(Layers(turn, done - start + 1, _branches(model, layer, run.repeats * (done - start + 1))))
    parameters = run.repeats * sum(map(_parameters, run.layers))
    return Stack(title, run.repeats, parameters, share(parameters, model.parameters), tuple(layers))


def _numbers(first: int, count: int) -> str:
    return f"layer {first}" if count == 1 else f"layers {first}-{first + count - 1}"


def _parameters(layer: LayerParts) -> int:
    return layer.attention.parameters + layer.ffn.parameters + 2 * layer.norm_parameters


def _branches(model: ModelFacts, layer: LayerParts, number: int) -> tuple[tuple[Block, Block], ...]:
    norm = _block(model, "norm", "norms", number * layer.norm_parameters)
    return tuple((norm, _part(model, part, number)) for part in (layer.attention, layer.ffn))


def _part(model: ModelFacts, part: Part, number: int) -> Block:
    title, kind, legend = _TITLES[part.kind]
    facts, dots = _DESCRIBED[type(part.config)](part.config)
    weights = tuple(f"{name} {' x '.join(f'{n:,}' for n in shape)}" for name, shape in part.weights.items())
    parameters = number * part.parameters
    count = sum(len(group.chosen) for group in dots)
    return Block(
        title,
        kind,
        parameters,
        share(parameters, model.parameters),
        tuple(filter(None, facts)),
        weights,
        dots if count <= MAX_DOTS else (),
        legend,
    )


Described = tuple[tuple[str, ...], tuple[Dots, ...]]  # in words, of which empty ones say nothing; in dots


def _gqa(config: GQAConfig) -> Described:
    H, G = config.num_heads, config.num_kv_heads
    biases = [name for name, bias in (("queries, keys, values", config.qkv_bias), ("output", config.out_bias)) if bias]
    norms = {None: "", "head": "norm of each query and key", "whole": "norm over all queries, and over all keys"}
    words = (
        f"{H:,} heads of {config.head_dim:,}",
        "keys and values for each head" if G == H else f"{G:,} {'heads' if G > 1 else 'head'} of keys and values",
        _rope(config.rope, config.head_dim),
        "" if config.window is None else f"window of {config.window:,} tokens",
        norms[config.qk_norm],
        f"bias: {', '.join(biases)}" if biases else "",
        "" if config.clip is None else f"cut to ±{config.clip:g}",
    )
    return words, (Dots((True,) * (H // G), shared=True),) * G if H <= MAX_DOTS else ()


def _mla(config: MLAConfig) -> Described:
    H, R = config.num_heads, config.rope.dim
    queries = "the hidden state" if config.q_rank is None else f"a latent of {config.q_rank:,}"
    words = (
        f"{H:,} heads of {config.nope_dim:,} + {R:,} rotated",
        f"values of {config.v_dim:,}",
        f"queries from {queries}",
        f"keys and values from a latent of {config.kv_rank:,}",
        f"cached: {config.kv_rank:,} + {R:,}",
        _rope(config.rope, R),
        "bias: latents, output" if config.bias else "",
    )
    return words, (Dots((True,) * H, shared=True),) if H <= MAX_DOTS else ()


def _mlp(config: MLPConfig) -> Described:
    return (f"SwiGLU of {config.size:,}", "bias" if config.bias else ""), ()


def _moe(config: MoEConfig) -> Described:
    E, N = config.num_experts, config.top_k
    shared = "" if config.shared is None else f"a shared expert of {config.shared.size:,}"
    words = (
        f"{E:,} experts: SwiGLU of {config.size:,}",
        f"{N:,} for each token",
        f"from {config.top_groups:,} of {config.num_groups:,} groups" if config.num_groups > 1 else "",
        f"{shared}, weighted" if config.shared_gate else shared,
        f"{config.scoring} router{' in float32' if config.float32_router else ''}",
        "correction bias" if config.correction_bias else "",
        "weights sum to 1" if config.renormalize else "",
        "" if config.scale == 1 else f"result x {config.scale:g}",
    )
    return words, _experts(config) if E <= MAX_DOTS else ()


def _experts(config: MoEConfig) -> tuple[Dots, ...]:
    """Those of one token, for example: spread evenly."""
    groups, size = config.num_groups, config.num_experts // config.num_groups
    eligible = [g * size + e for g in _spread(config.top_groups, groups) for e in range(size)]
    chosen = {eligible[n] for n in _spread(config.top_k, len(eligible))}
    dots = (Dots(tuple(g * size + e in chosen for e in range(size))) for g in range(groups))
    return (*dots, *([] if config.shared is None else [Dots((True,), shared=True)]))


def _spread(few: int, many: int) -> list[int]:
    return [(2 * n + 1) * many // (2 * few) for n in range(min(few, many))]


def _rope(rope: RopeConfig | None, head_dim: int) -> str:
    if rope is None:
        return "no position embedding"
    part = "" if rope.dim == head_dim else f" of {rope.dim} dimensions"
    scaling = "" if rope.scaling is None else f", {_SCALINGS[type(rope.scaling)](rope.scaling)}"
    return f"RoPE{part}, θ {rope.theta:,.10g}{scaling}"


# By the configs' types, whose functions take no other.
_DESCRIBED: dict[type, Callable[[Any], Described]] = {
    GQAConfig: _gqa,
    MLAConfig: _mla,
    MLPConfig: _mlp,
    MoEConfig: _moe,
}
_SCALINGS: dict[type, Callable[[Any], str]] = {
    LinearScaling: lambda s: f"positions ÷ {s.factor:g}",
    Llama3Scaling: lambda s: f"llama3 x {s.factor:g} from {s.original_max_positions:,}",
    YarnScaling: lambda s: f"YaRN x {s.factor:g} from {s.original_max_positions:,}",
    LongRopeScaling: lambda s: f"LongRoPE from {s.original_max_positions:,}",
}
_TITLES = {
    "GQA": ("attention", "attention", "heads of queries; those above one bar share a head of keys and values"),
    "MLA": ("latent attention", "attention", "heads; all have their keys and values from one latent"),
    "MLP": ("feed-forward", "feed-forward", ""),
    "MoE": ("experts", "experts", "experts, those of one token filled as an example; in a frame the shared one"),
}
