"""Argument checks with symbolic dimensions: each op says its shapes once, as data.

A specification such as `"int32: B max_pages"` is an optional data type and the names of the dimensions. A name is
bound by the first tensor that has it and compared in the others; `B+1` is one more than `B`, a number is itself, and
a leading `...` is any number of further dimensions. Without a data type the first tensor may have any floating-point
type and the others must have the same; `float:` is any floating-point type of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ANY_FLOAT = "a floating-point type"
_DTYPES = {"bool": torch.bool, "int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


class _Spec(NamedTuple):
    dtype: torch.dtype | str | None  # None: the first tensor's
    dims: tuple[str, ...]  # less a leading "...", less "+1"
    offsets: tuple[int, ...] | None  # what each dimension is more than its name, None: all 0
    ragged: bool  # with a leading "..."


def argument_check(op: str, names: Sequence[str], specs: dict[str, str]) -> Callable[[Sequence[Any]], None]:
    """A function that raises ValueError when the arguments of `op` do not fit `specs`.

    names: the op's arguments in order; specs: argument -> specification. The function takes the arguments' values,
    trailing ones may be missing. It reads shapes, data types and devices, never values, so it works on fake tensors.
    """
    first_name = next(name for name in names if name in specs)
    table = [_parse(specs[name], first=name == first_name) if name in specs else None for name in names]
    numbers = {dim: int(dim) for spec in table if spec for dim in spec.dims if dim.isdigit()}

    def check(args: Sequence[Any]) -> None:
        sizes: dict[str, Any] = numbers.copy()
        first = device = None
        for spec, arg in zip(table, args):  # noqa: B905  missing arguments are None by default
            if spec is None or arg is None:
                continue
            dtype, dims, offsets, ragged = spec
            if first is None:
                first, device = arg.dtype, arg.device
            elif arg.device != device:
                raise ValueError(f"{op}: {_name(arg, args)} is on {arg.device}, but {first_name} on {device}")
            if arg.dtype is not (dtype or first) and not (dtype is _ANY_FLOAT and arg.is_floating_point()):
                raise ValueError(f"{op}: {_name(arg, args)} is {arg.dtype}, but must be {dtype or first}")
            shape = arg.shape
            if ragged:
                lead = len(shape) - len(dims)
                if lead < 0 or sizes.setdefault("...", shape[:lead]) != shape[:lead]:
                    mismatch(args, arg, sizes)
                shape = shape[lead:]
            elif len(shape) != len(dims):
                mismatch(args, arg, sizes)
            if offsets:
                shape = [size - offset for size, offset in zip(shape, offsets, strict=True)]
            for dim, size in zip(dims, shape):  # noqa: B905  their lengths are equal, and this is hot
                if sizes.setdefault(dim, size) != size:
                    mismatch(args, arg, sizes)

    def _name(arg: Any, args: Sequence[Any]) -> str:
        return next(name for name, value in zip(names, args, strict=False) if value is arg)

    def mismatch(args: Sequence[Any], arg: Any, sizes: dict[str, Any]) -> None:
        name = _name(arg, args)
        dims = specs[name].rpartition(":")[2].split()
        known = [dim for dim in (dim.partition("+")[0] for dim in dims) if dim in sizes and not dim.isdigit()]
        values = ", ".join(f"{dim} = {sizes[dim]}" for dim in dict.fromkeys(known))
        raise ValueError(
            f"{op}: {name} has the shape {list(arg.shape)}, but must have [{', '.join(dims)}]"
            + (f" with {values}" if values else "")
        )

    return check


def segment_lengths(op: str, name: str, bounds: Tensor, total: int) -> list[int]:
    """How many rows each segment owns; `bounds` are their first rows and the end. Raises ValueError where they do not
    rise from 0 to `total`. Reads values."""
    ends = bounds.tolist()
    lengths = [end - begin for begin, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"{op}: {name} must rise from 0 to {total}, the number of rows, but is {ends}")
    return lengths


def _parse(text: str, first: bool) -> _Spec:
    dtype, _, shape = text.rpartition(":")
    dims = shape.split()
    ragged = dims[0] == "..."
    pairs = [dim.partition("+") for dim in dims[ragged:]]
    offsets = tuple(int(offset or 0) for _, _, offset in pairs)
    return _Spec(
        _DTYPES.get(dtype, _ANY_FLOAT) if dtype or first else None,
        tuple(name for name, _, _ in pairs),
        offsets if any(offsets) else None,
        ragged,
    )
