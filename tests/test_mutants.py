"""Planted bugs are noticed: every mutant fails its op's tests under at least one flavour of the emulated kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import SCHEDULES
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "mutants"
CSRC = BUILD / "csrc"
PRELOADED = {"plain": (), "asan": ("libasan.so", "libstdc++.so"), "tsan": ("libtsan.so",)}


def mutated(mutant: Mutant) -> str:
    """The file with the bug."""
    parts = (ROOT / "csrc" / mutant.file).read_text().split(mutant.old)
    assert len(parts) > mutant.nth + 1, f"{mutant.file} no longer has the text {mutant.old!r}"
    return mutant.old.join(parts[: mutant.nth + 1]) + mutant.new + mutant.old.join(parts[mutant.nth + 1 :])


def plant(path: Path, text: str) -> None:
    """Writes the file, unless it has this text: what is written is compiled again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def build(kernel: str, flavour: str) -> None:
    scripts = Path(sys.executable).parent
    configure = [scripts / "cmake", "-S", ROOT / "tests" / "emulator", "-B", BUILD / kernel, "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={scripts / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (
        [*configure, f"-Dcsrc={CSRC}", f"-Dkernel={kernel}"],
        [scripts / "cmake", "--build", BUILD / kernel, "--target", flavour],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout


def noticed(kernel: str, flavour: str) -> bool:
    """Whether the op's tests fail; that they cannot run at all is another matter."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in PRELOADED[flavour]
    ]
    environment = dict(os.environ, LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0")
    environment |= {"TSAN_OPTIONS": "halt_on_error=1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "emulated"]
    command += ["--emulator", flavour, "--emulator-build", str(BUILD / kernel)]
    command += [str(ROOT / "tests" / "ops" / f"test_{name}.py") for name in (kernel, "overlap")]
    if flavour != "plain":
        command += ["-m", "not nightly and not large"]
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return True
    assert done.returncode not in (2, 3, 4, 5), done.stdout + done.stderr  # interrupted, broken, or no tests
    return done.returncode != 0


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.bug}")
def test_text_is_there(mutant: Mutant) -> None:
    assert mutated(mutant) != (ROOT / "csrc" / mutant.file).read_text()
    assert (ROOT / "tests" / "ops" / f"test_{mutant.op}.py").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.bug}")
def test_planted_bug_is_noticed(mutant: Mutant) -> None:
    kernel = mutant.op
    for path in (ROOT / "csrc").rglob("*.*"):
        name = path.relative_to(ROOT / "csrc")
        plant(CSRC / name, mutated(mutant) if str(name) == mutant.file else path.read_text())
    for flavour in SCHEDULES:
        build(kernel, flavour)
        if noticed(kernel, flavour):
            return
    pytest.fail(f"no test of {kernel} fails")
