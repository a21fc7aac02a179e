"""Argument checks with symbolic dimensions: each op says its shapes once, as data.

A specification such as `"int32: B max_pages"` is an optional dtype and the names of the dimensions. A name is bound by
the first tensor that has it and compared in the others; `B+1` is one more than `B`, a number is itself, and a leading
`...` is any number of further dimensions. The first tensor without a dtype may have any floating-point one and the
others without must have the same; `float:` is any floating-point dtype of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ANY_FLOAT = "a floating-point dtype"
_DTYPES = {"bool": torch.bool, "int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


class _Spec(NamedTuple):
    name: str
    dtype: torch.dtype | str | None  # None: that of the first tensor without one
    dims: tuple[str, ...]  # less a leading "...", less "+1"
    offsets: tuple[int, ...] | None  # what each dimension is more than its name; None: all 0
    leading: bool  # with a leading "..."
    text: str  # "[..., D]"


def argument_check(op: str, names: Sequence[str], specs: dict[str, str]) -> Callable[[Sequence[Any]], None]:
    """A function that raises ValueError when the arguments of `op` do not fit `specs`.

    names: the op's arguments in order; specs: argument -> specification. The function takes the arguments' values,
    trailing ones may be missing. It reads shapes, dtypes and devices, never values, so it works on fake tensors.
    """
    first_name = next(name for name in names if name in specs)
    leader = next((name for name in names if name in specs and ":" not in specs[name]), None)  # in the data type
    table = [_parse(name, specs[name], name == leader) if name in specs else None for name in names]
    numbers = {dim: int(dim) for spec in table if spec for dim in spec.dims if dim.isdigit()}

    def check(args: Sequence[Any]) -> None:
        sizes: dict[str, Any] = numbers.copy()
        common = device = None
        for spec, arg in zip(table, args):  # noqa: B905  trailing arguments may be missing
            if spec is None or arg is None:
                continue
            name, dtype, dims, offsets, leading, text = spec
            if device is None:
                device = arg.device
            elif arg.device != device:
                raise ValueError(f"{op}: {name} is on {arg.device}, but {first_name} is on {device}")
            if name is leader:
                common = arg.dtype
            if arg.dtype is not (dtype or common) and not (dtype is _ANY_FLOAT and arg.is_floating_point()):
                wanted = dtype or f"{common}, the dtype of {leader}"
                raise ValueError(f"{op}: {name} must have {wanted}, but has {arg.dtype}")
            shape = arg.shape
            if leading:
                split = max(len(shape) - len(dims), 0)
                if sizes.setdefault("...", shape[:split]) != shape[:split]:
                    raise ValueError(f"{op}: {disagreement(spec, '...', shape[:split], sizes['...'], shape)}")
                shape = shape[split:]
            if len(shape) != len(dims):
                raise ValueError(f"{op}: {name} must have shape {text}, but has {list(arg.shape)}")
            if offsets:
                shape = [size - offset for size, offset in zip(shape, offsets, strict=True)]
            for dim, size in zip(dims, shape):  # noqa: B905  of equal lengths
                if sizes.setdefault(dim, size) != size:
                    raise ValueError(f"{op}: {disagreement(spec, dim, size, sizes[dim], arg.shape)}")

    def disagreement(spec: _Spec, dim: str, size: Any, met: Any, shape: torch.Size) -> str:
        if dim in numbers:
            return f"{spec.name} must have shape {spec.text}, but has {list(shape)}"
        other = next(other for other in table if other and dim in ("..." if other.leading else "", *other.dims))
        return f"{spec.name} of shape {list(shape)} has {dim} = {size}, but {other.name} has {dim} = {met}"

    return check


def segment_lengths(op: str, name: str, bounds: Tensor, total: int) -> list[int]:
    """How many rows each segment owns; `bounds` are the segments' first rows and the end.

    Reads values. Raises ValueError where they do not rise from 0 to `total`.
    """
    ends = bounds.tolist()
    lengths = [end - begin for begin, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"{op}: {name} must rise from 0 to {total}, the number of rows, but is {ends}")
    return lengths


def cached_lengths(op: str, seq_lens: Tensor, max_pages: int, page_size: int) -> list[int]:
    """How many tokens of each sequence are in the cache.

    Reads values. Raises ValueError where they are negative or more than the `max_pages` pages of a sequence hold.
    """
    lengths: list[int] = seq_lens.tolist()
    capacity = max_pages * page_size
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"{op}: seq_lens[{b}] is {length}, but must be in 0 to {capacity}, "
                f"the tokens that max_pages = {max_pages} pages of {page_size} hold"
            )
    return lengths


def _parse(name: str, text: str, leader: bool) -> _Spec:
    dtype, _, shape = text.rpartition(":")
    dims = shape.split()
    leading = dims[0] == "..."
    pairs = [dim.partition("+") for dim in dims[leading:]]
    offsets = tuple(int(offset or 0) for _, _, offset in pairs)
    return _Spec(
        name,
        _DTYPES.get(dtype, _ANY_FLOAT) if dtype or leader else None,
        tuple(symbol for symbol, _, _ in pairs),
        offsets if any(offsets) else None,
        leading,
        f"[{', '.join(dims)}]",
    )
