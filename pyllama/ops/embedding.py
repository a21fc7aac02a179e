"""The embedding gather. V vocabulary, D hidden size, T tokens."""

import torch.nn.functional as functional
from torch import Tensor

from pyllama.ops.registry import op


@op("(Tensor weight, Tensor token_ids) -> Tensor", weight="V D", token_ids="int64: T")
def embedding(weight: Tensor, token_ids: Tensor) -> Tensor:
    """Row t of the result is weight[token_ids[t]].

    weight: [V, D]; token_ids: int64 [T], each in [0, V); result: [T, D]. Raises ValueError for shapes or data types
    that do not fit, and IndexError for a token outside of the vocabulary; a kernel, which cannot raise for what is on
    the device, gives NaN for it.
    """
    return functional.embedding(token_ids, weight)
