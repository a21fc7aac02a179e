"""What is measured: a pyllama model, and transformers' model of the same configuration beside it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from sys import maxsize
from textwrap import shorten
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyllama.bench.limits import synchronize
from pyllama.bench.origin import package_version
from pyllama.cache import free_memory
from pyllama.config import ModelConfig
from pyllama.generation import generate
from pyllama.loader import empty_model
from pyllama.model import Model


class Timing(NamedTuple):
    prompt_seconds: float  # until every sequence has its first new token
    generation_seconds: float  # from then until each has its last


class EngineError(Exception):
    """Another library cannot run this; the message is a line that says why."""


class Engine(Protocol):
    name: str

    @property
    def weight_bytes(self) -> int:
        """That it holds now."""

    def run(self, prompts: Sequence[list[int]], new_tokens: int) -> Timing:
        """Continues all prompts greedily by so many tokens each. Raises EngineError or MemoryError."""


class Pyllama:
    name = "pyllama"

    def __init__(self, model: Model) -> None:
        self.model: Model | None = model

    @property
    def weight_bytes(self) -> int:
        return _bytes(self.model)

    def run(self, prompts: Sequence[list[int]], new_tokens: int) -> Timing:
        assert self.model is not None
        completions = generate(self.model, prompts, max_new_tokens=new_tokens, ignore_eos=True)
        return Timing(
            max(completion.prompt_seconds for completion in completions),
            max(completion.generation_seconds for completion in completions),
        )

    def release(self) -> None:
        """Lets the model go, and its memory."""
        self.model = None
        gc.collect()
        torch.cuda.empty_cache()  # nothing where no GPU was used


class Transformers:
    """transformers' `generate`, as it is fastest without more than torch: on a GPU with a static cache, its forward
    pass compiled, on a CPU with its default cache and no compilation.

    values: config.json's. folder: whose weights it takes; None: random ones. parameters: that its model must have,
    or it is another model. Raises EngineError where it is not installed or does not know the configuration.
    """

    name = "transformers"

    def __init__(
        self,
        values: dict[str, Any],
        folder: Path | None,
        parameters: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        version = package_version("transformers") if find_spec("transformers") else None
        if version is None:
            raise EngineError("not installed")
        shape = {key: value for key, value in values.items() if key not in ("auto_map", "quantization_config")}
        try:
            self._library: Any = import_module("transformers")
            self._config = self._library.AutoConfig.for_model(**shape)
        except Exception as error:  # its own, of many kinds
            raise EngineError(_reason(error)) from error
        self._folder, self._parameters, self._device, self._dtype = folder, parameters, device, dtype
        self._model: Any = None
        self._sizes: tuple[int, ...] = ()  # of the last run
        static = device.type == "cuda"
        self._cache = "static" if static else "dynamic"
        self.how = f"{version}, {'static cache, compiled' if static else 'dynamic cache, not compiled'}"

    @property
    def weight_bytes(self) -> int:
        return _bytes(self._model)

    def build(self) -> None:
        """Makes or reads the model. Raises EngineError."""
        auto = self._library.AutoModelForCausalLM
        try:
            if self._folder is not None:
                model = auto.from_pretrained(self._folder, dtype=self._dtype).to(self._device)
            else:
                with torch.device(self._device):  # where its random weights are made
                    model = auto.from_config(self._config, dtype=self._dtype)
        except Exception as error:
            raise EngineError(_reason(error)) from error
        found = sum(parameter.numel() for parameter in model.parameters())
        if found != self._parameters:
            raise EngineError(f"its model has {found:,} parameters, pyllama's {self._parameters:,}")
        options = {"do_sample": False, "cache_implementation": self._cache, "pad_token_id": 0}
        model.generation_config = self._library.GenerationConfig(**options)  # without an EOS token
        self._model = model.eval()

    def run(self, prompts: Sequence[list[int]], new_tokens: int) -> Timing:
        ids_BT = torch.tensor(prompts, device=self._device)
        if self._sizes != (sizes := (*ids_BT.shape, new_tokens)):
            # Or torch.compile would make sizes dynamic from the second on, and give up after eight.
            torch.compiler.reset()
            self._sizes = sizes
        first: list[float] = []

        def clock(ids_BT: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            """Called after each token; it stops nothing."""
            if not first:
                synchronize(self._device)
                first.append(perf_counter())
            return torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)

        start = perf_counter()
        try:
            out_BT = self._model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=new_tokens,
                stopping_criteria=self._library.StoppingCriteriaList([clock]),
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise EngineError(_reason(error)) from error
        synchronize(self._device)
        end = perf_counter()
        if out_BT.shape != (len(prompts), ids_BT.shape[1] + new_tokens):
            raise EngineError(f"it wrote {out_BT.shape[1] - ids_BT.shape[1]} tokens, not {new_tokens}")
        return Timing(first[0] - start, end - first[0])


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Model:
    """A model with weights as at the start of training: sublayers keep their inputs' size, tied embeddings do not
    repeat tokens. They are made on the device, so that peak memory is the model.

    Raises MemoryError before anything is allocated if it does not fit, saying how many layers do.
    """
    model = empty_model(config, maxsize)  # no files to hold it against
    # What no gradient trains is float32, as in loaded models.
    dtypes = {n: dtype if p.requires_grad else torch.float32 for n, p in model.named_parameters()}
    _check_fits(model, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        weight = weights[name] = torch.empty(parameter.shape, dtype=dtypes[name], device=device)
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
        elif not parameter.requires_grad:
            weight.zero_()
        else:
            std = 0.02 if name.startswith("embedding") else parameter.shape[-1] ** -0.5
            weight.normal_(std=std, generator=generator)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _check_fits(model: Model, device: torch.device, dtype: torch.dtype) -> None:
    sizes = [sum(p.numel() for p in layer.parameters()) * dtype.itemsize for layer in model.layers]
    needed, free = sum(p.numel() for p in model.parameters()) * dtype.itemsize, free_memory(device)
    if needed <= free:
        return
    room, fitting = free - (needed - sum(sizes)), 0
    while sizes[fitting] <= room:
        room -= sizes[fitting]
        fitting += 1
    raise MemoryError(
        f"random weights in {dtype} need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}; "
        + (f"--layers {fitting} leaves no more than fits" if fitting else "not even one layer fits")
    )


def _bytes(model: torch.nn.Module | None) -> int:
    return 0 if model is None else sum(parameter.nbytes for parameter in model.parameters())


def _reason(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 100, placeholder=" ...")
