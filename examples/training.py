"""What the examples that train share: the loop, held-out loss, the curve, and a state that survives a kill.

A `Trainer` is a model and how it takes a step. `train` gives it batches, measures the held-out loss at the milestones
of its `Plan` and writes there what is needed to go on. Batches follow from the number of steps taken, random numbers
from that and the seed, so a training that was stopped ends with the very bits of one that was not.

Processes that train together (torchrun) all run the loop; the first one shows and writes.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
import pickle
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyllama.model import Model

RECENT = 20  # steps whose mean loss is shown


class Trainer(Protocol):
    """A model in training."""

    def step(self, batch: Tensor, progress: float) -> tuple[float, float | None]:
        """One step on int64 [B, T], at `progress` in [0, 1) of the training.

        Returns the cross entropy in nats per token, and the load-balancing loss (None without experts).
        """

    def state_dict(self) -> dict[str, Any]:
        """All that steps change, as tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes it as it was when `state_dict` was called."""


@dataclass(frozen=True)
class Plan:
    """How far a training goes, and where it stops to look."""

    steps: int
    milestones: Sequence[float]  # shares of the training at which held-out loss is measured and the state written
    unit: str = "nats/token"
    scale: float = 1.0  # the unit in nats per token
    minutes: float = math.inf  # by then it ends, with fewer steps
    seed: int = 0

    def done(self, history: History) -> float:
        """The share of the training behind. Steps decide, so that it repeats; the clock where they take too long."""
        return min(max(history.steps / self.steps, history.seconds / (60 * self.minutes)), 1.0)


@dataclass
class History:
    """What was measured so far, in the plan's unit, the tokens seen until then beside each value."""

    training: list[tuple[int, float]] = field(default_factory=list)  # cross entropy of each step, before it
    held_out: list[tuple[int, float]] = field(default_factory=list)
    balance: float | None = None  # the last load-balancing loss
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.training)

    @property
    def tokens(self) -> int:
        return self.training[-1][0] if self.training else 0

    @property
    def loss(self) -> float:
        """The mean of the last steps."""
        return statistics.fmean(loss for _, loss in self.training[-RECENT:]) if self.training else math.nan


# Processes


def rank() -> int:
    """This process among those that train together; the first one, which shows and writes, is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def summed(value: float) -> float:
    """The sum over the processes that train together."""
    total = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


# Sequences


def sequences(stream: Tensor, context: int) -> Tensor:
    """Tokens [N] cut into [S, context]: a sequence's last token is the next one's first, so each is predicted once."""
    return stream.unfold(0, context, context - 1)


def shuffled(rows: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches [batch, T] of the rows [S, T]: every epoch holds each once, in an order of its own.

    An epoch may end within a batch, where the next one begins.
    """
    rng = np.random.default_rng(seed)
    order = itertools.chain.from_iterable(rng.permutation(len(rows)).tolist() for _ in itertools.repeat(None))
    while True:
        yield rows[list(itertools.islice(order, batch))]


