"""Kernels that start before the ones ahead of them have ended (programmatic dependent launch), as ThreadSanitizer sees
them: whatever they touch before they wait is a race. In every flavour, a block that never waits is an error.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from conftest import Implementation
from emulated import EMULATOR
from test_graphs import results, taken
from torch import Tensor

from pyllama.batch import Batch
from pyllama.cache import PAGE_SIZE, PagedCache
from pyllama.config import GQAConfig, LayerConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig, RopeConfig
from pyllama.model import Model
from pyllama.ops.advance import advance_
from pyllama.ops.registry import OPS
from pyllama.sampling import Sampler, SamplingParams

DTYPES = (torch.float32, torch.bfloat16)
# Those of a step of decoding, and `attention`, which shares kernels. All others wait for the end of what is ahead.
CHAIN = {"embedding", "advance_", "decode_attention_", "norm_rope_store_", "paged_attention", "attention", "sample"}
CHAIN |= {"norm_linear", "norm_swiglu", "linear_add_", "norm_gate", "norm_argmax_", "experts_swiglu"}
CHAIN |= {"experts_add_", "mla_rope_store_", "mla_paged_attention"}
EARLY = {"weight", "norm_weight", "bias", "indices", "weights"}  # what an op may read early where its caller says so


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    emulator = metafunc.config.stash[EMULATOR]
    kernels = [Implementation("emulated", "cpu", emulator, seed) for seed in emulator.seeds] if emulator else []
    if "op" in metafunc.fixturenames:
        every = [(op, one, dtype) for op in (emulator.ops if emulator else ()) for one in kernels for dtype in DTYPES]
        ids = [f"{op}-{one}-{str(dtype)[6:]}" for op, one, dtype in every]
        metafunc.parametrize(("op", "kernels", "dtype"), every, ids=ids)
    else:
        metafunc.parametrize("kernels", kernels, ids=str)


def test_nothing_else_is_touched_early(op: str, kernels: Implementation, dtype: torch.dtype) -> None:
    """A kernel ahead writes every argument, but for those that may be read early."""
    emulator = kernels.emulator
    assert emulator is not None
    names = [argument.name for argument in OPS[op].overload._schema.arguments]
    checked = overlapped = 0
    for args in import_module(f"test_{op.rstrip('_')}").examples(dtype):
        with torch.inference_mode(), kernels.active():
            if not taken(op, args):
                continue
            expected = results(op, copy.deepcopy(args))
            named = dict(zip(names, args))  # noqa: B905  trailing arguments may be missing
            early = named.get("early", False)
            with emulator.overlapping() as count:
                given = {name: value for name, value in named.items() if isinstance(value, Tensor)}
                emulator.touch(value for name, value in given.items() if not (early and name in EARLY))
                found = results(op, args)
                overlapped += count()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        checked += 1
    assert checked
    assert (overlapped > 0) == (op in CHAIN)


ROPE = RopeConfig(10_000.0, 32)
GQA, MLP, MOE = GQAConfig(4, 2, 32, ROPE), MLPConfig(96), MoEConfig(8, 2, 48, shared=MLPConfig(24))
MLA = MLAConfig(4, 48, 64, 128, 128, RopeConfig(10_000.0, 64, interleaved=True), 192**-0.5)
MODELS = {
    "dense": (LayerConfig(GQA, MLP),) * 2,
    "experts": (LayerConfig(GQA, MOE),) * 2,
    "experts alone": (LayerConfig(GQA, replace(MOE, shared=None)),) * 2,
    "latent": (LayerConfig(MLA, MLP),) * 2,
}


@torch.inference_mode()
def decode(model: Model, steps: int) -> list[Tensor]:
    """Logits and tokens of some steps of three sequences, one of which needs a second page; the last is greedy."""
    torch.manual_seed(1)
    cache = PagedCache(model.config, 6, model.device, model.dtype)
    block_table = torch.tensor([[4, 0], [1, 5], [2, 3]], dtype=torch.int32)
    lengths = [1, PAGE_SIZE - 1, 20]
    prompts = [torch.randint(model.config.vocab_size, (length,)) for length in lengths]
    batch = Batch.from_lengths(lengths, lengths, block_table, PAGE_SIZE)
    logits = model.run(torch.cat(prompts), batch, cache)
    sampler = Sampler(
        SamplingParams(temperature=0.9, top_k=50, seed=3),
        [prompt.tolist() for prompt in prompts],
        [3, 4, 5],
        model.config.vocab_size,
        model.device,
    )
    batch = Batch.from_lengths([1] * 3, lengths, block_table, PAGE_SIZE)
    batch = replace(batch, counters=torch.zeros(3 * 3, dtype=torch.int32))
    made = []
    for _ in range(steps):
        tokens = sampler.choose(logits)
        advance_(batch.positions, batch.seq_lens, batch.slots, block_table, PAGE_SIZE)
        logits = model.run(tokens, batch, cache)
        made += [tokens, logits]
    tokens = sampler.choose(logits)
    advance_(batch.positions, batch.seq_lens, batch.slots, block_table, PAGE_SIZE)
    model.run_greedily(tokens, batch, cache)
    return [*made, tokens]


@pytest.mark.parametrize("layers", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_decoding(layers: tuple[LayerConfig, ...], dtype: torch.dtype, kernels: Implementation) -> None:
    """Chains of the kernels as models call them."""
    emulator = kernels.emulator
    assert emulator is not None
    if not set(emulator.ops) >= CHAIN:
        pytest.skip("some kernels were left out of this build")
    torch.manual_seed(0)
    model = Model(ModelConfig(97, 64, 512, 1e-5, True, layers)).eval().to(dtype)
    with kernels.active():
        expected = decode(model, 3)
        with emulator.overlapping() as count:
            found = decode(model, 3)
            assert count() >= 3 * 2 * 5  # of each step and layer
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
