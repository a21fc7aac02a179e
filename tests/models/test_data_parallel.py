"""Data-parallel training in two processes (gloo), against one process with all the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from data_parallel import CASES, PROCESSES, WRAPPERS, plain, train, work
from families import write
from safetensors.torch import load_file
from test_training import config_of

import pyllama


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data parallel")
    changes = {
        "deepseek_v2": {"first_k_dense_replace": 0},
        "deepseek_v3": {"first_k_dense_replace": 1},
        "qwen2_moe": {"mlp_only_layers": [], "layer_types": None},
    }
    for case in CASES:
        family, _, kind = case.partition(" by ")
        write(folder / case, config_of(family, 4) | {"num_hidden_layers": 2} | changes.get(family, {}))
        if kind:
            config = json.loads((folder / case / "config.json").read_text())
            config |= {"aux_loss_alpha": 0.5, "seq_aux": kind == "sequence"}
            (folder / case / "config.json").write_text(json.dumps(config))
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


def test_mixed_precision_trains_what_is_saved(results: Path) -> None:
    """FSDP2 in bfloat16: near the run in float64, and what is saved are the trained weights, not their casts."""
    expected = train(pyllama.load(results / "deepseek_v3", "cpu", "float64"), plain, 0, 1)
    assert torch.load(results / "mixed.losses") == pytest.approx(expected, rel=0.05)
    saved, again = (load_file(results / name / "model.safetensors") for name in ("mixed", "mixed again"))
    assert saved.keys() == again.keys()
    for name, weight in saved.items():
        assert weight.dtype == torch.float32, name
        assert torch.equal(weight, again[name]), name
        if weight.ndim > 1:
            assert not torch.equal(weight, weight.bfloat16().float()), name


def test_all_processes_hear_that_one_cannot_save(results: Path) -> None:
    assert "FileExistsError" in (results / "0.error").read_text()
    expected = "RuntimeError: the first process could not save the model; its own error says why"
    assert (results / "1.error").read_text() == expected
