"""Argument checks with symbolic dimensions: each op says its shapes once, as data.

A specification such as `"int32: B max_pages"` is an optional data type and the names of the dimensions. A name is
bound by the first tensor that has it and compared in the others; `B+1` is one more than `B`, a number is itself, and
a leading `...` is any number of further dimensions. Without a data type the first tensor may have any floating-point
type and the others must have the same; `float:` is any floating-point type of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

_ANY_FLOAT, _SAME = "floating-point", "the same"
_DTYPES = {name: getattr(torch, name) for name in ("bool", "int32", "int64", "float32")} | {"float": _ANY_FLOAT}
_DIMENSION = re.compile(r"(?:([A-Za-z_]+)\+?)?(\d+)?")


def argument_check(op: str, names: Sequence[str], specs: dict[str, str]) -> Callable[[Sequence[Any]], None]:
    """A function that raises ValueError when the arguments of `op` do not fit `specs`.

    names: the op's argument names in order; specs: argument name -> specification. It reads shapes, data types and
    devices, never values, so it also works on fake tensors.
    """
    table = []
    for name, spec in specs.items():
        dtype, _, dims = spec.rpartition(":")
        expected = _DTYPES[dtype] if dtype else _SAME if table else _ANY_FLOAT
        symbols = dims.split()
        ragged = symbols[0] == "..."
        pairs = [_parse_dimension(symbol) for symbol in symbols[ragged:]]
        table.append((names.index(name), name, expected, pairs, ragged))

    def fail(args: Sequence[Any], index: int, sizes: dict[str | None, Any]) -> None:
        name = names[index]
        dims = specs[name].rpartition(":")[2].split()
        known = {symbol for dim in dims if (symbol := _parse_dimension(dim)[0]) in sizes and symbol is not None}
        values = " and ".join(f"{symbol} = {sizes[symbol]}" for symbol in sorted(known))
        raise ValueError(
            f"{op}: {name} has the shape {list(args[index].shape)}, but must have [{', '.join(dims)}]"
            + (f" with {values}" if values else "")
        )

    def check(args: Sequence[Any]) -> None:
        sizes: dict[str | None, Any] = {}
        first = None
        for index, name, dtype, dims, ragged in table:
            if index >= len(args):  # trailing defaults are not passed
                break
            arg = args[index]
            if arg is None:
                continue
            if first is None:
                first, device = arg, arg.device
            elif arg.device != device:
                raise ValueError(f"{op}: {name} is on {arg.device}, but {names[table[0][0]]} on {device}")
            if arg.dtype is not (first.dtype if dtype is _SAME else dtype) and not (
                dtype is _ANY_FLOAT and arg.is_floating_point()
            ):
                wanted = first.dtype if dtype is _SAME else dtype
                raise ValueError(f"{op}: {name} has the data type {arg.dtype}, but must have {wanted}")
            shape = arg.shape
            if ragged:
                lead = len(shape) - len(dims)
                if lead < 0 or sizes.setdefault("...", shape[:lead]) != shape[:lead]:
                    fail(args, index, sizes)
                shape = shape[lead:]
            elif len(shape) != len(dims):
                fail(args, index, sizes)
            for (symbol, offset), size in zip(dims, shape):
                if symbol is None:
                    if size != offset:
                        fail(args, index, sizes)
                elif symbol not in sizes:
                    sizes[symbol] = size - offset
                elif sizes[symbol] + offset != size:
                    fail(args, index, sizes)

    return check


def _parse_dimension(text: str) -> tuple[str | None, int]:
    """"B" -> ("B", 0), "B+1" -> ("B", 1), "2" -> (None, 2), "..." -> ("...", 0)."""
    if text == "...":
        return text, 0
    match = _DIMENSION.fullmatch(text)
    assert match, text
    return match[1], int(match[2] or 0)
