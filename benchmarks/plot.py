"""Draws a run's rows: rooflines, and each op's shares of its limits beside the others'. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D

from benchmarks.bench import short

Row = dict[str, Any]
OURS = "#a9cbe8"
COLOURS = ("#1f6fb2", "#d1495b", "#e09f1f", "#3f8f5b", "#7a5ea8", "#00798c", "#8d6a4f", "#c2559d", "#444444", "#9acd32")
MARKS = "DsovP^X*h<>p"
ROW_INCHES, PANEL_INCHES, ROOFLINE_INCHES = 0.25, 0.75, 4.0
COLUMNS = 2  # of panels with bars


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes a PNG of rows as `python -m benchmarks` makes them; of rows of one case, the last."""
    limits = {row["limit"]: row["rate"] for row in rows if row["op"] == "limit"}
    cases = {(row["op"], row["model"], row["case"], row["dtype"]): row for row in rows if row["op"] != "limit"}
    by_op: dict[str, list[Row]] = {}
    for row in cases.values():
        by_op.setdefault(row["op"], []).append(row)
    if not cases:
        raise SystemExit("benchmarks: no rows to draw")
    styles = _styles(cases.values())

    height = {op: len(found) * ROW_INCHES + PANEL_INCHES for op, found in by_op.items()}
    columns: list[list[str]] = [[] for _ in range(min(COLUMNS, len(by_op)))]
    for op in sorted(by_op, key=height.__getitem__, reverse=True):  # the largest first, each where most room is left
        min(columns, key=lambda column: sum(height[op] for op in column)).append(op)
    bars = max(sum(height[op] for op in column) for column in columns)

    figure = plt.figure(figsize=(8.5 * max(len(columns), 1.3), ROOFLINE_INCHES + bars + 1), layout="constrained")
    if any(row["implementation"] != "cuda" for row in cases.values()):
        title += ": eager bodies, which say nothing of the kernels"
    figure.suptitle(title, fontsize=13, fontweight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=(ROOFLINE_INCHES, bars))
    _roofline(top.subplots(), limits, by_op)
    for place, column in zip(bottom.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
        _panels(place, {op: by_op[op] for op in column}, height, bars, styles)
    marks = [
        Line2D([], [], color=colour, marker=mark, linestyle="", markersize=6, label=name)
        for name, (colour, mark) in styles.items()
    ]
    bar = Line2D([], [], color=OURS, linewidth=8, label="pyllama")
    figure.legend(handles=[bar, *marks], loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _styles(rows: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each contender: no two of the first ten have either in common."""
    names = dict.fromkeys(("torch", "compile", *(name for row in rows for name in row["contenders_us"])))
    return {
        name: (COLOURS[(i + len(COLOURS) - 2) % len(COLOURS)], MARKS[i % len(MARKS)]) for i, name in enumerate(names)
    }


def _roofline(axes: Axes, limits: Mapping[str, float], by_op: Mapping[str, list[Row]]) -> None:
    """FLOP per byte against FLOP per second, under what memory and products allow."""
    points = {
        op: [(row["work"]["flops"] / row["work"]["moved"], row["work"]["flops"] / row["us"] / 1e6) for row in rows]
        for op, rows in by_op.items()
        if all(row["work"]["flops"] for row in rows)  # a mere move has no place there
    }
    if not points:
        axes.set_visible(False)
        return
    xs, ys = ([point[i] for found in points.values() for point in found] for i in (0, 1))
    left, right, highest = min(xs) / 2, max(xs) * 3, max(ys)
    if "read" in limits and "product" in limits:
        slope, peak = limits["read"] / 1e3, limits["product"]  # TFLOP/s at one FLOP per byte; TFLOP/s
        right, highest = max(right, 4 * peak / slope), max(highest, peak)
        roof = ([left, peak / slope, right], [left * slope, peak, peak])
        axes.plot(*roof, color="black", linewidth=1.5)
        axes.fill_between(*roof, 1e-12, color="black", alpha=0.035, linewidth=0)
        offset = {"textcoords": "offset points", "fontsize": 9}
        axes.annotate(f"read {limits['read']:,.4g} GB/s", (left * 1.5, left * 1.5 * slope), (8, -12), **offset)
        axes.annotate(f"product {peak:,.3g} TFLOP/s", (right, peak), (-6, 5), ha="right", **offset)
    for number, (op, found) in enumerate(points.items()):
        colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
        axes.scatter(*zip(*found, strict=True), s=32, color=colour, marker=mark, alpha=0.8, linewidths=0, label=op)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(ys) / 2, highest * 2.5))
    axes.set(xlabel="FLOP per byte moved", ylabel="TFLOP/s")
    axes.set_title("Roofline: pyllama's ops under what the device reached in this run", fontsize=11, loc="left")
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(loc="lower right", fontsize=9, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _panels(
    place: SubFigure,
    by_op: Mapping[str, list[Row]],
    height: Mapping[str, float],
    room: float,
    styles: Mapping[str, tuple[str, str]],
) -> None:
    """One column of bars, each row of one height in all panels; what room is left stays empty, below."""
    heights = [height[op] for op in by_op]
    rest = max(room - sum(heights), 0.01)
    *panels, empty = place.subplots(len(heights) + 1, 1, height_ratios=[*heights, rest])
    empty.axis("off")
    for axes, (op, rows) in zip(panels, by_op.items(), strict=True):
        _bars(axes, op, rows, styles)


def _bars(axes: Axes, op: str, rows: list[Row], styles: Mapping[str, tuple[str, str]]) -> None:
    """Shares of the limit: pyllama's as bars, the others' as marks; pyllama's times on the right."""
    largest = 105.0
    for y, row in enumerate(rows):
        share = row["of_limit"] * 100
        axes.barh(y, share, color=OURS, height=0.7)
        time = f"{row['us']:,.0f}" if row["us"] >= 100 else f"{row['us']:.2f}"
        axes.text(1.01, y, f"{time} us", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        for name, other in row["contenders_us"].items():
            colour, mark = styles[name]
            theirs = share * row["us"] / other
            largest = max(largest, share, theirs)
            edge = {"markeredgecolor": "white", "markeredgewidth": 0.5}
            axes.plot(theirs, y, mark, color=colour, markersize=6, **edge, zorder=3)
    axes.axvline(100, color="black", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), [f"{short(row['model'])}   {row['case']}" for row in rows], fontsize=8)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, largest * 1.03))
    limits = " or ".join(dict.fromkeys(row["limit"] for row in rows))
    kind = f"{rows[0]['implementation']}, {rows[0]['dtype']}"
    axes.set_title(f"{op} ({kind}): % of the limit, {limits}", fontsize=10, loc="left")
    axes.grid(True, axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
