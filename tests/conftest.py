"""A tiny random checkpoint with a tokenizer, for the tests that need any model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import byte_level_tokenizer, write_checkpoint

import pyllama
from pyllama.model import Model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, byte_level_tokenizer())
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return pyllama.load(folder, device="cpu", dtype="float32")
