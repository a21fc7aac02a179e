"""examples/finetune.py: what it computes, against transformers; what a kill leaves; what it refuses."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import finetune
import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from tiny import VOCAB_SIZE, byte_level_tokenizer, write_checkpoint, write_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM
from typer.testing import CliRunner

import pyllama

SCRIPT = Path(finetune.__file__)
TEXT = Path(__file__).parents[1] / "LICENSE"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # tiny products gain nothing from more

app = typer.Typer()
app.command()(finetune.main)


def words(source: object, text: object, output: object, values: dict[str, Any]) -> list[str]:
    """The command's arguments; True is a flag."""
    options = ([f"--{name.replace('_', '-')}", str(value)] for name, value in ({"device": "cpu"} | values).items())
    return [str(source), str(text), str(output), *(word for option in options for word in option if word != "True")]


def run(source: object, text: object, output: object, **values: Any) -> Result:
    """In this process."""
    return CliRunner().invoke(app, words(source, text, output, values))


def begin(source: object, text: object, output: object, launcher: tuple[str, ...] = (), **values: Any) -> Popen[str]:
    """In a process of its own."""
    command = [sys.executable, *launcher, str(SCRIPT), *words(source, text, output, values)]
    return Popen(command, env=ENVIRONMENT, stdout=PIPE, stderr=PIPE, text=True)


def completed(process: Popen[str]) -> str:
    """What it printed, once it has come to a good end."""
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())


