"""The page of `pyllama inspect --html`, read by a parser: its figures, its areas, and names that would do harm."""

from __future__ import annotations

import json
import re
import resource
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from pages import HOSTILE, Element, parse
from shards import save, write_headers, write_headers_of
from test_inspection import flat
from torch import nn
from typer.testing import CliRunner

from pyllama.cli import app
from pyllama.files import target_file
from pyllama.inspection import Inspection, inspect
from pyllama.inspection.page import MAPS, MAX_ROWS, render, write_page
from pyllama.inspection.report import facts, lines
from pyllama.inspection.treemap import Rectangle, squarified
from pyllama.inspection.view import KINDS, bounded, view_of

CSS = Path(__file__).parents[1] / "pyllama" / "inspection" / "page.css"
# All that a page consists of: nothing that runs, and nothing that loads.
TAGS = {"html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "p", "div", "span"}
TAGS |= {"b", "i", "small", "bdi", "ul", "li", "dl", "dt", "dd", "details", "summary", "a"}
TAGS |= {"svg", "rect", "text", "tspan"}
ATTRIBUTES = {"lang", "charset", "content", "http-equiv", "name", "class", "style", "id", "href", "title", "open"}
ATTRIBUTES |= {"role", "aria-label", "aria-hidden", "viewbox", "x", "y", "width", "height", "transform"}


@pytest.fixture(scope="module")
def demo() -> tuple[Inspection, Element]:
    found = inspect("demo")
    return found, parse(render(found))


def number(text: str) -> int:
    return int(re.sub(r"\D", "", text.partition(" ")[0]))


def place(area: Element) -> Rectangle:
    return Rectangle(*(float(area.attributes[key]) for key in ("x", "y", "width", "height")))


def maps(page: Element) -> dict[str, list[tuple[str, Rectangle]]]:
    """Of each map the areas, with what is shown where a pointer rests on them: path, then bytes and share."""
    return {
        found.classes[1]: [(link.one(lambda e: e.tag == "title").text, place(link.one("area"))) for link in links]
        for found in page.all("map")
        for links in [found.all(lambda e: e.tag == "a")]
    }


def test_facts_are_those_of_the_text(demo: tuple[Inspection, Element]) -> None:
    found, page = demo
    cards = page.one("cards")
    names = [e.text for e in cards if e.tag == "dt"]
    assert names == [fact.name for fact in facts(found)]
    texts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines(found) if re.match(r"\S+( \S+)*\s{2,}", line))
    for name, value in zip(names, (e for e in cards if e.tag == "dd"), strict=True):
        figure, more = value.children[0], value.text.removeprefix(str(value.children[0]))
        assert texts[name].startswith(str(figure))
        assert texts[name].endswith(more)
    assert page.one(lambda e: e.tag == "h1").text == "demo"


def test_blocks_sum_to_the_model(demo: tuple[Inspection, Element]) -> None:
    found, page = demo
    assert found.model is not None
    flow = page.one("flow")
    titles = [e.one(lambda e: e.tag == "b").text for e in flow.all("block")]
    assert titles == ["embedding", "norm", "attention", "norm", "experts", "norm", "head"]
    figures = [number(e.one("figure").text) for e in flow.all("block")]
    assert sum(figures) == found.model.parameters
    (stack,) = flow.all("stack")
    assert [e.text for e in stack.all("times")] == ["\u00d7 4"]
    assert number(stack.all("figure")[0].text) == sum(figures[1:5])
    attention, experts = (e.one("dots") for e in flow.all("block") if e.all("dots"))
    assert len(attention.all("on")) == 3
    assert len(experts.all("on")) == 2 + 1  # and the shared one
    assert len(experts.all(lambda e: e.tag == "i")) == 8 + 1


@pytest.mark.parametrize("name", MAPS)
def test_areas_are_in_proportion_and_tile_the_map(name: str, demo: tuple[Inspection, Element]) -> None:
    found, page = demo
    whole, nodes, areas = MAPS[name], flat(found.root), maps(page)[name]
    scale = whole.width * whole.height / found.root.bytes
    known = [(nodes[path], r) for title, r in areas for path in [title.splitlines()[0]] if path in nodes]
    assert len(known) >= len(areas) - 3  # but for "2 others" of a module
    assert sum(node.bytes for node, _ in known) > 0.99 * found.root.bytes
    for node, r in known:
        assert r.width * r.height == pytest.approx(node.bytes * scale, abs=0.002 * (r.width + r.height))
    assert sum(r.width * r.height for _, r in areas) == pytest.approx(whole.width * whole.height, rel=1e-4)
    for (_, a), (_, b) in combinations(areas, 2):
        across = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
        along = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
        assert min(across, along) < 0.01, "they overlap"
    for _, r in areas:
        assert r.x > -0.01
        assert r.y > -0.01
        assert r.x + r.width < whole.width + 0.01
        assert r.y + r.height < whole.height + 0.01


