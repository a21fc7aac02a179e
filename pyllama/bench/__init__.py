"""How fast a model generates here, beside what the device can do and beside transformers: `pyllama bench`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pyllama.architectures import read_config
from pyllama.bench.engines import Engine, EngineError, Pyllama, Timing, Transformers, random_model
from pyllama.bench.figures import Row, figures, peak_memory, random_prompts, reset_peak_memory
from pyllama.bench.limits import measure_limits
from pyllama.bench.origin import commit, device_name, package_version
from pyllama.bench.profile import write_profile
from pyllama.bench.shapes import SHAPES, Values, find_shape, first_layers
from pyllama.bench.work import Cell, active_parameters, cache_bytes, prompt_work, step_work
from pyllama.cache import free_memory
from pyllama.checkpoint import parse_dtype
from pyllama.config import ModelConfig
from pyllama.loader import check_kernels_take, configured_dtype, find_folder, load, read_folder, target_device
from pyllama.ops.registry import OPS, implementation

DOES_NOT_FIT = "does not fit"
CONTEXTS = (128, 2048)  # by default, those of them that the model holds


class Bench:
    """A model that is ready to be measured, and what there is to say of it.

    source: what `pyllama.load` takes; with random_weights a shape of the table or a folder with a config.json.
    batches, contexts: each pair is a row; contexts None: `CONTEXTS`. new_tokens: for each sequence, 2 at least.
    layers: how many of the model's first layers random weights are made for; None: all. compare: with transformers,
    where it is installed. rounds: whose median counts. say: is told what is being done.

    Raises what `load` raises; ValueError for a shape that there is not, and for contexts that are too long, before
    anything is loaded; MemoryError when the model does not fit.
    """

    def __init__(
        self,
        source: str,
        batches: Sequence[int] = (1, 4, 16),
        contexts: Sequence[int] | None = None,
        new_tokens: int = 64,
        device: str | None = None,
        dtype: str | None = None,
        random_weights: bool = False,
        layers: int | None = None,
        compare: bool = True,
        rounds: int = 3,
        ignore_config_keys: Iterable[str] = (),
        say: Callable[[str], None] = lambda what: None,
    ) -> None:
        _check_source(source, random_weights, layers)
        chosen, folder = parse_dtype(dtype), None
        if random_weights and source in SHAPES:
            whole = SHAPES[source]
        elif random_weights and source != "demo" and not Path(source).is_dir():
            whole = find_shape(source)
        else:
            folder = find_folder(source, ignore_config_keys)
            whole = read_folder(folder, ignore_config_keys)[0]
        values = whole if layers is None else first_layers(whole, layers)
        config, _ = read_config(values, ignore_config_keys)
        self.cells = _cells(config, batches, contexts, new_tokens)
        self._target, self._rounds, self._say = target_device(device), rounds, say
        say(f"loads {source}")
        if random_weights:
            chosen = chosen or _own_dtype(values, self._target)
            check_kernels_take(chosen, self._target)
            model = random_model(config, self._target, chosen)
        else:
            model = load(source, device, dtype, ignore_config_keys)
        say("measures the device")
        self._limits = measure_limits(self._target, model.dtype)
        self._vocab_size = config.vocab_size
        self._works = {cell: (prompt_work(model, cell), step_work(model, cell)) for cell in self.cells}
        self._cache_bytes = {cell: cache_bytes(model, cell) for cell in self.cells}
        self._ours = Pyllama(model)
        self._peer: Transformers | None = None
        peer = self._compare(values, None if random_weights else folder) if compare else "not asked for"
        self.about = {
            "model": source,
            "weights": "random" if random_weights else "the checkpoint's",
            "layers": len(config.layers),
            "layers_of_the_model": whole.get("num_hidden_layers"),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "active_parameters": round(active_parameters(model)),
            "weight_bytes": self._ours.weight_bytes,
            "dtype": str(model.dtype).removeprefix("torch."),
            "new_tokens": new_tokens,
            "rounds": rounds,
            **self._origin(),
            "transformers": peer,
        }

    def _origin(self) -> dict[str, Any]:
        return {
            "device": device_name(self._target),
            "read_bytes_per_second": self._limits.bytes_per_second,
            "product_flops_per_second": self._limits.flops_per_second,
            "ops": dict(Counter(implementation(op, self._target) for op in OPS)),
            "pyllama": package_version("pyllama"),
            "commit": commit(Path(__file__).parents[2]),
            "torch": torch.__version__,
            "date": datetime.now(timezone.utc).date().isoformat(),
        }

    def _compare(self, values: Values, folder: Path | None) -> str:
        """Prepares transformers' model; what there is to say of it."""
        assert self._ours.model is not None
        count = sum(parameter.numel() for parameter in self._ours.model.parameters() if parameter.requires_grad)
        try:
            peer = Transformers(values, folder, count, self._target, self._ours.model.dtype)
            beside = self._ours.weight_bytes + max(self._cache_bytes.values()) <= free_memory(self._target)
            if beside:
                self._say("builds transformers' model")
                peer.build()
        except EngineError as error:
            return f"left out: {error}"
        self._peer = peer
        return f"{peer.how}; " + ("in turns" if beside else "after pyllama, beside which it does not fit")

    def rows(self) -> Iterator[Row]:
        """A row for each cell and engine, as soon as it is known."""
        peer = self._peer
        if peer is None or peer.weight_bytes:
            yield from self._measured([self._ours] if peer is None else [self._ours, peer])
            return
        yield from self._measured([self._ours])
        self._ours.release()
        self._say("builds transformers' model")
        try:
            peer.build()
        except EngineError as error:
            yield from (Row(peer.name, cell, None, str(error)) for cell in self.cells)
        else:
            yield from self._measured([peer])

    def profile(self, folder: Path) -> None:
        """Writes a trace of some steps of the first cell, and the table of its kernels. Before the model is let go."""
        assert self._ours.model is not None
        self._say("profiles")
        cell = self.cells[0]
        write_profile(self._ours.model, random_prompts(cell, self._vocab_size), self._limits, folder)

    def _measured(self, engines: Sequence[Engine]) -> Iterator[Row]:
        for cell in self.cells:
            if self._cache_bytes[cell] > free_memory(self._target):
                yield from (Row(engine.name, cell, None, DOES_NOT_FIT) for engine in engines)
            else:
                yield from self._cell(engines, cell)

    def _cell(self, engines: Sequence[Engine], cell: Cell) -> Iterator[Row]:
        """Medians of rounds in which each engine has its turn, after one that warms up."""
        prompts = random_prompts(cell, self._vocab_size)
        timings: dict[str, list[Timing]] = {engine.name: [] for engine in engines}
        problems: dict[str, str] = {}
        peaks: dict[str, int | None] = {}
        for turn in range((self._rounds + 1) * len(engines)):
            number, engine = turn // len(engines), engines[turn % len(engines)]
            if engine.name in problems:
                continue
            what = f"round {number} of {self._rounds}" if number else "warms up"
            self._say(f"{engine.name}, batch {cell.batch}, context {cell.context}: {what}")
            others = sum(other.weight_bytes for other in engines if other is not engine)
            counted = reset_peak_memory(self._target)
            try:
                timing = engine.run(prompts, cell.new_tokens)
            except (MemoryError, torch.OutOfMemoryError):
                problems[engine.name] = DOES_NOT_FIT
            except EngineError as error:
                problems[engine.name] = str(error)
            else:
                peak = peak_memory(self._target) if counted else None  # else it would be an earlier one's
                peaks[engine.name] = None if peak is None else peak - others
                timings[engine.name] += [timing] * (number > 0)
        for name in timings:
            if name in problems:
                yield Row(name, cell, None, problems[name])
            else:
                yield Row(name, cell, figures(cell, timings[name], self._works[cell], self._limits, peaks[name]))


