"""LongRoPE's two sets of factors: the reference takes the long ones for a whole sequence once it is long enough.

So at one step of decoding the keys so far are computed anew.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder import Decoder
from families import draw, write
from recorded import Recorded
from transformers import Phi3ForCausalLM

import pyllama
from pyllama import context, generation, step
from pyllama.cache import PAGE_SIZE
from pyllama.model import Model

ORIGINAL = 40  # tokens; prompts of this many and more begin with the long factors or go over to them at once
LENGTHS = [1, 25, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, PAGE_SIZE + 6]
NEW = 30


@pytest.fixture(scope="module", params=[None, 9], ids=["full", "window"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Phi3ForCausalLM:
    """Phi-3 with factors so different that the wrong ones change the tokens."""
    config: dict[str, Any] = draw("phi3", 0) | {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "sliding_window": request.param,
        "original_max_position_embeddings": ORIGINAL,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 6,
            "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
        },
    }
    folder = tmp_path_factory.mktemp("phi3")
    model = write(folder, config)
    assert isinstance(model, Phi3ForCausalLM)
    model.name_or_path = str(folder)
    return model


@pytest.fixture(scope="module")
def model(reference: Phi3ForCausalLM) -> Model:
    return pyllama.load(reference.name_or_path, device="cpu")


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [torch.randint(211, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


def greedy(reference: Phi3ForCausalLM, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    return out[0, len(prompt) :].tolist()


def test_greedy_tokens_equal_transformers(model: Model, reference: Phi3ForCausalLM) -> None:
    """Sequences of a ragged batch go over to the long factors at different steps, and as they do alone."""
    prompts = prompts_of(LENGTHS)
    expected = [greedy(reference, prompt) for prompt in prompts]
    assert [pyllama.generate(model, prompt, NEW).token_ids for prompt in prompts] == expected
    assert [out.token_ids for out in pyllama.generate(model, prompts, NEW)] == expected
    assert [out.token_ids for out in pyllama.generate(model, prompts, NEW, use_cache=False)] == expected


@pytest.mark.parametrize("most", [7, 17, 64])
def test_prompts_and_what_is_computed_anew_in_several_passes(
    most: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of([*LENGTHS, 2 * ORIGINAL])
    expected = [out.token_ids for out in pyllama.generate(model, prompts, NEW, use_cache=False)]
    monkeypatch.setattr(context, "PREFILL_TOKENS", most)
    assert [out.token_ids for out in pyllama.generate(model, prompts, NEW)] == expected


def test_samples_that_share_a_prompt(model: Model) -> None:
    """They share the prompt's full pages; some end before the others go over."""
    prompts = prompts_of([20, PAGE_SIZE + 3, ORIGINAL - 2])
    options: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 3, "max_new_tokens": NEW}
    free = [[out.token_ids for out in outs] for outs in pyllama.generate(model, prompts, **options, use_cache=False)]
    assert [[out.token_ids for out in outs] for outs in pyllama.generate(model, prompts, **options)] == free
    options["stop_token_ids"] = [free[0][1][5], free[2][0][1]]
    stopped = pyllama.generate(model, prompts, **options)
    assert len({len(out.token_ids) for outs in stopped for out in outs}) > 2
    for outs, whole in zip(stopped, free, strict=True):
        for out, tokens in zip(outs, whole, strict=True):
            assert out.token_ids == tokens[: len(out.token_ids)]


@pytest.mark.parametrize(("ahead", "graphs"), [(1, False), (1, True), (3, True)])
def test_steps_that_are_read_late_and_replayed(
    ahead: int, graphs: bool, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed anew needs the tokens so far, of which the last is still on the device."""
    prompts = prompts_of(LENGTHS)
    options: dict[str, Any] = {"n": 2, "temperature": 0.8, "seed": 5, "max_new_tokens": NEW}
    expected = [[out.token_ids for out in outs] for outs in pyllama.generate(model, prompts, **options)]
    monkeypatch.setattr(step, "Graphs", Recorded)
    monkeypatch.setattr(generation, "Decoding", partial(step.Decoding, ahead=ahead, graphs=graphs))
    assert [[out.token_ids for out in outs] for outs in pyllama.generate(model, prompts, **options)] == expected


def test_the_factors_matter(model: Model, reference: Phi3ForCausalLM) -> None:
    """Else the tests above could not fail: keys that were not computed anew would give other tokens."""
    prompts = prompts_of(LENGTHS)
    kept = [step.Decoding(model, [prompt], [NEW], pyllama.SamplingParams(max_new_tokens=NEW)) for prompt in prompts]
    for decoding in kept:
        decoding._switch = None
    found = [[decoding.step()[0].id for _ in range(NEW)] for decoding in kept]
    expected = [greedy(reference, prompt) for prompt in prompts]
    assert [tokens == wanted for tokens, wanted in zip(found, expected, strict=True)].count(True) <= 3


@torch.no_grad()
@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1])
def test_logits_at_the_border(length: int, model: Model, reference: Phi3ForCausalLM) -> None:
    token_ids = torch.tensor(prompts_of([length]))
    exact = Decoder(Path(reference.name_or_path))(token_ids[0])
    reference_error = (reference(token_ids).logits[0] - exact).abs().max()
    assert reference_error < 1e-4 * exact.std()
    assert (model(token_ids)[0] - exact).abs().max() <= 3 * reference_error