def message(result: Result) -> str:
    """The one line of an error."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.output.splitlines()[-1:] == lines
    return lines[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder, byte_level_tokenizer())
    return folder


def with_experts(folder: Path, dropout: float) -> Path:
    """A checkpoint with experts, their correction biases, and dropout."""
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=1, num_nextn_predict_layers=0, attention_dropout=dropout,
        max_position_embeddings=256, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    Glm4MoeForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, byte_level_tokenizer())
    return folder


# The result


def test_the_demo_learns_a_text(tmp_path: Path) -> None:
    arguments = {"steps": 12, "batch": 4, "context": 64, "lr": 2e-3, "interval": 5, "held_out": 0.1}
    output = completed(begin("demo", TEXT, tmp_path / "tuned", **arguments))
    found = record(tmp_path / "tuned")
    assert [tokens for tokens, _ in found["held_out_history"]] == [0, 5 * 256, 10 * 256, 12 * 256]
    assert [tokens for tokens, _ in found["training_history"]] == list(range(256, 13 * 256, 256))
    losses = [loss for _, loss in found["training_history"]]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.3
    assert found["held_out_history"][-1][1] < found["held_out_history"][0][1] - 0.3
    assert found["load_balancing_loss"] == pytest.approx(2, abs=0.5)
    assert (found["checkpoint"], found["text_file"]) == ("demo", str(TEXT))
    assert (found["steps"], found["lr"], found["torch"]) == (12, 2e-3, torch.__version__)
    assert "12 steps, 3,072 tokens" in output
    assert "tokens/s" in output
    assert (tmp_path / "tuned/loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]
    completion = pyllama.generate(str(tmp_path / "tuned"), "the License", max_new_tokens=4)
    assert 1 <= len(completion.token_ids) <= 4


def test_losses_are_those_of_transformers(source: Path, tmp_path: Path) -> None:
    """A loop of its own, with transformers' model and all that the options say, in float64."""
    context, batch, steps, lr, warmup, clip, decay, seed = 32, 6, 8, 3e-3, 0.3, 6.2, 0.4, 5  # clips half of the steps
    result = run(
        source, TEXT, tmp_path / "tuned", dtype="float64", context=context, batch=batch, micro_batch=2, steps=steps,
        lr=lr, warmup=warmup, clip=clip, weight_decay=decay, seed=seed, held_out=0.2, interval=3,
        activation_checkpointing=True,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = record(tmp_path / "tuned")

    ids = torch.tensor(Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT.read_text()).ids)
    count = int(0.2 * len(ids))

    def cut(part: torch.Tensor) -> torch.Tensor:
        starts = range(0, len(part) - context + 1, context - 1)
        return torch.stack([part[start : start + context] for start in starts])

    training, held_out = cut(ids[:-count]), cut(ids[-count:])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    named = dict(model.named_parameters())
    norms = [weight for name, weight in named.items() if "norm" in name]
    matrices = {"params": [weight for name, weight in named.items() if "norm" not in name], "weight_decay": decay}
    optimizer = torch.optim.AdamW([matrices, {"params": norms, "weight_decay": 0.0}], betas=(0.9, 0.95))

    def held_out_loss() -> float:
        with torch.no_grad():
            return model(held_out, labels=held_out).loss.item()

    rng = np.random.default_rng(seed)
    order: list[int] = []
    losses, held_out_losses = [], []
    for step in range(steps):
        if step % 3 == 0:
            held_out_losses.append(held_out_loss())
        while len(order) < batch:
            order += rng.permutation(len(training)).tolist()
        rows, order = training[order[:batch]], order[batch:]
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        middle = (step + 0.5) / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * min(middle / warmup, (1 - middle) / (1 - warmup))
        optimizer.step()
        losses.append(loss.item())
    held_out_losses.append(held_out_loss())

    assert [loss for _, loss in found["training_history"]] == pytest.approx(losses, rel=1e-6)
    assert [loss for _, loss in found["held_out_history"]] == pytest.approx(held_out_losses, rel=1e-6)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float64)
    for name, weight in tuned.named_parameters():
        torch.testing.assert_close(weight, named[name], rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert tuned(held_out, labels=held_out).loss.item() == pytest.approx(found["held_out_history"][-1][1], rel=1e-6)
    assert pyllama.generate(str(tmp_path / "tuned"), "the License", max_new_tokens=4).token_ids


def test_every_epoch_holds_each_sequence_once(source: Path, tmp_path: Path) -> None:
    rows = torch.arange(10).reshape(10, 1)
    batches = finetune.shuffled(rows, 4, seed=1)
    seen = torch.cat([next(batches) for _ in range(15)]).flatten().split(10)
    assert all(epoch.sort().values.tolist() == list(range(10)) for epoch in seen)
    assert len({tuple(epoch.tolist()) for epoch in seen}) == 6
    ids = torch.arange(1000)
    training, held_out = finetune.split(ids, 0.1, 30)
    assert set(training.flatten().tolist()).isdisjoint(held_out.flatten().tolist())
    assert held_out.flatten().tolist()[:31] == [*range(900, 930), 929]
    assert run(source, TEXT, tmp_path / "tuned", epochs=0.5, context=64, batch=16, lr=0.0).exit_code == 0
    tokens = len(pyllama.load(source).tokenizer.encode(TEXT.read_text()))
    sequences = (tokens - int(tokens * 0.05) - 1) // 63
    assert record(tmp_path / "tuned")["steps"] == math.ceil(sequences / 32)


# Broken off, and going on


def milestones(output: str) -> list[int]:
    return [int(line.split()[0]) for line in output.splitlines() if "held-out" in line and " steps, " in line]


def test_killed_again_and_again_the_result_is_the_same(tmp_path: Path) -> None:
    """With dropout, experts and their correction biases."""
    folder = with_experts(tmp_path / "source", dropout=0.1)
    arguments = {"steps": 80, "batch": 8, "context": 64, "interval": 4, "lr": 1e-3, "held_out": 0.1, "micro_batch": 4}
    output = completed(begin(folder, TEXT, tmp_path / "whole", **arguments))
    assert milestones(output) == list(range(0, 81, 4))

    interval = record(tmp_path / "whole")["seconds"] / 20

    chance = random.Random(time.time_ns())
    state, reached = tmp_path / "broken.state", 0
    for kill in (signal.SIGKILL, chance.choice([signal.SIGINT, signal.SIGTERM]), signal.SIGKILL):
        process = begin(folder, TEXT, tmp_path / "broken", **arguments)
        assert process.stdout is not None
        output, until = "", reached + chance.choice([1, 5])
        while max(milestones(output), default=0) < until:
            output += process.stdout.readline()
        time.sleep(chance.random() * interval)
        process.send_signal(kill)
        rest, errors = process.communicate()
        output += rest
        steps = len(torch.load(state)["history"]["training"])
        if reached:
            assert f"{reached} steps were done before" in output
        if kill == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
            assert steps % 4 == 0
            assert steps in (milestones(output)[-1], milestones(output)[-1] + 4)
        else:
            assert process.returncode == 130, errors
            assert f"stopped after {steps} steps: the same command goes on" in output
        assert reached < steps < 80
        reached = steps
    completed(begin(folder, TEXT, tmp_path / "broken", **arguments))
    assert not state.exists()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    assert record(whole) | {"seconds": 0} == record(broken) | {"seconds": 0}
    before, after = (dict(pyllama.load(path).named_parameters()) for path in (folder, whole))
    biases = [name for name in before if name.endswith("correction_bias")]
    assert biases
    assert all((before[name] != after[name]).any() for name in biases)


def test_a_result_that_cannot_be_saved_is_kept(source: Path, tmp_path: Path) -> None:
    """With a model in bfloat16, whose weights are moved in float32: one of them could not take steps so small."""
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    os.mkfifo(folder / "NOTES.txt")  # would be copied to the result, and no pipe is
    lr, steps = 1e-6, 6
    arguments = {"dtype": "bfloat16", "context": 64, "steps": steps, "lr": lr, "held_out": 0.1, "weight_decay": 0.0}
    error = message(run(folder, TEXT, tmp_path / "tuned", **arguments))
    assert "NOTES.txt is not a regular file" in error
    assert f"{tmp_path / 'tuned.state'} has it" in error
    assert "run the same command again" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "tuned.state"]

    start = dict(pyllama.load(source, "cpu", "float32").named_parameters())
    weights = torch.load(tmp_path / "tuned.state")["trainer"]["weights"]
    assert weights.keys() == start.keys()
    for name, weight in weights.items():
        moved = (weight - start[name]).abs()
        assert weight.dtype == torch.float32
        assert 0 < moved.max() < lr * steps * 1.5, name
    assert (moved > lr / 2).float().mean() > 0.7

    (folder / "NOTES.txt").unlink()
    result = run(folder, TEXT, tmp_path / "tuned", **arguments)
    assert result.exit_code == 0, result.output
    assert f"{steps} steps were done before" in result.output
    saved = dict(pyllama.load(tmp_path / "tuned", "cpu", "bfloat16").named_parameters())
    for name, weight in weights.items():
        assert torch.equal(saved[name], weight.bfloat16()), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "tuned"]