def _check_source(source: str, random_weights: bool, layers: int | None) -> None:
    if layers is not None and not random_weights:
        raise ValueError("--layers is for --random-weights: a checkpoint is measured whole")
    if source in SHAPES and not random_weights and not Path(source).exists():
        raise ValueError(f"{source} is a shape without weights: add --random-weights, or give a checkpoint's folder")


def _cells(
    config: ModelConfig, batches: Sequence[int], contexts: Sequence[int] | None, new_tokens: int
) -> tuple[Cell, ...]:
    """Shorter contexts first: transformers never makes its static cache smaller again."""
    longest = config.max_positions - new_tokens
    if contexts is None:
        contexts = [context for context in CONTEXTS if context <= longest]
    too_long = [context for context in contexts if context > longest]
    if too_long or not contexts:
        raise ValueError(
            f"the model holds {config.max_positions} tokens, {new_tokens} new ones included, so a context may have "
            f"1 to {longest}, got {', '.join(map(str, too_long or CONTEXTS))}; give others, or fewer new tokens"
        )
    return tuple(Cell(batch, context, new_tokens) for context in sorted(contexts) for batch in batches)


def _own_dtype(values: Values, device: torch.device) -> torch.dtype:
    """As `load` chooses: float32 on a CPU, on a GPU the checkpoint's own."""
    return configured_dtype(values) if device.type == "cuda" else torch.float32
