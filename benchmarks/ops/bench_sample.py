"""sample: every kind of filter on the models' vocabularies, against one read of the logits.

Logits are normal. A spread of 4 leaves a few likely tokens, as a model does; of 1 ("flat") thousands. Contenders draw
their own noise, so that a token is right where the filters keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.shapes import Scope
from pyllama.ops.sample import sample

SLACK = 1e-5  # in probability, at the filters' edges: what float32 rounds


class Options(NamedTuple):
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


OPTIONS = {
    "greedy": Options(temperature=0.0),
    "temperature": Options(),
    "top_k": Options(top_k=50),
    "top_p": Options(top_p=0.9),
    "min_p": Options(min_p=0.05),
    "top_k + top_p": Options(top_k=50, top_p=0.9),
}
FLAT = ("temperature", "top_k", "top_p")


def cases(scope: Scope) -> Iterator[Case]:
    def case(model: str, B: int, name: str, spread: int) -> Case:
        V = scope.models[model].V
        flat = ", flat" if spread == 1 else ""
        sizes = {"B": B, "V": V, "spread": spread, **OPTIONS[name]._asdict()}
        return Case(model, f"{B} x {V}, {name}{flat}", sizes)

    for model in scope.models:
        for B in scope.batches:
            for name in OPTIONS:
                yield case(model, B, name, 4)
    for name in FLAT:
        yield case(next(iter(scope.models)), scope.batches[0], name, 1)


def inputs(dtype: torch.dtype, B: int, V: int, spread: int, **options: Any) -> tuple[Any, ...]:
    """Logits, the options as numbers, and sample's other arguments: the options and seed and step by sequence."""
    given = Options(**options)
    seed = torch.arange(B)
    return (
        (spread * torch.randn(B, V)).to(dtype),
        given,
        torch.full((B,), given.temperature),
        torch.full((B,), given.top_k, dtype=torch.int32),
        torch.full((B,), given.top_p),
        torch.full((B,), given.min_p),
        seed,
        torch.zeros_like(seed),
    )


def work(dtype: torch.dtype, B: int, V: int, **others: Any) -> Work:
    return Work(moved=B * V * dtype.itemsize, flops=4 * B * V, limit="read")


def formula(logits: Tensor, options: Options, *tensors: Tensor) -> Tensor:
    """Filters in the order of a sort, or of top-k's; the draw is multinomial's, less its look at values on the host."""
    temperature, top_k, top_p, min_p = options
    if temperature == 0:
        return logits.argmax(-1)
    order = None
    if top_k:
        logits, order = logits.topk(top_k)
    elif top_p < 1:
        logits, order = logits.sort(-1, descending=True)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        likelier = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(likelier >= top_p, 0.0)
    if min_p:
        probabilities = probabilities * (probabilities >= min_p * probabilities.amax(-1, keepdim=True))
    drawn = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
    return drawn if order is None else order.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def kept(tokens: Tensor, logits: Tensor, options: Options, *tensors: Tensor) -> Tensor:
    """Whether the filters keep each of the tokens, [B]; in float64."""
    temperature, top_k, top_p, min_p = options
    B, V = logits.shape
    tokens = tokens.long().view(B, 1)
    known = tokens.clamp(0, V - 1)
    scores = logits.double()
    scores = (scores - scores.amax(-1, keepdim=True)) / (temperature or 1.0)
    chosen = scores.gather(-1, known)
    if temperature == 0:
        right = chosen == 0
    else:
        edge = scores.topk(top_k or V).values[:, -1:]
        likelier = scores.masked_fill(scores < edge, float("-inf")).softmax(-1).masked_fill(scores <= chosen, 0.0)
        right = chosen >= edge - SLACK
        right &= likelier.sum(-1, keepdim=True) < top_p + SLACK
        right &= chosen.exp() >= min_p - SLACK
    return (right & (tokens == known)).squeeze(-1)


def flashinfer_for(sampling: Any, logits: Tensor, options: Options, *tensors: Tensor) -> Callable[..., Tensor] | None:
    """flashinfer's functions for the options, from logits and temperatures; None for greedy ones, which it lacks."""
    temperature, top_k, top_p, min_p = options
    if temperature == 0:
        return None

    def of(draw: Callable[..., Tensor], *args: float, **more: str) -> Callable[..., Tensor]:
        return lambda logits, temperatures: draw(sampling.softmax(logits, temperatures), *args, **more)

    if top_k and top_p < 1:
        return of(sampling.top_k_top_p_sampling_from_probs, top_k, top_p, filter_apply_order="top_k_first")
    if top_k:
        return of(sampling.top_k_sampling_from_probs, top_k)
    if top_p < 1:
        return of(sampling.top_p_sampling_from_probs, top_p)
    if min_p:
        return of(sampling.min_p_sampling_from_probs, min_p)
    return lambda logits, temperatures: sampling.sampling_from_logits(logits.float() / temperatures.unsqueeze(1))


BENCH = Bench(
    op="sample",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=lambda logits, options, *tensors: sample(logits, *tensors),
    formula=formula,
    peers={
        "flashinfer": Peer(
            "flashinfer:sampling",
            lambda function, logits, options, temperatures, *others: function(logits, temperatures),
            flashinfer_for,
        )
    },
    right=kept,
)
