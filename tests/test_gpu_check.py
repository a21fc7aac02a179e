"""What `make gpu-check` runs, as far as it can be seen without a GPU: its steps, its verdicts, its model check."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from emulated import EMULATOR
from tiny import CONFIG

import pyllama

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: what is installed as pyllama comes first

from benchmarks import choices, gpu_check, host_cost, train_step  # noqa: E402
from benchmarks.bench import benches  # noqa: E402
from benchmarks.model_check import compare, cut_down, random_model  # noqa: E402
from pyllama.architectures import read_config  # noqa: E402
from pyllama.config import MLPConfig, ModelConfig, MoEConfig  # noqa: E402
from pyllama.layers import linear  # noqa: E402

TINY = CONFIG | {"tie_word_embeddings": True}


def steps(stage: str, out: Path) -> list[gpu_check.Step]:
    return list(gpu_check.steps(stage, out, monotonic() + gpu_check.STAGE_SECONDS))


@pytest.mark.parametrize("stage", gpu_check.STAGES)
def test_the_files_of_every_step_are_there(stage: str, tmp_path: Path) -> None:
    found = steps(stage, tmp_path)
    assert len({step.name for step in found}) == len(found)  # their logs would be one file
    for step in found:
        paths = [word for word in step.command if isinstance(word, Path) and word.is_relative_to(ROOT)]
        assert all(path.exists() for path in paths if not path.is_relative_to(gpu_check.TARGET)), step


@pytest.mark.parametrize(("stage", "name"), [("test", "tests"), ("sanitize", "memcheck")])
def test_the_tests_to_run_are_found(stage: str, name: str, tmp_path: Path) -> None:
    """pytest takes the options that the check gives it, and finds what is on a GPU where there is one."""
    command = next(step.command for step in steps(stage, tmp_path) if step.name == name)
    command = [*command[command.index(sys.executable) :], "--collect-only"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 5), run.stdout + run.stderr  # 5: none
    kernels = [line for line in run.stdout.splitlines() if "test_formula[cuda-cuda" in line]
    assert bool(kernels) == torch.cuda.is_available()
    assert not [line for line in kernels if "[cuda-cuda-float16" in line and name == "memcheck"]


@pytest.mark.parametrize(
    ("output", "status", "verdict"),
    [
        ("==== 3 passed\n========= ERROR SUMMARY: 0 errors", 0, "passed: 0 errors"),
        ("========= ERROR SUMMARY: 2 errors\n==== 3 passed", 0, "failed: 2 errors"),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error)", 0, "failed: 1 errors"),
        ("==== 1 failed\n========= ERROR SUMMARY: 0 errors", 1, "failed: 0 errors"),
        ("Device not supported", 1, "skipped: Device not supported"),
        ("..\nstopped after 9 s", gpu_check.TIMED_OUT, "failed: 0 errors; stopped after 9 s"),
    ],
)
def test_verdicts_on_sanitizers(output: str, status: int, verdict: str) -> None:
    assert gpu_check.by_sanitizer(status, output).startswith(verdict)


def test_verdicts_on_conformance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, golden = tmp_path / "digest", tmp_path / "golden"
    monkeypatch.setattr(gpu_check, "GOLDEN", golden)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    verdict = gpu_check.by_golden(digest)
    output = "warp\n00000000 00000001\n00000002 00000003\nbulk\ndeadbeef 00000000\n"
    assert verdict(1, "CUDA: no device").startswith("failed: CUDA: no device")
    assert verdict(0, output).startswith("passed: nothing to compare with yet; record digest as golden")
    golden.write_text(digest.read_text())
    assert verdict(0, output) == "passed: as recorded"
    assert verdict(0, output.replace("00000003", "00000004")) == "failed: 1 sections differ: warp"
    assert verdict(0, output[: output.index("bulk")]) == "failed: 1 sections differ: bulk"


def test_no_test_begins_after_the_time(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.pytest_rows"]
    for seconds, result in (("100", "passed"), ("0", "skipped")):
        rows = tmp_path / f"{result}.jsonl"
        subprocess.run(
            [*command, "--rows", rows, "--seconds", seconds, tmp_path / "test_it.py"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
        )
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        assert {(row["test"].split("::")[1], row["result"]) for row in found} == {
            ("test_one", result),
            ("test_two", result),
        }


@pytest.fixture
def tiny() -> ModelConfig:
    return read_config(TINY)[0]


def test_the_model_check_runs_as_a_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.model_check", "--config", str(tmp_path), "--tokens", "6"]
    run = subprocess.run([*command, "--json", str(rows)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert row["passed"] is True
    assert row["tokens"] == 6
    assert 0 <= row["leading_tokens_equal"] <= 6
    assert 0 < row["eager_error"] < 0.1
    assert min(row["ms_per_token"], row["eager_ms_per_token"]) > 0
    if row["ops_with_kernel"] == 0:  # eager bodies against themselves
        assert (row["leading_tokens_equal"], row["worst_difference"]) == (6, 0)


def test_the_model_check_of_emulated_kernels(tiny: ModelConfig, request: pytest.FixtureRequest) -> None:
    emulator = request.config.stash[EMULATOR]
    if emulator is None:
        pytest.skip("no emulated kernels")
    row = compare(random_model(tiny, "cpu", torch.bfloat16), 6, partial(emulator.enabled, emulator.seeds[0]))
    assert row["passed"]
    assert row["ops_with_kernel"] == len(emulator.ops)
    assert 0 < row["worst_difference"] < 0.2  # they are others than eager bodies, and compute the same
    assert row["leading_tokens_equal"] > 0


def test_the_model_check_notices_a_wrong_kernel(tiny: ModelConfig) -> None:
    library = torch.library.Library("pyllama", "IMPL")

    def wrong() -> AbstractContextManager[None]:
        library.impl("swiglu", lambda x: x.unflatten(-1, (2, -1)).prod(-2), "CPU")  # without the sigmoid
        return nullcontext()

    try:
        row = compare(random_model(tiny, "cpu", torch.bfloat16), 6, wrong)
    finally:
        library._destroy()
    assert not row["passed"]
    assert row["ops_with_kernel"] == 1


def test_what_a_step_costs_the_host(tiny: ModelConfig) -> None:
    """Of a step, the parts are within the whole, and nothing is left replaced."""
    model = random_model(tiny, "cpu", torch.float32)
    for options in host_cost.SAMPLING.values():
        figures = host_cost.measure(model, 2, 4, options)
        assert figures["waiting"] == 0  # the CPU is the device
        assert (figures["sampling"] > 0) == bool(options)  # the greedy choice is the model's
        assert figures["sampling"] < figures["step"]
        assert 0 < figures["model"] < figures["step"]
        assert 0 < figures["host"] < figures["step"]
    timed = [one for every in host_cost.TIMED.values() for one in every]
    assert all(getattr(owner, name).__qualname__.startswith(owner.__name__) for owner, name in timed)


def test_choices_are_ways_to_the_same_tokens(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them stays replaced."""
    model, prompts = random_model(tiny, "cpu", torch.float32), [[5, 6, 7], [8, 9]]
    add, given = linear.linear_add_, []

    def watched(*args: Any, **options: Any) -> None:
        given.append(options.get("prefetch") is not None)
        add(*args, **options)

    monkeypatch.setattr(linear, "linear_add_", watched)
    written = []
    for name, choice in choices.CHOICES.items():
        given.clear()
        with choice():
            written.append([out.token_ids for out in pyllama.generate(model, prompts, 6, ignore_eos=True)])
        assert bool(given) == (name != "products")
        assert any(given) == (name == "as chosen")
    assert written == written[:1] * 3
    assert linear.linear_add_ is watched
    assert all(us > 0 for us in choices.measure(model, 2, 4).values())


