"""The command line: what it prints where, and how it fails."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from click.testing import Result
from tiny import VOCAB_SIZE, byte_level_tokenizer, write_checkpoint, write_tokenizer
from tokenizers import models
from typer.testing import CliRunner

import pyllama
from pyllama import doctor
from pyllama.cli import app
from pyllama.doctor import GPU
from pyllama.model import Model
from pyllama.ops.registry import OPS, implementation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer has no EOS token, so answers are as long as they may be."""
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, byte_level_tokenizer(), max_position_embeddings=2**17, eos_token_id=None)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    write_tokenizer(path, byte_level_tokenizer(), eos_token=None, chat_template=template)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return pyllama.load(folder, "cpu")


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def written(result: Result) -> str:
    """Standard output as it is: `result.stdout` would change line ends that the model wrote."""
    return result.stdout_bytes.decode()


def test_generate_prints_the_text_and_then_the_speed(folder: Path, model: Model) -> None:
    result = run("generate", folder, "The quick", "--max-new-tokens", 12, "--device", "cpu")
    assert result.exit_code == 0
    assert written(result) == pyllama.generate(model, "The quick", 12).text + "\n"
    prompt, generation, memory = result.stderr.splitlines()
    assert prompt.startswith("prompt: 3 tokens, ")
    assert prompt.endswith(" tokens/s")
    assert generation.startswith("generation: 12 tokens, ")
    assert generation.endswith(" tokens/s")
    assert 0.01 < float(memory.removeprefix("peak memory: ").removesuffix(" GB")) < 100


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--temperature 1.5 --seed 3 --top-k 40 --top-p 0.9 --min-p 0.01", None),
        ("--repetition-penalty 1.3 --presence-penalty 0.5 --frequency-penalty 0.25", None),
        ("--stop e --stop ou --ignore-eos", {"stop": ["e", "ou"], "ignore_eos": True}),
        ("--stop-token-id 100 --stop-token-id 365", {"stop_token_ids": [100, 365]}),
        ("--no-cache", {"use_cache": False}),
        ("-n 3 --temperature 1 --seed 5", {"n": 3, "temperature": 1.0, "seed": 5}),
        ("--logprobs 2", None),
    ],
)
def test_generate_json(folder: Path, model: Model, flags: str, options: dict[str, Any] | None) -> None:
    """Every option does what it does in Python."""
    if options is None:
        words = flags.split()
        options = {words[i][2:].replace("-", "_"): json.loads(words[i + 1]) for i in range(0, len(words), 2)}
    result = run("generate", folder, "The quick", "--max-new-tokens", 10, "--json", *flags.split())
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["device"], found["dtype"]) == (str(model.device), "float32")
    assert found["peak_memory_bytes"] > 10**7
    expected = pyllama.generate(model, "The quick", 10, **options)
    for one, completion in zip(found["completions"], expected if "n" in options else [expected], strict=True):
        for name in ("text", "token_ids", "finish_reason", "prompt_tokens"):
            assert one[name] == getattr(completion, name)
        assert one["prompt_tokens_per_second"] == one["prompt_tokens"] / one["prompt_seconds"]
        assert (one["logprobs"] is None) == (completion.logprobs is None)
        if completion.logprobs:
            assert one["logprobs"][0]["token_id"] == completion.token_ids[0]
            assert len(one["logprobs"][0]["top"]) == 2


def test_escape_sequences_reach_a_pipe_and_no_terminal(tmp_path: Path) -> None:
    tokens = [f"\x1b[{i}m{i}" for i in range(VOCAB_SIZE)]
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
    )
    write_checkpoint(tmp_path, eos_token_id=None)
    write_tokenizer(tmp_path, tokenizer, bos_token=None, eos_token=None, unk_token=None)
    expected = f"{pyllama.generate(pyllama.load(tmp_path, 'cpu'), tokens[7], 4)}\n"
    assert "\x1b[" in expected
    arguments = ["generate", str(tmp_path), tokens[7], "--max-new-tokens", "4", "--device", "cpu"]
    assert written(run(*arguments)) == expected

    terminal, theirs = pty.openpty()
    command = [sys.executable, "-c", "from pyllama.cli import app; app()", *arguments]
    subprocess.run(command, stdout=theirs, stderr=subprocess.DEVNULL, check=True)
    os.close(theirs)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert shown == expected.replace("\x1b", "\ufffd").replace("\n", "\r\n")


