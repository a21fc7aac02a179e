"""What the emulator's primitives compute: against tables of the PTX ISA worked out here, and against a GPU's output."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conformance import differences, digest, sections

GOLDEN = Path(__file__).parent / "emulator" / "conformance.golden"
ALL = np.arange(32)


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest) -> Callable[[int], str]:
    """Runs the emulated program under a schedule."""
    program = request.config.getoption("--emulator-build").resolve() / "conformance"
    if not program.exists():
        pytest.skip(f"{program} is not there: make emulator")
    return lambda seed: subprocess.run([program, str(seed)], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def output(run: Callable[[int], str]) -> str:
    return run(0)


def words(output: str, section: str) -> np.ndarray:
    """uint32 [rows, 32]: of each value printed, every lane's."""
    return np.array([[int(word, 16) for word in line.split()] for line in sections(output)[section]], dtype=np.uint32)


def test_output_is_the_gpus(output: str) -> None:
    if not GOLDEN.exists():
        pytest.skip("no GPU's output is recorded yet: make gpu-check STAGE=test writes it")
    assert not differences(digest(output), GOLDEN.read_text())


def test_no_schedule_changes_the_output(run: Callable[[int], str], output: str) -> None:
    assert len(sections(output)) == 5 + 4 * 8 * 2  # swizzles, sizes n and types of wgmma
    for seed in (1, 2):
        assert not differences(digest(run(seed)), digest(output))


@pytest.mark.parametrize(("block", "width"), [(0, 32), (1, 16), (2, 8), (3, 4)])
def test_shuffles(output: str, block: int, width: int) -> None:
    own, first = ALL % width, ALL - ALL % width
    expected = [
        first + 5 % width,
        first + 3 * ALL % width,
        np.where((own ^ 3) < width, ALL ^ 3, ALL),
        np.where((ALL ^ 17) // width <= ALL // width, ALL ^ 17, ALL),  # later segments are out of reach
        np.where(own >= 3, ALL - 3, ALL),
        np.where(own + 3 < width, ALL + 3, ALL),
    ]
    assert np.array_equal(words(output, "warp")[6 * block : 6 * block + 6], expected)


def test_votes_and_reductions(output: str) -> None:
    def mask(chosen: np.ndarray) -> int:
        return sum(1 << int(lane) for lane in ALL[chosen])

    expected = [
        [mask(ALL % 3 == 0)] * 32,
        [1] * 32,
        [0] * 32,
        [mask(lane % 5 == ALL % 5) for lane in ALL],
        [31 * 32 // 2] * 32,
        [0] * 32,
        [int(np.bitwise_xor.reduce(ALL * ALL))] * 32,
    ]
    rows = words(output, "warp")
    assert np.array_equal(rows[24:31], expected)
    assert np.array_equal(rows[31, :16], ALL[:16] ^ 1)  # the last sixteen take no part and print the next values here
    reversed_bits = [int(f"{lane:032b}"[::-1], 2) for lane in ALL]
    assert np.array_equal(np.concatenate((rows[32, :16], rows[31, 16:])), reversed_bits)
    assert np.array_equal(rows[33, :16], [32 - int(lane).bit_length() for lane in ALL[:16]])
    assert np.array_equal(rows[35:38, 0], [21, 1, 0])  # of 32 lanes, 21 are no multiple of three


def test_matrices_are_loaded_as_the_isa_says(output: str) -> None:
    """ldmatrix: lane l has elements 2 (l % 4) and the next of row l / 4 (of column l / 4, transposed)."""
    rows, columns = ALL // 4, ALL % 4 * 2
    plain, transposed = (
        [64 * i + (low | low + step << 16) + (64 * i << 16) for i in range(4)]
        for low, step in ((8 * rows + columns, 1), (8 * columns + rows, 8))
    )
    expected = [*plain, *transposed, *plain[:2], *transposed[:2], plain[0], transposed[0]]
    assert np.array_equal(words(output, "matrices")[:14], expected)


@pytest.mark.parametrize("first", [42, 46], ids=["bfloat16", "float16"])
def test_products_are_those_of_the_isas_fragments(output: str, first: int) -> None:
    """mma.m16n8k16: a [16, 16] row by row, b [16, 8] column by column, c and d [16, 8] of float32."""

    def small(i: int) -> int:
        return (i * 7 + i // 5 * 3) % 11 - 5

    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for lane in range(32):
        group, pair = lane // 4, lane % 4 * 2
        for i in range(4):
            for j in range(2):
                value = small(lane * 8 + i * 2 + j)
                a[group + i % 2 * 8, pair + i // 2 * 8 + j] = value
                if i < 2:
                    b[pair + i * 8 + j, group] = -value if j else value
            c[group + i // 2 * 8, pair + i % 2] = small(lane + i * 32)
    d = a @ b + c
    expected = [[d[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] for lane in range(32)] for i in range(4)]
    assert np.array_equal(words(output, "matrices")[first : first + 4].view(np.float32), expected)
