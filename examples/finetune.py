"""Fine-tunes a checkpoint on a text file.

    python examples/finetune.py demo TEXT.txt build/tuned              # a folder, a Hub id or "demo"
    pyllama generate build/tuned "If the file"
    torchrun --nproc-per-node 2 examples/finetune.py ...               # data parallel: one process for each GPU

The text's last tokens are held out; the others are cut into sequences of --context tokens, in another order every
epoch. A special token written out in the text is that token, so the model's own may stand between documents. OUTPUT
becomes a checkpoint in Hugging Face's layout, with the record of the training (training.json) and a picture of its
loss (loss.png). Until then OUTPUT.state has the training as it was at the last interval: after Ctrl-C, a kill or a
full disk, the same command goes on from there, and on a CPU to the very bits of a training without a break.

--dtype is what the model computes in. The optimizer moves weights of float32 at least, of which a model in bfloat16
is a rounded copy; it has gradients of its own type, and is what is saved.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import (
    Plan,
    StateFile,
    draw,
    learning_rate,
    rank,
    sequences,
    shuffled,
    summed,
    total_nats,
    train,
    write_result,
)

import pyllama
from pyllama.balance import new_loads, update_correction_biases
from pyllama.cli.app import one_line_errors
from pyllama.config import MoEConfig
from pyllama.model import Model
from pyllama.save import new_target

BETAS = (0.9, 0.95)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float64")}


@dataclass(frozen=True)
class Options:
    """What the result depends on, beside model and text."""

    steps: int
    batch: int
    micro_batch: int
    processes: int
    context: int
    lr: float
    warmup: float
    weight_decay: float
    clip: float
    held_out: float
    interval: int
    seed: int
    device: str
    dtype: str
    activation_checkpointing: bool


class Tuner:
    """A model in training: gradients by one process or several, AdamW for weights of float32 at least."""

    def __init__(self, model: Model, options: Options) -> None:
        """model: in the data type of the weights that the optimizer moves; is cast to the one to compute in."""
        self.model, self.options = model.train(), options
        dtype = DTYPES[options.dtype]
        # What needs no gradient (correction biases) keeps its type. A parameter of the right type is its own master.
        self.masters: dict[str, Tensor] = {}
        self.trained: list[tuple[nn.Parameter, Tensor]] = []
        for name, parameter in model.named_parameters():
            narrow = parameter.requires_grad and parameter.dtype != dtype
            self.masters[name] = nn.Parameter(parameter.detach()) if narrow else parameter
            if narrow:
                parameter.data = parameter.data.to(dtype)
            if parameter.requires_grad:
                self.trained.append((parameter, self.masters[name]))
        masters = [master for _, master in self.trained]
        groups = [
            {"params": [m for m in masters if m.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [m for m in masters if m.ndim == 1], "weight_decay": 0.0},  # norms and biases
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=options.lr, betas=BETAS)
        experts = [layer.ffn for layer in model.config.layers if isinstance(layer.ffn, MoEConfig)]
        self.aux_loss_coef = experts[0].aux_loss_coef if experts else None
        biased = any(ffn.correction_bias for ffn in experts)
        self.loads = new_loads(model.config, device=model.device) if biased else None
        parallel = DistributedDataParallel(model) if dist.is_initialized() else None
        self.forward = parallel or model
        self.without_reduction = parallel.no_sync if parallel else nullcontext

    def step(self, batch: Tensor, progress: float) -> tuple[float, float | None]:
        """One step on int64 [B, T], of which each process computes its share: cross entropy, load-balancing loss."""
        options = self.options
        parts = batch.unflatten(0, (-1, options.processes, options.micro_batch))[:, rank()].to(self.model.device)
        totals = torch.zeros(2, dtype=torch.float64, device=self.model.device)
        for i, part in enumerate(parts, start=1):
            with nullcontext() if i == len(parts) else self.without_reduction():
                out = self.forward(
                    part,
                    labels=part,
                    loads=self.loads,
                    balance_group=dist.group.WORLD if dist.is_initialized() else None,
                    activation_checkpointing=options.activation_checkpointing,
                )
                (out.loss / len(parts)).backward()
            totals += torch.stack((out.loss, out.loss if out.aux_loss is None else out.aux_loss)).detach()
        self._move(learning_rate(progress + 0.5 / options.steps, options.warmup))  # the step's middle: never 0
        loss, aux_loss = (summed(total) / len(parts) / options.processes for total in totals.tolist())
        if self.aux_loss_coef is None:
            return loss, None
        return loss - self.aux_loss_coef * aux_loss, aux_loss

    def _move(self, factor: float) -> None:
        """Moves the weights along the gradients, at this share of the learning rate."""
        for parameter, master in self.trained:
            assert parameter.grad is not None
            master.grad = parameter.grad.to(master.dtype)
        nn.utils.clip_grad_norm_([master for _, master in self.trained], self.options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * factor
        self.optimizer.step()
        for parameter, master in self.trained:
            parameter.data.copy_(master.data)
            parameter.grad = master.grad = None
        if self.loads is not None:
            update_correction_biases(self.model, self.loads)
            self.loads.zero_()

    def state_dict(self) -> dict[str, Any]:
        """All that steps change."""
        weights = {name: master.detach() for name, master in self.masters.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes it as it was when `state_dict` was called."""
        for name, parameter in self.model.named_parameters():
            self.masters[name].copy_(state["weights"][name])
            parameter.copy_(self.masters[name])
        self.optimizer.load_state_dict(state["optimizer"])


