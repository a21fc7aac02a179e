"""The kernels inside transformers' models, emulated and on a GPU, against eager bodies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from emulated import EMULATOR
from hf_models import COMMON, EXPERTS, LATENT, model_of, padding, tokens, use
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV3Config, MistralConfig, PreTrainedConfig, Qwen3MoeConfig

import pyllama

SIZES = {**COMMON, "hidden_size": 64, "head_dim": 32}
LATENT_SIZES = {
    **LATENT,
    "hidden_size": 64,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 64,
}
CONFIGS = {
    "experts": Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4),  # its routers' weights are bfloat16
    "window": MistralConfig(**SIZES, sliding_window=5),
    "latent": DeepseekV3Config(**LATENT_SIZES, n_group=2, topk_group=1),
}
MASK = padding(11, (4, 11), (0, 8), (0, 11))


class Kernels(NamedTuple):
    device: str
    active: Callable[[], AbstractContextManager[None]]


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    emulator = request.config.stash[EMULATOR]
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return Kernels("cuda", nullcontext)
    if emulator is None:
        pytest.skip("no emulated kernels")
    return Kernels("cpu", partial(emulator.enabled, emulator.seeds[0]))


class Called(TorchDispatchMode):
    """Which of pyllama's ops ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "pyllama":
            self.ops.add(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def results(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Tensor]]:
    model = model_of(config, torch.float32).to(device, dtype)
    use(model, "pyllama")
    ids, mask = tokens(3, 11).to(device), MASK.to(device)
    for name, given in (("whole", None), ("padded", mask)):
        model.zero_grad()
        logits = model(ids, attention_mask=given).logits
        logits[mask.bool()].float().sin().sum().backward()
        yield f"{name} logits", logits[mask.bool()].detach()
        for parameter, value in model.named_parameters():
            yield f"{name} {parameter}", value.grad.clone()
    packed = {"position_ids": torch.tensor([[*range(4), *range(1), *range(6)]], device=device), "use_cache": False}
    yield "packed", model(ids[:1], **packed).logits.detach()
    options = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True}
    for cache in (None, "static"):
        out = model.generate(
            ids,
            attention_mask=mask.flip(1),
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        yield f"generated, cache {cache}", torch.stack(out.logits)[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels(name: str, dtype: torch.dtype, kernels: Kernels) -> None:
    if name == "latent" and dtype is torch.float32:
        pytest.skip("no such kernel")
    with pyllama.eager():
        expected = dict(results(CONFIGS[name], dtype, kernels.device))
    with kernels.active(), Called() as called:
        found = dict(results(CONFIGS[name], dtype, kernels.device))
    wanted = {"attention"} if name == "window" else {"attention", "moe_dispatch", "grouped_swiglu", "moe_combine"}
    assert wanted <= called.ops
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    for result, tensor in expected.items():
        assert (found[result] - tensor).float().norm() <= tolerance * tensor.float().norm(), result
