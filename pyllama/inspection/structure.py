"""The layers of a model that pyllama runs: what each is made of, and which follow each other alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from pyllama.config import AttentionConfig, FFNConfig
from pyllama.model import Model

MAX_PERIOD = 16  # layers that take turns, as every fourth that sees more than a window


@dataclass(frozen=True)
class Part:
    """The attention or the feed-forward of a layer."""

    kind: str  # "GQA", "MLA", "MLP" or "MoE"
    config: AttentionConfig | FFNConfig
    weights: dict[str, tuple[int, ...]]  # their shapes, by pyllama's names
    parameters: int


@dataclass(frozen=True)
class LayerParts:
    attention: Part
    ffn: Part
    norm_parameters: int  # of the norm ahead of each


@dataclass(frozen=True)
class Run:
    """Layers `first` and on: `repeats` times these ones, which differ, or one by itself."""

    first: int
    repeats: int
    layers: tuple[LayerParts, ...]


def structure_of(model: Model) -> tuple[Run, ...]:
    numbers: dict[object, int] = {}
    kinds = [numbers.setdefault(layer, len(numbers)) for layer in model.config.layers]
    return tuple(
        Run(first, repeats, tuple(_layer(model, i) for i in range(first, first + period)))
        for first, repeats, period in _runs(kinds)
    )


def _runs(kinds: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """First layer, how often, how many layers in turn: from each on, of all ways the one that goes farthest."""
    first = 0
    while first < len(kinds):
        repeats, period = max(
            ((_repeats(kinds, first, period), period) for period in range(1, MAX_PERIOD + 1)),
            key=lambda run: run[0] * run[1] if run[0] > 1 else int(run[1] == 1),
        )
        yield first, repeats, period
        first += repeats * period


def _repeats(kinds: Sequence[int], first: int, period: int) -> int:
    pattern, end = kinds[first : first + period], first + period
    while kinds[end : end + period] == pattern:
        end += period
    return (end - first) // period


def _layer(model: Model, number: int) -> LayerParts:
    layer, config = model.layers[number], model.config.layers[number]
    attention, ffn = layer.get_submodule("attention"), layer.get_submodule("ffn")
    return LayerParts(
        _part(attention, config.attention),
        _part(ffn, config.ffn),
        layer.get_parameter("attention_norm.weight").numel(),
    )


def _part(module: nn.Module, config: AttentionConfig | FFNConfig) -> Part:
    parameters = dict(module.named_parameters())
    return Part(
        kind=type(module).__name__,
        config=config,
        weights={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        parameters=sum(parameter.numel() for parameter in parameters.values()),
    )