@pytest.mark.parametrize(
    "sizes",
    [[1], [6, 6, 4, 3, 2, 2, 1], [2**62, 1, 1], [10**13] * 3 + [1] * 5, [5] * 400, [2**i for i in range(100, 0, -1)]],
    ids=len,
)
def test_squarified_rectangles(sizes: list[int]) -> None:
    whole = Rectangle(3, 5, 600, 400)
    found = list(squarified(sizes, whole))
    for size, r in zip(sizes, found, strict=True):
        assert r.width * r.height == pytest.approx(size / sum(sizes) * 240_000, rel=1e-6)
        assert r.x + r.width <= 603.0001
        assert r.y + r.height <= 405.0001
    if sizes == [6, 6, 4, 3, 2, 2, 1]:  # the paper's example, in a rectangle of the same proportions as its 6 x 4
        assert [(r.width, r.height) for r in found[:2]] == [pytest.approx((300, 200))] * 2


def test_kinds_sum_to_the_whole(demo: tuple[Inspection, Element]) -> None:
    found, page = demo
    kinds = view_of(found.root).kinds
    assert sum(kinds.values()) == found.root.bytes
    assert kinds["embedding"] == 1536 * 192 * 2
    assert kinds["norms"] == (4 * 2 + 1) * 192 * 2
    shown = [re.match(r"(\D+) ", e.text) for e in page.one("legend") if e.tag == "li"]
    assert [match[1] for match in shown if match] == [kind for kind in KINDS if kind in kinds]
    widths = [float(e.attributes["style"][6:-1]) for e in page.one("band") if e.tag == "i"]
    assert sum(widths) == pytest.approx(100, abs=0.001)


def test_the_table_is_that_of_the_text(demo: tuple[Inspection, Element]) -> None:
    found, page = demo
    rows = page.one("table").all("row")
    shown = [[e.text for e in row if e.tag == "span" and "bar" not in e.classes] for row in rows]
    table = list(lines(found))
    text = table[table.index("") + 1 :]
    assert len(shown) == len(text)
    for row, line in zip(shown, text, strict=True):
        words = re.split(r"\s{2,}", re.sub(r"^[│├└─ ]+", "", line))
        assert [cell for cell in row if cell] == words
    ids = {e.attributes["id"] for e in page if "id" in e.attributes}
    links = {e.attributes["href"] for e in page if "href" in e.attributes}
    assert links
    assert links <= {f"#{id}" for id in ids}


def test_a_model_that_is_not_known(tmp_path: Path) -> None:
    D, V = 64, 100
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 4, 128), 3)
    save(nn.ModuleDict({"embedding": nn.Embedding(V, D), "decoder": decoder}).state_dict(), tmp_path / "model.pth")
    found = inspect(tmp_path / "model.pth")
    page = parse(render(found))
    assert "no config.json" in page.one("problem").text
    assert not page.all("flow")
    (layers,) = (e for e in page.one("modules").children if isinstance(e, Element) and "module" in e.classes)
    assert [e.text for e in layers.all("times")] == ["\u00d7 3"]  # once, not on each module in it
    inner = [e for e in layers.all("inner")[0].children if isinstance(e, Element)]
    assert [e.all(lambda e: e.tag == "b")[0].text for e in inner] == [
        "linear1",
        "linear2",
        "multihead_attn",
        "norm1",
        "norm2",
        "norm3",
        "self_attn",
    ]
    tensors = page.one("modules").all("tensor")
    assert len(tensors) == 18 + 1  # of a layer, and the embedding
    assert {"embedding.weight 100 x 64", "in_proj_weight 192 x 64"} <= {e.text for e in tensors}


