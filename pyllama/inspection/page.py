"""The page that `pyllama inspect --html` writes: one file that needs nothing else, no scripts and no network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from pyllama.files import printable, write_text
from pyllama.inspection import Inspection
from pyllama.inspection.blocks import diagram_of
from pyllama.inspection.report import cells, facts, share, size
from pyllama.inspection.tree import MAX_DEPTH
from pyllama.inspection.treemap import LINE, MARGIN, Rectangle, areas
from pyllama.inspection.view import KINDS, bounded, view_of, walk

MAX_ROWS = 1500  # of the table, and then one for what else a module has
MAX_BLOCKS = 200  # of the module tree where the model is not known
MAX_AREAS = 400
LEAST_AREA = 0.0003  # of the whole: still to be seen
# Of which a window shows one, that labels may be read.
MAPS = {
    "wide": Rectangle(0, 0, 1160, 620),
    "middle": Rectangle(0, 0, 760, 560),
    "narrow": Rectangle(0, 0, 400, 640),
}
MAX_TEXT = 1000
MAX_OPEN = 40  # rows of the table; of more only the first levels are not folded


def write_page(inspection: Inspection, path: str | Path) -> None:
    """Writes the whole page, or nothing."""
    write_text(path, render(inspection))


def render(inspection: Inspection) -> str:
    environment = Environment(
        autoescape=True,
        finalize=_shown,
        loader=FunctionLoader(lambda name: (files("pyllama.inspection") / name).read_text(encoding="utf-8")),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "coordinate": lambda value: f"{value:.3f}".rstrip("0").rstrip("."),
        "number": lambda value: f"{value:,}",
        "printable": printable,
        "size": size,
        "tail": lambda path: printable(path[-200:]),
    }
    root = view_of(inspection.root)
    table = bounded(root, MAX_ROWS)
    pictured = bounded(root, MAX_AREAS, LEAST_AREA * root.node.bytes)
    return environment.get_template("page.html.jinja").render(
        inspection=inspection,
        facts=list(facts(inspection)),
        kinds=[(kind, root.kinds[kind]) for kind in KINDS if root.kinds.get(kind)],
        diagram=None if inspection.model is None else diagram_of(inspection.model),
        blocks=bounded(root, MAX_BLOCKS),
        maps={name: (place, list(areas(pictured, place))) for name, place in MAPS.items()},
        tree=table,
        open=MAX_DEPTH if sum(1 for _ in walk(table)) <= MAX_OPEN else 2,
        cells=cells,
        share=lambda part: share(part, root.node.bytes),
        portion=lambda part: f"{part / root.node.bytes:.4%}" if root.node.bytes else "0%",
        line=LINE,
        margin=MARGIN,
    )


def _shown(value: Any) -> Any:
    """Every value on its way into the page, before it is escaped: names and messages may have come from anybody."""
    if isinstance(value, Markup):  # what a macro made of such values
        return value
    text = str(value)
    text = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
