"""The cos/sin tables of rotary position embeddings, for every scaling: one pure function each.

Angles are computed in float32 and in the order of the reference implementation (transformers'
modeling_rope_utils): checkpoints were trained with those, and at long positions exact angles would differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyllama.batch import Packed
from pyllama.config import LinearScaling, Llama3Scaling, LongRopeScaling, RopeConfig, YarnScaling


class Rotation:
    """What the op `rope` needs of a pass; a plain object, as FSDP2 would cast the table with a layer's other inputs."""

    def __init__(self, cos_sin: Tensor, rows: Tensor) -> None:
        self.cos_sin = cos_sin  # float32 [rows, R]
        self.rows = rows  # int32 [T], each token's row of it


def _plain(rope: RopeConfig, periods: Tensor, scaling: None) -> Tensor:
    """Frequencies of the pairs of dimensions; `periods` are tokens per radian without scaling."""
    return 1.0 / periods


def _linear(rope: RopeConfig, periods: Tensor, scaling: LinearScaling) -> Tensor:
    return 1.0 / periods / scaling.factor


def _llama3(rope: RopeConfig, periods: Tensor, scaling: Llama3Scaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    frequencies = 1.0 / periods
    wavelengths = 2 * math.pi / frequencies
    # 0 where the wave is so long that it never turned round in training, 1 where it turned round often.
    smooth = (scaling.original_max_positions / wavelengths - low) / (high - low)
    stretched = frequencies / scaling.factor
    blended = (1 - smooth) * stretched + smooth * frequencies
    return torch.where(smooth < 0, stretched, torch.where(smooth > 1, frequencies, blended))


def _yarn(rope: RopeConfig, periods: Tensor, scaling: YarnScaling) -> Tensor:
    def pair_that_turns(times: float) -> float:
        """Index of the pair of dimensions that turns so often in the original context."""
        turns = scaling.original_max_positions / (times * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _long(rope: RopeConfig, periods: Tensor, scaling: LongRopeScaling) -> Tensor:
    return 1.0 / (torch.tensor([scaling.short_factors, scaling.long_factors]) * periods)


FREQUENCIES: dict[type, Callable[[RopeConfig, Tensor, Any], Tensor]] = {
    type(None): _plain,
    LinearScaling: _linear,
    Llama3Scaling: _llama3,
    YarnScaling: _yarn,
    LongRopeScaling: _long,
}


def cos_sin_table(rope: RopeConfig, positions: int, device: torch.device) -> Tensor:
    """float32 [positions, rope.dim]: the cosines of each position's angles, then their sines.

    With LongRopeScaling [2 * positions, rope.dim]: each position with the short factors, then with the long ones.
    """
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    frequencies = FREQUENCIES[type(rope.scaling)](rope, rope.theta**exponents, rope.scaling)
    angles = torch.arange(positions, dtype=torch.float32).view(-1, 1, 1) * frequencies
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.magnitude).flatten(0, 1).to(device)


def table_rows(rope: RopeConfig, batch: Packed) -> Tensor:
    """int32 [T]: each token's row of the table."""
    if not isinstance(rope.scaling, LongRopeScaling):
        return batch.positions
    return batch.positions * 2 + (batch.lengths > rope.scaling.original_max_positions)
