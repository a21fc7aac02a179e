"""Where benchmarks put what they measure: JSON lines that name device, versions and commit, on disk row by row."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pyllama.bench.origin import commit, package_version, processor


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in columns, which are all their keys but those of nested values."""
    columns = list(dict.fromkeys(name for row in rows for name in row if not isinstance(row[name], dict)))
    lines = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


class Results:
    """A run's rows, and the file to which they are appended, if any."""

    def __init__(self, path: Path | None) -> None:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[dict[str, Any]] = []
        cuda = torch.cuda.is_available()
        self.origin = {
            "device": torch.cuda.get_device_name() if cuda else processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "pyllama_version": package_version("pyllama"),
            "commit": commit(Path(__file__).parents[1]) or "unknown",
        }

    def add(self, **row: Any) -> None:
        """Appends a row; it is on disk when this returns."""
        self.rows.append(row)
        if not self.path:
            return
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with self.path.open("a") as file:
            file.write(json.dumps({**row, **self.origin, "time": time}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def show(self, title: str) -> None:
        """Prints this run's rows as a table, and where they are."""
        print(f"\n{title}; {self.origin['device']}, torch {self.origin['torch']}")
        print(table(self.rows))
        print(f"appended to {self.path}" if self.path else "")


ORIGIN = ("device", "python", "torch", "cuda", "pyllama_version", "commit", "time")


def read(path: Path, offset: int = 0) -> list[dict[str, Any]]:
    """The rows that a file has from a position on, less where they come from."""
    with path.open() as file:
        file.seek(offset)
        rows = [json.loads(line) for line in file if line.endswith("\n")]
    return [{name: value for name, value in row.items() if name not in ORIGIN} for row in rows]


def origin(path: Path) -> str:
    """Device and torch of a file's last row."""
    row = json.loads(path.read_text().splitlines()[-1])
    return f"{row['device']}, torch {row['torch']}"
