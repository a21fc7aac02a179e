"""Trains the model that comes with pyllama, on the text that every Python comes with.

    python examples/train_demo.py                       # 2 CPU cores, at most 45 minutes; writes build/demo
    python examples/train_demo.py --steps 20 --tiny     # a trial run

The output folder is a checkpoint in Hugging Face's layout that `pyllama.load` reads, with the record of the training
(training.json) and a picture of the loss curve. Held-out bits per byte stand beside those of a byte 4-gram model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from corpus import Corpus, num_bytes, read_corpus
from kneser_ney import KneserNey
from muon import Muon
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import pyllama
from pyllama.architectures import read_config
from pyllama.model import Model
from pyllama.save import unstack

END_OF_TEXT = "<|endoftext|>"  # before and after every document; id 0


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    vocab_size: int = 1536
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 3
    num_kv_heads: int = 1
    num_experts: int = 8
    num_experts_per_token: int = 2
    expert_size: int = 64
    shared_expert_size: int = 64
    context: int = 512

    steps: int = 1330  # about 8 epochs: held-out text gains nothing from more
    batch: int = 8  # sequences of `context` tokens a step
    micro_batch: int = 2  # sequences that a thread computes at a time: few enough to stay in its cache
    muon_lr: float = 0.015
    adam_lr: float = 0.008
    weight_decay: float = 0.1
    warmup: float = 0.02  # share of the training; then the learning rate falls linearly to 0
    aux_loss_coef: float = 0.01
    evaluations: int = 10
    seed: int = 0


TINY = Recipe(
    vocab_size=320, hidden_size=64, num_layers=2, num_heads=1, num_experts=4, expert_size=32, shared_expert_size=32,
    context=64, steps=20, batch=4, evaluations=1,
)  # fmt: skip


def config_json(recipe: Recipe) -> dict[str, Any]:
    """The checkpoint's config.json."""
    return {
        "architectures": ["LlamaMoeForCausalLM"],
        "model_type": "llama_moe",
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_kv_heads,
        "head_dim": 64,
        "hidden_act": "silu",
        "num_local_experts": recipe.num_experts,
        "num_experts_per_tok": recipe.num_experts_per_token,
        "norm_topk_prob": True,
        "moe_intermediate_size": recipe.expert_size,
        "shared_expert_intermediate_size": recipe.shared_expert_size,
        "router_aux_loss_coef": recipe.aux_loss_coef,
        "max_position_embeddings": recipe.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "bfloat16",
    }


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., arXiv:1508.07909) with GPT-2's splitting into words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[Tensor]:
    """Token ids of each document, int64, begun and ended by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return [torch.tensor([end, *e.ids, end]) for e in tokenizer.encode_batch(documents, add_special_tokens=False)]


@torch.no_grad()
def initialize(model: Model, seed: int) -> None:
    """Normal weights by the size of their input; layers begin as the identity, their last product being 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        elif name.startswith("embedding"):
            parameter.normal_(std=0.02, generator=generator)
        elif ".down" in name or ".out." in name:
            parameter.zero_()
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)


def batches(documents: list[Tensor], recipe: Recipe) -> Iterator[Tensor]:
    """Endless batches, int64 [batch, context]: every epoch the documents in another order, end to end, cut."""
    rng = np.random.default_rng(recipe.seed)
    stride = recipe.context - 1  # the last token is predicted here and is the first of the next sequence
    while True:
        stream = torch.cat([documents[i][1:] for i in rng.permutation(len(documents))])
        sequences = stream.unfold(0, recipe.context, stride)
        for rows in torch.from_numpy(rng.permutation(len(sequences))).split(recipe.batch):
            if len(rows) == recipe.batch:
                yield sequences[rows]


def windows(documents: list[Tensor], context: int) -> Iterator[tuple[Tensor, int]]:
    """Pieces of documents (from `encode`) that fit the context, each with the first token to be predicted in it.

    Pieces of one document overlap by half of the context; each of its tokens, the first excepted, is predicted once.
    """
    for ids in documents:
        first = 1
        while first < len(ids):
            start = 0 if first == 1 else first - context // 2
            yield ids[start : start + context], first - start
            first = start + context