def test_everything_is_measured() -> None:
    others, few = gpu_check.measured("bench"), gpu_check.measured("decode")
    assert sorted(others + few) == sorted(benches())
    assert set(gpu_check.kernels()) < {*others, *few}
    assert few == [
        *("experts_add", "experts_swiglu", "linear_add"),
        *(f"norm_{op}" for op in ("argmax", "gate", "linear", "swiglu")),
    ]


def test_models_are_cut_down() -> None:
    config = read_config(json.loads((ROOT / "tests" / "configs" / "DeepSeek-R1" / "config.json").read_text()))[0]
    cut = cut_down(config, 2, 2, 64)
    assert [type(layer.ffn) for layer in cut.layers] == [MLPConfig, MoEConfig]
    assert cut.layers[1].ffn.num_experts == 64
    assert cut.layers[1].attention == config.layers[3].attention
    assert cut_down(config, 0, None, None) == config


def test_random_models_are_the_same_each_time(tiny: ModelConfig) -> None:
    first, again, other = (random_model(tiny, "cpu", torch.bfloat16, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_steps_of_training_are_the_same_step() -> None:
    """Each contender's loss and time; gradients do not stay."""
    torch.manual_seed(0)
    model = random_model(read_config(TINY)[0], "cpu", torch.float32).train()
    token_ids = torch.randint(model.config.vocab_size, (2, 20))
    engines = train_step.contenders(model, TINY, compiled=False)
    assert list(engines) == ["pyllama", "pyllama, layers twice", "transformers"]
    found = [train_step.measure(owner, step, token_ids) for owner, step in engines.values()]
    assert all(seconds > 0 for seconds, _, _ in found)
    assert [loss for _, loss, _ in found] == pytest.approx([model(token_ids, token_ids).loss.item()] * 3, rel=1e-5)
    assert all(parameter.grad is None for owner, _ in engines.values() for parameter in owner.parameters())
