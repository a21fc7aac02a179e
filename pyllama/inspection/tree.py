"""Tensors' names as a tree of modules, in which neighbours of one structure are one: layers, experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from pyllama.checkpoint import TensorInfo

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
MAX_DEPTH = 32  # of modules; a name may come from anybody, and could have a million


@dataclass(frozen=True)
class Node:
    """A module or a tensor, or `count` of them that are alike; figures are of all of them together."""

    name: str
    count: int
    parameters: int  # elements of floating-point tensors
    bytes: int
    shape: tuple[int, ...] | None = None  # of each tensor; of each piece where every rank has one
    dtype: str | None = None  # safetensors' name
    children: tuple[Node, ...] = ()


@dataclass
class _Module:
    tensor: TensorInfo | None = None
    children: dict[str, _Module] = field(default_factory=dict)


def tree_of(tensors: Mapping[str, TensorInfo]) -> Node:
    """The root, whose name is empty. Modules are in the order of their names, then of their numbers."""
    root = _Module()
    for name, info in tensors.items():
        module = root
        for part in name.split(".", MAX_DEPTH):
            module = module.children.setdefault(part, _Module())
        module.tensor = info
    return _node("", root)


def _node(name: str, module: _Module) -> Node:
    if module.tensor is not None and not module.children:
        return _leaf(name, module.tensor)
    numbered = sorted(filter(_NUMBER.fullmatch, module.children), key=int)
    named = sorted(module.children.keys() - numbered)
    children = _folded(_node(part, module.children[part]) for part in (*named, *numbered))
    if module.tensor is not None:
        children.insert(0, _leaf(name, module.tensor))
    if len(children) == 1 and name:  # one step deeper without a line of its own
        return replace(children[0], name=f"{name}.{children[0].name}")
    total = sum(child.parameters for child in children), sum(child.bytes for child in children)
    return Node(name, 1, *total, children=tuple(children))


def _leaf(name: str, info: TensorInfo) -> Node:
    return Node(name, 1, info.elements if info.is_floating else 0, info.bytes, info.shape, info.dtype)


def _folded(nodes: Iterable[Node]) -> list[Node]:
    """Those whose names are numbers joined with the others of their structure, in the place of the first."""
    groups: dict[Any, list[Node]] = {}
    for node in nodes:
        first, dot, rest = node.name.partition(".")
        groups.setdefault((_structure(node), rest) if _NUMBER.fullmatch(first) else (node.name, dot), []).append(node)
    return [group[0] if len(group) == 1 else _joined(group, True) for group in groups.values()]


def _structure(node: Node) -> Any:
    inner = tuple((child.name, _structure(child)) for child in node.children)
    return node.count, node.shape, node.dtype, inner


def _joined(nodes: list[Node], numbered: bool = False) -> Node:
    """One node for several of one structure."""
    numbers, (_, dot, rest) = [node.name.partition(".")[0] for node in nodes], nodes[0].name.partition(".")
    return Node(
        f"{_ranges([*map(int, numbers)])}{dot}{rest}" if numbered else nodes[0].name,
        sum(node.count for node in nodes),
        sum(node.parameters for node in nodes),
        sum(node.bytes for node in nodes),
        nodes[0].shape,
        nodes[0].dtype,
        tuple(_joined(list(alike)) for alike in zip(*(node.children for node in nodes), strict=True)),
    )


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
