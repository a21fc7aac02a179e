"""The table that people paste: Markdown, line by line; and the same as one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pyllama.bench import Bench
from pyllama.bench.figures import Row

COLUMNS = (
    "engine",
    "batch",
    "context",
    "prompt tokens/s",
    "first token, ms",
    "of limit",
    "new tokens/s",
    "ms/step",
    "GB/step",
    "of limit",
    "peak GB",
    "x prompt",
    "x new",
)
WIDTHS = (12, *map(len, COLUMNS[1:]))


def run(progress: Console, json_file: str | None, profile: Path | None, **options: Any) -> None:
    """Measures and prints the table, its rows as they become known; Ctrl-C leaves what there is, the JSON too.

    progress: shows what is being done. json_file: "-" is standard output, and the table goes to standard error.
    profile: the folder of a profile. options: `Bench`'s.
    """
    # What cannot be written is an error now, not after the run.
    if json_file not in (None, "-"):
        Path(str(json_file)).touch()
    if profile is not None:
        profile.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    complete = False
    with progress.status("") as status:

        def say(what: str) -> None:
            status.update(what)
            status.start()

        def show(text: str) -> None:
            status.stop()  # or the two would share a line of the terminal
            print(text, file=sys.stderr if json_file == "-" else sys.stdout, flush=True)

        bench = Bench(**options, say=say)
        try:
            for text in head(bench.about):
                show(text)
            for row in bench.rows():
                rows.append(row)
                show(line(row, rows))
            if profile is not None:
                bench.profile(profile)
            complete = True
        finally:
            if json_file is not None:
                text = json.dumps(as_json(bench.about, rows, complete)) + "\n"
                sys.stdout.write(text) if json_file == "-" else Path(json_file).write_text(text)


def head(about: dict[str, Any]) -> Iterator[str]:
    """The lines before the rows."""
    layers, whole = about["layers"], about["layers_of_the_model"]
    cut = f", the first {layers} of its {whole} layers" if whole not in (None, layers) else ""
    active = about["active_parameters"]
    used = f", {_count(active)} of them for each token" if active != about["parameters"] else ""
    checkout = f" ({about['commit']})" if about["commit"] else ""
    ops = ", ".join(f"{count} {kind}" for kind, count in about["ops"].items())
    memory = "of the whole process," if "threads" in about["device"] else "of tensors,"
    yield f"**{about['model']}**, {about['weights']} weights{cut}"
    yield ""
    yield f"- {_count(about['parameters'])} parameters{used}; {about['dtype']}, {about['weight_bytes'] / 1e9:.2f} GB"
    yield (
        f"- {about['device']}: reads {about['read_bytes_per_second'] / 1e9:,.1f} GB/s, "
        f"multiplies {about['product_flops_per_second'] / 1e12:,.3g} TFLOP/s, measured in this run"
    )
    yield f"- pyllama {about['pyllama']}{checkout}, torch {about['torch']}, {about['date']}; ops: {ops}"
    yield f"- transformers: {about['transformers']}"
    yield f"- random prompts, {about['new_tokens']} new tokens each, greedy; median of {about['rounds']}"
    yield (
        "- rates are of the whole batch; GB/step: weights (of experts those expected to be chosen, each as likely as "
        "any other) and cache, each read once; of limit: the least time for reading and multiplying / the time taken; "
        f"peak: {memory} less the other model's weights; x: pyllama's rate / transformers'"
    )
    yield ""
    yield _line(COLUMNS)
    yield "|" + "|".join("-" * (width + 1) + (":" if place else "-") for place, width in enumerate(WIDTHS)) + "|"


def line(row: Row, rows: Sequence[Row]) -> str:
    """A row of the table. rows: those so far, among which another engine's finds pyllama's to be held against."""
    cell = (row.engine, str(row.cell.batch), str(row.cell.context))
    found = row.figures
    if found is None:
        return _line((*cell, str(row.problem).replace("|", "/"), *[""] * (len(COLUMNS) - len(cell) - 1)))
    ours = [r.figures for r in rows if r.engine == "pyllama" != row.engine and r.cell == row.cell and r.figures]
    return _line(
        (
            *cell,
            _number(found.prompt_tokens_per_second),
            _number(1e3 * found.first_token_seconds),
            _percent(found.prompt_share),
            _number(found.tokens_per_second),
            _number(1e3 * found.step_seconds),
            _number(found.step_bytes / 1e9),
            _percent(found.step_share),
            "" if found.peak_bytes is None else f"{found.peak_bytes / 1e9:.2f}",
            "".join(f"{our.prompt_tokens_per_second / found.prompt_tokens_per_second:.2f}" for our in ours),
            "".join(f"{our.tokens_per_second / found.tokens_per_second:.2f}" for our in ours),
        )
    )


def as_json(about: dict[str, Any], rows: Sequence[Row], complete: bool) -> dict[str, Any]:
    """Everything; times in seconds, rates per second. complete: whether all rows are there."""
    return {
        **about,
        "complete": complete,
        "rows": [
            {"engine": row.engine, "batch": row.cell.batch, "context": row.cell.context}
            | (asdict(row.figures) if row.figures else {"problem": row.problem})
            for row in rows
        ],
    }


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _number(value: float) -> str:
    """Three digits, or all there are before the point, with commas."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _line(cells: Sequence[str]) -> str:
    padded = [cells[0].ljust(WIDTHS[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], WIDTHS[1:], strict=True)]
    return "| " + " | ".join(padded) + " |"
