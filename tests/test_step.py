"""Steps of decoding read late, in batches with unused places, as graphs: always what each sequence gets alone.

On a GPU with CUDA graphs, on the CPU with a stand-in for them (recorded.py).
"""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from recorded import WAYS, Recorded, Way
from tiny import VOCAB_SIZE

import pyllama
from pyllama import generation, graphs, step
from pyllama.cache import PAGE_SIZE, PagedCache
from pyllama.config import GQAConfig, LayerConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig, RopeConfig
from pyllama.graphs import Graphs, places_for
from pyllama.model import Model
from pyllama.sampling import SamplingParams
from pyllama.step import Decoding, NewToken
from pyllama.text import Chunk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    chosen: Way = request.param
    if chosen.device == "cpu":
        monkeypatch.setattr(step, "Graphs", Recorded)
    return chosen


ROPE = RopeConfig(10_000.0, 32)
GQA, MLP, MOE = GQAConfig(4, 2, 32, ROPE), MLPConfig(96), MoEConfig(8, 2, 48)
MLA = MLAConfig(4, 48, 64, 128, 128, RopeConfig(10_000.0, 64, interleaved=True), 192**-0.5)
KINDS = {"dense": LayerConfig(GQA, MLP), "moe": LayerConfig(GQA, MOE), "mla": LayerConfig(MLA, MLP)}
V = 211


@pytest.fixture(scope="module", params=KINDS.values(), ids=list(KINDS))
def any_model(request: pytest.FixtureRequest) -> Model:
    """Random, with weights large enough to make its choices varied."""
    generator = torch.Generator().manual_seed(0)
    model = Model(ModelConfig(V, 64, 512, 1e-5, False, (request.param,) * 2)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=2 * weight.shape[-1] ** -0.5, generator=generator)
    return model


def prompts_of(vocab_size: int, *lengths: int) -> list[list[int]]:
    pick = random.Random(sum(lengths))
    return [[pick.randrange(5, vocab_size) for _ in range(length)] for length in lengths]


def written(decoding: Decoding, rooms: list[int], stops: Mapping[int, int] | None = None) -> list[list[NewToken]]:
    """What each sequence gets; `stops` stops some, after so many tokens."""
    entries: list[list[NewToken]] = [[] for _ in rooms]
    going_on = set(range(len(rooms)))
    while going_on:
        new = decoding.step()
        assert list(new) == sorted(going_on)
        for number, entry in new.items():
            entries[number].append(entry)
        stopped = {number for number in going_on if len(entries[number]) == (stops or {}).get(number)}
        decoding.stop(stopped)
        going_on -= stopped | {number for number in going_on if len(entries[number]) == rooms[number]}
    return entries


def tokens_of(entries: list[list[NewToken]]) -> list[list[int]]:
    return [[token.id for token in row] for row in entries]


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "top_k": 60, "top_p": 0.95, "seed": 3},
    "penalized": {"temperature": 0.8, "seed": 1, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
}


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_a_batch_that_loses_members(options: dict[str, Any], any_model: Model, way: Way) -> None:
    """By length and by stops, several at once and one by one, some without a change of places; each sequence gets what
    it gets alone, where every step is read before the next begins."""
    model = copy.deepcopy(any_model).to(way.device)
    prompts = prompts_of(V, 3, PAGE_SIZE, 17, 1, PAGE_SIZE - 1, 40, 5, PAGE_SIZE + 1, 9, 130, 2, 8, 12, 33, 6, 4, 7, 10)
    rooms = [24, 5, 11, 24, 24, 7, 24, 16, 5, 24, 1, 13, 3, 9, 2, 15, 4, 12]
    stops = {0: 9, 3: 6, 5: 7, 6: 3, 7: 3}
    params = SamplingParams(**options)
    expected = []
    for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
        alone = Decoding(model, [prompt], [room], params, ahead=0, graphs=False)
        expected += tokens_of(written(alone, [room], {0: stops[number]} if number in stops else None))
    assert tokens_of(written(way.decoding(model, prompts, rooms, params), rooms, stops)) == expected
    assert len({tuple(tokens[:3]) for tokens in expected}) >= 8  # they do not all write the same


@pytest.mark.parametrize("sequences", [1, 2, 7, 8])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 5, "logprobs": 3}], ids=["greedy", "drawn"])
def test_replays_equal_eager_steps(options: dict[str, Any], sequences: int, any_model: Model, way: Way) -> None:
    """Bit for bit, over a page's end, where no place is unused."""
    model = copy.deepcopy(any_model).to(way.device)
    prompts = prompts_of(V, *range(PAGE_SIZE - 4, PAGE_SIZE - 4 + sequences))
    rooms = [10] * sequences
    params = SamplingParams(**options)
    plain = Decoding(model, prompts, rooms, params, ahead=0, graphs=False)
    assert written(way.decoding(model, prompts, rooms, params), rooms) == written(plain, rooms)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_graphs_write_what_eager_bodies_write(options: dict[str, Any], any_model: Model) -> None:
    """By default, in float32."""
    model = copy.deepcopy(any_model).to("cuda")
    prompts = prompts_of(V, 3, PAGE_SIZE, 17, 1, PAGE_SIZE - 1, 40, 5, PAGE_SIZE + 1, 9)
    found = pyllama.generate(model, prompts, 20, **options)
    with pyllama.eager():
        expected = pyllama.generate(model, prompts, 20, **options)
    assert [out.token_ids for out in found] == [out.token_ids for out in expected]


