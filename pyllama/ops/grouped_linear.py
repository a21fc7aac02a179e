"""One matrix product per expert over sorted rows. M rows, D hidden size, F feed-forward size, E experts."""

from itertools import pairwise

import torch
import torch.nn.functional as functional
from torch import Tensor

from pyllama.ops.registry import op


def _rows_by_features(x: Tensor, weight: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0] if rows is None else rows.shape[0], weight.shape[1])


@op(
    "(Tensor x, Tensor weight, Tensor offsets, Tensor? rows=None) -> Tensor",
    fake=_rows_by_features,
    x="tokens D",
    weight="E F D",
    offsets="int32: E+1",
    rows="int32: M",
)
def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:
    """Row m of the result is x[rows[m]] @ weight[e].T, with e the expert that owns row m.

    x: [tokens, D]; weight: [E, F, D]; offsets: int32 [E + 1], expert e owns rows offsets[e] to offsets[e + 1], from 0
    to M; rows: int32 [M], or None for x's own rows in order (M = tokens); result: [M, F]. Raises ValueError for
    shapes that do not fit.
    """
    x_MD = x if rows is None else x.index_select(0, rows)
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != x_MD.shape[0]:
        raise ValueError(
            f"grouped_linear: offsets go from {bounds[0]} to {bounds[-1]}, but must go from 0 to M = {x_MD.shape[0]}"
        )
    parts = [
        functional.linear(x_MD[begin:end], weight[e]) for e, (begin, end) in enumerate(pairwise(bounds)) if begin < end
    ]
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[1])
