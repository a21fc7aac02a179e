"""The cos/sin table of rotary position embeddings, for every scaling: one pure function each.

Angles are computed in float32 and in the order of the reference implementation (transformers'
modeling_rope_utils): checkpoints were trained with those, and at long positions exact angles would differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyllama.config import LinearScaling, Llama3Scaling, RopeConfig


def _linear(frequencies: Tensor, scaling: LinearScaling) -> Tensor:
    return frequencies / scaling.factor


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    # 0 where the wave is so long that it never turned round in training, 1 where it turned round often.
    smooth = (scaling.original_max_positions / wavelengths - low) / (high - low)
    stretched = frequencies / scaling.factor
    blended = (1 - smooth) * stretched + smooth * frequencies
    return torch.where(smooth < 0, stretched, torch.where(smooth > 1, frequencies, blended))


SCALINGS: dict[type, Callable[[Tensor, Any], Tensor]] = {LinearScaling: _linear, Llama3Scaling: _llama3}


def cos_sin_table(rope: RopeConfig, positions: int, device: torch.device) -> Tensor:
    """float32 [positions, rope.dim]: the cosines of each position's angles, then their sines."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.scaling is not None:
        frequencies = SCALINGS[type(rope.scaling)](frequencies, rope.scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
