"""Experts' loads of completions: what transformers' routers choose in one pass over prompt and text.

M layers with experts, E experts, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import draw, write
from recorded import WAYS, Recorded, Way
from tiny import byte_level_tokenizer, write_checkpoint, write_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

import pyllama
from pyllama import context, generation, step
from pyllama.balance import new_loads
from pyllama.cache import PAGE_SIZE
from pyllama.config import GQAConfig, LayerConfig, LongRopeScaling, MLPConfig, ModelConfig, MoEConfig, RopeConfig
from pyllama.layers.ffn import MoE
from pyllama.model import Model
from pyllama.sampling import SamplingParams
from pyllama.step import Decoding
from pyllama.text import Completion

V = 400
Load = tuple[tuple[int, ...], ...]

# Layers without experts among those with some; groups of experts with a bias for the choice.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_hidden_layers": 3, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "num_hidden_layers": 6,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "glm4_moe": {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 12,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 3,
    },
}


def chosen(gate: nn.Module, x_TD: Tensor, config: Any) -> list[int]:
    """The experts of all tokens, by the published formulas."""
    logits_TE = x_TD.double() @ gate.weight.double().T
    if config.model_type != "glm4_moe":
        return logits_TE.topk(config.num_experts_per_tok).indices.flatten().tolist()
    scores_TE = logits_TE.sigmoid() + gate.e_score_correction_bias.double()
    groups = scores_TE.unflatten(1, (config.n_group, -1))
    best = groups.topk(2).values.sum(-1).topk(config.topk_group).indices
    open_ = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, best, True)
    scores_TE = groups.masked_fill(~open_[..., None], -torch.inf).flatten(1)
    return scores_TE.topk(config.num_experts_per_tok).indices.flatten().tolist()


def one_pass(reference: PreTrainedModel, tokens: list[int]) -> Load:
    """From what goes into transformers' routers."""
    gates = [module for name, module in reference.named_modules() if name.endswith(".gate")]
    inputs: list[Tensor] = []
    handles = [gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2))) for gate in gates]
    with torch.no_grad():
        reference(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return counted(
        [chosen(gate, x, reference.config) for gate, x in zip(gates, inputs, strict=True)], len(gates[0].weight)
    )


def counted(choices: Sequence[Sequence[int]], experts: int) -> Load:
    return tuple(tuple(Counter(layer)[expert] for expert in range(experts)) for layer in choices)


def computed(prompt: list[int], completion: Completion) -> list[int]:
    """All tokens that went through the layers: the last one is only given out."""
    return prompt + completion.token_ids[:-1]


def prompts_of(*lengths: int) -> list[list[int]]:
    pick = random.Random(sum(lengths))
    return [[pick.randrange(5, V) for _ in range(length)] for length in lengths]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = tmp_path_factory.mktemp(request.param)
    config = draw(request.param, 1) | FAMILIES[request.param] | {"vocab_size": V}
    model = write(folder, config)
    write_tokenizer(folder, byte_level_tokenizer())
    model.name_or_path = str(folder)
    return model


@pytest.fixture(scope="module")
def model(reference: PreTrainedModel) -> Model:
    return pyllama.load(reference.name_or_path, "cpu", "float32")


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "samples": {"temperature": 1.2, "seed": 2, "n": 3},
    "samples without a cache": {"temperature": 1.2, "seed": 2, "n": 2, "use_cache": False},
    "one token": {"max_new_tokens": 1, "logprobs": 1},
    "stops": {"temperature": 1.0, "seed": 3, "n": 2, "stop_token_ids": list(range(5, 60)), "stop": ["e", "a"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_loads_are_those_of_transformers_routers(
    options: dict[str, Any], model: Model, reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each completion of a batch whose prompts are computed in several passes."""
    monkeypatch.setattr(context, "PREFILL_TOKENS", 40)
    prompts = prompts_of(1, 30, PAGE_SIZE, PAGE_SIZE + 1, 3)
    made = pyllama.generate(model, prompts, **{"max_new_tokens": 12, "ignore_eos": True} | options, routing=True)
    top_k = reference.config.num_experts_per_tok
    for prompt, row in zip(prompts, made, strict=True):
        for out in row if "n" in options else [row]:
            assert out.expert_load == one_pass(reference, computed(prompt, out))
            tokens = out.prompt_tokens + len(out.token_ids) - 1
            assert [sum(layer) for layer in out.expert_load] == [tokens * top_k] * len(out.expert_load)


def test_a_model_adds_to_the_loads_it_is_given(model: Model, reference: PreTrainedModel) -> None:
    """For each sequence or for all of them, over several calls, as in training."""
    ids_BT = torch.tensor(prompts_of(11, 11, 11))
    alone = torch.tensor([one_pass(reference, row) for row in ids_BT.tolist()]).transpose(0, 1)
    each, together = new_loads(model.config, 3), new_loads(model.config)
    for _ in range(2):
        model(ids_BT, labels=ids_BT, loads=each)
        model(ids_BT, loads=together)
    assert torch.equal(each, 2 * alone)
    assert torch.equal(together, 2 * alone.sum(1, keepdim=True))
    for loads in (each[1:], each[:, :2], each.int(), new_loads(model.config, 4)):
        with pytest.raises(ValueError, match="loads must be int64"):
            model(ids_BT, loads=loads)


ROPE = RopeConfig(10_000.0, 32)
SWITCH = 40  # tokens
LONG = RopeConfig(10_000.0, 32, scaling=LongRopeScaling((1.0,) * 16, tuple(1 + i / 2 for i in range(16)), SWITCH))


@pytest.fixture(scope="module", params=[ROPE, LONG], ids=["rope", "longrope"])
def mixture(request: pytest.FixtureRequest) -> Model:
    """Random, with a dense layer first and weights large enough to make its choices varied; it has a tokenizer."""
    attention = GQAConfig(4, 2, 32, request.param)
    layers = [LayerConfig(attention, ffn) for ffn in (MLPConfig(48), MoEConfig(6, 2, 24), MoEConfig(6, 2, 24))]
    model = Model(ModelConfig(V, 64, 512, 1e-5, False, tuple(layers))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=2 * weight.shape[-1] ** -0.5, generator=generator)
    model.tokenizer = pyllama.load("demo", "cpu").tokenizer
    return model


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    chosen: Way = request.param
    if chosen.device == "cpu":
        monkeypatch.setattr(step, "Graphs", Recorded)
    monkeypatch.setattr(generation, "Decoding", chosen.decoding)
    return chosen


@torch.inference_mode()
def own_pass(model: Model, tokens: list[int]) -> Load:
    """From what pyllama's own routers decide, which the tests above compare with transformers'."""
    choices: list[list[int]] = []
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    handles = [
        module.register_forward_hook(lambda _, args, out: choices.append(out[1].experts.flatten().tolist()))
        for module in mixtures
    ]
    model(torch.tensor([tokens], device=model.device))
    for handle in handles:
        handle.remove()
    return counted(choices, mixtures[0].config.num_experts)


STOPS: list[dict[str, Any]] = [
    {},
    {"stop_token_ids": list(range(5, 40))},
    {"temperature": 1.0, "seed": 5, "n": 3, "stop_token_ids": list(range(5, 40))},
    {"temperature": 0.9, "seed": 1, "repetition_penalty": 1.2, "logprobs": 2, "stop": ["e", "o"]},
]


@pytest.mark.parametrize("options", STOPS, ids=str)
def test_steps_begun_ahead_and_unused_places_do_not_count(options: dict[str, Any], mixture: Model, way: Way) -> None:
    """Sequences of a batch end one by one and leave it, by length and by stops."""
    model = copy.deepcopy(mixture).to(way.device)
    prompts = prompts_of(3, PAGE_SIZE, 17, SWITCH - 1, SWITCH, 25, 5, PAGE_SIZE + 1, 33)
    options = {"max_new_tokens": 20} | options
    last = [chunk for chunk in pyllama.stream(model, prompts, **options, routing=True) if chunk.completion]
    assert len(last) == len(prompts) * options.get("n", 1)
    for chunk in last:
        assert chunk.completion.expert_load == own_pass(model, computed(prompts[chunk.index], chunk.completion))
    lengths = {len(chunk.completion.token_ids) for chunk in last}
    assert lengths == {20} if options == {"max_new_tokens": 20} else len(lengths) > 2


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_sequences_of_different_lengths(ahead: int, mixture: Model) -> None:
    """Each is stopped, or has its length, at another step."""
    prompts, rooms, stops = prompts_of(6, 1, 38, 9), [9, 2, 7, 30], {0: 3, 3: 11}
    decoding = Decoding(mixture, prompts, rooms, SamplingParams(), ahead=ahead, loads=True)
    texts, going_on = copy.deepcopy(prompts), set(range(4))
    while going_on:
        for number, token in decoding.step().items():
            assert token.loads is not None
            assert tuple(map(tuple, token.loads.tolist())) == own_pass(mixture, texts[number])
            texts[number].append(token.id)
        new = [len(text) - len(prompt) for text, prompt in zip(texts, prompts, strict=True)]
        ended = {number for number in going_on if new[number] in (rooms[number], stops.get(number))}
        decoding.stop(ended)
        going_on -= ended
    assert new == [3, 2, 7, 11]


def test_without_routing_nothing_is_counted(mixture: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("loads were counted")

    expected = pyllama.generate(mixture, [5, 6], 4, routing=True)
    monkeypatch.setattr("pyllama.model.count_", refuse)
    for use_cache in (True, False):
        plain = pyllama.generate(mixture, [5, 6], 4, use_cache=use_cache)
        assert (plain.token_ids, plain.expert_load) == (expected.token_ids, None)
        with pytest.raises(AssertionError, match="loads were counted"):
            pyllama.generate(mixture, [5, 6], 4, use_cache=use_cache, routing=True)


def test_a_stream_left_early_and_one_beside_it(mixture: Model) -> None:
    expected = pyllama.generate(mixture, [5, 6, 7], 8, routing=True).expert_load
    left = pyllama.stream(mixture, [5, 6, 7], 8, routing=True)
    beside = pyllama.stream(mixture, [5, 6, 7], 8, routing=True)
    for _ in range(3):
        assert next(left).completion is None
        next(beside)
    left.close()
    assert [chunk.completion.expert_load for chunk in beside if chunk.completion] == [expected]


@pytest.fixture
def dense(tmp_path: Path) -> Model:
    write_checkpoint(tmp_path)
    return pyllama.load(tmp_path, "cpu")


def test_errors_come_at_the_call(dense: Model, mixture: Model) -> None:
    with pytest.raises(ValueError, match="the model has no experts"):
        pyllama.stream(dense, [5, 6], routing=True)
    with pytest.raises(ValueError, match="the model has no experts"):
        Decoding(dense, [[5, 6]], [4], SamplingParams(), loads=True)
    with pytest.raises(TypeError, match="routing must be True or False, got 1"):
        pyllama.stream(mixture, [5, 6], routing=1)
