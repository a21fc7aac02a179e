"""What `pyllama inspect` prints: facts, and the tree as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pyllama.files import printable
from pyllama.inspection import Inspection
from pyllama.inspection.tree import Node

COLUMNS = ("module", "number", "shape", "type", "parameters", "bytes", "share")


class Fact(NamedTuple):
    name: str
    figure: str
    more: str = ""  # what follows the figure

    def __str__(self) -> str:
        return self.figure + self.more


def lines(inspection: Inspection) -> Iterator[str]:
    """Names and messages may have come from anybody: nothing of them steers a terminal."""
    for line in _lines(inspection):
        yield "".join(character if character.isprintable() else "\ufffd" for character in line)


def _lines(inspection: Inspection) -> Iterator[str]:
    found = [Fact("source", printable(inspection.source)), *facts(inspection)]
    if inspection.problem is not None:
        found.append(Fact("no model", f"that pyllama runs: {inspection.problem}"))
    width = max(len(fact.name) for fact in found)
    yield from (f"{fact.name:{width}}  {fact}" for fact in found)
    yield ""
    total = inspection.root.bytes
    rows = [(line, *cells(node, total)) for line, node in _tree(inspection.root.children)]
    rows += [("all", *cells(inspection.root, total))]
    yield from aligned([COLUMNS, *rows])


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        columns = [first.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(others, widths[1:], strict=True))]
        yield "  ".join(columns).rstrip()


def facts(inspection: Inspection) -> Iterator[Fact]:
    root, model = inspection.root, inspection.model
    counts = f"{counted(inspection.files, 'file')}, {counted(inspection.tensors, 'tensor')}"
    yield Fact("files", counts, f", {size(root.bytes)}")
    shares = sorted(inspection.dtypes.items(), key=lambda item: -item[1])
    yield Fact("types", ", ".join(f"{printable(name)} {share(part, root.bytes)}" for name, part in shares))
    if model is None:
        numbers = " floating-point numbers in the files; packed integers are not counted"
        yield Fact("parameters", f"{root.parameters:,}", numbers)
        return
    yield Fact("parameters", f"{model.parameters:,}")
    if model.active_parameters < model.parameters:
        part = share(model.active_parameters, model.parameters)
        idle = f" ({part}): all but the experts that it does not choose"
        yield Fact("active per token", f"{model.active_parameters:,}", idle)
    tied = "also the head" if model.tied else "the head is a weight of its own"
    part = share(model.embedding_parameters, model.parameters)
    yield Fact("embedding", f"{model.embedding_parameters:,}", f" ({part}), {tied}")
    yield Fact("layers", f"{model.layers:,}")
    yield Fact("context", f"{model.max_positions:,} tokens")
    yield Fact("cache per token", size(model.cache_bytes_per_token), f" in {model.dtype}")
    seen = f", and {_scaled(model.flops_per_token_seen)}FLOP for each token that it sees"
    windows = f", within a window in {model.windows} of the layers" if model.windows else ""
    yield Fact("work per token", f"{_scaled(model.flops_per_token)}FLOP", seen + windows)


def _tree(nodes: tuple[Node, ...], indent: str = "") -> Iterator[tuple[str, Node]]:
    """Each node with its place in the tree drawn before its name."""
    for number, node in enumerate(nodes, start=1):
        last = number == len(nodes)
        yield f"{indent}{'└─ ' if last else '├─ '}{printable(node.name)}", node
        yield from _tree(node.children, indent + ("   " if last else "│  "))


def cells(node: Node, total: int) -> tuple[str, ...]:
    """Of all columns but the first."""
    shape = "" if node.shape is None else printable(" x ".join(map(str, node.shape))) or "scalar"
    number = f"{node.count:,}" if node.count > 1 else ""
    counts = f"{node.parameters:,}", size(node.bytes), share(node.bytes, total)
    return number, shape, printable(node.dtype or ""), *counts


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def size(number: int) -> str:
    return f"{_scaled(number)}B"


def _scaled(number: float) -> str:
    """With a prefix of the SI, in three digits."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:,.3g} P"
