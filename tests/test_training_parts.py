"""What the examples that train share (examples/training.py), where their own tests do not reach."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from training import History, Plan, StateFile, draw, learning_rate, train, write_result


def test_a_disk_without_room_is_refused_at_once(tmp_path: Path) -> None:
    """The first state needs its place and that of the next one, later ones need the next one's."""
    states = StateFile.beside(tmp_path / "tuned", {})
    size = 2 * shutil.disk_usage(tmp_path).free // 3
    states.check_room(size // 2)
    with pytest.raises(OSError, match=r"tuned.state takes .* GB at a time, and .* GB are free"):
        states.check_room(size)
    states.path.touch()
    states.check_room(size)
    with pytest.raises(OSError, match="GB are free"):
        states.check_room(2 * size)


class Counter:
    """The smallest trainer: its one weight counts steps."""

    def __init__(self) -> None:
        self.weight = torch.zeros(())

    def step(self, batch: torch.Tensor, progress: float) -> tuple[float, float | None]:
        self.weight += 1
        return float(batch.sum()), None

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight.copy_(state["weight"])


def test_each_step_has_its_own_batch_however_often_it_breaks_off(tmp_path: Path) -> None:
    """What a kill leaves of a state half written is cleared away, here and nowhere else."""
    states = StateFile.beside(tmp_path / "[tuned]", {})
    leftover, other = tmp_path / ".[tuned].state.17.partial", tmp_path / ".t.state.17.partial"
    leftover.touch()
    other.touch()
    plan = Plan(steps=10, milestones=[0.0, 0.4, 0.8, 1.0], scale=2.0)
    for most in (2, 6, 9, 10):  # batches before it breaks off
        trainer, batches = Counter(), (torch.full((1, 3), i) for i in range(most))
        with contextlib.suppress(StopIteration):
            history = train(trainer, batches, lambda: 7.0, plan, states, Console(quiet=True))
    assert history.training == [(3 * (i + 1), 2.0 * 3 * i) for i in range(10)]
    assert history.held_out == [(0, 7.0), (12, 7.0), (24, 7.0), (30, 7.0)]
    assert trainer.weight == 10
    assert sorted(tmp_path.iterdir()) == sorted([states.path, other])


def test_a_result_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    states = StateFile.beside(tmp_path / "tuned", {})
    states.path.touch()

    def half(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").touch()
        raise OSError("no space left")

    with pytest.raises(OSError, match=r"no space left.*not lost.*tuned.state has it.*same command again"):
        write_result(tmp_path / "tuned", half, states)
    assert list(tmp_path.iterdir()) == [states.path]
    killed = tmp_path / ".tuned.unfinished"  # what a kill at this point leaves
    killed.mkdir()
    (killed / "leftover").touch()
    write_result(tmp_path / "tuned", Path.mkdir, states)
    assert list(tmp_path.iterdir()) == [tmp_path / "tuned"]
    assert list((tmp_path / "tuned").iterdir()) == []


def test_the_learning_rate_rises_and_falls_in_straight_lines() -> None:
    assert [learning_rate(i / 10, 0.2) for i in range(11)] == pytest.approx(
        [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]
    )
    assert [learning_rate(i / 4, 0.0) for i in range(5)] == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("lines", [{}, {"another model": 2.0}])
def test_a_curve_of_any_length_is_drawn(lines: dict[str, float], tmp_path: Path) -> None:
    for steps in (1, 300):
        history = History([(i * 100, 5 / i) for i in range(1, steps + 1)], [(0, 5.0), (100 * steps, 5 / steps)])
        draw(history, Plan(steps, [0.0, 1.0]), tmp_path / "loss.png", lines)
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
