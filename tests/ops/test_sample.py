"""sample against a reference written with Python's integers and numpy's float64, by sorting, one sequence at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from comparing import numpy, refused
from torch import Tensor

from pyllama.ops.registry import implementation
from pyllama.ops.sample import philox, sample

MASK = 0xFFFFFFFF


def options(B: int, device: str = "cpu", **given: Any) -> dict[str, Tensor]:
    """sample's options for B sequences, each a number for all or a list; without one: plain sampling."""
    dtypes = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
    dtypes |= {"seed": torch.int64, "step": torch.int64}
    if any(name.endswith("penalty") for name in given):
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        dtypes |= dict.fromkeys(penalties, torch.float32) | {"prompt_mask": torch.bool, "counts": torch.int32}
    plain = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    return {
        name: torch.as_tensor(given.get(name, plain.get(name, 0)), dtype=dtype)
        .expand(*([B] if name not in ("prompt_mask", "counts") else [B, -1]))
        .contiguous()
        .to(device)
        for name, dtype in dtypes.items()
    }


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    logits = torch.randn(3, 20, dtype=dtype)
    yield logits, *options(3, temperature=[0.0, 0.5, 1.0], top_k=5, top_p=0.9, seed=[1, 2, 3]).values()
    mask = torch.rand(3, 20) < 0.3
    yield logits, *options(3, repetition_penalty=1.2, prompt_mask=mask, counts=mask.int()).values()


def philox_of_one(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 with Python's integers, after the paper (Salmon et al., SC 2011, section 3.3)."""
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * counter[0], 1 << 32)
        hi1, lo1 = divmod(0xCD9E8D57 * counter[2], 1 << 32)
        counter = [hi1 ^ counter[1] ^ key[0], lo1, hi0 ^ counter[3] ^ key[1], lo0]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return counter


