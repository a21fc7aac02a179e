"""Whole tiny dense models on the kernels, emulated and on a GPU, against eager bodies and a float64 model.

H query heads, G key/value heads, K head size, V vocabulary.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from emulated import EMULATOR
from families import randomize
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyllama
from pyllama import _C, context
from pyllama.batch import Batch
from pyllama.cache import PAGE_SIZE, PagedCache, pages_for
from pyllama.config import GQAConfig, LayerConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig, RopeConfig
from pyllama.model import Model
from pyllama.ops.registry import OPS, implementation

V = 211
SEEDS = 0, 1  # of the emulated threads' schedules: in order, and at random; the ops' own tests run more
ERROR_FACTOR = 1.25  # of errors' root mean squares; rounding at other places is as likely to help as to hurt
STORES = {
    GQAConfig: {"norm_rope_store_", "paged_attention", "decode_attention_"},
    MLAConfig: {"mla_rope_store_", "mla_paged_attention"},
}
MOE_OPS = {"topk_gate", "moe_dispatch", "grouped_swiglu", "grouped_linear", "moe_combine"}
FEW_OPS = {"norm_linear", "norm_swiglu", "linear_add_"}  # of few tokens
FEW_MOE_OPS = {"norm_gate", "experts_swiglu", "experts_add_"}


class Kernels(NamedTuple):
    device: str
    ops: tuple[str, ...]  # those that have a kernel
    active: Callable[[], AbstractContextManager[None]]  # inside, they run


IMPLEMENTATIONS = [
    *(pytest.param(("cpu", seed), id=f"emulated-cpu-{seed}") for seed in SEEDS),
    pytest.param(
        ("cuda", 0),
        id="cuda-cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
    ),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    device, seed = request.param
    if device == "cuda":
        return Kernels("cuda", _C.ops, nullcontext)
    emulator = request.config.stash[EMULATOR]
    if emulator is None or seed not in emulator.seeds:
        pytest.skip("no emulated kernels for it")
    return Kernels("cpu", emulator.ops, partial(emulator.enabled, seed))


ROPE = RopeConfig(10_000.0, 32)
GQA_32, DENSE = GQAConfig(4, 2, 32, ROPE), MLPConfig(96)
GQA_64 = partial(GQAConfig, rope=RopeConfig(10_000.0, 64), head_dim=64)
MLA = MLAConfig(4, 48, 64, 128, 128, RopeConfig(10_000.0, 64, interleaved=True), 192**-0.5)
MIXTRAL = MoEConfig(8, 2, 48)
GLM = MoEConfig(
    16, 4, 24, "sigmoid", scale=1.5, correction_bias=True, float32_router=True, shared=MLPConfig(24)
)  # fmt: skip
DEEPSEEK = replace(GLM, num_groups=4, top_groups=2, group_top_k=2)


class Case(NamedTuple):
    """What distinguishes a model."""

    hidden_size: int
    layers: tuple[LayerConfig, ...]

    @property
    def routed(self) -> bool:
        return any(isinstance(layer.ffn, MoEConfig) for layer in self.layers)

    @property
    def dense(self) -> bool:
        return any(layer.ffn == DENSE or layer.ffn.shared for layer in self.layers)

    @property
    def whole(self) -> set[str]:
        """The ops that its layers take without a cache."""
        ops = {"embedding", "rms_norm", "rope", "attention"}
        return ops | ({"swiglu"} if self.dense else set()) | (MOE_OPS if self.routed else set())

    @property
    def serving(self) -> set[str]:
        """Those that they take with one, for many tokens and for few."""
        stores = (STORES[type(layer.attention)] for layer in self.layers)
        of_few = (FEW_OPS if self.dense else FEW_OPS - {"norm_swiglu"}) | (FEW_MOE_OPS if self.routed else set())
        return self.whole.union(of_few, *stores) - {"rope", "attention"}


CASES = {
    "32": Case(64, (LayerConfig(GQA_32, DENSE),) * 2),
    "64-window": Case(128, tuple(LayerConfig(GQA_64(4, 1, window=window, qkv_bias=True), DENSE) for window in (9, 70))),
    "64-norm": Case(
        64, tuple(LayerConfig(GQA_64(2, 2, window=window, qk_norm="head"), DENSE) for window in (None, 33))
    ),
    "mixtral": Case(64, (LayerConfig(GQA_32, MIXTRAL),) * 2),
    "research": Case(64, (LayerConfig(GQA_32, replace(MIXTRAL, num_experts=4, shared=MLPConfig(48))),) * 2),
    "qwen3-moe": Case(64, (LayerConfig(GQA_64(2, 1, qk_norm="head"), replace(MIXTRAL, top_k=3)),) * 2),
    "glm-4-moe": Case(64, (LayerConfig(GQA_32, DENSE), LayerConfig(replace(GQA_32, rope=RopeConfig(1e4, 16)), GLM))),
    "deepseek-v3": Case(64, (LayerConfig(MLA, DENSE), LayerConfig(replace(MLA, q_rank=None), DEEPSEEK))),
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture
def model(case: Case) -> Model:
    torch.manual_seed(0)
    model = Model(ModelConfig(V, case.hidden_size, 512, 1e-5, case.hidden_size == 64, case.layers)).eval()
    with torch.no_grad():
        randomize(dict(model.named_parameters()))
    return model


class Called(TorchDispatchMode):
    """Inside, the ops that are called are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.name().removeprefix("pyllama::"))
        return function(*args, **(kwargs or {}))


