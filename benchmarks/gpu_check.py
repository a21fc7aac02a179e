"""Tests and measures a checkout on this machine's GPU, without network: what `make gpu-check` calls.

    python benchmarks/gpu_check.py [--out benchmarks/results] [test | bench | decode | sanitize | model]...

Builds the wheel with the installed tools (nvcc, cmake, ninja, pybind11, scikit-build-core), unpacks it into
build/gpu-check, and runs the stages, each of which ends within nine minutes. Every result is on disk in --out as soon
as it is known, as a row of a .jsonl file, every command's output as it comes in a .log file. Prints a table at the end,
failures last, and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # this file is started as a script, before it is known what is installed
TARGET = ROOT / "build" / "gpu-check"  # where the wheel is unpacked
STAGES = ("test", "bench", "decode", "sanitize", "model")
# Of the sizes of real ones, cut down to what 80 GB hold three times (model_check.py).
MODELS = {
    "Llama-3.2-1B-Instruct": (),
    "Qwen3-30B-A3B": ("--layers", "4"),
    "DeepSeek-R1": ("--first", "2", "--layers", "2", "--experts", "64"),
}
HOST_COST = "Llama-3.2-1B-Instruct"  # small, so that a step is short for what the host does in it
STAGE_SECONDS = 520
START_SECONDS = 40  # for what pytest needs before its first test and after its last, under a sanitizer
SEEDS = (1, 2)  # of the ops' random inputs, beside 0
ON_KERNELS = "cuda-cuda"  # in the names of those of the ops' tests that run kernels
SANITIZED = f"{ON_KERNELS} and not float16 or {ON_KERNELS} and bfloat16"  # float16 is bfloat16's code
CASE_SECONDS = 30  # for what an op's benchmark needs beside the time in which it starts cases: imports, the last case
TIMED_OUT = 124
MAX_CHARACTERS = 10_000
MODULES = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "huggingface_hub", "rich", "typer", "pytest")
MODULES += ("transformers",)  # the tests make tiny models with it
TESTS = ROOT / "tests"
CONFORMANCE = TESTS / "emulator" / "conformance.cu"
GOLDEN = CONFORMANCE.with_suffix(".golden")


@dataclass(frozen=True)
class Step:
    """A command, and the verdict on its exit status and its output: "passed: ...", "failed: ..." or "skipped: ..."."""

    name: str
    command: list[str | Path]
    verdict: Callable[[int, str], str]
    rows: str | None = None  # the file of --out to which it appends
    log: str | None = None  # the file of --out that has its output; None: <stage>_<step>.log


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def by_status(status: int, output: str) -> str:
    return f"{'passed' if status == 0 else 'failed'}: {last_line(output)}"


def by_sanitizer(status: int, output: str) -> str:
    errors = [int(count) for count in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)]
    if not errors and status != TIMED_OUT:  # it could not run anything here
        return f"skipped: {last_line(output)}"
    return f"{'failed' if status or sum(errors) else 'passed'}: {sum(errors)} errors; {last_line(output)}"


def by_text(status: int, output: str) -> str:
    if status:
        return by_status(status, output)
    run = json.loads(output[output.index("{") :])
    completion = run["completions"][0]
    verdict = "passed" if run["device"].startswith("cuda") and completion["text"] else "failed"
    speed = completion["generation_tokens_per_second"]
    return f"{verdict}: {run['device']} {run['dtype']}, {speed:.0f} tokens/s, {completion['text'][:60]!r}"


def by_golden(digest_file: Path) -> Callable[[int, str], str]:
    """The verdict on conformance's output: the same, section by section, as was recorded on an earlier GPU."""
    sys.path.append(str(CONFORMANCE.parent))
    from conformance import differences, digest

    def verdict(status: int, output: str) -> str:
        if status:
            return by_status(status, output)
        digest_file.write_text(digest(output))
        if not GOLDEN.exists():
            return f"passed: nothing to compare with yet; record {digest_file.name} as {GOLDEN.relative_to(ROOT)}"
        different = differences(digest(output), GOLDEN.read_text())
        if different:
            return f"failed: {len(different)} sections differ: {'; '.join(different)}"
        return "passed: as recorded"

    return verdict


def conformance(out: Path) -> Iterator[Step]:
    """What each primitive of csrc/common computes, compared with what the emulator is held against."""
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        return  # it is of instructions that sm_90a alone has
    path = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"])
    compiler = shutil.which("nvcc", path=path) or "nvcc"
    program = TARGET / "conformance"
    command: list[str | Path] = [compiler, "-std=c++17", "-O2", "-gencode=arch=compute_90a,code=sm_90a"]
    command += ["-I", ROOT / "csrc", '-DPYLLAMA_ARCHITECTURES="sm_90a"']
    yield Step("conformance-build", [*command, "-o", program, CONFORMANCE], by_status)
    digest_file = out / "conformance.sm_90.golden"
    yield Step("conformance", [program], by_golden(digest_file), log="conformance.sm_90.txt")


