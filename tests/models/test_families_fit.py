"""`pyllama fit` says of every family what loading then takes, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import OPTIONS, draw, write, write_llama_moe

import pyllama
from pyllama.checkpoint import MODEL_DTYPES
from pyllama.inspection.fit import fit
from pyllama.model import Model


def mapped_bytes(model: Model, folder: Path) -> int:
    """Of parameters in memory that the system says is a file of the folder."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    return sum(p.nbytes for p in model.parameters() if any(low <= p.data_ptr() < high for low, high in ranges))


@pytest.mark.parametrize("dtype", MODEL_DTYPES)
@pytest.mark.parametrize("family", [*OPTIONS, "llama_moe"])
def test_weights_are_those_of_the_loaded_model(family: str, dtype: str, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        folder = tmp_path / str(seed)
        if family == "llama_moe":
            write_llama_moe(folder)
        else:
            write(folder, draw(family, seed))
        found, model = fit(folder, "64GB", "cpu", dtype, contexts=[64], batches=[1]), pyllama.load(folder, "cpu", dtype)
        assert found.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
        assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert found.mapped_bytes == mapped_bytes(model, folder)
        assert found.mapped_bytes or dtype != "float32"
        assert found.max_positions == model.config.max_positions
