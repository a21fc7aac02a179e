"""Sampling the next token. B sequences, V vocabulary.

Noise is counter-based (Philox4x32-10; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the
same seed, step and vocabulary index give the same noise in any batch on any device, and nothing is kept between calls.
"""

import torch
from torch import Tensor

from pyllama.ops.registry import cast, compute_dtype, op

_LOW32 = 0xFFFFFFFF


def _one_per_sequence(logits: Tensor, *args: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@op(
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor step, "
    "Tensor? repetition_penalty=None, Tensor? presence_penalty=None, Tensor? frequency_penalty=None, "
    "Tensor? prompt_mask=None, Tensor? counts=None) -> Tensor",
    fake=_one_per_sequence,
    differentiable=False,
    logits="B V",
    temperature="float32: B",
    top_k="int32: B",
    top_p="float32: B",
    min_p="float32: B",
    seed="int64: B",
    step="int64: B",
    repetition_penalty="float32: B",
    presence_penalty="float32: B",
    frequency_penalty="float32: B",
    prompt_mask="bool: B V",
    counts="int32: B V",
)
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    step: Tensor,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Choose one token per sequence, int64 [B], from logits [B, V]; every option is per sequence, [B].

    In this order: penalties, temperature (0: the likeliest token, of equals the lowest index), the filters, and the
    largest of logit + Gumbel noise, which is an exact sample of what the filters left.
    Penalties (all three with prompt_mask bool [B, V] and counts int32 [B, V], how often each token was generated, or
    none of them): repetition divides positive and multiplies negative logits of tokens of prompt or output
    (arXiv:1909.05858, Hugging Face's formula); presence and frequency subtract once, and per occurrence in the output
    (OpenAI's formula). top_k (0: off) keeps the k likeliest and ties with the last of them; top_p (1: off) then keeps
    a token iff the probability of strictly likelier ones is below it; min_p (0: off) then keeps tokens at least
    min_p times as likely as the likeliest. seed, step: int64, step counts the tokens of the sequence.
    Raises ValueError for shapes that do not fit or penalties given in part.
    """
    scores = cast(logits, compute_dtype(logits))
    penalties = (repetition_penalty, presence_penalty, frequency_penalty, prompt_mask, counts)
    given = [penalty for penalty in penalties if penalty is not None]
    if len(given) == len(penalties):
        scores = _penalised(scores, *given)
    elif given:
        raise ValueError(
            "sample: repetition_penalty, presence_penalty, frequency_penalty, prompt_mask and counts go together: "
            "give all five or none"
        )
    greedy = temperature == 0
    if greedy.all():
        return scores.argmax(-1)
    noisy = scores - scores.amax(-1, keepdim=True)  # so that no temperature, however low, makes two scores infinite
    noisy = noisy / temperature.where(~greedy, 1.0).unsqueeze(1)
    if top_k.any() or (top_p < 1).any():
        noisy = noisy.masked_fill(noisy < _threshold(noisy, top_k, top_p), float("-inf"))
    if min_p.any():
        noisy = noisy.masked_fill(noisy < min_p.log().unsqueeze(1), float("-inf"))
    noisy = noisy + gumbel_noise(seed, step, logits.shape[1], scores.dtype)
    return torch.where(greedy.unsqueeze(1), scores, noisy).argmax(-1)


def _penalised(
    scores: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor, prompt_mask: Tensor, counts: Tensor
) -> Tensor:
    generated = counts > 0
    repetition = repetition.unsqueeze(1)
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(prompt_mask | generated, repeated, scores)
    return scores - presence.unsqueeze(1) * generated - frequency.unsqueeze(1) * counts


def _threshold(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """[B, 1]: the least score that top-k, then top-p, keep."""
    V, off, p = scores.shape[1], top_k.unsqueeze(1) <= 0, top_p.unsqueeze(1)
    k = torch.where(off, V, top_k.unsqueeze(1)).clamp(max=V).to(torch.int64)
    for count in (min(V, 1024), V):  # the likeliest tokens nearly always suffice, and sorting all takes long
        ordered = scores.topk(count, dim=-1).values
        k_threshold = ordered.gather(1, k.clamp(max=count) - 1).masked_fill(k > count, float("-inf"))
        total = scores.masked_fill(scores < k_threshold, float("-inf")).logsumexp(-1, keepdim=True)
        probabilities = (ordered - total).exp()
        likelier = probabilities.cumsum(-1) - probabilities  # the probability of all tokens before
        if ((k <= count) | off & ((p >= 1) | (likelier[:, -1:] >= p))).all():
            break
    kept = (likelier < p).sum(-1, keepdim=True).clamp(min=1)
    p_threshold = ordered.gather(1, kept - 1)
    return torch.where(p < 1, torch.maximum(k_threshold, p_threshold), k_threshold)


def gumbel_noise(seed: Tensor, step: Tensor, V: int, dtype: torch.dtype) -> Tensor:
    """[B, V] of -log(-log(u)); u = (x >> 9 + 0.5) / 2**23, which float32 holds exactly and is never 0 or 1."""
    blocks = torch.arange((V + 3) // 4, device=seed.device)
    zero = torch.zeros_like(seed).unsqueeze(1)
    counter = (blocks.unsqueeze(0), step.unsqueeze(1) & _LOW32, zero, zero)
    key = (seed.unsqueeze(1) & _LOW32, (seed.unsqueeze(1) >> 32) & _LOW32)
    bits = torch.stack(philox(counter, key), dim=-1).flatten(1)[:, :V]
    uniform = ((bits >> 9).to(dtype) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 random bits from a counter of four words and a key of two, all in int64."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps at 64 bits, which keeps every bit needed
        c0, c1 = (product1 >> 32 ^ c1 ^ k0) & _LOW32, product1
        c2, c3 = (product0 >> 32 ^ c3 ^ k1) & _LOW32, product0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1 & _LOW32, c2, c3 & _LOW32
