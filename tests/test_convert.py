"""`pyllama convert` writes a whole checkpoint or nothing, and holds a parameter of it at a time."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_load_memory import sparse_checkpoint
from tiny import write_checkpoint
from typer.testing import CliRunner

import pyllama
from pyllama.architectures.reader import ConfigError
from pyllama.cli import app
from pyllama.convert import convert
from pyllama.files import CheckpointError


@pytest.mark.parametrize("what", ["a file", "a folder with a file", "the source"])
def test_nothing_is_written_over(what: str, tmp_path: Path) -> None:
    source = target = tmp_path / "source"
    write_checkpoint(source)
    before = {file: file.read_bytes() for file in source.iterdir()}
    if what != "the source":
        target = tmp_path / "target"
        if what == "a file":
            target.write_text("mine")
        else:
            target.mkdir()
            (target / ".mine").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{target} is not an empty folder"):
        convert(source, target)
    assert {file: file.read_bytes() for file in source.iterdir()} == before


@pytest.mark.parametrize("size", ["5 bananas", "", "-1", "0", 0, "GB", "0.1B", "1e3", None])
def test_sizes_that_are_none(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_shard_size must be a number of bytes, or one as in '5GB'"):
        convert("demo", tmp_path / "result", max_shard_size=size)


def test_what_cannot_be_read_is_not_converted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"attention_sinks": 4}))
    with pytest.raises(ConfigError, match=rf"{source}: .*ignore_config_keys=\['attention_sinks'\]"):
        convert(source, tmp_path / "result")
    convert(source, tmp_path / "result", ignore_config_keys=["attention_sinks"])
    assert pyllama.load(tmp_path / "result", device="cpu").config.vocab_size == 400  # without ignoring anything
    save_file({"x": torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"describes 2 layers"):
        convert(source, tmp_path / "other", ignore_config_keys=["attention_sinks"])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        convert(tmp_path / "nowhere", tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "result"}


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**5})())
    with pytest.raises(OSError, match=r"result would take .* GB, and 0.0 GB are free on its disk"):
        convert("demo", tmp_path / "result")
    assert not list(tmp_path.iterdir())


# Runs in a process of its own, whose files may not grow beyond a limit: the kernel ends a write as on a full disk.
FULL = """
import resource, signal, sys
from pyllama.convert import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    convert("demo", sys.argv[1])
except OSError as error:
    print(error.errno)
"""


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "new")], capture_output=True, text=True)
    assert result.stdout.split() == [str(errno.EFBIG)], result.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    script = "import sys; from pyllama.convert import convert; convert(sys.argv[1], sys.argv[2])"
    (tmp_path / "source").mkdir()
    sparse_checkpoint(tmp_path / "source", 2**28)
    target = tmp_path / "target"
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "source", target], stderr=subprocess.PIPE)
    while process.poll() is None and not list(tmp_path.glob(".target.*.partial/*/*.safetensors")):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert b"KeyboardInterrupt" in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Prints by how many bytes the process's own memory grew at most. Files that are mapped are not counted.
MEMORY = """
import re, sys, threading, time
from pathlib import Path
from pyllama.convert import convert

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    while running:
        seen.append(own())
        time.sleep(0.002)

running, seen, before = True, [], own()
watcher = threading.Thread(target=watch)
watcher.start()
convert(sys.argv[1], sys.argv[2])
running = False
watcher.join()
print(max(seen) - before)
"""


def test_one_parameter_is_in_memory_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    size = 4 * sparse_checkpoint(tmp_path / "source", 2**29)[0]
    command = [sys.executable, "-c", MEMORY, tmp_path / "source", tmp_path / "result"]
    found = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found < size / 3  # gate and up of one layer are a sixteenth of it, and torch needs some


def test_the_command(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source")
    flags = ["--dtype", "bfloat16", "--max-shard-size", "50KB"]
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "source"), str(tmp_path / "result"), *flags])
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    expected = pyllama.load(tmp_path / "source", device="cpu", dtype="bfloat16")
    found = pyllama.load(tmp_path / "result", "cpu", "bfloat16").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
    assert len(list((tmp_path / "result").glob("model-0000*-of-*.safetensors"))) > 2
    again = CliRunner().invoke(app, ["convert", str(tmp_path / "source"), str(tmp_path / "result")])
    assert again.exit_code == 1
    assert again.stderr.startswith("error:")
    assert "is not an empty folder" in again.stderr
