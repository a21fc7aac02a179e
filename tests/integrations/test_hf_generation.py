"""transformers' generate with pyllama's attention and experts: the same tokens and logits as with its own."""

from __future__ import annotations

import pytest
import torch
from hf_models import CONFIGS, REFERENCE, assert_same, model_of, padding, tokens, use
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

NONE = padding(7, (0, 7), (0, 7), (0, 7))
LEFT = padding(7, (4, 7), (0, 7), (1, 7))
NEW = 8


def generated(model: PreTrainedModel, attention: str, mask: Tensor, **options: object) -> dict[str, Tensor]:
    use(model, attention)
    out = model.generate(
        tokens(*mask.shape),
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return {"tokens": out.sequences, "logits": torch.stack(out.logits)}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("mask", [NONE, LEFT], ids=["whole", "left-padded"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(family: str, mask: Tensor, cache: str | None) -> None:
    """Windows of 4 and 5 tokens are filled long before the last of 15."""
    model = model_of(CONFIGS[family]).eval()
    expected, found = (generated(model, name, mask, cache_implementation=cache) for name in (REFERENCE, "pyllama"))
    assert torch.equal(found["tokens"], expected["tokens"])
    assert_same(found, expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_from_one_padded_row(family: str, cache: str | None) -> None:
    """Whose positions begin again and again, which does not make it packed."""
    model = model_of(CONFIGS[family]).eval()
    expected, found = (generated(model, name, LEFT[:1], cache_implementation=cache) for name in (REFERENCE, "pyllama"))
    assert torch.equal(found["tokens"], expected["tokens"])
    assert_same(found, expected)


def test_a_mask_as_long_as_a_static_cache() -> None:
    model, ids = model_of(CONFIGS["llama"]).eval(), tokens(3, 7)
    mask = torch.cat([LEFT, torch.ones(3, 5, dtype=torch.long)], dim=1)
    logits = []
    for attention in (REFERENCE, "pyllama"):
        use(model, attention)
        past = StaticCache(config=model.config, max_cache_len=12)
        prompt = model(ids, attention_mask=mask, past_key_values=past).logits[LEFT.bool()]
        logits.append(
            {"prompt": prompt.detach(), "next": model(ids[:, :1], attention_mask=mask, past_key_values=past).logits}
        )
    assert_same(logits[1], logits[0])


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral"])
def test_beams(family: str) -> None:
    model = model_of(CONFIGS[family]).eval()
    expected, found = (generated(model, name, LEFT, num_beams=3)["tokens"] for name in (REFERENCE, "pyllama"))
    assert torch.equal(found, expected)


def test_generate_compiled_with_a_static_cache() -> None:
    """As generate does by itself on a GPU."""
    model = model_of(CONFIGS["llama"]).eval()
    compiling = CompileConfig(backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    expected = generated(model, REFERENCE, LEFT)["tokens"]
    found = generated(model, "pyllama", LEFT, cache_implementation="static", compile_config=compiling)["tokens"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "deepseek_v3"])
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_of_a_prompt(family: str, cache: type, padded: bool) -> None:
    """Several tokens on top of a cache, in chunks that fill windows and go past them."""
    model, ids = model_of(CONFIGS[family]).eval(), tokens(3, 12)
    mask = padding(12, (5, 12), (0, 12), (2, 12)) if padded else torch.ones(3, 12, dtype=torch.long)
    use(model, REFERENCE)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    use(model, "pyllama")
    past = cache(config=model.config, **({"max_cache_len": 14} if cache is StaticCache else {}))
    found, begin = [], 0
    for length in (3, 3, 5, 1):
        end = begin + length
        out = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end] if padded else None,
            position_ids=positions[:, begin:end],
            past_key_values=past,
        )
        found.append(out.logits)
        begin = end
    kept = mask.bool()
    assert_same({"logits": torch.cat(found, dim=1)[kept].detach()}, {"logits": expected[kept].detach()})
