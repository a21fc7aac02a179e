"""Trains the model that comes with pyllama, on the text that every Python comes with.

    python examples/train_demo.py                       # 2 CPU cores, at most 45 minutes; writes build/demo
    python examples/train_demo.py --steps 20 --tiny     # a trial run

The output folder is a checkpoint in Hugging Face's layout that `pyllama.load` reads, with the record of the training
(training.json) and a picture of the loss curve. Held-out bits per byte stand beside those of a byte 4-gram model.
A training that was stopped goes on, from the last evaluation, when the same command is run again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from corpus import num_bytes, read_corpus
from kneser_ney import KneserNey
from muon import Muon
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from training import Plan, StateFile, draw, learning_rate, sequences, total_nats, train, write_result

import pyllama
from pyllama.architectures import read_config
from pyllama.cli.app import one_line_errors
from pyllama.model import Model
from pyllama.save import Origin, new_target

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
    while True:
        stream = torch.cat([documents[i][1:] for i in rng.permutation(len(documents))])
        rows = sequences(stream, recipe.context)
        for chosen in torch.from_numpy(rng.permutation(len(rows))).split(recipe.batch):
            if len(chosen) == recipe.batch:
                yield rows[chosen]


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


def model_bits(model: Model, documents: list[Tensor], tokens_at_once: int = 4096) -> float:
    """Bits that documents (from `encode`) cost, their ends included."""
    pieces = list(windows(documents, model.config.max_positions))
    return total_nats(model, pieces, tokens_at_once) / math.log(2)


class Trainer:
    """One model in training: gradients by threads, Muon for the layers' matrices, AdamW for the rest."""

    def __init__(self, recipe: Recipe, threads: int):
        self.recipe = recipe
        config, _ = read_config(config_json(recipe))
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
        factor = learning_rate(progress, self.recipe.warmup)
        for optimizer, lr in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
        return loss, aux_loss

    def state_dict(self) -> dict[str, Any]:
        """All that steps change."""
        return {"model": self.model.state_dict(), "optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes it as it was when `state_dict` was called."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def save(trainer: Trainer, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the checkpoint."""
    tokens = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "add_bos_token": True}
    files = {
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
        "tokenizer_config.json": {**tokens, "tokenizer_class": "PreTrainedTokenizerFast"},
    }
    with tempfile.TemporaryDirectory() as name:
        for file, values in files.items():
            Path(name, file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(f"{name}/tokenizer.json")
        trainer.model.origin = Origin(config_json(trainer.recipe), Path(name))
        trainer.model.save(folder, dtype="bfloat16")


def main(
    output: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path("build/demo"),
    picture: Annotated[
        Path | None, typer.Option(help="Picture of the loss curve (if not given: OUTPUT/loss.png).")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps (if not given: the recipe's).")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Stop by then, having trained for fewer steps.")] = 42.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads; the result is the same for any number.")] = 2,
    tiny: Annotated[bool, typer.Option("--tiny", help="A model of no use, quickly.")] = False,
) -> None:
    """Trains the demo model and writes it as a checkpoint."""
    with one_line_errors():
        run(new_target(output), picture, TINY if tiny else Recipe(), steps, minutes, threads)


def run(output: Path, picture: Path | None, recipe: Recipe, steps: int | None, minutes: float, threads: int) -> None:
    """As `main`."""
    console = Console(highlight=False, markup=False)
    recipe = dataclasses.replace(recipe, steps=steps or recipe.steps)
    torch.set_num_threads(1)  # the trainer's threads do not share ops
    output.parent.mkdir(parents=True, exist_ok=True)

    corpus = read_corpus()
    training_bytes, held_out_bytes = num_bytes(corpus.training), num_bytes(corpus.held_out)
    console.print(f"corpus: {training_bytes:,} bytes, {held_out_bytes:,} held out, sha256 {corpus.sha256[:16]}")
    training_text, held_out_text = ([text.encode() for text in texts] for texts in (corpus.training, corpus.held_out))
    baselines = {order: KneserNey(training_text, order).bits(held_out_text) / held_out_bytes for order in (4, 6)}
    console.print(", ".join(f"byte {order}-gram: {bits:.3f} bits/byte" for order, bits in baselines.items()))

    tokenizer = train_tokenizer(corpus.training, recipe.vocab_size)
    documents, held_out = encode(tokenizer, corpus.training), encode(tokenizer, corpus.held_out)
    trainer = Trainer(recipe, threads)
    parameters = sum(parameter.numel() for parameter in trainer.parameters)
    console.print(f"model: {parameters:,} parameters")
    plan = Plan(
        recipe.steps,
        [(i + 1) / recipe.evaluations for i in range(recipe.evaluations)],
        unit="bits/byte",
        scale=sum(len(ids) - 1 for ids in documents) / training_bytes / math.log(2),
        minutes=minutes,
    )
    states = StateFile.beside(output, {"corpus": corpus.sha256, **dataclasses.asdict(recipe), "minutes": minutes})
    history = train(
        trainer,
        batches(documents, recipe),
        lambda: model_bits(trainer.model, held_out) / held_out_bytes,
        plan,
        states,
        console,
    )

    def write(folder: Path) -> None:
        save(trainer, tokenizer, folder)
        # What is recorded is the checkpoint's quality, rounded to bfloat16, as everybody loads it.
        bits = model_bits(pyllama.load(folder, device="cpu", dtype="float32"), held_out) / held_out_bytes
        console.print(f"held-out: {bits:.3f} bits/byte (byte 4-gram: {baselines[4]:.3f})")
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
            "steps": history.steps,
            "tokens": history.tokens,
            "seconds": round(history.seconds),
            "threads": threads,
            "load_balancing_loss": round(history.balance or 0.0, 4),
            "torch": torch.__version__,
            "recipe": dataclasses.asdict(recipe),
            "held_out_history": [[tokens, round(bits, 4)] for tokens, bits in history.held_out],
        }
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        lines = {"held-out, byte 4-gram (Kneser-Ney)": baselines[4]}
        draw(history, plan, picture or folder / "loss.png", lines)

    write_result(output, write, states)
    console.print(f"written to {output}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
