"""Weights: how the tensors of a checkpoint become a model's parameters.

A family is a table of rules, nothing else. It is matched against the parameters' names and the files' headers
first, so that every tensor is used once and every parameter is filled, or loading stops with the names before
anything is read. Then tensors stream from the memory-mapped files straight into their parameter.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"

# safetensors' names. Other types (int8, float8) come with scales that no rule applies.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(ValueError):
    """A checkpoint's files are missing, damaged, or not the model that its config.json describes."""


@dataclass(frozen=True)
class Rule:
    """The tensors `sources`, stacked in order along their first dimension, are the parameter `target`.

    {i} stands for any layer. {e}, in sources only, stands for every expert and becomes the parameter's first
    dimension. `shard` is the dimension of the parameter that tensor parallelism splits, in each source by
    itself; None: every device holds all of it. A checkpoint that comes in such shards is joined along it.
    `interleaved` is for weights of queries and keys made for RoPE over pairs (2i, 2i + 1): of each source the head
    size K, or 0; its rows are put in the order of pairs (i, i + K/2) of each head.
    """

    target: str
    sources: tuple[str, ...]
    shard: int | None
    interleaved: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockScales:
    """Weights of 8 bits with a scale for each block (DeepSeek-V3, arXiv:2412.19437, section 3.3).

    Element [r, c] of the tensor `x.weight` times element [r // rows, c // columns] of `x.{name}` is the weight.
    """

    rows: int
    columns: int
    name: str = "weight_scale_inv"


@dataclass(frozen=True)
class WeightTable:
    """A family's rules; `skip` names tensors that may be left over, since they hold nothing that is used.

    In names of `skip`, `*` stands for anything. `tied` are pairs of tensors: the first may be left over where it
    equals the second.
    """

    rules: tuple[Rule, ...]
    skip: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    scales: BlockScales | None = None


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says about one tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Part:
    """One tensor's place: from row `start` of the parameter on, or of its slice for expert `expert`."""

    tensor: str
    start: int
    expert: int | None


class Checkpoint:
    """The tensors of a folder's safetensors files, memory-mapped: reading one makes no copy of it."""

    def __init__(self, folder: Path, files: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self._files = files
        self.tensors = tensors

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Checkpoint]:
        """Opens the files and checks their headers.

        Raises CheckpointError for missing and damaged files, MemoryError for one too large to be mapped.
        """
        names, indexed = find_files(folder)
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            tensors: dict[str, TensorInfo] = {}
            for name in names:
                try:
                    file = files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(
                        f"{folder / name} ({_size(folder / name)}) is not a complete safetensors file: {error}. "
                        "It may be truncated or damaged; download it again"
                    ) from error
                except RuntimeError as error:  # Linux maps no file that is larger than the main memory
                    raise MemoryError(f"{folder / name} ({_size(folder / name)}) cannot be mapped: {error}") from error
                for tensor in file.keys():  # noqa: SIM118  (not a dict)
                    if tensor in tensors:
                        raise CheckpointError(f"{tensor} is in both {tensors[tensor].file} and {name}")
                    header = file.get_slice(tensor)
                    tensors[tensor] = TensorInfo(name, tuple(header.get_shape()), header.get_dtype())
            if indexed is not None and (wrong := indexed ^ tensors.keys()):
                raise CheckpointError(
                    f"{folder / INDEX} and the headers of its files name different tensors: {_few(wrong)}"
                )
            yield cls(folder, files, tensors)

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, as a view of its file."""
        tensor: Tensor = self._files[self.tensors[name].file].get_tensor(name)
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        """The data type of most of the weights."""
        weights: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype in DTYPES:
                weights[DTYPES[tensor.dtype]] += tensor.bytes
        return weights.most_common(1)[0][0] if weights else torch.float32


def find_files(folder: Path) -> tuple[list[str], set[str] | None]:
    """The names of the folder's safetensors files, and the tensors that its index lists, if it has one."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if "model.safetensors" in names:
        return ["model.safetensors"], None
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    if len(names) == 1:
        return names, None
    if names:
        raise CheckpointError(f"{folder} has {len(names)} safetensors files and no {INDEX} to tell them apart")
    others = sorted(path.name for pattern in ("*.bin*", "*.pt*", "*.gguf") for path in folder.glob(pattern))
    if others:
        raise CheckpointError(
            f"{folder} has no .safetensors file, only {_few(others)}. Only safetensors are read; with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) converts"
        )
    raise CheckpointError(f"{folder} has no .safetensors file")