def test_generate_several_from_standard_input(folder: Path, model: Model) -> None:
    flags = ["--max-new-tokens", "5", "-n", "2", "--temperature", "1", "--seed", "1"]
    result = run("generate", folder, "-", *flags, stdin="The quick")
    first, second = pyllama.generate(model, "The quick", 5, n=2, temperature=1.0, seed=1)
    assert written(result) == f"--- 1 of 2 ---\n{first}\n--- 2 of 2 ---\n{second}\n"


def test_generate_with_the_chat_template(folder: Path, model: Model) -> None:
    result = run("generate", folder, "hello", "--chat", "--max-new-tokens", 5)
    assert written(result) == f"{pyllama.generate(model, '[user]hello', 5)}\n"


def test_chat(folder: Path, model: Model) -> None:
    """The model sees what was said; /reset forgets it, the system message excepted."""
    flags = ["--max-new-tokens", 4, "--temperature", 0, "--system", "Be brief."]
    result = run("chat", folder, *flags, stdin="hello\nand?\n\n/what\n/reset\nhello\n/exit\nnever\n")
    assert result.exit_code == 0
    first = pyllama.generate(model, "[system]Be brief.[user]hello", 4)
    second = pyllama.generate(model, f"[system]Be brief.[user]hello[assistant]{first}[user]and?", 4)
    assert written(result) == f"{first}\n{second}\n{first}\n"
    assert "the commands are /reset and /exit" in result.stderr
    assert result.stderr.count("generation: 4 tokens") == 3
    assert written(run("chat", folder, *flags, stdin="hello\n")) == f"{first}\n", "the end of input ends it"


def test_chat_goes_on_after_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, byte_level_tokenizer(), max_position_embeddings=32)
    result = run("chat", tmp_path, "--temperature", 0, stdin="a\n" + "long " * 40 + "\n/reset\na\n")
    assert result.exit_code == 0
    first, second = written(result).split("\n")[:-1]
    assert first == second
    assert "error: prompt has" in result.stderr
    assert "the context holds 32" in result.stderr


def read_until(terminal: int, wanted: str, seen: str = "", seconds: float = 60) -> str:
    """Everything a terminal shows until it shows `wanted`."""
    until = time.monotonic() + seconds
    while wanted not in seen:
        assert select.select([terminal], [], [], max(0, until - time.monotonic()))[0], f"{wanted!r} not in {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


