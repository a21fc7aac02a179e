"""`pyllama bench`: the table, transformers beside, the profile, and how it fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import weakref
from math import isclose
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from tiny import CONFIG, VOCAB_SIZE, byte_level_tokenizer, write_checkpoint
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from typer.testing import CliRunner

from pyllama.bench import Bench, limits, report
from pyllama.bench import profile as profiles
from pyllama.bench.engines import EngineError, Transformers
from pyllama.bench.figures import Row, peak_memory, reset_peak_memory
from pyllama.bench.origin import commit
from pyllama.bench.work import Cell
from pyllama.cli import app

CPU = torch.device("cpu")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def table_rows(text: str) -> list[list[str]]:
    """The cells of the table's rows."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rough ones."""
    monkeypatch.setattr(limits, "READ_BYTES", 2**22)
    monkeypatch.setattr(limits, "ROUNDS", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, byte_level_tokenizer())
    return path


@pytest.fixture(scope="module")
def shape_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a config.json."""
    path = tmp_path_factory.mktemp("shape")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_peak_memory_counts_from_where_it_is_reset() -> None:
    torch.ones(2**27)  # half a GB, gone when the line is done
    reset_peak_memory(CPU)
    low = peak_memory(CPU)
    block = torch.ones(2**26)
    high = peak_memory(CPU)
    assert low is not None
    assert high is not None
    assert isclose(high - low, block.nbytes, rel_tol=0.3)


def test_the_table_and_the_json_say_the_same(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    flags = ["--batch", "1,3", "--context", "70,5", "--new-tokens", 4, "--rounds", 1, "--device", "cpu"]
    result = run(folder, *flags, "--json", file)
    assert result.exit_code == 0, result.stderr
    found = json.loads(file.read_text())
    assert found["complete"]
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    assert found["parameters"] == found["active_parameters"] == 2 * VOCAB_SIZE * 64 + 2 * layer + 64
    assert found["transformers"].endswith("dynamic cache, not compiled; in turns")
    assert found["dtype"] == "float32"
    rows = found["rows"]
    expected = [(e, b, c) for c in (5, 70) for b in (1, 3) for e in ("pyllama", "transformers")]
    assert [(row["engine"], row["batch"], row["context"]) for row in rows] == expected
    printed = table_rows(result.stdout)
    assert [row[:3] for row in printed] == [[e, str(b), str(c)] for e, b, c in expected]
    for row, (ours, theirs) in zip(printed[1::2], zip(rows[::2], rows[1::2], strict=True), strict=True):
        assert float(row[-1]) == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"], abs=0.006)
        for one in (ours, theirs):
            assert one["tokens_per_second"] == pytest.approx(one["batch"] / one["step_seconds"])
            rate = one["batch"] * one["context"] / one["first_token_seconds"]
            assert one["prompt_tokens_per_second"] == pytest.approx(rate)
            assert 0 < one["step_share"] < 1
            assert one["peak_bytes"] > found["weight_bytes"]
    assert f"reads {found['read_bytes_per_second'] / 1e9:,.1f} GB/s" in result.stdout


def test_random_weights_of_a_folder_and_json_on_standard_output(shape_folder: Path) -> None:
    flags = ["--batch", 2, "--context", 3, "--new-tokens", 3, "--rounds", 1, "--layers", 1, "--device", "cpu"]
    result = run(shape_folder, "--random-weights", "--dtype", "bfloat16", *flags, "--json", "-")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["dtype"], found["layers"], found["layers_of_the_model"]) == ("bfloat16", 1, 2)
    assert [row["engine"] for row in found["rows"]] == ["pyllama", "transformers"]
    assert "random weights, the first 1 of its 2 layers" in result.stderr
    assert len(table_rows(result.stderr)) == 2


def test_a_model_beside_which_transformers_does_not_fit(shape_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyllama's model goes before transformers' comes."""
    monkeypatch.setattr("pyllama.bench.free_memory", lambda device: 300_000)
    bench = Bench(str(shape_folder), [1], [8], 3, "cpu", random_weights=True, rounds=1)
    assert bench.about["transformers"].endswith("after pyllama, beside which it does not fit")
    model = weakref.ref(bench._ours.model)
    rows = bench.rows()
    first = next(rows)
    assert (first.engine, bench._ours.weight_bytes) == ("pyllama", bench.about["weight_bytes"])
    second = next(rows)
    assert (second.engine, bench._ours.weight_bytes, model()) == ("transformers", 0, None)
    assert second.figures is not None
    assert [second.cell, *rows] == [first.cell]