def _indexed_files(folder: Path) -> tuple[list[str], set[str]]:
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {tensor: str(file) for tensor, file in weight_map.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: no JSON object 'weight_map' ({error})") from error
    names = sorted(set(files.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{folder / INDEX} names files outside of its folder: {_few(outside)}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(names)} files that {INDEX} names: {_few(missing)}"
        )
    return names, set(files)


def plan(
    table: WeightTable, parameters: Mapping[str, torch.Size], tensors: Mapping[str, TensorInfo]
) -> dict[str, list[Part]]:
    """Where each tensor goes: the parts of every parameter.

    Raises CheckpointError with the names of missing, left over and wrongly shaped tensors.
    """
    rules = [(_pattern(rule.target), rule) for rule in table.rules]
    parts: dict[str, list[Part]] = {name: [] for name in parameters}
    wanted: set[str] = set()
    misfits: list[str] = []
    for parameter, shape in parameters.items():
        matches = ((pattern.fullmatch(parameter), rule) for pattern, rule in rules)
        match, rule = next(((match, rule) for match, rule in matches if match), (None, None))
        if match is None or rule is None:
            wanted.add(f"a rule for the parameter {parameter}")
            continue
        by_expert = any("{e}" in source for source in rule.sources)
        for expert in range(shape[0]) if by_expert else [None]:
            names = [source.format(e=expert, **match.groupdict()) for source in rule.sources]
            wanted.update(names)
            if any(name not in tensors for name in names):
                continue
            shapes = [tensors[name].shape for name in names]
            whole = tuple(shape[1:] if by_expert else shape)
            if not _stacks_to(shapes, whole):
                have = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
                misfits.append(f"{have} should {'stack to' if len(names) > 1 else 'be'} {list(whole)}")
                continue
            rows = [shape[0] for shape in shapes]
            parts[parameter] += [Part(name, sum(rows[:n]), expert) for n, name in enumerate(names)]

    skip = [_pattern(name) for name in (*table.skip, *(copy for copy, _ in table.tied))]
    problems = {
        "missing": wanted - tensors.keys(),
        "of a wrong shape": misfits,
        "not part of the model": [n for n in tensors.keys() - wanted if not any(s.fullmatch(n) for s in skip)],
        f"not {', '.join(DTYPES)}": [
            f"{name} ({tensors[name].dtype})" for name in wanted & tensors.keys() if tensors[name].dtype not in DTYPES
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {what}: {_few(names)}" for what, names in problems.items() if names)
        raise CheckpointError(f"the checkpoint's tensors are not those of its config.json: {found}")
    return parts


def check_tied(table: WeightTable, parts: Mapping[str, list[Part]], checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a tensor that would be dropped as a copy of another and is none."""
    used = {part.tensor for found in parts.values() for part in found}
    for copy, original in table.tied:
        if copy in checkpoint.tensors and copy not in used:
            left, right = checkpoint.read(copy), checkpoint.read(original)
            if left.dtype != right.dtype or not torch.equal(left, right):
                raise CheckpointError(
                    f"config.json ties the embeddings, but {copy} in {checkpoint.folder} is not {original}: if the "
                    "model has a head of its own, set tie_word_embeddings to false in config.json"
                )


@torch.no_grad()
def copy_weights(
    parts: Mapping[str, list[Part]],
    parameters: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    progress: Callable[[int], None],
) -> None:
    """Copies every tensor to its place, in the parameter's data type; `progress` is told the bytes read."""
    for name, found in parts.items():
        for part in found:
            place = parameters[name] if part.expert is None else parameters[name][part.expert]
            tensor = checkpoint.read(part.tensor)
            place[part.start : part.start + len(tensor)].copy_(tensor)
            progress(checkpoint.tensors[part.tensor].bytes)


def _stacks_to(shapes: Sequence[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    """Whether tensors of these shapes, stacked along their first dimension, have the wanted shape."""
    fit = all(len(shape) == len(wanted) > 0 and shape[1:] == wanted[1:] for shape in shapes)
    return fit and sum(shape[0] for shape in shapes) == wanted[0]


def _pattern(name: str) -> re.Pattern[str]:
    """`layers.{i}.norm` as a regular expression whose group `i` is a number; `*` is anything."""
    return re.compile(re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\*", ".*"), re.DOTALL)


def _size(file: Path) -> str:
    return f"{file.stat().st_size:,} bytes" if file.exists() else "a link to nothing"


def _few(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
