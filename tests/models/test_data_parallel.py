"""Data-parallel training in two processes (gloo), against one process with all the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from data_parallel import CASES, PROCESSES, WRAPPERS, plain, train, work
from families import write
from test_training import config_of

import pyllama


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data parallel")
    changes = {"deepseek_v3": {"first_k_dense_replace": 1}, "qwen2_moe": {"mlp_only_layers": [], "layer_types": None}}
    for case in CASES:
        write(folder / case, config_of(case, 4) | {"num_hidden_layers": 2} | changes.get(case, {}))
    mp.spawn(work, (folder,), nprocs=PROCESSES)
    return folder


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case: str, kind: str, results: Path) -> None:
    model = pyllama.load(results / case, "cpu", "float64")
    expected = train(model, plain, 0, 1, **CASES[case])
    losses = torch.load(results / f"{case} {kind}.losses")
    assert losses == pytest.approx(expected, rel=1e-12)
    found = pyllama.load(results / f"{case} {kind}", "cpu", "float64")
    for (name, parameter), other in zip(model.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(other, parameter, rtol=0, atol=1e-9, msg=name)
        if "correction_bias" in name:
            assert len(set(parameter.tolist())) > 1