def own_terminal() -> None:
    """Makes standard input the process's terminal, whose Ctrl-C interrupts, also where the tests themselves ignore it
    (programs in a shell's background do)."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_in_a_chat_stops_the_answer_only(folder: Path) -> None:
    """In a real terminal, which the model's control characters do not reach."""
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-c", "from pyllama.cli import app; app()", "chat", str(folder)]
    command += ["--max-new-tokens", "100000", "--device", "cpu"]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "dumb"},
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(theirs)
    try:
        seen = read_until(terminal, "> ")
        for _ in range(30):
            os.write(terminal, b"\x03")  # again where it came before the terminal was waited for
            if select.select([terminal], [], [], 2)[0]:
                seen = read_until(terminal, "> ")
            if "(/exit or Ctrl-D ends the chat)\r\n> " in seen:
                break
        else:
            pytest.fail(f"Ctrl-C at the prompt does nothing: {seen!r}")
        for _ in range(2):
            os.write(terminal, b"hello\n")
            seen = read_until(terminal, "hello\r\n")
            while len(seen) < 200:  # the answer is under way
                seen += os.read(terminal, 4096).decode(errors="replace")
            os.write(terminal, b"\x03")
            seen = read_until(terminal, "(stopped)\r\n> ", seen)
            assert not [c for c in seen.replace("^C", "") if ord(c) < 32 and c not in "\r\n\t"]
        os.write(terminal, b"/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_a_reader_that_leaves_early_gets_no_complaint(folder: Path) -> None:
    command = [sys.executable, "-c", "from pyllama.cli import app; app()", "generate", str(folder), "The"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "3000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert b"rror" not in process.stderr.read()


def broken_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{")


def no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def no_template(path: Path) -> None:
    write_tokenizer(path, byte_level_tokenizer())


@pytest.mark.parametrize(
    ("command", "harm", "message"),
    [
        (["generate", "/no/such/folder", "x"], None, "there is no folder /no/such/folder"),
        (["generate", "{}", ""], None, "prompt is empty"),
        (["generate", "{}", "x" * 3000, "--json"], None, "the context holds 512"),
        (["generate", "{}", "x"], broken_tokenizer, "tokenizer.json is not a tokenizer that can be read"),
        (["generate", "{}", "x"], no_tokenizer, "is text, but the checkpoint has no tokenizer.json"),
        (["generate", "{}", "x", "--chat"], no_template, "no chat template"),
        (["generate", "{}", "x", "--stop-token-id", "400"], None, "stop_token_ids has 400"),
        (["generate", "{}", "x", "--dtype", "int8"], None, "dtype must be one of"),
        (["generate", "{}", "x", "--show-routing"], None, "the model has no experts"),
        (["generate", "{}", "x", "--json", "--routing-picture", "{}/a.svg"], None, "the model has no experts"),
        (["generate", "/no/such/folder", "x", "--routing-picture", "{}/b/a.svg"], None, "b to write a.svg to"),
        (["chat", "{}"], no_template, "no chat template"),
        (["chat", "{}"], no_tokenizer, "no tokenizer.json, which a chat needs"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, command: list[str], harm: Any, message: str) -> None:
    write_checkpoint(tmp_path, byte_level_tokenizer())
    if harm is not None:
        harm(tmp_path)
    result = run(*(word.replace("{}", str(tmp_path)) for word in command))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature -1", "temperature must be at least 0"),
        ("--temperature hot", "--temperature"),
        ("--top-p 2", "top_p must be above 0 and at most 1"),
        ("--logprobs 2", "--logprobs needs --json"),
        ("--routing-picture a.png", "the file must end in .svg"),
        ("--best-of 2", "--best-of"),
    ],
)
def test_usage_errors_come_before_anything_is_loaded(flags: str, message: str) -> None:
    result = run("generate", "/no/such/folder", "x", *flags.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert "folder" not in result.stderr


def test_doctor() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert set(found["ops"]) == set(OPS)
    for name, devices in found["ops"].items():
        assert devices["cpu"] == implementation(name, "cpu")
    assert found["versions"]["pyllama"] == pyllama.__version__
    result = run("doctor")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    for name, devices in found["ops"].items():
        assert [name, *devices.values()] in rows
    for advice in found["advice"]:
        assert advice.split()[0] in result.stdout


H200 = GPU("cuda:0", "NVIDIA H200", "9.0", 2**37, supported=True)
V100 = GPU("cuda:0", "Tesla V100", "7.0", 2**34, supported=False)


@pytest.mark.parametrize(
    ("driver", "torch_cuda", "build", "gpus", "served", "expected"),
    [
        (None, None, None, [], {}, []),
        (None, None, "13.0", [], {}, []),
        ("580.65", "13.0", "13.0", [H200], {"cuda:0": "cuda"}, []),
        ("580.65", None, "13.0", [], {}, ["this torch is CPU-only"]),
        ("470.1", "13.0", "13.0", [], {}, ["driver 470.1 is loaded, but torch finds no GPU"]),
        ("580.65", "13.0", None, [H200], {"cuda:0": "eager"}, ["pyllama was built without nvcc"]),
        ("580.65", "13.0", "13.0", [H200], {"cuda:0": "eager"}, ["cuda:0 runs 1 of 1 ops eagerly, slower: rope"]),
        ("580.65", "13.0", "13.0", [V100], {"cuda:0": "eager"}, ["compute capability 7.0, and .*sm_80.*native"]),
    ],
)
def test_advice(
    driver: str | None,
    torch_cuda: str | None,
    build: str | None,
    gpus: list[GPU],
    served: dict[str, str],
    expected: list[str],
) -> None:
    gpus = [gpu if build else GPU(gpu.device, gpu.name, gpu.capability, gpu.memory_bytes, False) for gpu in gpus]
    advice = doctor._advice(driver, torch_cuda, build, ("sm_80",), gpus, {"rope": {"cpu": "eager"} | served})
    assert len(advice) == len(expected)
    for line, pattern in zip(advice, expected, strict=True):
        assert re.search(pattern, line)


def test_paths_of_users_that_there_are_not() -> None:
    for command in (
        ["inspect", "~no-such-user/x"],
        ["generate", "~no-such-user/x", "a"],
        ["convert", "demo", "~no-such-user/x"],
    ):
        result = CliRunner().invoke(app, command)
        assert (result.exit_code, result.stderr) == (1, "error: ~no-such-user/x: there is no home of this user\n")


@pytest.mark.parametrize(
    ("command", "default"),
    [("generate", "the GPU if there is one"), ("convert", "each tensor's own"), ("fit", "what is free here")],
)
def test_help_says_what_is_chosen_where_nothing_is_said(command: str, default: str) -> None:
    found = CliRunner().invoke(app, [command, "--help"], terminal_width=200, env={"COLUMNS": "200"})
    assert f"[default: ({default})]" in found.output
