"""The tree as pictures show it: each part with its kind, and no more of them than can be looked at."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from pyllama.inspection.tree import Node

# What a tensor is for, as its name says in one checkpoint or another. The first that is found in it counts.
_WORDS = {
    "norms": r"norm|(^|[._])ln(_|\d|f?\.)",
    "experts": r"expert|moe|router|(mlp|ffn|feed_forward)\.gate\.|e_score_correction",
    "attention": r"attn|attention|(^|\.)w?([qkvo]|qkv|query|key|value)(_proj|_a|_b)?\.",
    "feed-forward": r"mlp|ffn|feed_?forward|(^|\.)(w[123]|linear[12]|fc\d?|up|down|gate)(_proj)?\.",
    "head": r"^(model\.|module\.)*(lm_head|head|output|unembed\w*|generator|classifier|score)(\.|$)|shared_head",
    "embedding": r"emb|(^|\.)w[tp]e\.",
}
_PATTERNS = {kind: re.compile(words) for kind, words in _WORDS.items()}
OTHER = "other"
KINDS = ("embedding", "attention", "feed-forward", "experts", "norms", "head", OTHER)


def kind_of(name: str) -> str:
    """What a tensor of this whole name is for."""
    lower = name.lower()
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(lower)), OTHER)


@dataclass(frozen=True)
class View:
    """A node of the tree, or several small ones with one parent as one."""

    node: Node
    number: int  # its own; of several their parent's
    path: str  # the whole name
    kinds: dict[str, int]  # bytes by kind
    children: tuple[View, ...] = ()
    others: int = 0  # so many nodes are this one

    @property
    def kind(self) -> str:
        """The kind of all that is in it; "mixed" where it has several."""
        return next(iter(self.kinds)) if len(self.kinds) == 1 else "mixed"


def view_of(root: Node) -> View:
    return _view(root, "", count())


def _view(node: Node, parent: str, numbers: Iterator[int]) -> View:
    number, path = next(numbers), f"{parent}.{node.name}" if parent else node.name
    children = tuple(_view(child, path, numbers) for child in node.children)
    kinds = _sum(child.kinds for child in children) if children else {kind_of(path): node.bytes}
    return View(node, number, path, kinds, children)


def _sum(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for kinds in parts:
        for kind, size in kinds.items():
            total[kind] = total.get(kind, 0) + size
    return {kind: total[kind] for kind in KINDS if kind in total}


def bounded(root: View, most: int, least: float = 0) -> View:
    """The root with the `most` largest of its parts that have `least` bytes; in each module the others are one part."""
    # Those of one size keep their order, and no part is larger than its module: a part is kept only with its module.
    kept = heapq.nlargest(most, walk(root), key=lambda view: view.node.bytes)
    return _pruned(root, {view.number for view in kept if view.node.bytes >= least})


def walk(view: View) -> Iterator[View]:
    yield view
    for child in view.children:
        yield from walk(child)


def _pruned(view: View, kept: set[int]) -> View:
    children = [_pruned(child, kept) for child in view.children if child.number in kept]
    rest = [child for child in view.children if child.number not in kept]
    if rest:
        children.append(replace(rest[0], children=()) if len(rest) == 1 else _others(view, rest))
    return replace(view, children=tuple(children))


def _others(parent: View, rest: list[View]) -> View:
    node = Node(
        name=f"{len(rest):,} others",
        count=sum(view.node.count for view in rest),
        parameters=sum(view.node.parameters for view in rest),
        bytes=sum(view.node.bytes for view in rest),
    )
    path = f"{parent.path}: {node.name}" if parent.path else node.name
    return View(node, parent.number, path, _sum(view.kinds for view in rest), others=len(rest))