def test_another_training_is_not_continued(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    os.mkfifo(folder / "NOTES.txt")
    output, text = tmp_path / "tuned", tmp_path / "text.txt"
    text.write_text(TEXT.read_text())
    arguments = {"context": 64, "steps": 1, "lr": 1e-3, "held_out": 0.1}
    assert "has it" in message(run(folder, text, output, **arguments))
    state = tmp_path / "tuned.state"
    before = state.read_bytes()

    error = message(run(folder, text, output, **arguments | {"lr": 1e-4, "seed": 3}))
    assert f"{state} is the state of another training: lr is 0.001 there and 0.0001 here, seed is 0 there" in error
    assert "delete it to begin anew" in error
    text.write_text(TEXT.read_text().replace("License", "Licence"))
    assert "another training: text is" in message(run(folder, text, output, **arguments))
    text.write_text(TEXT.read_text())
    write_checkpoint(folder, seed=1)
    assert "another training: source is" in message(run(folder, text, output, **arguments))
    assert state.read_bytes() == before
    for damaged in (before[:-100], b"", b"nothing of the kind"):
        state.write_bytes(damaged)
        assert f"{state} is not a whole state" in message(run(folder, text, output, **arguments))


# Several processes


@pytest.mark.parametrize("family", ["demo", "glm4_moe"])
def test_two_processes_are_one(family: str, tmp_path: Path) -> None:
    """Load-balancing losses and correction biases, too, are of all that the processes compute at a time."""
    folder = "demo" if family == "demo" else with_experts(tmp_path / "source", dropout=0.0)
    arguments = {
        "dtype": "float64", "context": 32, "steps": 4, "batch": 8, "interval": 2, "lr": 1e-3, "held_out": 0.1,
    }  # fmt: skip
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    both = completed(begin(folder, TEXT, tmp_path / "two", launcher, **arguments, micro_batch=2))
    assert both.count("written to") == 1
    result = run(folder, TEXT, tmp_path / "one", **arguments, micro_batch=4)
    assert result.exit_code == 0, result.output
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("training_history", "held_out_history"):
        expected, found = ([loss for _, loss in each[name]] for each in (one, two))
        assert found == pytest.approx(expected, rel=1e-7)
    assert two["load_balancing_loss"] == pytest.approx(one["load_balancing_loss"], rel=1e-7)
    expected, found = (
        dict(pyllama.load(tmp_path / name, "cpu", "float64").named_parameters()) for name in ("one", "two")
    )
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-7)


