"""What `pyllama generate --show-routing` prints, and `--routing-picture` draws: the load of each expert in each layer.

Both are heat maps, layers by experts: the hotter a place, the nearer its tokens are to the most that any expert has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import ceil
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from rich.text import Text

from pyllama.config import ModelConfig, MoEConfig
from pyllama.files import printable
from pyllama.text import Completion

BARS = " ▁▂▃▄▅▆▇█"
COLD, HOT = (64, 72, 88), (255, 138, 36)  # seen on dark and on light terminals
LAYER, SUMMARY = "layer", ("max/mean", "unused")


@dataclass(frozen=True)
class ExpertLoad:
    """Of completions together."""

    layers: tuple[int, ...]  # the numbers of those with experts
    counts: tuple[tuple[int, ...], ...]  # of each of them, the tokens of each expert
    tokens: int
    top_k: int  # experts of a token
    completions: int

    @classmethod
    def of(cls, config: ModelConfig, completions: Sequence[Completion]) -> ExpertLoad:
        """completions: with `expert_load`. A prompt counts with each of its samples."""
        experts = {i: layer.ffn for i, layer in enumerate(config.layers) if isinstance(layer.ffn, MoEConfig)}
        loads = [completion.expert_load or () for completion in completions]
        return cls(
            tuple(experts),
            tuple(tuple(map(sum, zip(*layer, strict=True))) for layer in zip(*loads, strict=True)),
            sum(completion.prompt_tokens + len(completion.token_ids) - 1 for completion in completions),
            next(iter(experts.values())).top_k,
            len(completions),
        )

    @property
    def experts(self) -> int:
        return len(self.counts[0])

    @property
    def mean(self) -> float:
        """Tokens of each expert, if all had as many."""
        return self.tokens * self.top_k / self.experts

    @cached_property
    def peak(self) -> int:
        return max(map(max, self.counts))

    @property
    def facts(self) -> str:
        of = f" of {self.completions} completions" if self.completions > 1 else ""
        return (
            f"{self.tokens} tokens{of} to {self.top_k} of {self.experts} experts each; "
            f"mean {self.mean:.1f}, most {self.peak}"
        )

    def summary(self, layer: Sequence[int]) -> tuple[str, ...]:
        """Its busiest expert's tokens as a multiple of the mean, and how many experts have none."""
        return f"{max(layer) / self.mean:.2f}", str(layer.count(0))