def kernels() -> list[str]:
    return sorted({path.stem.removesuffix("_sm90") for path in (ROOT / "csrc").glob("*.cu")})


def measured(stage: str) -> list[str]:
    """The names of a stage's benchmarks: "decode" has those whose cases are of a scope's few tokens, "bench" those of
    the other kernels and of whole layers."""
    paths = (ROOT / "benchmarks").glob("*/bench_*.py")
    chosen = [path for path in paths if ("scope.few" in path.read_text()) == (stage == "decode")]
    return sorted(path.stem.removeprefix("bench_") for path in chosen)


def steps(stage: str, out: Path, end: float) -> Iterator[Step]:
    """The stage's steps, each made when the one before is over. end: when the stage must be, by `monotonic`."""
    python = sys.executable
    pytest: list[str | Path] = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--emulator", "none"]
    pytest += ["-p", "benchmarks.pytest_rows", "--rows"]
    tests = [TESTS / "ops" / f"test_{name}.py" for name in kernels()]

    def within(share: float) -> list[str | Path]:
        """Options of pytest: no test begins after this share of the time that is left."""
        return ["--seconds", f"{max(share * (end - monotonic()) - START_SECONDS, 1):.0f}"]

    if stage == "test":
        others = [TESTS / "ops" / "test_graphs.py", TESTS / "models" / "test_emulated.py", TESTS / "test_step.py"]
        others += [TESTS / "test_extension.py", TESTS / "test_fit.py", TESTS / "integrations" / "test_hf_kernels.py"]
        command = [
            *pytest,
            out / "tests.jsonl",
            *within(0.6),
            "-k",
            "cuda or test_extension or on_a_gpu",
            *tests,
            *others,
        ]
        yield Step("tests", command, by_status, "tests.jsonl")
        yield from conformance(out)
        for left, seed in zip((2, 1), SEEDS, strict=True):
            command = [*pytest, out / "tests.jsonl", *within(1 / left), "--seed", str(seed), "-k", ON_KERNELS, *tests]
            yield Step(f"seed-{seed}", command, by_status, "tests.jsonl")
    elif stage in ("bench", "decode"):
        if stage == "bench":
            yield Step("limits", [python, "-m", "benchmarks.limits", "--output", out], by_status, "limits.jsonl")
            command = [python, "-m", "benchmarks.load", "--device", "cuda", "--rounds", "3", "--gigabytes", "4"]
            yield Step("load", [*command, "--output", out], by_status, "load.jsonl")
        names = measured(stage)
        for done, name in enumerate(names):  # each in a process of its own, as a fault ends all work of its process
            seconds = (end - monotonic()) / (len(names) - done) - CASE_SECONDS
            command = [python, "-m", "benchmarks", "--quick", "--op", name, "--json", out / "ops.jsonl"]
            yield Step(name, [*command, "--seconds", f"{max(seconds, 1):.0f}"], by_status, "ops.jsonl")
    elif stage == "sanitize":
        path = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"])
        sanitizer = shutil.which("compute-sanitizer", path=path) or "compute-sanitizer"
        for left, tool in ((2, "memcheck"), (1, "racecheck")):
            rows = f"{tool}.jsonl"
            # Without torch's cache every tensor is an allocation of its own, whose bounds the tool knows.
            command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--tool", tool, *pytest, out / rows]
            command += [*within(1 / left), "-k", SANITIZED, "-m", "not nightly and not large", *tests]
            yield Step(tool, command, by_sanitizer, rows)
    elif stage == "model":
        yield Step("wheel", [python, ROOT / "tests" / "wheel" / "smoke.py"], by_status)
        cli = [python, "-c", "from pyllama.cli import app; app()"]
        yield Step("generate", [*cli, "generate", "demo", "If the file", "--json"], by_text)
        for name, options in {"host-cost": (), "host-cost-1B": ("--config", TESTS / "configs" / HOST_COST)}.items():
            command = [python, "-m", "benchmarks.host_cost", *options, "--output", out]
            yield Step(name, command, by_status, "host_cost.jsonl")
        for name, options in {"choices-1B": (HOST_COST,), "choices-A3B": ("Qwen3-30B-A3B", "--layers", "4")}.items():
            command = [python, "-m", "benchmarks.choices", "--config", TESTS / "configs" / options[0], *options[1:]]
            yield Step(name, [*command, "--output", out], by_status, "choices.jsonl")
        for name, options in {"train-0.6B": ("qwen3-0.6b",), "train-A3B": ("qwen3-30b-a3b", "--layers", "2")}.items():
            command = [python, "-m", "benchmarks.train_step", "--shape", *options, "--output", out]
            yield Step(name, command, by_status, "train_step.jsonl")
        rows = "model_check.jsonl"
        for name, options in MODELS.items():
            command = [python, "-m", "benchmarks.model_check", "--config", TESTS / "configs" / name, *options]
            yield Step(name, [*command, "--json", out / rows], by_status, rows)


