"""Measures pyllama's ops beside PyTorch and other libraries: `python -m benchmarks --help`, and README.md."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import limits
from benchmarks.backward import backward_of
from benchmarks.bench import Bench, benches, measure, merged, missing_peers, short
from benchmarks.results import Results, origin, read
from benchmarks.shapes import SCOPES
from benchmarks.timing import reason, sets_past_cache

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COLUMNS = {  # of the printed table: width and what a row has there
    "model": (24, lambda row: short(row["model"])[:24]),
    "case": (34, lambda row: row["case"]),
    "us": (-10, lambda row: f"{row['us']:.2f}"),
    "rate": (-15, lambda row: f"{row['rate']:g} {row['unit']}"),
    "of limit": (-15, lambda row: f"{row['of_limit']:.0%} {row['limit']}"),
    "torch": (-8, lambda row: _times(row["x_torch"])),
    "compile": (-8, lambda row: _times(row["x_compile"])),
    "best peer": (-20, lambda row: f"{row['peer']} {_times(row['x_peer'])}" if row["peer"] else "-"),
}


def main(
    op: Annotated[
        list[str] | None, typer.Option(help="An op or layer to measure. May be repeated.", show_default="all")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few sizes of two models.")] = False,
    backward: Annotated[
        bool, typer.Option("--backward", help="Also forward and backward, where it is for training.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Append each row to this file, as a line of JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw rooflines and bars to this PNG file.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Measure nothing: plot the rows of this file.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}", show_default="what suits the device")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Start no case after so many seconds.")] = float("inf"),
) -> None:
    """Measure ops on this machine's GPU; without one, their eager bodies on the CPU."""
    if rows is not None:
        found, title = read(rows), origin(rows)
    else:
        results = Results(json)
        complete = run(results, op, quick, backward, dtype, seconds)
        found, title = results.rows, f"{results.origin['device']}, torch {torch.__version__}"
    if plot is not None:
        from benchmarks.plot import draw

        draw(found, title, plot)
        print(f"drawn: {plot}")
    if rows is None and not complete:
        raise SystemExit("benchmarks: some cases failed, see above")


def run(results: Results, op: list[str] | None, quick: bool, backward: bool, dtype: str | None, seconds: float) -> bool:
    """Measures what is asked for, printing each row as it is known; whether pyllama's op ran in every case."""
    deadline = time.monotonic() + seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scope = SCOPES[device, quick]
    if dtype not in (None, *DTYPES):
        raise SystemExit(f"benchmarks: --dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
    chosen_dtype = DTYPES[dtype] if dtype else scope.dtype
    known = benches()
    if unknown := [name for name in op or () if name.rstrip("_") not in known]:
        raise SystemExit(f"benchmarks: no op {', '.join(unknown)}; there are {', '.join(known)}")

    print(f"{results.origin['device']}, torch {torch.__version__}, commit {results.origin['commit']}")
    if device == "cpu":
        print(
            "CPU FIGURES: there is no GPU here. These are the eager bodies on the CPU, timed by the wall clock; they "
            "say nothing of the CUDA kernels, and only ratios within this run mean anything."
        )
    add_limits(results, chosen_dtype, device, quick)
    count = measured = left = 0
    chosen = [known[name.rstrip("_")] for name in op or known]
    if backward:
        chosen = [one for bench in chosen for one in (bench, backward_of(bench)) if one is bench or bench.gradients]
    for bench in chosen:
        header(bench, device)
        cases = list(merged(bench.cases(scope)))
        count += len(cases)
        if device == "cuda" and bench.implementation(device) != "cuda":
            print("this build has no kernel for it")
            continue
        for case in cases:
            if time.monotonic() > deadline:
                left += 1
                continue
            try:
                with torch.no_grad():
                    row = measure(bench, case, chosen_dtype, device, results)
            except Exception as error:  # too little memory, say; the other cases are still to be measured
                print(f"{case.model}, {case.what}: {reason(error)}", flush=True)
                continue
            finally:
                if device == "cuda":
                    torch.cuda.empty_cache()
            measured += 1
            print(line({name: get(row) for name, (_, get) in COLUMNS.items()}), flush=True)
    if results.path:
        print(f"\nappended to {results.path}")
    print(f"{measured} of {count} cases measured" + f", {left} left out when {seconds:.0f} s were over" * bool(left))
    return measured + left == count


def add_limits(results: Results, dtype: torch.dtype, device: str, quick: bool) -> None:
    """What the device can do at its best; the shares are of limits measured again beside each case, of its size."""
    size = (2**30 if device == "cuda" else 2**28) >> (2 if quick else 0)
    sets = sets_past_cache(size, device)
    rates = {
        "read": limits.measured(limits.read(size, sets, device), sets, device) / 1e9,
        "copy": limits.measured(limits.copy(size, sets, device), sets, device) / 1e9,
        "product": limits.measured(limits.product(dtype, device), 1, device) / 1e12,
    }
    for name, rate in rates.items():
        results.add(op="limit", limit=name, rate=round(rate, 2), unit="TFLOP/s" if name == "product" else "GB/s")
    print("limits: " + ", ".join(f"{row['limit']} {row['rate']:g} {row['unit']}" for row in results.rows), flush=True)


def header(bench: Bench, device: str) -> None:
    print(f"\n{bench.op} ({bench.implementation(device)}); other time / pyllama's time of torch, compile, peer")
    if missing := missing_peers(bench):
        print(f"not installed: {', '.join(missing)}")
    print(line({name: name for name in COLUMNS}), flush=True)


def line(cells: dict[str, str]) -> str:
    return "  ".join(
        cell.ljust(width) if (width := COLUMNS[name][0]) > 0 else cell.rjust(-width) for name, cell in cells.items()
    ).rstrip()


def _times(ratio: Any) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


if __name__ == "__main__":
    typer.run(main)
