"""Weights: how the tensors of a checkpoint become a model's parameters.

A family is a table of rules, nothing else. It is matched against the parameters' names and the files' headers
first, so that every tensor is used once and every parameter is filled, or loading stops with the names before
anything is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from pyllama.checkpoint import DTYPES, FLOAT8, Checkpoint, TensorInfo
from pyllama.files import CheckpointError, few


@dataclass(frozen=True)
class Rule:
    """The tensors `sources`, stacked in order along their first dimension, are the parameter `target`.

    {i} stands for any layer. {e}, in sources only, stands for every expert and becomes the parameter's first
    dimension. `shard` is the dimension of the parameter that tensor parallelism splits, in each source by
    itself; None: every device holds all of it.
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

    def of(self, weight: str) -> str:
        """The name of a weight's scales."""
        return f"{weight.removesuffix('.weight')}.{self.name}"


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

    def rule_for(self, parameter: str) -> tuple[Rule, str | None] | None:
        """The first rule for the parameter, and which layer's it is; None where there is none."""
        for rule in self.rules:
            if match := _pattern(rule.target).fullmatch(parameter):
                return rule, match.groupdict().get("i")
        return None


@dataclass(frozen=True)
class Part:
    """One tensor's place: from row `start` of the parameter on, or of its slice for expert `expert`."""

    tensor: str
    start: int
    rows: int
    expert: int | None
    join: int | None  # the dimension along which its pieces are joined; None: each is the whole tensor
    head_size: int  # of rows in another order, as `Rule.interleaved` says; 0: none are
    blocks: BlockScales | None  # of the scales it is to be multiplied by; None: it is the weight itself


def plan(
    table: WeightTable, parameters: Mapping[str, torch.Size], tensors: Mapping[str, TensorInfo]
) -> dict[str, list[Part]]:
    """Where each tensor goes: the parts of every parameter.

    Raises CheckpointError with the names of missing, left over and wrongly shaped tensors.
    """
    parts: dict[str, list[Part]] = {name: [] for name in parameters}
    wanted: set[str] = set()
    misfits: list[str] = []
    for parameter, shape in parameters.items():
        if (matching := table.rule_for(parameter)) is None:
            wanted.add(f"a rule for the parameter {parameter}")
            continue
        rule, layer = matching
        by_expert = any("{e}" in source for source in rule.sources)
        for expert in range(shape[0]) if by_expert else [None]:
            names = [source.format(e=expert, i=layer) for source in rule.sources]
            wanted.update(names)
            if any(name not in tensors for name in names):
                continue
            whole = tuple(shape[1:] if by_expert else shape)
            found = _parts(rule, names, tensors, whole, expert, table.scales)
            if isinstance(found, str):
                misfits.append(found)
            else:
                parts[parameter] += found

    scaled = {part.tensor: part.blocks for found in parts.values() for part in found if part.blocks}
    wanted.update(blocks.of(name) for name, blocks in scaled.items())
    misfits += [text for name, blocks in scaled.items() if (text := _scales_misfit(name, blocks, tensors))]
    skip = [_pattern(name) for name in (*table.skip, *(copy for copy, _ in table.tied))]
    types = {name: tensors[name].dtype for name in (wanted & tensors.keys()) - scaled.keys()}
    problems = {
        "missing": wanted - tensors.keys(),
        "of a wrong shape": misfits,
        "not part of the model": [n for n in tensors.keys() - wanted if not any(s.fullmatch(n) for s in skip)],
        f"{FLOAT8} without scales, of which config.json says nothing": [n for n, t in types.items() if t == FLOAT8],
        f"not {', '.join(DTYPES)}": [f"{n} ({t})" for n, t in types.items() if t not in (*DTYPES, FLOAT8)],
    }
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {what}: {few(names)}" for what, names in problems.items() if names)
        raise CheckpointError(f"the checkpoint's tensors are not those of its config.json: {text}")
    return parts


def _parts(
    rule: Rule,
    names: Sequence[str],
    tensors: Mapping[str, TensorInfo],
    whole: tuple[int, ...],
    expert: int | None,
    scales: BlockScales | None,
) -> list[Part] | str:
    """The rule's tensors as parts of a parameter of shape `whole`, or what does not fit."""
    infos = [tensors[name] for name in names]
    # Which dimension the pieces of a tensor were cut along is seen from their shapes; one at most makes them fit.
    joins = (None, *range(len(whole)))
    join = next((join for join in joins if _stacks_to([_joined(info, join) for info in infos], whole)), -1)
    if join == -1:
        have = ", ".join(
            f"{name} {list(info.shape)}" + (f" in each of {len(info.files)} files" if len(info.files) > 1 else "")
            for name, info in zip(names, infos, strict=True)
        )
        return f"{have} should {'stack to' if len(names) > 1 else 'be'} {list(whole)}"
    heads = rule.interleaved or (0,) * len(names)
    if cut := [name for name, info, K in zip(names, infos, heads, strict=True) if K and info.shape[0] % K]:
        return f"{few(cut)} {list(tensors[cut[0]].shape)} should be rows of whole heads"
    rows = [_joined(info, join)[0] for info in infos]
    return [
        Part(name, sum(rows[:n]), rows[n], expert, join, heads[n], scales if infos[n].dtype == FLOAT8 else None)
        for n, name in enumerate(names)
    ]


def _joined(info: TensorInfo, join: int | None) -> tuple[int, ...]:
    """The shape of the tensor's pieces, joined along a dimension if it has as many."""
    return tuple(n * len(info.files) if dim == join else n for dim, n in enumerate(info.shape))


def _stacks_to(shapes: Sequence[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    """Whether tensors of these shapes, stacked along their first dimension, have the wanted shape."""
    fit = all(len(shape) == len(wanted) > 0 and shape[1:] == wanted[1:] for shape in shapes)
    return fit and sum(shape[0] for shape in shapes) == wanted[0]


def _scales_misfit(name: str, blocks: BlockScales, tensors: Mapping[str, TensorInfo]) -> str | None:
    """What is wrong with a tensor's scales, if they are there. Each of its pieces has those of its own blocks."""
    weight, found = tensors[name], tensors.get(blocks.of(name))
    wanted = [-(-size // block) for size, block in zip(weight.shape, (blocks.rows, blocks.columns), strict=False)]
    if found is None or (len(weight.shape) == 2 and (list(found.shape), found.files) == (wanted, weight.files)):
        return None
    return (
        f"{blocks.of(name)} {list(found.shape)} in {few(found.files)} should be {wanted}, one for each {blocks.rows} x "
        f"{blocks.columns} of {name} {list(weight.shape)}, in {few(weight.files)}"
    )


def check_tied(table: WeightTable, parts: Mapping[str, list[Part]], checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a tensor that would be dropped as a copy of another and is none."""
    used = {part.tensor for found in parts.values() for part in found}
    for copy, original in table.tied:
        if copy in checkpoint.tensors and copy not in used:
            left, right = checkpoint.tensors[copy], checkpoint.tensors[original]
            alike = (left.shape, left.dtype, len(left.files)) == (right.shape, right.dtype, len(right.files))
            pieces = range(len(left.files))
            if not alike or not all(torch.equal(*(checkpoint.read(n, p) for n in (copy, original))) for p in pieces):
                raise CheckpointError(
                    f"config.json ties the embeddings, but {copy} in {checkpoint.folder} is not {original}: if the "
                    "model has a head of its own, set tie_word_embeddings to false in config.json"
                )


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """`layers.{i}.norm` as a regular expression whose group `i` is a number; `*` is anything."""
    return re.compile(re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\*", ".*"), re.DOTALL)
