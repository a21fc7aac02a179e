"""Where the bytes are: rectangles whose areas are in proportion to them, nested as the modules are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from unicodedata import east_asian_width

from pyllama.files import printable
from pyllama.inspection.view import View

LETTER = 7.3  # pixels of a letter of the labels' font, as wide as any platform's
LINE = 17  # pixels
MARGIN = 6
THIN = 8


class Rectangle(NamedTuple):
    x: float
    y: float
    width: float
    height: float


class Label(NamedTuple):
    text: str
    upright: bool  # read from top to bottom
    share: bool  # there is room for it too, beside or below


@dataclass(frozen=True)
class Area:
    view: View
    place: Rectangle
    depth: int  # of modules around it

    @property
    def is_thin(self) -> bool:
        """Edges would leave nothing of it to be seen."""
        return min(self.place.width, self.place.height) < THIN

    def label(self) -> Label:
        """The end of its whole name, as much as there is room for; empty where that says nothing."""
        whole = self.view.node.name if self.view.others else printable(self.view.path[-200:]).removesuffix(".weight")
        parts = whole.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts)) if not parts[i][:1].isdigit()] or [whole]
        _, _, width, height = self.place
        for upright, along, across in ((False, width, height), (True, height, width)):
            room = int((along - 2 * MARGIN) / LETTER)
            fitting = next((end for end in ends if _columns(end) <= room), None)
            if fitting is not None and across >= LINE:
                more = _columns(fitting) + len(" 99.9%") <= room if upright else height >= 2 * LINE and room >= 5
                return Label(fitting, upright, more)
        return Label("", False, False)


def _columns(text: str) -> int:
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def areas(view: View, place: Rectangle, depth: int = 0) -> Iterator[Area]:
    """Those of all parts that have bytes, and of the modules before those within them."""
    if view.node.bytes:
        yield Area(view, place, depth)
        inner = sorted((child for child in view.children if child.node.bytes), key=lambda child: -child.node.bytes)
        for child, rectangle in zip(inner, squarified([child.node.bytes for child in inner], place), strict=True):
            yield from areas(child, rectangle, depth + 1)


def squarified(sizes: Sequence[int], place: Rectangle) -> Iterator[Rectangle]:
    """A rectangle for each size, together the place; rows of them are filled while they become squarer.

    sizes: positive, the largest first (Bruls, Huizing and van Wijk, "Squarified Treemaps", 2000).
    """
    start, left = 0, sum(sizes)
    while start < len(sizes):
        x, y, width, height = place
        scale, side = width * height / left, min(width, height)
        end = start + 1
        while end < len(sizes) and _worst(sizes[start : end + 1], scale, side) <= _worst(sizes[start:end], scale, side):
            end += 1
        total, done = sum(sizes[start:end]), 0
        share = total / left
        for size in sizes[start:end]:
            at, part = done / total, size / total
            if width >= height:  # a column at the left
                yield Rectangle(x, y + height * at, width * share, height * part)
            else:  # a row at the top
                yield Rectangle(x + width * at, y, width * part, height * share)
            done += size
        if width >= height:
            place = Rectangle(x + width * share, y, width * (left - total) / left, height)  # 1 - share could be 0
        else:
            place = Rectangle(x, y + height * share, width, height * (left - total) / left)
        start, left = end, left - total


def _worst(sizes: Sequence[int], scale: float, side: float) -> float:
    """The longest side of a rectangle of such a row by its shortest."""
    thick = sum(sizes) * scale / side
    longs = [size * scale / thick for size in (sizes[0], sizes[-1])]
    return max(max(long / thick, thick / long) for long in longs)