@torch.no_grad()
def model_bits(model: Model, documents: list[Tensor], tokens_at_once: int = 4096) -> float:
    """Bits that documents (from `encode`) cost, their ends included."""
    nats = 0.0
    pieces = sorted(windows(documents, model.config.max_positions), key=lambda piece: len(piece[0]))
    while pieces:
        count = max(1, tokens_at_once // len(pieces[-1][0]))  # the longest first, with others of similar length
        chosen, pieces = pieces[-count:], pieces[:-count]
        token_ids = pad_sequence([ids for ids, _ in chosen], batch_first=True)  # causal: what follows changes nothing
        labels = pad_sequence([ids for ids, _ in chosen], batch_first=True, padding_value=-100)
        for row, (_, first) in zip(labels, chosen, strict=True):
            row[:first] = -100
        logits = model(token_ids)[:, :-1].flatten(0, 1).float()
        nats += F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum").item()
    return nats / math.log(2)


class Trainer:
    """One model in training: gradients by threads, Muon for the layers' matrices, AdamW for the rest."""

    def __init__(self, recipe: Recipe, threads: int):
        self.recipe = recipe
        config, self.table = read_config(config_json(recipe))
        self.model = Model(config)
        initialize(self.model, recipe.seed)
        self.parameters = list(self.model.parameters())
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            matrix = name.startswith("layers") and parameter.ndim > 1 and ".router." not in name
            (matrices if matrix else others).append(parameter)
        self.optimizers: dict[torch.optim.Optimizer, float] = {
            Muon(matrices, lr=0.0, weight_decay=recipe.weight_decay): recipe.muon_lr,
            torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0): recipe.adam_lr,
        }
        # Ops on tensors this small are too short to be split among threads: each thread has its own sequences.
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def gradients(self, sequences: Tensor) -> tuple[float, float, tuple[Tensor, ...]]:
        """Cross entropy per token, load-balancing loss, and the gradient of each parameter."""
        out = self.model(sequences, labels=sequences)
        gradients = torch.autograd.grad(out.loss, self.parameters)
        aux_loss = out.aux_loss.item()
        return out.loss.item() - self.recipe.aux_loss_coef * aux_loss, aux_loss, gradients

    def step(self, batch: Tensor, progress: float) -> tuple[float, float]:
        """One step at `progress` in [0, 1] of the training: cross entropy per token, load-balancing loss.

        Gradients are summed in the order of the sequences, so the number of threads changes nothing.
        """
        parts = batch.split(self.recipe.micro_batch)
        loss = aux_loss = 0.0
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for part_loss, part_aux_loss, gradients in self.pool.map(self.gradients, parts):
            loss += part_loss / len(parts)
            aux_loss += part_aux_loss / len(parts)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad.add_(gradient, alpha=1 / len(parts))  # type: ignore[union-attr]
        factor = min(progress / self.recipe.warmup, (1 - progress) / (1 - self.recipe.warmup))
        for optimizer, lr in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
        return loss, aux_loss


@dataclass
class History:
    """What is measured on the way, the tokens seen so far beside each value."""

    training: list[tuple[int, float]]  # cross entropy, bits per byte
    held_out: list[tuple[int, float]]  # bits per byte