def hostile(folder: Path, port: int = 0) -> Inspection:
    names = [name.format(port=port) for name in HOSTILE]
    tensors = {name: ("F32", (n + 2, 3)) for n, name in enumerate(names)}
    tensors |= {f"{name}.{n}.{name}": ("F32", (n + 2, 3)) for n, name in enumerate(names)}
    write_headers(folder / "x.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"architectures": names}))
    found = inspect(folder)
    assert found.problem is not None
    return replace(found, source=" ".join(names), problem=f"{found.problem} {' '.join(names)}")


def test_names_that_would_do_harm_are_text(tmp_path: Path) -> None:
    text = render(hostile(tmp_path))
    page = parse(text)
    assert {e.tag for e in page} <= TAGS
    for element in page:
        assert set(element.attributes) <= ATTRIBUTES, element
        assert re.fullmatch(r"#n\d+", element.attributes.get("href", "#n0"))
        assert re.fullmatch(r"(width:[\d.]+%|--depth:\d+)?", element.attributes.get("style", ""))
    assert all(character.isprintable() or character == "\n" for character in text)
    text.encode("utf-8")
    names = {e.text for e in page.all("name")}
    assert "<script>document" in " ".join(names)  # up to its dot, as it was written
    assert "{{ 7 * 7 }}{% for x in y %}" in " ".join(names)
    assert HOSTILE[0] in page.one("problem").text
    assert len(text) < 300_000


def test_a_page_of_very_many_tensors_is_small(tmp_path: Path) -> None:
    """None of them alike, so that nothing folds; nor do their sizes differ, which the limit could go by."""
    shapes = {f"{i}.layer{j}.{i * 7 % 311}x": ("F32", (1, 1 + i % 3, 97)) for i in range(400) for j in range(100)}
    write_headers(tmp_path / "x.safetensors", shapes)
    found = inspect(tmp_path / "x.safetensors")
    text = render(found)
    page = parse(text)
    assert len(text) < 1_500_000
    view = bounded(view_of(found.root), MAX_ROWS)
    assert sum(child.node.bytes for child in view.children) == found.root.bytes
    rows = page.one("table").all("row")
    assert MAX_ROWS / 2 < len(rows) < 2 * MAX_ROWS + 3
    others = [e for e in page.all("name") if re.fullmatch(r"[\d,]+ others", e.text)]
    assert others
    for name, areas in maps(page).items():
        assert sum(r.width * r.height for _, r in areas) == pytest.approx(MAPS[name].width * MAPS[name].height, 1e-3)


def test_no_tensors(tmp_path: Path) -> None:
    save({}, tmp_path / "x.safetensors")
    page = parse(render(inspect(tmp_path)))
    assert not page.all("map")
    assert "no bytes" in page.text


def test_the_page_is_the_same_each_time(tmp_path: Path) -> None:
    write_headers_of(tmp_path, "SmolLM2-135M", num_hidden_layers=4)
    found = inspect(tmp_path)
    header = tmp_path / "model.safetensors"
    size = int.from_bytes(header.read_bytes()[:8], "little")
    tensors = json.loads(header.read_bytes()[8 : 8 + size])
    write_headers(header, {name: (tensors[name]["dtype"], tuple(tensors[name]["shape"])) for name in reversed(tensors)})
    assert render(inspect(tmp_path)) == render(found)


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    found, file = inspect("demo"), tmp_path / "page.html"
    write_page(found, file)
    assert file.read_text(encoding="utf-8") == render(found)
    file.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a disk that is full
    try:
        with pytest.raises(OSError, match="too large"):
            write_page(found, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    (tmp_path / "link.html").symlink_to("page.html")
    write_page(found, tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert file.read_text(encoding="utf-8") == render(found)


def test_where_no_page_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/nowhere to write page.html to"):
        target_file(tmp_path / "nowhere" / "page.html")
    with pytest.raises(FileExistsError, match="is not a file that could be written over"):
        target_file(tmp_path)
    with pytest.raises(FileExistsError, match="/dev/null is not a file"):
        target_file("/dev/null")
    with pytest.raises(FileNotFoundError, match="no home of this user"):
        target_file("~nobody-of-this-name/page.html")


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["inspect", "demo", "--html", str(file)])
    assert (result.exit_code, result.stdout.splitlines()) == (0, list(lines(inspect("demo"))))
    assert file.read_text(encoding="utf-8") == render(inspect("demo"))
    file.unlink()
    result = CliRunner().invoke(app, ["inspect", "demo", "--json", "--html", str(file)])
    assert json.loads(result.stdout)["source"] == "demo"
    assert file.exists()
    # The page's place is looked at first: that there is no such source is not said.
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "nothing"), "--html", str(tmp_path / "no" / "x.html")])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: there is no folder ")
    assert result.stderr.rstrip().endswith("to write x.html to")


def luminance(colour: str) -> float:
    """Relative, of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(dark: bool) -> None:
    """4.5 : 1, which WCAG 2 asks of text; in areas of every kind too."""
    themes = re.findall(r":root \{(.*?)\}", CSS.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", themes[dark]))
    pairs = [("text", "page"), ("text", "card"), ("soft", "page"), ("soft", "card"), ("page", "text")]
    pairs += [("on-kind", kind) for kind in (*KINDS, "mixed")]
    for pair in pairs:
        low, high = sorted(luminance(colours[name]) for name in pair)
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