# The text


def read_text(file: Path) -> str:
    """The file's text. Raises ValueError where it has none, or is not UTF-8."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def encode(text: str, model: Model) -> Tensor:
    """Token ids, int64 [N]. Raises ValueError where the model has no tokenizer, or it has more tokens."""
    if model.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer.json, so it cannot read a text")
    tokens = torch.tensor(model.tokenizer.encode(text))
    if tokens.max() >= model.config.vocab_size:
        raise ValueError(f"the text has token {tokens.max()}, and the model only {model.config.vocab_size} tokens")
    return tokens


def split(tokens: Tensor, share: float, context: int) -> tuple[Tensor, Tensor]:
    """The sequences to train on, and those of the last `share` of the tokens. Raises ValueError if there are none."""
    count = math.floor(share * len(tokens))
    for what, size in (("to train on", len(tokens) - count), ("held out", count)):
        if size < context:
            raise ValueError(
                f"of the text's {len(tokens):,} tokens {size:,} are {what} (--held-out {share:g}), too few for one "
                f"sequence of {context:,}: a longer text, a shorter --context or another --held-out is needed"
            )
    training, held_out = tokens[:-count], tokens[-count:]
    return sequences(training, context), sequences(held_out, context)


# The command


def digest(config: Mapping[str, Any], tensors: Iterable[Tensor]) -> str:
    """What tells one source or text from another."""
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for tensor in tensors:
        found.update(tensor.detach().cpu().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


@contextmanager
def memory_hint() -> Iterator[None]:
    """Says what to do where memory does not suffice; torch has no class of its own for that on a CPU."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise MemoryError(
            "out of memory: a smaller --micro-batch or --context, or --activation-checkpointing, needs less"
            f" ({str(error).splitlines()[0]})"
        ) from error