def test_what_transformers_cannot_build_is_left_out_with_a_line(shape_folder: Path) -> None:
    with pytest.raises(EngineError, match="llama_moe"):
        Transformers({"model_type": "llama_moe"}, None, 1, CPU, torch.float32)
    peer = Transformers(CONFIG, None, 1, CPU, torch.float32)
    with pytest.raises(EngineError, match=r"its model has [\d,]+ parameters, pyllama's 1"):
        peer.build()
    result = run("demo", "--batch", 1, "--context", 4, "--new-tokens", 2, "--rounds", 1)
    assert result.exit_code == 0
    assert "\n- transformers: left out: " in result.stdout
    assert [row[0] for row in table_rows(result.stdout)] == ["pyllama"]


def test_a_batch_beyond_memory_is_a_row_and_the_run_goes_on(folder: Path) -> None:
    result = run(folder, "--batch", "1000000000,1", "--context", 9, "--new-tokens", 2, "--rounds", 1, "--no-compare")
    assert result.exit_code == 0
    first, second = table_rows(result.stdout)
    assert first[:4] == ["pyllama", "1000000000", "9", "does not fit"]
    assert second[:3] == ["pyllama", "1", "9"]
    assert float(second[6].replace(",", "")) > 0


def test_ctrl_c_keeps_the_rows_that_there_are(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    command = [sys.executable, "-c", "from pyllama.cli import app; app()", "bench", str(folder), "--no-compare"]
    command += ["--context", "400", "--batch", ",".join(["1"] * 500), "--new-tokens", "100", "--json", str(file)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Programs in a shell's background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        seen = ""
        while "\n| pyllama" not in seen:
            line = process.stdout.readline()
            assert line, process.communicate()
            seen += line
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    found = json.loads(file.read_text())
    assert not found["complete"]
    printed = len(table_rows(seen + rest))
    assert 1 <= printed <= len(found["rows"]) <= printed + 1 < 500


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("llama-3.1-8b", 1, "is a shape without weights: add --random-weights"),
        ("llama-3.1 --random-weights", 1, "there is no shape llama-3.1, nor a folder"),
        ("demo --layers 2", 1, "--layers is for --random-weights"),
        ("demo --context 449", 1, "a context may have 1 to 448, got 449"),
        ("demo --new-tokens 400", 1, "a context may have 1 to 112, got 128, 2048"),
        ("qwen3-0.6b --random-weights --layers 29", 1, "the model has 28 layers, so --layers may be 1 to 28, got 29"),
        ("qwen3-0.6b --random-weights --context 40960", 1, "got 40960"),
        ("qwen3-0.6b --random-weights --dtype int8", 1, "dtype must be one of"),
        ("demo --json /no/such/folder/file", 1, "No such file or directory: '/no/such/folder/file'"),
        ("demo --batch 1,x", 2, "'--batch': must be positive numbers"),
        ("demo --context 0", 2, "'--context': must be positive numbers"),
        ("demo --new-tokens 1", 2, "--new-tokens"),
        ("demo --rounds 0", 2, "--rounds"),
    ],
)
def test_errors_come_before_anything_is_measured(flags: str, code: int, message: str) -> None:
    result = run(*flags.split())
    assert result.exit_code == code
    assert result.stdout == ""
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_commit_is_that_of_the_folder_itself(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    (tmp_path / "file").write_text("1")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "1")
    clean = commit(tmp_path)
    assert clean is not None
    assert len(clean) == 12
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == clean + "+"
    (tmp_path / "inside").mkdir()
    assert commit(tmp_path / "inside") is None