def table(load: ExpertLoad, width: int) -> Iterator[Text]:
    """Lines of at most `width` columns (60 at least) but for the first: numbers where they fit, otherwise bars, of an
    expert each or the mean of a few."""
    room = max(width, 60) - len(LAYER) - 2 - sum(2 + len(name) for name in SUMMARY)
    digits = max(len(str(load.peak)), len(str(load.experts)))
    draw: Callable[[float, float], Text] = partial(_number, digits)
    each, names = 1, "".join(f" {expert:>{digits}} " for expert in range(load.experts))
    if len(names) > room:
        draw, each = _bar, -(-load.experts // room)
        names = f"experts 0 to {load.experts - 1}" + (f", {each} a bar" if each > 1 else "")
        names = names.ljust(-(-load.experts // each))
    groups = [[counts[i : i + each] for i in range(0, load.experts, each)] for counts in load.counts]
    shown = [[sum(group) / len(group) for group in row] for row in groups]
    most = max(map(max, shown))
    yield Text(f"expert load: {load.facts}")
    yield Text("  ".join((LAYER, names, *SUMMARY)), "bold")
    for number, row, counts in zip(load.layers, shown, load.counts, strict=True):
        cells = Text().join(draw(tokens, tokens / most) for tokens in row)
        cells.append(" " * (len(names) - len(cells)))
        summary = [f"  {text:>{len(name)}}" for name, text in zip(SUMMARY, load.summary(counts), strict=True)]
        yield Text.assemble(f"{number:>{len(LAYER)}}  ", cells, *summary)


def _number(digits: int, tokens: float, heat: float) -> Text:
    ink = "rgb(0,0,0)" if heat > 0.4 else "rgb(255,255,255)"
    return Text(f" {tokens:>{digits}.0f} ", f"{ink} on {_mixed(heat)}" if tokens else "dim")


def _bar(tokens: float, heat: float) -> Text:
    return Text(BARS[ceil(heat * (len(BARS) - 1))], _mixed(heat))


def _mixed(heat: float) -> str:
    """Between cold and hot."""
    r, g, b = (round(cold + heat * (hot - cold)) for cold, hot in zip(COLD, HOT, strict=True))
    return f"rgb({r},{g},{b})"


# How hot a cell is, is its opacity: so that no tokens look like the page, whether it is light or dark.
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 }
.note { fill: #59636e }
.page { fill: #ffffff }
.row { fill: #eef1f4 }
.heat { fill: #b03a00 }
.mark { fill: #1f2328 }
.middle { text-anchor: middle }
.on { fill: #ffffff }
.right { text-anchor: end }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.note { fill: #9198a1 }
.page { fill: #0d1117 }
.row { fill: #1c222b }
.heat { fill: #ffa657 }
.mark { fill: #e6edf3 }
.on { fill: #0d1117 }
}
"""
LEFT, TOP, FIRST, NEXT = 64, 100, 72, 64  # of the map; of the columns on its right


def picture(load: ExpertLoad, name: str) -> str:
    """The same as an SVG file that needs no other; name: the model's, whatever characters it has."""
    cell = 8 * len(str(load.peak)) + 14  # holds the number
    numbers = cell * load.experts <= 1000
    width, height = (cell, 26) if numbers else (max(5, min(16, 1200 // load.experts)), 14)
    right, bottom = LEFT + width * load.experts, TOP + height * len(load.layers)
    size: dict[str, Any] = {"width": max(right + FIRST + NEXT + 24, 480), "height": bottom + 64}
    svg = Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox="0 0 {width} {height}".format(**size))
    svg.attrib |= {key: str(value) for key, value in size.items()}
    heading = f"Expert load of {printable(name)}"
    _add(svg, "title", heading)
    _add(svg, "style", STYLE)
    _add(svg, "rect", class_="page", **size)
    _add(svg, "text", heading, class_="title", x=16, y=30)
    _add(svg, "text", load.facts, class_="note", x=16, y=52)
    _add(svg, "text", LAYER, class_="note right", x=LEFT - 8, y=TOP - 8)
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64) if step * width >= 28)
    for expert in range(0, load.experts, every):
        _add(svg, "text", str(expert), class_="note middle", x=LEFT + width * (expert + 0.5), y=TOP - 8)
    for i, column in enumerate(SUMMARY):
        _add(svg, "text", column, class_="note right", x=right + FIRST + NEXT * i, y=TOP - 8)
    for row, (layer, counts) in enumerate(zip(load.layers, load.counts, strict=True)):
        y = TOP + height * row
        line = y + height / 2 + 4  # on which text stands
        _add(svg, "text", str(layer), class_="right", x=LEFT - 8, y=line)
        _add(svg, "rect", class_="row", x=LEFT, y=y, width=right - LEFT, height=height - 1)
        for expert, tokens in enumerate(counts):
            x, heat = LEFT + width * expert, tokens / load.peak
            told = _add(svg, "g")
            _add(
                told, "title", f"layer {layer}, expert {expert}: {tokens} tokens, {tokens / load.mean:.2f} of the mean"
            )
            _add(told, "rect", class_="heat", opacity=f"{heat:.2f}", x=x, y=y, width=width - 1, height=height - 1)
            if numbers:
                on = "middle on" if heat > 0.6 else "middle"
                _add(told, "text", str(tokens), class_=on, x=x + (width - 1) / 2, y=line)
        for i, text in enumerate(load.summary(counts)):
            _add(svg, "text", text, class_="right", x=right + FIRST + NEXT * i, y=line)
    _add_legend(svg, load, bottom + 28)
    indent(svg, "")
    return tostring(svg, encoding="unicode") + "\n"


def _add_legend(svg: Element, load: ExpertLoad, y: int) -> None:
    """From no tokens to the most, and where the mean is."""
    steps, width = 20, 8
    mean = LEFT + steps * width * load.mean / load.peak
    _add(svg, "text", "0", class_="note right", x=LEFT - 8, y=y + 10)
    _add(svg, "rect", class_="row", x=LEFT, y=y, width=steps * width, height=12)
    for step in range(steps):
        heat = (step + 0.5) / steps
        _add(svg, "rect", class_="heat", opacity=f"{heat:.2f}", x=LEFT + step * width, y=y, width=width, height=12)
    _add(svg, "rect", class_="mark", x=mean - 0.5, y=y - 3, width=1, height=18)
    _add(svg, "text", f"mean {load.mean:.1f}", class_="note middle", x=mean, y=y + 27)
    _add(svg, "text", f"{load.peak} tokens", class_="note", x=LEFT + steps * width + 8, y=y + 10)


def _add(parent: Element, tag: str, text: str | None = None, **attributes: object) -> Element:
    """An element inside `parent`; class_ is the attribute class."""
    element = SubElement(parent, tag, {key.rstrip("_"): f"{value}" for key, value in attributes.items()})
    element.text = text
    return element