def join(device: str | None) -> torch.device:
    """The device of this process, which torchrun may have started with others to train with."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not dist.is_torchelastic_launched():
        return chosen
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    if chosen.type == "cpu":
        return chosen
    torch.cuda.set_device(dist.get_node_local_rank())
    return torch.device("cuda", torch.cuda.current_device())


def main(
    source: Annotated[str, typer.Argument(help="A folder with a checkpoint, a Hugging Face Hub id, or 'demo'.")],
    text: Annotated[Path, typer.Argument(help="A text file in UTF-8.")],
    output: Annotated[Path, typer.Argument(help="The new checkpoint's folder.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the optimizer; instead of --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(min=0, help="Times that the text is seen (1 if not given).")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 8,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences that a process computes at once (if not given: all of its own)."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Of a sequence, in tokens (if not given: 1024, or what the model has).")
    ] = None,
    lr: Annotated[float, typer.Option(min=0, help="The highest learning rate.")] = 2e-5,
    warmup: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the steps in which it grows.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of matrices.")] = 0.1,
    clip: Annotated[float, typer.Option(min=0, help="The largest norm of the gradients; inf: any.")] = 1.0,
    held_out: Annotated[float, typer.Option(min=0, max=1, help="Share of the text, its end.")] = 0.05,
    interval: Annotated[int, typer.Option(min=1, help="Steps between held-out losses, and saved states.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of sequences, and of dropout.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (if not given: a GPU where there is one).")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64"], typer.Option(help="What the model computes in.")
    ] = "float32",
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Less memory, more time.")
    ] = False,
) -> None:
    """Fine-tunes the checkpoint SOURCE on a text; the same command goes on where a training was stopped."""
    with one_line_errors(), memory_hint():
        if steps is not None and epochs is not None:
            raise ValueError("--steps and --epochs both say how long to train: give one of them")
        target = new_target(output)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = read_text(text)
        place = join(device)
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if batch % (unit := processes * (micro_batch or 1)):
            raise ValueError(f"--batch {batch} is not a multiple of {unit}, the processes times --micro-batch")
        model = pyllama.load(source, place, torch.promote_types(DTYPES[dtype], torch.float32))
        context = context or min(1024, model.config.max_positions)
        if context > model.config.max_positions:
            raise ValueError(f"--context {context} is more than the model's {model.config.max_positions}")
        tokens = encode(content, model)
        training, kept = split(tokens, held_out, context)
        options = Options(
            steps=steps or max(1, math.ceil((1 if epochs is None else epochs) * len(training) / batch)),
            batch=batch,
            micro_batch=micro_batch or batch // processes,
            processes=processes,
            context=context,
            lr=lr,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            held_out=held_out,
            interval=interval,
            seed=seed,
            device=place.type,
            dtype=dtype,
            activation_checkpointing=activation_checkpointing,
        )
        origin = model.origin.values if model.origin else {}
        identity = {"source": digest(origin, model.parameters()), "text": digest({}, [tokens]), **asdict(options)}
        names = {"checkpoint": source, "text_file": str(text)}
        run(Tuner(model, options), training, kept, StateFile.beside(target, identity), target, names)
    if dist.is_initialized():
        dist.barrier()  # nobody goes while another still needs it
        dist.destroy_process_group()


def run(
    tuner: Tuner, training: Tensor, held_out: Tensor, states: StateFile, output: Path, names: dict[str, str]
) -> None:
    """Trains on the rows of one tensor, measures on those of the other, writes the result; names: for its record."""
    model, options = tuner.model, tuner.options
    console = Console(highlight=False, markup=False, quiet=rank() > 0)
    weights = sum(master.nbytes for master in tuner.masters.values())
    states.check_room(3 * weights)  # with the optimizer's two moments
    console.print(
        f"{sum(weight.numel() for weight in model.parameters()):,} parameters; {len(training):,} sequences of "
        f"{options.context} tokens to train on, {len(held_out):,} held out; {options.steps:,} steps of {options.batch}",
        soft_wrap=True,
    )
    milestones = [step / options.steps for step in range(0, options.steps, options.interval)]
    plan = Plan(options.steps, [*milestones, 1.0], seed=options.seed)

    def held_out_loss() -> float:
        own = [(row, 1) for row in held_out[rank() :: options.processes]]
        return summed(total_nats(model, own, options.micro_batch * options.context)) / held_out[:, 1:].numel()

    history = train(tuner, shuffled(training, options.batch, options.seed), held_out_loss, plan, states, console)

    def write(folder: Path) -> None:
        model.save(folder)
        record = {
            **names,
            **states.options,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyllama": pyllama.__version__,
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine(),
            "seconds": round(history.seconds, 1),
            "tokens": history.tokens,
            "unit": plan.unit,
            "load_balancing_loss": history.balance,
            "held_out_history": history.held_out,
            "training_history": history.training,
        }
        (folder / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        draw(history, plan, folder / "loss.png")

    if rank() > 0:
        return
    write_result(output, write, states)
    losses = [loss for _, loss in history.held_out]
    console.print(f"held-out loss: {losses[0]:.3f} before, {losses[-1]:.3f} after; written to {output}", soft_wrap=True)
    if min(losses) < losses[-1]:
        console.print(f"it was {min(losses):.3f} on the way: fewer steps or a lower learning rate may do better")


if __name__ == "__main__":
    typer.run(main)