def test_a_problem_does_not_break_the_table() -> None:
    line = report.line(Row("transformers", Cell(1, 2, 3), None, "no | here"), [])
    assert line.count("|") == len(report.COLUMNS) + 1
    assert "no / here" in line


def test_a_profile_says_where_the_time_goes(folder: Path, tmp_path: Path) -> None:
    where = tmp_path / "new" / "profile"
    result = run(folder, "--batch", 2, "--context", 20, "--new-tokens", 4, "--rounds", 1, "--profile", where)
    assert result.exit_code == 0, result.stderr
    events = json.loads((where / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "cpu_op"]
    assert names.count("pyllama::advance_") == profiles.STEPS
    rows = {row[0].strip("`"): row[1:] for row in table_rows((where / "kernels.md").read_text())}
    whole = float(rows["the step"][1])
    assert sum(float(row[1]) for name, row in rows.items() if name != "the step") == pytest.approx(whole, rel=1e-3)
    assert float(rows["pyllama::decode_attention_"][0]) == 2  # layers


def event(name: str, device: DeviceType, microseconds: int, **more: Any) -> FunctionEvent:
    return FunctionEvent(0, name, 0, 0, microseconds, device_type=device, **more)


def test_kernels_of_a_gpu_are_counted_by_name_and_products_by_their_bytes() -> None:
    """Events as torch makes them of a GPU's trace: a product of two kernels, one outside of ops, as of a graph."""
    mm = event("aten::mm", DeviceType.CPU, 9, input_shapes=[[1, 1000], [1000, 500]])
    mm.append_kernel("gemm", 0, 100)
    mm.append_kernel("reduce", 0, 10)
    norm = event("pyllama::rms_norm", DeviceType.CPU, 9, input_shapes=[[1, 1000], [1000]])
    norm.append_kernel("norm", 0, 20)
    add = event("pyllama::linear_add_", DeviceType.CPU, 9, input_shapes=[[1, 8], [1, 100], [8, 100], [], [], [500, 8]])
    add.append_kernel("skinny", 0, 30)
    times = {"gemm": 100, "reduce": 10, "norm": 20, "skinny": 30}
    device = [event(name, DeviceType.CUDA, time) for name, time in times.items()]
    loose = event("gemm", DeviceType.CUDA, 50)
    marked = event("step", DeviceType.CUDA, 900, is_user_annotation=True)
    found = profiles.of_gpu([mm, norm, add, *device, loose, marked], itemsize=2)
    assert found.keys() == times.keys()
    assert (found["gemm"].calls, found["gemm"].seconds) == (2, pytest.approx(150e-6))
    assert found["gemm"].product_bytes == 2 * (1000 + 500_000)
    assert found["gemm"].product_seconds == pytest.approx(100e-6)
    assert found["skinny"].product_bytes == 2 * (8 + 100 + 800)  # its last tensor is only brought to a cache
    assert found["reduce"].product_seconds == found["norm"].product_seconds == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the limits as they are
    file = tmp_path / "bench.json"
    flags = ["--layers", 2, "--batch", "1,2", "--context", 100, "--new-tokens", 8, "--rounds", 1]
    result = run("llama-3.2-1b", "--random-weights", *flags, "--json", file)
    assert result.exit_code == 0, result.stderr
    found = json.loads(file.read_text())
    assert found["dtype"] == "bfloat16"
    assert "static cache, compiled" in found["transformers"]
    for row in found["rows"]:
        assert 0 < row["step_share"] < 1.1
        assert found["weight_bytes"] < row["peak_bytes"] < 2 * found["weight_bytes"]
    assert found["product_flops_per_second"] > found["read_bytes_per_second"] > 1e11
    result = run("llama-3.2-1b", "--random-weights", *flags, "--profile", tmp_path)
    assert result.exit_code == 0, result.stderr
    rows = {row[0]: row[1:] for row in table_rows((tmp_path / "kernels.md").read_text())}
    assert float(rows["the step"][1]) > float(rows["the GPU waits"][1]) > 0
