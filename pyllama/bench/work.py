"""What a model must read and multiply, counted from its parameters and its config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Size, Tensor

from pyllama.bench.limits import Limits
from pyllama.cache import PAGE_SIZE, bytes_per_page, page_shape, pages_for
from pyllama.config import AttentionConfig, MLAConfig, MoEConfig
from pyllama.layers.ffn import MoE
from pyllama.model import Model


@dataclass(frozen=True)
class Cell:
    """One measurement: so many sequences, of so many tokens each, continued by so many."""

    batch: int
    context: int
    new_tokens: int  # the first comes with the prompt, each further one from a step of its own


@dataclass(frozen=True)
class Work:
    bytes_read: float
    flops: float

    def seconds(self, limits: Limits) -> float:
        """The least time that it can take."""
        return max(self.bytes_read / limits.bytes_per_second, self.flops / limits.flops_per_second)


def active_parameters(model: Model) -> float:
    """The parameters that serve one token: all but the experts that it does not choose, embedding and head included."""
    idle = sum(p.numel() * (1 - share) for p, share in _weights(model, lambda moe: moe.top_k / moe.num_experts))
    return sum(parameter.numel() for parameter in model.parameters()) - idle


def token_flops(model: Model) -> tuple[int, int]:
    """Of a new token: in the products with weights, the head's included, and in attention to each token it sees."""
    attention = sum(count * _pair_flops(attention, True) for attention, count in _attentions(model))
    return round(_product_flops(model)) + 2 * _head(model).numel(), attention


def prompt_work(model: Model, cell: Cell) -> Work:
    """Of all prompts, until each has its first new token: its head's product is of the last tokens alone."""
    tokens = cell.batch * cell.context
    layers = _product_flops(model) * tokens + 2 * _head(model).numel() * cell.batch
    attention = sum(
        count * _pair_flops(attention, False) * _pairs(attention, 0, cell.context)
        for attention, count in _attentions(model)
    )
    return Work(_weight_bytes(model, tokens), layers + attention * cell.batch)


def step_work(model: Model, cell: Cell) -> Work:
    """Of one step, a new token for each sequence; the mean of all steps, whose contexts grow.

    The weights are read once: of experts those that the batch's tokens are expected to choose if each expert is as
    likely as any other, of an embedding that is not the head a row for each token. So is each sequence's cache.
    """
    steps, batch, head = cell.new_tokens - 1, cell.batch, _head(model)
    cache_bytes = flops = 0.0
    for attention, count in _attentions(model):
        pairs = _pairs(attention, cell.context, cell.context + steps) / steps
        cache_bytes += count * pairs * Size(page_shape(attention)).numel() / PAGE_SIZE * model.dtype.itemsize
        flops += count * pairs * _pair_flops(attention, True)
    rows = batch * model.config.hidden_size * model.dtype.itemsize
    per_token = _product_flops(model) + 2 * head.numel() + flops
    return Work(_weight_bytes(model, batch) + rows + batch * cache_bytes, batch * per_token)


def cache_bytes(model: Model, cell: Cell) -> int:
    """That the sequences' keys and values take in the end."""
    return cell.batch * pages_for(cell.context + cell.new_tokens) * bytes_per_page(model.config, model.dtype)


def chosen_share(moe: MoEConfig, tokens: int) -> float:
    """The share of a layer's experts that at least one of the tokens is expected to choose."""
    return 1 - (1 - moe.top_k / moe.num_experts) ** tokens


def _weights(model: Model, share: Callable[[MoEConfig], float]) -> Iterator[tuple[Tensor, float]]:
    """All parameters but an embedding that is not the head, each with the share of it that is used."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, MoE) and parameter.ndim == 3:
                yield parameter, share(module.config)
            elif module is not model.embedding or model.head is None:
                yield parameter, 1.0


def _head(model: Model) -> Tensor:
    return model.embedding.weight if model.head is None else model.head.weight


def _weight_bytes(model: Model, tokens: int) -> float:
    return sum(p.nbytes * share for p, share in _weights(model, lambda moe: chosen_share(moe, tokens)))


def _product_flops(model: Model) -> float:
    """Of one token, in the products with weights but for the head's."""
    weights = _weights(model, lambda moe: moe.top_k / moe.num_experts)
    return 2 * (sum(p.numel() * share for p, share in weights if p.ndim > 1) - _head(model).numel())


def _attentions(model: Model) -> list[tuple[AttentionConfig, int]]:
    """The kinds of attention, and how many layers have each."""
    return list(Counter(layer.attention for layer in model.config.layers).items())


def _pairs(attention: AttentionConfig, first: int, end: int) -> int:
    """Queries at the positions from `first` to before `end`, each with every key that it sees."""
    window = None if isinstance(attention, MLAConfig) else attention.window
    return sum(position + 1 if window is None else min(position + 1, window) for position in range(first, end))


def _pair_flops(attention: AttentionConfig, step: bool) -> int:
    """Of one query and one key over all heads: the score, and the value's part in the result."""
    if not isinstance(attention, MLAConfig):
        return 4 * attention.num_heads * attention.head_dim
    # Steps take latents as they are; prompts have them expanded to each head's keys and values.
    sizes = (2 * attention.kv_rank,) if step else (attention.nope_dim, attention.v_dim)
    return 2 * attention.num_heads * (attention.rope.dim + sum(sizes))
