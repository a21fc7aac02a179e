"""Options of the test run, and a tiny random checkpoint with a tokenizer, for the tests that need any model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulated import BUILD, EMULATOR, SCHEDULES, Emulator
from tiny import byte_level_tokenizer, write_checkpoint

import pyllama
from pyllama.model import Model


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("emulated kernels")
    group.addoption("--emulator", choices=[*SCHEDULES, "none"], help="their flavour [plain, if it is built]")
    group.addoption("--emulator-build", type=Path, default=BUILD, help="the folder where they were built [%(default)s]")
    parser.addoption("--seed", type=int, default=0, help="of the random inputs of the ops' tests [%(default)s]")


def pytest_configure(config: pytest.Config) -> None:
    flavour = config.getoption("--emulator")
    emulator = Emulator(flavour or "plain", config.getoption("--emulator-build").resolve())
    wanted = flavour != "none" and (flavour is not None or emulator.path.exists())
    if wanted and not emulator.path.exists():
        raise pytest.UsageError(f"{emulator.path} is not there: make emulator")
    config.stash[EMULATOR] = emulator if wanted else None


def pytest_report_header(config: pytest.Config) -> str:
    emulator = config.stash[EMULATOR]
    return f"emulated kernels: {emulator.flavour if emulator else 'none'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, byte_level_tokenizer())
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return pyllama.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For products so small that they gain nothing from a second, and wait for it on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
