"""What `pyllama inspect` prints: facts, and the tree as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pyllama.files import printable
from pyllama.inspection import Inspection
from pyllama.inspection.tree import Node

COLUMNS = ("module", "number", "shape", "type", "parameters", "bytes", "share")


def lines(inspection: Inspection) -> Iterator[str]:
    """Names and messages may have come from anybody: nothing of them steers a terminal."""
    for line in _lines(inspection):
        yield "".join(character if character.isprintable() else "\ufffd" for character in line)


def _lines(inspection: Inspection) -> Iterator[str]:
    facts = list(_facts(inspection))
    width = max(len(name) for name, _ in facts)
    yield from (f"{name:{width}}  {value}" for name, value in facts)
    yield ""
    total = inspection.root.bytes
    rows = [(line, *_cells(node, total)) for line, node in _tree(inspection.root.children)]
    rows += [("all", *_cells(inspection.root, total))]
    yield from aligned([COLUMNS, *rows])


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _facts(inspection: Inspection) -> Iterator[tuple[str, str]]:
    root, model = inspection.root, inspection.model
    yield "source", printable(inspection.source)
    shares = sorted(inspection.dtypes.items(), key=lambda item: -item[1])
    types = ", ".join(f"{printable(name)} {_share(size, root.bytes)}" for name, size in shares)
    yield "files", f"{_count(inspection.files, 'file')}, {_count(inspection.tensors, 'tensor')}, {size(root.bytes)}"
    yield "types", types
    if model is None:
        yield "parameters", f"{root.parameters:,} floating-point numbers in the files; packed integers are not counted"
        yield "no model", f"that pyllama runs: {inspection.problem}"
        return
    yield "parameters", f"{model.parameters:,}"
    if model.active_parameters < model.parameters:
        share = _share(model.active_parameters, model.parameters)
        yield "active per token", f"{model.active_parameters:,} ({share}): all but the experts that it does not choose"
    tied = "also the head" if model.tied else "the head is a weight of its own"
    share = _share(model.embedding_parameters, model.parameters)
    yield "embedding", f"{model.embedding_parameters:,} ({share}), {tied}"
    yield "layers, context", f"{model.layers}, {model.max_positions:,} tokens"
    yield "cache per token", f"{size(model.cache_bytes_per_token)} in {model.dtype}"
    seen = f"{_scaled(model.flops_per_token_seen)}FLOP for each token that it sees"
    windows = f", within a window in {model.windows} of the layers" if model.windows else ""
    yield "work per token", f"{_scaled(model.flops_per_token)}FLOP, and {seen}{windows}"


def _tree(nodes: tuple[Node, ...], indent: str = "") -> Iterator[tuple[str, Node]]:
    """Each node with its place in the tree drawn before its name."""
    for number, node in enumerate(nodes, start=1):
        last = number == len(nodes)
        yield f"{indent}{'└─ ' if last else '├─ '}{printable(node.name)}", node
        yield from _tree(node.children, indent + ("   " if last else "│  "))


def _cells(node: Node, total: int) -> tuple[str, ...]:
    shape = "" if node.shape is None else printable(" x ".join(map(str, node.shape))) or "scalar"
    number = f"{node.count:,}" if node.count > 1 else ""
    counts = f"{node.parameters:,}", size(node.bytes), _share(node.bytes, total)
    return number, shape, printable(node.dtype or ""), *counts


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def size(size: int) -> str:
    return f"{_scaled(size)}B"


def _scaled(number: float) -> str:
    """With a prefix of the SI, in three digits."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:,.3g} P"