@torch.no_grad()
def total_nats(model: Model, pieces: Sequence[tuple[Tensor, int]], tokens_at_once: int) -> float:
    """Nats that sequences cost: token ids [T] and the first to be predicted, on about so many tokens at once."""
    nats = 0.0
    training = model.training
    model.eval()
    pieces = sorted(pieces, key=lambda piece: len(piece[0]))
    while pieces:
        count = max(1, tokens_at_once // len(pieces[-1][0]))  # the longest first, with others of similar length
        chosen, pieces = pieces[-count:], pieces[:-count]
        token_ids = pad_sequence([ids for ids, _ in chosen], batch_first=True)  # causal: what follows changes nothing
        labels = pad_sequence([ids for ids, _ in chosen], batch_first=True, padding_value=-100)
        for row, (_, first) in zip(labels, chosen, strict=True):
            row[:first] = -100
        logits = model(token_ids.to(model.device))[:, :-1].flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = labels[:, 1:].flatten().to(model.device)
        nats += F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
    model.train(training)
    return nats


def learning_rate(progress: float, warmup: float) -> float:
    """The share of the highest rate: it grows from 0 over the share `warmup` of the training, then falls to 0."""
    fall = (1 - progress) / (1 - warmup)
    return min(progress / warmup, fall) if warmup else fall


# State


@dataclass(frozen=True)
class StateFile:
    """A training between two milestones, in a file that is always whole.

    options: all that the result depends on; the state of a training with others is refused.
    """

    path: Path
    options: Mapping[str, Any]

    @classmethod
    def beside(cls, output: Path, options: Mapping[str, Any]) -> StateFile:
        """For the training whose result will be the folder `output`."""
        return cls(output.with_name(f"{output.name}.state"), options)

    def restore(self, trainer: Trainer) -> History:
        """Takes the trainer to where the training was; at its beginning, where there is no file.

        Raises ValueError for another training's file, and for one that is damaged.
        """
        for leftover in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.partial"):
            leftover.unlink(missing_ok=True)  # of a run that was killed while it wrote
        if not self.path.exists():
            return History()
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            there = state["options"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path} is not a whole state ({error}): delete it to begin anew") from error
        other = [
            f"{name} is {there.get(name)} there and {self.options.get(name)} here"
            for name in dict.fromkeys([*there, *self.options])
            if there.get(name) != self.options.get(name)
        ]
        if other:
            raise ValueError(
                f"{self.path} is the state of another training: {', '.join(other)}. Give the same options to go on "
                "with it, another output to leave it alone, or delete it to begin anew"
            )
        trainer.load_state_dict(state["trainer"])
        return History(**state["history"])

    def check_room(self, size: int) -> None:
        """Raises OSError where the disk cannot take states of this size: the old one stays until the new is whole."""
        needed = size if self.path.exists() else 2 * size
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OSError(
                f"{self.path} takes {needed / 1e9:.1f} GB at a time, and {free / 1e9:.1f} GB are free on its disk"
            )

    def write(self, trainer: Trainer, history: History) -> None:
        """Replaces the file; whatever happens meanwhile, the old one or the new one is there."""
        if rank() > 0:
            return
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        state = {"options": dict(self.options), "history": asdict(history), "trainer": trainer.state_dict()}
        try:
            with new.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except (OSError, RuntimeError) as error:  # the second is torch's own writer's
            new.unlink(missing_ok=True)
            rest = "the one of an earlier step is still there" if self.path.exists() else "there is none yet"
            raise OSError(
                f"the state of step {history.steps} could not be written to {self.path} ({error}); {rest}. "
                "Make room, then run the same command again to go on"
            ) from error
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name, too, must outlive the machine
        os.close(folder)


# The loop


@contextmanager
def stop_requests(console: Console) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted in the list, for the loop to obey when a step is whole."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if not received:
            console.print("stopping after this step")
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    trainer: Trainer,
    batches: Iterator[Tensor],
    held_out: Callable[[], float],
    plan: Plan,
    states: StateFile,
    console: Console,
) -> History:
    """Trains as planned, from where `states` has it.

    batches: from the first step on; held_out: measures the held-out loss, in the plan's unit.
    Raises KeyboardInterrupt when it was asked to stop and has written its state, ValueError where the loss is not
    a number any more, OSError where the state cannot be written.
    """
    history = states.restore(trainer)
    if history.steps:
        console.print(f"{history.steps} steps were done before: going on from {states.path}", soft_wrap=True)
    batches = itertools.islice(batches, history.steps, None)
    start, start_tokens = time.monotonic(), history.tokens
    seconds_before = history.seconds
    columns = (
        BarColumn(), TextColumn("{task.percentage:3.0f}%  loss {task.fields[loss]:.3f}"),
        TextColumn(f"held-out {{task.fields[held_out]:.3f}} {plan.unit}  {{task.fields[speed]:,.0f}} tokens/s"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar, stop_requests(console) as stop:
        last = history.held_out[-1][1] if history.held_out else math.nan
        task = bar.add_task("training", total=1.0, loss=history.loss, held_out=last, speed=0.0)
        while True:
            done = plan.done(history)
            bar.update(task, completed=done)
            if done >= (*plan.milestones, math.inf)[len(history.held_out)]:
                last = held_out()
                history.held_out.append((history.tokens, last))
                if history.steps:
                    states.write(trainer, history)
                bar.update(task, held_out=last)
                console.print(describe(history, plan), soft_wrap=True)
            if done == 1.0:
                return history
            if summed(len(stop)):
                states.write(trainer, history)
                console.print(
                    f"stopped after {history.steps} steps: the same command goes on from {states.path}", soft_wrap=True
                )
                raise KeyboardInterrupt
            seed = np.random.SeedSequence((plan.seed, history.steps, rank()))
            torch.manual_seed(int(seed.generate_state(1)[0]))
            batch = next(batches)
            loss, history.balance = trainer.step(batch, done)
            if not math.isfinite(loss):
                raise ValueError(f"the loss of step {history.steps + 1} is {loss}: a lower learning rate may help")
            history.training.append((history.tokens + batch.numel(), loss * plan.scale))
            elapsed = time.monotonic() - start
            history.seconds = seconds_before + elapsed
            bar.update(task, loss=history.loss, speed=(history.tokens - start_tokens) / elapsed)


def describe(history: History, plan: Plan) -> str:
    """One line about a milestone."""
    parts = [
        f"{history.steps} steps, {history.tokens:,} tokens, {history.seconds:.0f} s: held-out "
        f"{history.held_out[-1][1]:.3f} {plan.unit}"
    ]
    parts += [f"training {history.loss:.3f}"] if history.steps else []
    parts += [] if history.balance is None else [f"load-balancing loss {history.balance:.3f}"]
    return ", ".join(parts)


# The result


def write_result(output: Path, write: Callable[[Path], None], states: StateFile) -> None:
    """Has `write` make a folder, which becomes `output` when it is whole; only then the state goes.

    Raises OSError, the state being there still, where that fails.
    """
    new = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed here
    try:
        write(new)
        new.rename(output)
        os.sync()
    except (OSError, ValueError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(
            f"the result could not be saved ({error}), but the training is not lost: {states.path} has it. When that "
            "is mended, run the same command again to save it"
        ) from error
    states.path.unlink()


def draw(history: History, plan: Plan, file: Path, lines: Mapping[str, float] | None = None) -> None:
    """The picture of the loss curve; lines: what to compare with, by its name."""
    lines = lines or {}
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    tokens, losses = np.array(history.training).T
    window = max(1, math.isqrt(history.steps) // 2)
    first = window // 2  # means stand in the middle of their steps
    means = np.convolve(losses, np.ones(window) / window, "valid")
    axes.plot(tokens, losses, color="tab:gray", linewidth=1, alpha=0.3)
    axes.plot(tokens[first : first + len(means)], means, color="tab:gray", linewidth=1.5, label="training")
    axes.plot(*np.array(history.held_out).T, "o-", color="tab:blue", markersize=4, label="held-out")
    for name, value in lines.items():
        axes.axhline(value, color="tab:red", linestyle="--", label=name)
    axes.set(xlabel="tokens", ylabel=plan.unit)
    if lines:  # the beginning would leave them little of the picture
        axes.set_ylim(top=min(losses.max(), 2 * max(lines.values())))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)
