"""The embedded model, and the script that trained it (examples/train_demo.py)."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import kneser_ney
import numpy as np
import pytest
import torch
import train_demo
from corpus import Corpus, num_bytes, read_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer
from training import Plan, StateFile, train

import pyllama
from pyllama.config import MoEConfig
from pyllama.model import Model

DEMO = Path(pyllama.__file__).parent / "demo"
SCRIPT = Path(train_demo.__file__)


@pytest.fixture(scope="module")
def demo() -> Model:
    return pyllama.load("demo", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus()


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((DEMO / "training.json").read_text())


def test_the_embedded_model_is_small_and_of_the_promised_kind(demo: Model) -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 4 * 2**20
    assert demo.config.hidden_size % 64 == 0
    for layer in demo.config.layers:
        assert layer.attention.head_dim == 64
        assert isinstance(layer.ffn, MoEConfig)
        assert layer.ffn.shared is not None
        assert layer.ffn.aux_loss_coef > 0
    assert demo.tokenizer is not None
    assert 1024 <= demo.tokenizer.vocab_size == demo.config.vocab_size <= 2048
    assert demo.eos_token_ids == {demo.tokenizer.eos_token_id}


def test_the_record_is_complete_and_the_model_beats_the_baseline(record: dict, demo: Model) -> None:
    assert len(record["corpus_sha256"]) == 64
    assert record["python"].split(".")[0] == "3"
    assert record["seconds"] <= 45 * 60
    assert record["threads"] <= 2
    assert record["parameters"] == sum(parameter.numel() for parameter in demo.parameters())
    assert record["held_out_bits_per_byte"] < record["kneser_ney_bits_per_byte"]["4-gram"]


def test_held_out_text_of_this_python_costs_less_than_under_the_baseline(
    demo: Model, corpus: Corpus, record: dict
) -> None:
    """Sources held out under one Python version are held out under all, so every Python can check."""
    size = num_bytes(corpus.held_out)
    backend = demo.tokenizer.backend
    bits = train_demo.model_bits(demo, train_demo.encode(backend, corpus.held_out)) / size
    baseline = kneser_ney.KneserNey([text.encode() for text in corpus.training])
    baseline_bits = baseline.bits([text.encode() for text in corpus.held_out]) / size
    assert bits < baseline_bits
    if corpus.sha256 == record["corpus_sha256"]:
        assert bits == pytest.approx(record["held_out_bits_per_byte"], abs=1e-3)
        assert baseline_bits == pytest.approx(record["kneser_ney_bits_per_byte"]["4-gram"], abs=1e-3)


def test_the_embedded_model_uses_all_its_experts(demo: Model, corpus: Corpus) -> None:
    """The load-balancing loss is E * sum(load * probability): N at perfect balance, E with one expert for all."""
    text = "\n".join(corpus.held_out)[:2000]
    token_ids = torch.tensor([demo.tokenizer.encode(text)[: demo.config.max_positions]])
    with torch.no_grad():
        aux_loss = demo(token_ids, labels=token_ids).aux_loss
    assert aux_loss < 1.25 * demo.config.layers[0].ffn.top_k


def test_training_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--steps", "3", "--output", str(tmp_path / "demo")]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, timeout=600)
    record = json.loads((tmp_path / "demo/training.json").read_text())
    assert record["steps"] == 3
    assert record["corpus_sha256"] == read_corpus().sha256
    assert (tmp_path / "demo/loss.png").read_bytes().startswith(b"\x89PNG")
    completion = pyllama.generate(str(tmp_path / "demo"), "The with statement", max_new_tokens=4)
    assert 1 <= len(completion.token_ids) <= 4


# The trainer


@pytest.fixture
def tiny_tokenizer() -> Tokenizer:
    return train_demo.train_tokenizer(["Return the number of items.", "Return an item."] * 10, 300)


def trainer(threads: int = 1) -> train_demo.Trainer:
    return train_demo.Trainer(replace(train_demo.TINY, vocab_size=300), threads)


def test_saved_parameters_come_back_rounded_to_bfloat16(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    trained = trainer()
    for parameter in trained.parameters:  # no two equal: a swapped pair would show
        torch.nn.init.normal_(parameter)
    train_demo.save(trained, tiny_tokenizer, tmp_path)
    loaded = dict(pyllama.load(tmp_path, device="cpu", dtype="float32").named_parameters())
    expected = dict(trained.model.named_parameters())
    assert loaded.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(loaded[name], parameter.bfloat16().float()), name


def test_a_step_is_the_same_for_any_number_of_threads_and_lowers_the_loss() -> None:
    batch = torch.randint(300, (4, 64), generator=torch.Generator().manual_seed(0))
    one, two = trainer(1), trainer(2)
    losses = [(one.step(batch, 0.5)[0], two.step(batch, 0.5)[0]) for _ in range(5)]
    assert all(a == b for a, b in losses)
    assert losses[0][0] == pytest.approx(math.log(300), rel=0.02)  # layers begin as the identity
    assert losses[-1][0] < losses[0][0] - 0.2
    for a, b in zip(one.parameters, two.parameters, strict=True):
        assert torch.equal(a, b)


def test_a_training_that_broke_off_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """Between evaluations, so that the steps since the last one are lost, and taken again."""
    documents = [torch.randint(300, (100,), generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    plan = Plan(steps=8, milestones=[0.25, 0.5, 0.75, 1.0])

    def finish(states: StateFile, steps: int | None = None) -> train_demo.Trainer:
        """Steps before it breaks off; None: all."""
        one = trainer()
        rows = itertools.islice(train_demo.batches(documents, one.recipe), steps)
        train(one, rows, lambda: 0.0, plan, states, Console(quiet=True))
        return one

    states = StateFile.beside(tmp_path / "broken", {})
    for steps in (3, 7):
        with pytest.raises(StopIteration):
            finish(states, steps)
        assert len(torch.load(states.path)["history"]["training"]) == steps - 1
    expected, found = finish(StateFile.beside(tmp_path / "whole", {})), finish(states)
    for a, b in zip(expected.parameters, found.parameters, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(trainer().parameters[0], found.parameters[0])


def test_an_epoch_holds_every_token_of_every_document() -> None:
    recipe = replace(train_demo.TINY, context=16, batch=1)
    documents = [torch.tensor([0, *range(start, start + 14), 0]) for start in range(1, 241, 15)]  # 16 of 15 tokens
    epoch = list(itertools.islice(train_demo.batches(documents, recipe), 15))
    assert all(batch.shape == (1, 16) for batch in epoch)
    predicted = torch.cat([batch[0, 1:] for batch in epoch])
    assert len(predicted.unique()) >= 15 * 14  # all but what the cut at the end loses
    assert (predicted == 0).sum() >= 14


@pytest.mark.parametrize("tokens_at_once", [1, 100, 4096])
def test_bits_of_documents_are_the_sum_over_their_tokens(tokens_at_once: int) -> None:
    """Against one token at a time, for documents shorter, as long as and longer than the context of 64."""
    model = trainer().model
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    lengths = [2, 3, 63, 64, 65, 66, 96, 97, 150]
    documents = [torch.randint(300, (length,)) for length in lengths]
    bits = 0.0
    for ids in documents:
        for i in range(1, len(ids)):
            # Windows start at 0, then 32 before the first token that the previous one did not reach.
            start = 0 if i < 64 else 32 + 32 * ((i - 64) // 32)
            start = start if i >= 64 else 0
            with torch.no_grad():
                log_p = model(ids[None, start:i])[0, -1].log_softmax(-1)
            bits -= log_p[ids[i]].item() / math.log(2)
    assert train_demo.model_bits(model, documents, tokens_at_once) == pytest.approx(bits, rel=1e-4)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    from muon import orthogonalize

    stack = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(1))
    result = orthogonalize(stack)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert torch.allclose(result[1], orthogonalize(stack[1]), atol=1e-5)
    assert torch.allclose(result.mT, orthogonalize(stack.mT), atol=1e-5)


# The corpus


def test_the_corpus_has_no_repetitions_and_holds_whole_sources_out(tmp_path: Path) -> None:
    paragraph = "A paragraph that is long enough to be looked for elsewhere."
    folder = tmp_path / "package"
    folder.mkdir()
    for i in range(60):
        functions = f'def f():\n    """Short."""\ndef g():\n    """Item {i}."""\n'
        (folder / f"m{i}.py").write_text(f'"""Module {i}.\n\n    {paragraph}\n    """\n{functions}')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""Not to be read."""\n')
    found = read_corpus(tmp_path)
    documents = found.training + found.held_out
    assert len(documents) == len(set(documents))
    assert sum(paragraph in document for document in documents) == 1
    assert documents.count("Short.") == 1
    assert "Not to be read." not in documents
    for i in range(60):
        name = f"package/m{i}.py"
        digest = hashlib.sha256(name.encode()).hexdigest()
        held_out = int(digest[:16], 16) < 0.05 * 2**64
        assert (f"Item {i}." in found.held_out) == held_out
        assert (f"Item {i}." in found.training) != held_out
    assert read_corpus(tmp_path).sha256 == found.sha256