def build(out: Path) -> str:
    """Builds the wheel, unpacks it into TARGET, and gives the verdict."""
    wheels = ROOT / "build" / "gpu-check-wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-build-isolation", "--no-deps"]
    command += ["--no-index", "--wheel-dir", wheels, ROOT]
    status, output = execute(command, out / "build.log", STAGE_SECONDS)
    if status:
        return f"failed: {last_line(output)}"
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(TARGET)
    facts = (
        "import torch; from pyllama import _C; print(_C.__file__); print('CUDA', _C.cuda_version, *_C.architectures)"
    )
    status, output = execute([sys.executable, "-c", facts], out / "import.log", 60)
    if status == 0 and not output.startswith(str(TARGET)):
        return f"failed: {sys.executable} imports {output.splitlines()[0]}; uninstall pyllama there"
    return by_status(status, output)


def execute(command: list[str | Path], log: Path, seconds: float) -> tuple[int, str]:
    """Runs a command, its output going to `log`; gives status and output. It is killed with all its children when
    the time is over (status TIMED_OUT), or this process is stopped."""
    environment = dict(os.environ, PYTHONPATH=f"{TARGET}{os.pathsep}{ROOT}", PYTHONUNBUFFERED="1")
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=TARGET, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
            file.write(f"\nstopped after {seconds:.0f} s\n")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return status, log.read_text(errors="replace")


def device() -> str:
    """The verdict on the device."""
    import torch

    if not torch.cuda.is_available():
        return f"failed: no CUDA device: torch {torch.__version__} finds none"
    major, minor = torch.cuda.get_device_capability()
    return f"passed: {torch.cuda.get_device_name()}, sm_{major}{minor}, torch {torch.__version__}"


def stage(name: str) -> str:
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(STAGES)}")
    return name


def report(
    checks: list[dict[str, object]], measured: list[dict[str, object]], failed_tests: list[dict[str, object]]
) -> str:
    """At most MAX_CHARACTERS; what failed comes last and is kept whole as far as possible."""
    from benchmarks.results import table

    failures = [row for row in checks if row["result"] == "failed"] + failed_tests
    last = table([{**row, "detail": str(row["detail"])[:300]} for row in failures[:20]]) if failures else "no failures"
    last = f"\n{len(failures)} failed\n{last}"[: MAX_CHARACTERS // 2]
    first = table([{**row, "detail": str(row["detail"])[:120]} for row in checks if row["result"] != "failed"])
    groups: dict[tuple[str, ...], list[dict[str, object]]] = {}
    for row in measured:
        groups.setdefault(tuple(row), []).append(row)
    for rows in groups.values():
        first += "\n\n" + table(rows)
    room = MAX_CHARACTERS - len(last) - 20
    return (first if len(first) <= room else first[:room] + "\n[...]") + "\n" + last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("stages", nargs="*", type=stage, metavar="stage", help=", ".join(STAGES))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    out = arguments.out.resolve()
    checks: list[dict[str, object]] = []
    measured: list[dict[str, object]] = []
    failed_tests: list[dict[str, object]] = []

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if missing := [name for name in MODULES if importlib.util.find_spec(name) is None]:
        sys.exit(f"gpu-check: {sys.executable} lacks {', '.join(missing)}")
    from benchmarks.results import Results, read

    results = Results(out / "gpu_check.jsonl")

    def add(stage: str, step: str, seconds: float, verdict: str) -> None:
        result, _, detail = verdict.partition(": ")
        row = {"stage": stage, "step": step, "result": result, "s": round(seconds), "detail": detail}
        print(f"{stage} {step}: {verdict} ({seconds:.0f} s)", flush=True)
        results.add(**row)
        checks.append(row)

    began = monotonic()  # the build counts for the first stage
    on_device = device()
    add("build", "device", 0, on_device)
    built = build(out)
    add("build", "wheel", monotonic() - began, built)
    for name in arguments.stages or STAGES:
        for step in steps(name, out, began + STAGE_SECONDS):
            if reason := next((verdict for verdict in (on_device, built) if verdict.startswith("failed")), None):
                add(name, step.name, 0, reason.replace("failed", "skipped", 1))
                continue
            rows = out / step.rows if step.rows else None
            offset = rows.stat().st_size if rows and rows.exists() else 0
            since = monotonic()
            log = out / (step.log or f"{name}_{step.name}.log")
            status, output = execute(step.command, log, began + STAGE_SECONDS - since)
            add(name, step.name, monotonic() - since, step.verdict(status, output))
            if rows and rows.exists():
                new = read(rows, offset)
                failed_tests += [
                    {"stage": name, "step": row.pop("test"), **row} for row in new if row.get("result") == "failed"
                ]
                measured += [row for row in new if "result" not in row]
        began = monotonic()
    print("\n" + report(checks, measured, failed_tests))
    sys.exit(any(row["result"] == "failed" for row in checks))


if __name__ == "__main__":
    main()