def test_a_seed_draws_the_same_in_batches_of_every_size(model: Model, way: Way) -> None:
    model = copy.deepcopy(model).to(way.device)
    prompts = prompts_of(VOCAB_SIZE, *range(2, 13))
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=11)
    expected = []
    for prompt in prompts:
        expected += tokens_of(written(Decoding(model, [prompt], [6], params, ahead=0, graphs=False), [6]))
    for size in range(1, len(prompts) + 1):
        rooms = [6] * size
        found = written(way.decoding(model, prompts[:size], rooms, params), rooms)
        assert tokens_of(found) == expected[:size]


def plain(chunk: Chunk) -> tuple[Any, ...]:
    """All but times and logarithms."""
    last = chunk.completion
    outcome = None if last is None else (last.text, last.token_ids, last.finish_reason, last.prompt_tokens)
    return chunk.index, chunk.sample, chunk.text, chunk.token_ids, chunk.finish_reason, outcome


@pytest.mark.parametrize(
    "options",
    [
        {"stop_token_ids": list(range(5, 40))},
        {"temperature": 1.0, "seed": 5, "n": 3, "stop_token_ids": list(range(5, 40))},
        {"temperature": 0.9, "seed": 1, "repetition_penalty": 1.2, "presence_penalty": 0.5, "n": 2, "stop": "e"},
        {"logprobs": 2, "stop": ["e", "ou"], "ignore_eos": True},
        {"logprobs": 0, "stop": ["th", "a", "o"], "temperature": 1.2, "seed": 9, "n": 2, "max_new_tokens": 5},
    ],
    ids=str,
)
def test_streams_give_the_same_chunks_in_the_same_order(
    options: dict[str, Any], model: Model, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(model).to(way.device)
    prompts = ["The quick", prompts_of(VOCAB_SIZE, 70)[0], "with", [9], "Größe, 你好"]
    options = {"max_new_tokens": 20} | options
    monkeypatch.setattr(generation, "Decoding", partial(Decoding, ahead=0, graphs=False))
    expected = list(pyllama.stream(model, prompts, **options))
    monkeypatch.setattr(generation, "Decoding", way.decoding)
    found = list(pyllama.stream(model, prompts, **options))
    assert [plain(chunk) for chunk in found] == [plain(chunk) for chunk in expected]
    assert len({len(chunk.completion.token_ids) for chunk in expected if chunk.completion}) > 1  # they end one by one
    for a, b in zip(found, expected, strict=True):
        assert (a.logprobs is None) == (b.logprobs is None) == ("logprobs" not in options)
        for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True):
            assert (x.token_id, x.logprob) == (y.token_id, pytest.approx(y.logprob, abs=1e-4))
            assert list(x.top.values()) == pytest.approx(list(y.top.values()), abs=1e-4)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The new tokens of each pass that the model was asked for."""
    asked: list[int] = []

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Model, token_ids: torch.Tensor, *args: Any) -> Any:
            asked.append(len(token_ids))
            return run(self, token_ids, *args)

        return call

    for run in (Model.run, Model.run_greedily):
        monkeypatch.setattr(Model, run.__name__, counted(run))
    return asked


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_no_step_is_begun_for_sequences_that_have_their_length(ahead: int, model: Model, passes: list[int]) -> None:
    rooms = [2, 6, 1, 4]
    decoding = Decoding(model, prompts_of(VOCAB_SIZE, 3, 4, 5, 6), rooms, SamplingParams(), ahead=ahead)
    written(decoding, rooms)
    assert passes == [3 + 4 + 5 + 6, 3, 2, 2, 1, 1]


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_a_stop_costs_as_many_steps_as_were_begun(ahead: int, model: Model, passes: list[int]) -> None:
    rooms = [9, 9]
    decoding = Decoding(model, prompts_of(VOCAB_SIZE, 3, 4), rooms, SamplingParams(), ahead=ahead)
    assert [len(row) for row in written(decoding, rooms, {0: 3})] == [3, 9]
    together = min(3 + ahead, 9)
    assert passes == [7] + [2] * (together - 1) + [1] * (9 - together)


def test_every_step_begins_before_the_one_before_is_read(model: Model, passes: list[int]) -> None:
    decoding = Decoding(model, prompts_of(VOCAB_SIZE, 3), [4], SamplingParams(), ahead=1)
    for begun in (2, 3, 4, 4):
        decoding.step()
        assert len(passes) == begun


def test_places_become_fewer(any_model: Model, way: Way, passes: list[int]) -> None:
    """What nobody uses counts for nothing. Graphs are captured, after one pass without them, for each number of places;
    when they are replayed, the model is not asked."""
    rooms = list(range(4, 48, 4))
    model = copy.deepcopy(any_model).to(way.device)
    decoding = way.decoding(model, prompts_of(V, *[5] * len(rooms)), rooms, SamplingParams())
    for steps in range(1, max(rooms) + 1):
        decoding.step()
        begun = min(steps + way.ahead, max(rooms))
        lengths = decoding._context._batch.seq_lens
        sequences = sum(room >= begun for room in rooms)
        assert len(lengths) == (places_for(sequences) if way.graphs else sequences)
        assert lengths.count_nonzero() == sequences
    if way.graphs:
        assert passes[1:] == [places for places in (12, 10, 8, 7, 6, 5, 4, 3, 2, 1) for _ in range(2)]


def test_another_call_may_take_longer_tables(any_model: Model, way: Way) -> None:
    """The model then has new tables of RoPE, while a graph goes on with its own."""
    model = copy.deepcopy(any_model).to(way.device)
    (prompt,) = prompts_of(V, 20)
    expected = pyllama.generate(model, prompt, 30).token_ids
    decoding = way.decoding(copy.deepcopy(any_model).to(way.device), [prompt], [30], SamplingParams())
    found = [decoding.step()[0].id for _ in range(6)]
    pyllama.generate(decoding._context._model, prompts_of(V, 300)[0], 2)
    waste = [torch.full((256 * 64,), float("nan"), device=way.device) for _ in range(64)]
    found += [decoding.step()[0].id for _ in range(24)]
    assert found == expected
    del waste


def test_leaving_early_frees_everything(any_model: Model, way: Way) -> None:
    model = copy.deepcopy(any_model).to(way.device)
    decoding = way.decoding(model, prompts_of(V, 3, 20), [50, 50], SamplingParams(temperature=1.0, logprobs=1))
    for _ in range(5):
        decoding.step()
    gc.collect()
    assert any(type(thing) is PagedCache for thing in gc.get_objects())
    gc.disable()
    try:
        del decoding
        assert not any(type(thing) is PagedCache for thing in gc.get_objects()), "freed at once"
    finally:
        gc.enable()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_memory_of_graphs_comes_back(any_model: Model) -> None:
    """A first call leaves what cuBLAS keeps, others nothing."""
    model = copy.deepcopy(any_model).to("cuda")
    prompts = prompts_of(V, *range(1, 21))
    rooms = [5 + 3 * number for number in range(20)]
    allocated, reserved = [], []
    for _ in range(3):
        written(Decoding(model, prompts, rooms, SamplingParams(), graphs=True), rooms)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        allocated.append(torch.cuda.memory_allocated())
        reserved.append(torch.cuda.memory_reserved())
    assert allocated[1] == allocated[2]
    assert reserved[1] >= reserved[2]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_the_host_reads_is_pinned_and_late(any_model: Model) -> None:
    model = copy.deepcopy(any_model).to("cuda")
    decoding = Decoding(model, prompts_of(V, 3, 4), [9, 9], SamplingParams(logprobs=2))
    assert (decoding._ahead, decoding._graphs) == (1, True)
    decoding.step()
    (late,) = decoding._in_flight
    assert all(result.is_pinned() for result in late.results)


def test_what_graphs_need(model: Model) -> None:
    prompts = prompts_of(VOCAB_SIZE, 3)
    with pytest.raises(ValueError, match="graphs run on a CUDA device, but the model is on cpu; use graphs=False"):
        Decoding(model, prompts, [4], SamplingParams(), graphs=True)
    with pytest.raises(ValueError, match="graphs need a cache"):
        Decoding(model, prompts, [4], SamplingParams(), use_cache=False, graphs=True)
    with pytest.raises(ValueError, match="graphs run on a CUDA device"):
        Graphs(torch.device("cpu"))


def test_places() -> None:
    assert [places_for(sequences) for sequences in range(1, 9)] == list(range(1, 9))
    for sequences in range(9, 3000):
        assert sequences <= places_for(sequences) <= sequences * 1.25
    assert places_for(3000) == 3000
    assert list(graphs.PLACES) == sorted(set(graphs.PLACES))


def test_rows_are_kept_in_place() -> None:
    x = torch.arange(10).view(5, 2)
    kept = graphs.keep_rows(x, torch.tensor([1, 3, 3]))
    assert kept.tolist() == [[2, 3], [6, 7], [6, 7]]
    assert kept.data_ptr() == x.data_ptr()