def test_a_python_without_sources_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no Python sources in {tmp_path}"):
        read_corpus(tmp_path)


def test_about_a_twentieth_of_the_corpus_is_held_out(corpus: Corpus) -> None:
    share = num_bytes(corpus.held_out) / num_bytes(corpus.training + corpus.held_out)
    assert 0.02 < share < 0.1
    assert num_bytes(corpus.training) > 1_000_000


# The baseline

ALPHABET = st.lists(st.text("ab\x00ÿ ", max_size=30).map(str.encode), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(documents=ALPHABET, order=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_kneser_ney_sums_to_one_in_every_context(documents: list[bytes], order: int, seed: int) -> None:
    model = kneser_ney.KneserNey(documents, order)
    size = kneser_ney.NUM_SYMBOLS
    seen = kneser_ney.ngrams(documents, order) // size
    unseen = np.random.default_rng(seed).integers(0, size ** (order - 1), 20)
    for contexts in (seen, unseen):
        p = model.probabilities(contexts[:, None] * size + np.arange(size))
        assert p.min() > 0
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)


def reference_probability(documents: list[bytes], order: int, context: tuple[int, ...], symbol: int) -> float:
    """Chen and Goodman's recursion, word for word, over dictionaries."""
    counts = Counter()
    for text in documents:
        symbols = [256] * (order - 1) + list(text) + [256]
        counts.update(tuple(symbols[i : i + order]) for i in range(len(symbols) - order + 1))
    levels = {order: counts}
    for length in range(order - 1, 0, -1):
        preceded = defaultdict(set)
        for gram in levels[length + 1]:
            preceded[gram[1:]].add(gram[0])
        levels[length] = {gram: len(before) for gram, before in preceded.items()}

    def discount(length: int, count: int) -> float:
        n1, n2, n3, n4 = (sum(c == i for c in levels[length].values()) for i in range(1, 5))
        fixed = [0, 0.5, 1, 1.5]
        if not (n1 and n2 and n3):
            return fixed[min(count, 3)]
        y = n1 / (n1 + 2 * n2)
        estimates = [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return (estimates if min(estimates[1:]) > 0 else fixed)[min(count, 3)]

    def probability(context: tuple[int, ...]) -> float:
        length = len(context) + 1
        lower = probability(context[1:]) if context else 1 / 257
        following = {gram: c for gram, c in levels[length].items() if gram[:-1] == context}
        if not following:
            return lower
        total = sum(following.values())
        freed = sum(discount(length, c) for c in following.values())
        count = following.get((*context, symbol), 0)
        return (max(count - discount(length, count), 0) + freed * lower) / total

    return probability(context)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_kneser_ney_is_chen_and_goodmans_recursion(order: int) -> None:
    documents = [b"the cat sat on the mat", b"the dog sat", b"a cat and a dog and the cat", b""]
    model = kneser_ney.KneserNey(documents, order)
    expected = 0.0
    for text in (b"the rat sat on a cat", b"zz"):
        symbols = [256] * (order - 1) + list(text) + [256]
        for i in range(order - 1, len(symbols)):
            p = reference_probability(documents, order, tuple(symbols[i - order + 1 : i]), symbols[i])
            expected -= math.log2(p)
    assert model.bits([b"the rat sat on a cat", b"zz"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("documents", "order", "message"), [([b"a"], 0, "order is 0"), ([b"a"], 8, "64 bits"), ([], 4, "empty")]
)
def test_kneser_ney_refuses_what_it_cannot_count(documents: list[bytes], order: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kneser_ney.KneserNey(documents, order)