def train(
    trainer: Trainer, corpus: Corpus, tokenizer: Tokenizer, minutes: float, console: Console
) -> tuple[History, float, float]:
    """Trains for the recipe's steps, or as many as fit `minutes`: history, seconds, last load-balancing loss."""
    recipe = trainer.recipe
    documents, held_out = encode(tokenizer, corpus.training), encode(tokenizer, corpus.held_out)
    bits_per_nat = sum(len(ids) - 1 for ids in documents) / num_bytes(corpus.training) / math.log(2)
    history = History([], [])
    columns = (
        BarColumn(), TextColumn("{task.percentage:3.0f}%  loss {task.fields[loss]:.3f} bits/byte"),
        TextColumn("held-out {task.fields[held_out]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    start = time.monotonic()
    step, tokens, smooth, aux_loss, done = 0, 0, math.nan, math.nan, 0.0
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=1.0, loss=math.nan, held_out=math.nan, speed=0.0)
        for batch in batches(documents, recipe):
            loss, aux_loss = trainer.step(batch, done)
            step, tokens = step + 1, tokens + batch.numel()
            smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
            seconds = time.monotonic() - start
            # Steps decide, so that a training repeats; the clock only where they would take too long.
            done = min(max(step / recipe.steps, seconds / (60 * minutes)), 1.0)
            history.training.append((tokens, loss * bits_per_nat))
            if done >= (len(history.held_out) + 1) / recipe.evaluations:
                bits = model_bits(trainer.model, held_out) / num_bytes(corpus.held_out)
                history.held_out.append((tokens, bits))
                bar.update(task, held_out=bits)
                console.print(
                    f"{step} steps, {tokens:,} tokens, {seconds:.0f} s: training {smooth * bits_per_nat:.3f}, "
                    f"held-out {bits:.3f} bits/byte, load-balancing loss {aux_loss:.3f}"
                )
            bar.update(task, completed=done, loss=smooth * bits_per_nat, speed=tokens / seconds)
            if done == 1.0:
                break
    return history, time.monotonic() - start, aux_loss


def save(trainer: Trainer, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the checkpoint."""
    tokens = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "add_bos_token": True}
    files = {
        "config.json": config_json(trainer.recipe),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
        "tokenizer_config.json": {**tokens, "tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        tensors |= unstack(trainer.table, trainer.model.config, name, parameter.detach().to(torch.bfloat16))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def draw(history: History, baseline: float, file: Path) -> None:
    """The picture of the loss curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    window = max(1, len(history.training) // 100)
    tokens, losses = np.array(history.training).T
    means = np.convolve(losses, np.ones(window) / window, "valid")
    axes.plot(tokens[window - 1 :] / 1e6, means, color="tab:gray", linewidth=1, label="training")
    axes.plot(*(np.array(history.held_out).T / [[1e6], [1]]), "o-", color="tab:blue", label="held-out")
    axes.axhline(baseline, color="tab:red", linestyle="--", label="held-out, byte 4-gram (Kneser-Ney)")
    axes.set(xlabel="million tokens", ylabel="bits per byte", ylim=(None, min(losses.max(), 2 * baseline)))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def main(
    output: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path("build/demo"),
    picture: Annotated[Path | None, typer.Option(help="Picture of the loss curve [OUTPUT/loss.png].")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps [the recipe's].")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Stop by then, having trained for fewer steps.")] = 42.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads; the result is the same for any number.")] = 2,
    tiny: Annotated[bool, typer.Option("--tiny", help="A model of no use, quickly.")] = False,
) -> None:
    """Trains the demo model and writes it as a checkpoint."""
    console = Console()
    recipe = TINY if tiny else Recipe()
    recipe = dataclasses.replace(recipe, steps=steps or recipe.steps)
    torch.set_num_threads(1)  # the trainer's threads do not share ops
    output.mkdir(parents=True, exist_ok=True)

    corpus = read_corpus()
    training_bytes, held_out_bytes = num_bytes(corpus.training), num_bytes(corpus.held_out)
    console.print(f"corpus: {training_bytes:,} bytes, {held_out_bytes:,} held out, sha256 {corpus.sha256[:16]}")
    training_text, held_out_text = ([text.encode() for text in texts] for texts in (corpus.training, corpus.held_out))
    baselines = {order: KneserNey(training_text, order).bits(held_out_text) / held_out_bytes for order in (4, 6)}
    console.print(", ".join(f"byte {order}-gram: {bits:.3f} bits/byte" for order, bits in baselines.items()))

    tokenizer = train_tokenizer(corpus.training, recipe.vocab_size)
    trainer = Trainer(recipe, threads)
    parameters = sum(parameter.numel() for parameter in trainer.parameters)
    console.print(f"model: {parameters:,} parameters")
    history, seconds, aux_loss = train(trainer, corpus, tokenizer, minutes, console)
    save(trainer, tokenizer, output)

    # What is recorded is the checkpoint's quality, rounded to bfloat16, as everybody loads it.
    loaded = pyllama.load(output, device="cpu", dtype="float32")
    bits = model_bits(loaded, encode(tokenizer, corpus.held_out)) / held_out_bytes
    record = {
        "python": platform.python_version(),
        "corpus_sha256": corpus.sha256,
        "training_documents": len(corpus.training),
        "training_bytes": training_bytes,
        "held_out_documents": len(corpus.held_out),
        "held_out_bytes": held_out_bytes,
        "held_out_bits_per_byte": round(bits, 4),
        "kneser_ney_bits_per_byte": {f"{order}-gram": round(bits, 4) for order, bits in baselines.items()},
        "parameters": parameters,
        "steps": len(history.training),
        "tokens": history.training[-1][0],
        "seconds": round(seconds),
        "threads": threads,
        "load_balancing_loss": round(aux_loss, 4),
        "torch": torch.__version__,
        "recipe": dataclasses.asdict(recipe),
        "held_out_history": [[tokens, round(bits, 4)] for tokens, bits in history.held_out],
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draw(history, baselines[4], picture or output / "loss.png")
    console.print(f"held-out: {bits:.3f} bits/byte (byte 4-gram: {baselines[4]:.3f}); written to {output}")


if __name__ == "__main__":
    typer.run(main)