def noise_of_one(V: int, seed: int, step: int) -> np.ndarray:
    key = [seed & MASK, seed >> 32 & MASK]
    bits = [philox_of_one([block, step & MASK, 0, 0], key) for block in range(-(-V // 4))]
    uniform = (np.array(bits).flatten()[:V] // 512 + 0.5) / 2**23
    return -np.log(-np.log(uniform))


def filtered(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, slack: float = 0.0
) -> np.ndarray:
    """The logits that are left, -inf elsewhere. slack: moves each edge so far (in probability, the largest being 1)."""
    scores = (logits - logits.max()) / temperature
    if top_k > 0:
        edge = sorted(scores, reverse=True)[min(top_k, len(scores)) - 1]
        scores = np.where(scores >= edge - max(slack, 0), scores, -np.inf)  # the k-th itself is always kept
    if top_p < 1:
        probabilities = np.exp(scores)
        probabilities /= probabilities.sum()
        order = np.argsort(-scores, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        likelier = before[np.searchsorted(-scores[order], -scores, side="left")]  # that of the first of its equals
        scores = np.where(likelier < top_p + slack, scores, -np.inf)
    return np.where(np.exp(scores) >= min_p * (1 - slack), scores, -np.inf)


def assert_chosen(token: int, logits: np.ndarray, options: dict[str, float], seed: int, step: int) -> None:
    """The token wins, up to float32's rounding: of the noisy scores, and of an edge that a token is next to."""
    assert 0 <= token < len(logits)
    noise = noise_of_one(len(logits), seed, step)
    if options["temperature"] == 0:
        assert token == logits.argmax()
        return
    behind = []
    for slack in (0, 1e-6, -1e-6):
        noisy = filtered(logits, **options, slack=slack) + noise
        behind.append(noisy.max() - noisy[token])
    assert min(behind) < 1e-5, f"token {token} is {behind} behind"


def numbers(chosen: dict[str, Tensor], b: int) -> dict[str, float]:
    """The options of one sequence that say what is kept."""
    return {name: chosen[name][b].item() for name in ("temperature", "top_k", "top_p", "min_p")}


FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "top-k": {"top_k": 7},
    "top-k-of-all": {"top_k": 10_000},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    "different": {
        "temperature": [0.0, 0.5, 1.0, 2.0] * 4,
        "top_k": [0, 3, 0, 9] * 4,
        "top_p": [0.9, 1.0, 0.5, 0.99] * 4,
        "min_p": [0.0, 0.0, 0.2, 0.01] * 4,
    },
}


@pytest.mark.parametrize("V", [1, 103, 1000])
@pytest.mark.parametrize("given", FILTERS.values(), ids=FILTERS)
def test_formula(given: dict[str, Any], V: int, dtype: torch.dtype, device: str) -> None:
    B = 16
    logits = 3 * torch.randn(B, V, dtype=dtype, device=device)
    seeds, steps = torch.randint(-(2**62), 2**62, (B,)), torch.randint(2**33, (B,))
    chosen = options(B, device, **given, seed=seeds, step=steps)
    tokens = sample(logits, **chosen)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (B,)
    for b, token in enumerate(tokens.tolist()):
        assert_chosen(token, numpy(logits)[b], numbers(chosen, b), seeds[b].item(), steps[b].item())


@pytest.mark.parametrize("temperature", [0.2, 20.0], ids=["peaked", "flat"])
def test_filters_of_a_large_vocabulary(temperature: float, device: str) -> None:
    """What is kept may be a few of the tokens or nearly all."""
    B, V = 6, 6000
    logits = 2 * torch.randn(B, V, device=device)
    top_k, top_p, min_p = [0, 0, 5000, 5000, 20, 0], [0.9, 1.0, 0.97, 0.1, 0.8, 0.9], [0, 0.01, 0, 0, 0, 0.3]
    chosen = options(B, device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=5)
    for b, token in enumerate(sample(logits, **chosen).tolist()):
        assert_chosen(token, numpy(logits)[b], numbers(chosen, b), 5, 0)


@pytest.mark.parametrize("V", [20_000, 20_001])
def test_the_largest_vocabularies(V: int, dtype: torch.dtype, device: str) -> None:
    """With an even number of tokens, rows are aligned; the first token of all and the last can be chosen."""
    logits = 3 * torch.randn(5, V, dtype=dtype, device=device)
    logits[0, -1], logits[1, 0] = 20, 20
    chosen = options(5, device, temperature=[0, 0, 1, 1, 0.7], top_k=[0, 0, 0, 50, 0], top_p=[1, 1, 1, 1, 0.9], seed=3)
    tokens = sample(logits, **chosen).tolist()
    assert tokens[:2] == [V - 1, 0]
    for b, token in enumerate(tokens):
        assert_chosen(token, numpy(logits)[b], numbers(chosen, b), 3, 0)


def test_no_sequences(dtype: torch.dtype, device: str) -> None:
    tokens = sample(torch.empty(0, 40, dtype=dtype, device=device), **options(0, device))
    assert tokens.dtype == torch.int64
    assert tokens.shape == (0,)


@pytest.mark.parametrize("given", [{"temperature": 0.0}, {}, {"top_k": 9, "top_p": 0.8}], ids=str)
def test_strided_rows(given: dict[str, Any], device: str) -> None:
    """The last positions' logits, a part of the vocabulary, one row for all."""
    logits, chosen = torch.randn(4, 3, 96, device=device), options(4, device, **given, seed=range(4))
    for view in (logits[:, -1], logits[:, 0, 3:90], logits[1, 1].expand(4, 96)):
        assert torch.equal(sample(view, **chosen), sample(view.contiguous(), **chosen))


@pytest.mark.parametrize("given", [{"temperature": 0.0}, {}, {"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_rows_without_numbers(given: dict[str, Any], device: str) -> None:
    """Where nothing is likely, or a logit is infinite or NaN, the choice is a token all the same."""
    logits = torch.randn(5, 300, device=device)
    logits[0], logits[1], logits[2, 7], logits[3, 5], logits[4, 11] = -torch.inf, torch.nan, torch.nan, torch.inf, 1e38
    tokens = sample(logits, **options(5, device, **given)).tolist()
    assert all(0 <= token < 300 for token in tokens)
    assert tokens[3:] == [5, 11]


def test_equal_scores(device: str) -> None:
    """All tokens at one distance, more than a kernel lists: every filter keeps all of them."""
    logits = torch.full((20, 4500), 3.0, device=device)
    plain = sample(logits, **options(20, device, seed=range(20)))
    for given in ({"top_k": 2}, {"top_p": 0.3}, {"min_p": 1.0}):
        assert torch.equal(sample(logits, **options(20, device, **given, seed=range(20))), plain)


def test_greedy(dtype: torch.dtype, device: str) -> None:
    logits = torch.randn(5, 300, dtype=dtype, device=device)
    logits[0, [7, 250]] = 9.0  # of equals the lowest index
    logits[1] = 0.0
    tokens = sample(logits, **options(5, device, temperature=0.0, top_k=5, top_p=0.3, min_p=0.5))
    assert tokens.tolist() == [7, 0, *numpy(logits)[2:].argmax(-1)]


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45])
@pytest.mark.parametrize("given", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_the_lowest_temperatures_are_greedy(given: dict[str, Any], temperature: float, device: str) -> None:
    """Down to float32's least number, by which every score overflows."""
    logits = 5 * torch.randn(40, 300, device=device)
    logits[::2] = logits[::2].abs()
    chosen = options(40, device, temperature=temperature, seed=torch.arange(40), **given)
    assert sample(logits, **chosen).tolist() == numpy(logits).argmax(-1).tolist()


def test_filters_keep_ties(device: str) -> None:
    """Three equal tokens at the edge: top-k and top-p keep all of them, and nothing below."""
    logits = torch.log(torch.tensor([0.3, 0.2, 0.2, 0.2, 0.1], device=device)).expand(150, 5).contiguous()
    seed = torch.arange(150)
    for given in ({"top_k": 2}, {"top_k": 3}, {"top_p": 0.31}, {"top_p": 0.5}, {"min_p": 0.6}):
        assert sample(logits, **options(150, device, seed=seed, **given)).unique().tolist() == [0, 1, 2, 3]
    for given in ({"top_k": 1}, {"top_p": 0.29}, {"top_p": 1e-9}, {"min_p": 0.7}):
        assert sample(logits, **options(150, device, seed=seed, **given)).unique().tolist() == [0]
    assert sample(logits, **options(150, device, seed=seed, top_p=0.91)).unique().tolist() == [0, 1, 2, 3, 4]


def test_excluded_tokens_are_never_chosen(device: str) -> None:
    """A grammar sets logits to -inf; fewer than top_k may be left."""
    logits = torch.full((200, 50), -torch.inf, device=device)
    logits[:, [3, 17]] = torch.tensor([1.0, 1.5], device=device)
    for given in ({}, {"top_k": 10}, {"top_p": 0.99}, {"min_p": 0.1}):
        tokens = sample(logits, **options(200, device, seed=torch.arange(200), **given))
        assert tokens.unique().tolist() == [3, 17]


@pytest.mark.large
@pytest.mark.parametrize("given", [{}, {"temperature": 0.5, "top_k": 9, "top_p": 0.9}, {"min_p": 0.05}], ids=str)
@pytest.mark.parametrize("counting", ["seed", "step"])
def test_frequencies(counting: str, given: dict[str, Any], device: str) -> None:
    """Over many seeds, and over many steps of one seed, tokens come as often as their probability says."""
    B, V = 4000 if implementation("sample", device) == "emulated" else 40_000, 23
    logits = torch.randn(V, device=device)
    chosen = options(B, device, **given, **{counting: torch.arange(B)})
    tokens = sample(logits.expand(B, V).contiguous(), **chosen)
    scores = filtered(numpy(logits), **numbers(chosen, 0))
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    expected, seen = B * probabilities, np.bincount(tokens.cpu(), minlength=V)
    kept = expected > 0
    assert seen[~kept].sum() == 0
    freedom = kept.sum() - 1
    chi_square = ((seen - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # mean and 4 standard deviations
    both = np.zeros((V, V))  # neighbouring draws are independent
    np.add.at(both, (tokens[:-1].cpu(), tokens[1:].cpu()), 1)
    expected_both = B * np.outer(probabilities, probabilities)
    enough = expected_both > 5
    chi_square = ((both - expected_both)[enough] ** 2 / expected_both[enough]).sum()
    assert chi_square < enough.sum() + 5 * np.sqrt(2 * enough.sum())


def test_the_same_alone_and_in_a_batch(device: str) -> None:
    logits = torch.randn(9, 5000, device=device)
    chosen = options(9, device, temperature=[0, 0.5, 1] * 3, top_k=40, top_p=0.9, seed=[7] * 9, step=range(9))
    together = sample(logits, **chosen)
    for b in range(9):
        alone = sample(logits[b : b + 1], **{name: x[b : b + 1] for name, x in chosen.items()})
        assert alone.item() == together[b].item()


def test_penalties(device: str) -> None:
    """Against the formulas, read off greedy choices: the token wins iff its penalised logit beats a threshold."""
    B, V = 64, 31
    logits = 2 * torch.randn(B, V, device=device)
    mask, counts = torch.rand(B, V) < 0.3, torch.randint(4, (B, V)) * (torch.rand(B, V) < 0.4)
    repetition, presence, frequency = 1 + torch.rand(B), torch.randn(B), torch.randn(B)
    chosen = options(
        B,
        device,
        temperature=0.0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        prompt_mask=mask,
        counts=counts,
    )
    tokens = sample(logits, **chosen).tolist()
    changed = 0
    for b, row in enumerate(numpy(logits)):
        penalised = row.copy()
        for v in range(V):
            if mask[b, v] or counts[b, v] > 0:
                penalised[v] = row[v] / repetition[b] if row[v] > 0 else row[v] * repetition[b]
            penalised[v] -= presence[b] * (counts[b, v] > 0) + frequency[b] * counts[b, v]
        assert tokens[b] == penalised.argmax()
        changed += penalised.argmax() != row.argmax()
    assert changed > B // 4


def test_repetition_agrees_with_transformers(device: str) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, seen = 2 * torch.randn(40, 50), torch.randint(50, (40, 12))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, logits).argmax(-1)
    mask, counts = torch.zeros(40, 50, dtype=torch.bool), torch.zeros(40, 50, dtype=torch.int32)
    mask.scatter_(1, seen[:, :5], True)
    counts.scatter_(1, seen[:, 5:], 1)
    chosen = options(40, device, temperature=0.0, repetition_penalty=1.7, prompt_mask=mask, counts=counts)
    assert torch.equal(sample(logits.to(device), **chosen).cpu(), expected)


@pytest.mark.large
def test_filters_agree_with_transformers(device: str) -> None:
    """The support of many samples per row is what transformers' warpers leave."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits, draws = torch.randn(4, 12), 1000
    left = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(9)(None, logits.clone()))
    left = MinPLogitsWarper(0.05)(None, left)
    chosen = options(4 * draws, device, top_k=9, top_p=0.8, min_p=0.05, seed=torch.arange(4 * draws))
    tokens = sample(logits.repeat_interleave(draws, 0).to(device), **chosen).view(4, draws)
    for row, kept in zip(tokens, left > -torch.inf, strict=True):
        assert row.unique().tolist() == kept.nonzero().flatten().tolist()


# Random123's known answers (its tests/kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox_of_one(counter, key) == expected
    words = philox(tuple(torch.tensor([word]) for word in counter), (torch.tensor([key[0]]), torch.tensor([key[1]])))
    assert [word.item() for word in words] == expected


def test_arguments(device: str) -> None:
    logits, chosen = torch.randn(2, 9, device=device), options(2, device)
    with refused(r"sample: top_k of shape \[1\] has B = 1, but logits has B = 2"):
        sample(logits, **chosen | {"top_k": chosen["top_k"][:1]})
    with refused("sample: seed must have .*int64"):
        sample(logits, **chosen | {"seed": chosen["seed"].int()})
    with refused("sample: .* go together"):
        sample(logits, **chosen, repetition_penalty=torch.ones(2, device=device))
    with refused(r"sample: counts of shape \[2, 8\] has V = 8, but logits has V = 9"):
        some = options(2, device, presence_penalty=1.0, prompt_mask=[False] * 9, counts=[0] * 8)
        sample(logits, **some)


@pytest.mark.parametrize("name", ["logits", "temperature", "counts"])
def test_arguments_of_kernels(name: str, device: str) -> None:
    """Kernels want contiguous data, and say so; eager bodies do not mind."""
    mask = torch.zeros(2, 9, dtype=torch.bool)
    arguments = {"logits": torch.randn(2, 9, device=device)}
    arguments |= options(2, device, presence_penalty=1.0, prompt_mask=mask, counts=mask)
    expected = sample(**arguments)
    arguments[name] = arguments[name].repeat_interleave(2, -1)[..., ::2]
    if implementation("sample", device) == "eager":
        assert torch.equal(sample(**arguments), expected)
        return
    with refused(f"sample: {name} must .*contiguous"):
        sample(**arguments)
