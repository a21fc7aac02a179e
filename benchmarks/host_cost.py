"""What a step of decoding costs the host beside the model and the choice of tokens, per step in microseconds.

    python -m benchmarks.host_cost [--config tests/configs/Llama-3.2-1B-Instruct] [--output benchmarks/results]

The embedded model, or a random one of a real one's size, streams from prompts of 16 tokens; medians over steps.
step: from one step to the next. model, sampling: inside `Model.run` and `Sampler.choose`, or `Model.run_greedily`
alone, which graphs replace. waiting: for the device. host: the rest of the step. device (GPU only): from event to event
around a step's work, where so many steps are ahead that the device never waits for the host: the least that a step can
take.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer

import pyllama
from benchmarks.model_check import random_model
from benchmarks.results import Results
from pyllama import generation
from pyllama.architectures import read_config
from pyllama.model import Model
from pyllama.sampling import Sampler
from pyllama.step import Decoding

PROMPT_TOKENS = 16
WARM_UP = 8  # steps that load kernels and are captured
TIMED = {
    "model": ((Model, "run"), (Model, "run_greedily")),
    "sampling": ((Sampler, "choose"),),
    "waiting": ((torch.cuda.Event, "synchronize"),),
}
SAMPLING: dict[str, dict[str, Any]] = {"greedy": {}, "top-p": {"temperature": 0.8, "top_p": 0.95, "seed": 0}}


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, an attribute is what `make` makes of it."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def host_microseconds(write: Callable[[], object]) -> dict[str, float]:
    """Medians over the steps of `write`, by what they were spent on."""
    spent: Counter[str] = Counter()
    began: list[Counter[str]] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += perf_counter() - start

        return call

    def noted(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(decoding: Decoding) -> Any:
            began.append(Counter(spent, step=perf_counter()))
            return step(decoding)

        return call

    with ExitStack() as stack:
        for name, owner, attribute in ((name, *one) for name, timed_ones in TIMED.items() for one in timed_ones):
            stack.enter_context(replaced(owner, attribute, partial(timed, name)))
        stack.enter_context(replaced(Decoding, "step", noted))
        write()
    rows = []
    for before, after in zip(began[WARM_UP:-1], began[WARM_UP + 1 :], strict=True):
        row = {name: 1e6 * (after[name] - before[name]) for name in ("step", *TIMED)}
        rows.append(row | {"host": row["step"] - sum(row[name] for name in TIMED)})
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def device_microseconds(write: Callable[[], object]) -> float:
    """Median over the steps of `write` on a GPU."""
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def marked(begin: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            begin(*args)
            end.record()
            events.append((start, end))

        return call

    with (
        replaced(Decoding, "_begin", marked),
        replaced(generation, "Decoding", lambda decoding: partial(decoding, ahead=WARM_UP)),
    ):
        write()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in events[WARM_UP:])


def measure(model: Model, batch: int, steps: int, options: dict[str, Any]) -> dict[str, float]:
    """A row's figures."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (batch, PROMPT_TOKENS), generator=generator).tolist()

    def write() -> None:
        pyllama.generate(model, prompts, max_new_tokens=WARM_UP + steps, ignore_eos=True, **options)

    write()
    figures = host_microseconds(write)
    return figures | ({"device": device_microseconds(write)} if model.device.type == "cuda" else {})


def main(
    config: Annotated[Path | None, typer.Option(help="folder with a config.json [the embedded model]")] = None,
    steps: Annotated[int, typer.Option(min=2)] = 200,
    batch: Annotated[list[int], typer.Option(min=1)] = [1, 8],  # noqa: B006  typer takes lists only
    output: Path = Path(__file__).parent / "results",
) -> None:
    if config is None:
        model = pyllama.load("demo")
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = random_model(read_config(json.loads((config / "config.json").read_text()))[0], device, torch.bfloat16)
    results = Results(output / "host_cost.jsonl")
    for sequences in batch:
        for name, options in SAMPLING.items():
            figures = measure(model, sequences, steps, options)
            results.add(
                model="demo" if config is None else config.name,
                batch=sequences,
                sampling=name,
                **{f"{what}_us": round(value, 1) for what, value in figures.items()},
                steps=steps,
                threads=torch.get_num_threads(),
            )
    results.show("us of a step, medians; host: beside the model, sampling and waiting")


if __name__ == "__main__":
    typer.run(main)