def sequences_of(*lengths: int) -> list[list[int]]:
    pick = random.Random(sum(lengths))
    return [[pick.randrange(V) for _ in range(length)] for length in lengths]


@contextmanager
def serving(kernels: Kernels, ops: set[str]) -> Iterator[None]:
    """Inside, every op that has a kernel runs it; these ops must be called, of which some have one."""
    name = {"cpu": "emulated", "cuda": "cuda"}[kernels.device]
    with kernels.active(), Called() as called:
        assert {op for op in OPS if implementation(op, kernels.device) == name} == set(kernels.ops)
        yield
    assert called.names >= ops
    assert ops & set(kernels.ops)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float32_writes_eager_tokens(
    options: dict[str, Any], case: Case, model: Model, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ragged batch, prefilled in pieces: a pass ends one prompt, continues another, and may begin a third."""
    monkeypatch.setattr(context, "PREFILL_TOKENS", 50)
    model.to(kernels.device)
    prompts = sequences_of(1, 20, PAGE_SIZE, PAGE_SIZE + 1, 33)
    write = partial(pyllama.generate, model, prompts, max_new_tokens=12, routing=case.routed, **options)
    with pyllama.eager():
        expected = [(out.token_ids, out.expert_load) for out in write()]
    with serving(kernels, case.serving | {"advance_", "sample" if options else "norm_argmax_"}):
        found = [(out.token_ids, out.expert_load) for out in write()]
    assert found == expected
    assert len({tuple(tokens) for tokens, _ in found}) == len(prompts)  # they do not all write the same


# New tokens of three sequences, pass by pass: prompts in chunks, prompts beside decoding, decoding alone.
PASSES = [(64, 30, 0), (7, 1, 5), (1, 40, 1), *[(1, 1, 1)] * 6]


@torch.inference_mode()
def cached_logits(model: Model, sequences: list[list[int]]) -> Tensor:
    """[N, V]: after each pass, of each sequence's last token. What nobody wrote to the cache must not be read."""
    width = max(pages_for(len(sequence)) for sequence in sequences)
    cache = PagedCache(model.config, 3 * width, model.device, model.dtype)
    for layer in cache.layers:
        layer.fill_(float("nan"))
    pages = random.Random(0).sample(range(3 * width), 3 * width)
    block_table = torch.tensor(pages, dtype=torch.int32, device=model.device).view(3, width)
    done, logits = [0, 0, 0], []
    for news in PASSES:
        active = [b for b in range(3) if news[b]]
        tokens = [token for b in active for token in sequences[b][done[b] : done[b] + news[b]]]
        done = [before + new for before, new in zip(done, news, strict=True)]
        batch = Batch.from_lengths([news[b] for b in active], [done[b] for b in active], block_table[active], PAGE_SIZE)
        logits.append(model.run(torch.tensor(tokens, device=model.device), batch, cache))
    return torch.cat(logits)


@torch.inference_mode()
def whole_logits(model: Model, sequences: list[list[int]]) -> Tensor:
    """[T, V] of the sequences without a cache."""
    return torch.cat([model(torch.tensor([sequence], device=model.device))[0] for sequence in sequences])


@pytest.mark.parametrize("logits", [cached_logits, whole_logits])
def test_bfloat16_is_as_near_to_float64_as_eager(
    logits: Callable[[Model, list[list[int]]], Tensor], case: Case, model: Model, kernels: Kernels
) -> None:
    """Logits of given tokens, in mixed batches over a cache and of whole sequences."""
    model.to(kernels.device, torch.bfloat16)
    sequences = sequences_of(*(sum(news) for news in zip(*PASSES, strict=True)))
    with pyllama.eager():
        exact = logits(copy.deepcopy(model).double(), sequences)
        eager = logits(model, sequences)
    with serving(kernels, case.serving if logits is cached_logits else case.whole):
        found = logits(model, sequences)
    assert found.dtype == torch.bfloat16
    # With experts the median token's: where two experts are as good, rounding decides, and changes all of a token.
    squares = [(x.double() - exact).square().mean(dim=-1) for x in (found, eager)]
    found_error, eager_error = ((x.median() if case.routed else x.mean()).sqrt().item() for x in squares)
    assert eager_error < 0.05 * exact.std().item()  # the three are the same model
    assert found_error <= ERROR_FACTOR * eager_error


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed twice"])
def test_gradients_are_those_of_eager_bodies(again: bool, case: Case, model: Model, kernels: Kernels) -> None:
    """Kernels forward, recomputation backward, in float32."""
    model.to(kernels.device).train()
    token_ids = torch.tensor(sequences_of(70, 70), device=kernels.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients() -> list[Tensor]:
        loss = model(token_ids, token_ids, activation_checkpointing=again).loss
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    with pyllama.eager():
        expected = gradients()
    with serving(kernels, case.whole | {f"{op}_backward" for op in ("embedding", "attention", "rms_norm")}):
        found = gradients()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
