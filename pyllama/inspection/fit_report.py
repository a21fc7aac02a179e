"""What `pyllama fit` prints: facts, and a table of contexts and batches."""

from __future__ import annotations

from collections.abc import Iterator

from pyllama.files import printable
from pyllama.inspection.fit import MOST_BATCH, Fit
from pyllama.inspection.report import aligned, size

DEVICES = {"cuda": "a GPU", "cpu": "the CPU"}


def lines(fit: Fit) -> Iterator[str]:
    facts = list(_facts(fit))
    width = max(len(name) for name, _ in facts)
    yield from (f"{name:{width}}  {value}" for name, value in facts)
    yield ""
    batches = sorted({cell.batch for cell in fit.cells})
    cells = {(cell.context, cell.batch): f"{'' if cell.fits else '✗ '}{size(cell.bytes)}" for cell in fit.cells}
    rows = [["context", *(f"batch {batch}" for batch in batches), "largest batch"]]
    for context, most in fit.largest_batches.items():
        number = f"{most}{' or more' if most == MOST_BATCH else ''}" if most else "none"
        rows.append([f"{context:,}", *(cells[context, batch] for batch in batches), number])
    yield from aligned(rows)
    yield ""
    yield "bytes in all; ✗ does not fit, of which without the workspace where that much is too much already"


def _facts(fit: Fit) -> Iterator[tuple[str, str]]:
    yield "source", f"{printable(fit.source)}, in {fit.dtype} on {DEVICES[fit.device]}"
    yield "weights", f"{size(fit.weight_bytes)}, {fit.parameters:,} parameters"
    if fit.mapped_bytes:
        yield (
            "mapped",
            f"{size(fit.mapped_bytes)} of them, left in the files and read through the system's cache of these",
        )
    known = [cell for cell in fit.cells if cell.workspace_bytes is not None]
    if known:
        cell = min(known, key=lambda cell: (cell.batch, -cell.context))
        least = ", and what ops take within" if fit.device == "cpu" else ""
        yield "workspace", f"{size(cell.workspace_bytes or 0)} for batch {cell.batch}, context {cell.context:,}{least}"
    yield "cache per token", size(fit.cache_bytes_per_token)
    yield (
        "memory",
        f"{size(fit.memory)}, of which {size(fit.reserve)} are left alone" if fit.reserve else size(fit.memory),
    )
    lacking = fit.weight_bytes + fit.reserve - fit.memory
    if lacking > 0:
        yield "does not fit", f"the weights alone need {size(lacking)} more than there is"
        return
    if fit.left < 0:
        yield "does not fit", f"loading the weights takes {size(-fit.left)} more than there is"
        return
    yield "left", f"{size(fit.left)} beside the weights{' and what converting them takes' if fit.staged_bytes else ''}"
    if not fit.fits:
        yield "does not fit", "nothing can be generated: cache and workspace need more than is left"
        return
    whole = ", all that the model holds" if fit.largest_context == fit.max_positions else f" of {fit.max_positions:,}"
    yield "largest context", f"{fit.largest_context:,} tokens at batch 1{whole}"