# What is refused


@pytest.mark.parametrize(
    ("content", "values", "expected"),
    [
        (b"", {}, "text.txt is empty"),
        (b" \n ", {}, "text.txt is empty"),
        (b"\xef\xbb\xbf", {}, "text.txt is empty"),
        (b"caf\xe9 au lait", {}, "text.txt is not UTF-8: invalid continuation byte at byte 3"),
        (b"short", {}, "5 are to train on (--held-out 0.05), too few for one sequence of 512"),
        (b"word " * 300, {"context": 64}, "held out (--held-out 0.05), too few for one sequence of 64"),
        (b"word " * 300, {"context": 64, "held_out": 0.99}, "to train on (--held-out 0.99), too few"),
        (b"word " * 300, {"context": 64, "held_out": 0}, "0 are held out (--held-out 0)"),
        (b"text", {"context": 513}, "--context 513 is more than the model's 512"),
        (b"text", {"steps": 3, "epochs": 1}, "--steps and --epochs"),
        (b"text", {"batch": 6, "micro_batch": 4}, "--batch 6 is not a multiple of 4"),
        (b"word " * 300, {"context": 16, "lr": 1e30}, "the loss of step"),
    ],
)
def test_mistakes_end_with_one_line(
    source: Path, tmp_path: Path, content: bytes, values: dict[str, Any], expected: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    assert expected in message(run(source, text, tmp_path / "tuned", **values))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_what_is_in_the_way_or_missing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    assert "No such file" in message(run(source, tmp_path / "none.txt", output))
    assert "no folder" in message(run(tmp_path / "none", TEXT, output))
    write_checkpoint(tmp_path / "mute")
    assert "no tokenizer.json" in message(run(tmp_path / "mute", TEXT, output))
    write_checkpoint(tmp_path / "small", byte_level_tokenizer(), vocab_size=200)
    assert "and the model only 200 tokens" in message(run(tmp_path / "small", TEXT, output))
    assert not output.exists()
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    assert "tuned is not an empty folder" in message(run(source, TEXT, output))
    assert "is not an empty folder" in message(run(source, TEXT, TEXT))
    assert (output / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("limit", "size", "values", "expected"),
    [
        (resource.RLIMIT_FSIZE, 10**5, {}, ["the state of step 2 could not be written", "Make room"]),
        (resource.RLIMIT_AS, 5 * 10**9, {"batch": 2**17}, ["out of memory: a smaller --micro-batch", "you tried"]),
    ],
)
def test_too_little_of_the_machine(
    source: Path, tmp_path: Path, limit: int, size: int, values: dict[str, Any], expected: list[str]
) -> None:
    arguments = {"context": 128, "steps": 4, "batch": 1, "interval": 2, "held_out": 0.1} | values
    process = begin(source, TEXT, tmp_path / "tuned", **arguments)
    resource.prlimit(process.pid, limit, (size, size))
    errors = process.communicate()[1]
    assert process.returncode == 1
    assert errors.count("\n") == 1
    assert all(part in errors for part in ["error: ", *expected])
    assert list(tmp_path.iterdir()) == []
