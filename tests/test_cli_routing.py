"""`pyllama generate --show-routing` and `--routing-picture`: experts' loads as tables, JSON and pictures."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import Result
from typer.testing import CliRunner

import pyllama
from pyllama.cli import app
from pyllama.cli.routing import ExpertLoad, picture, table
from pyllama.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, MoEConfig
from pyllama.model import Model
from pyllama.text import Completion

DEMO = Path(pyllama.__file__).parent / "demo"
SVG = "{http://www.w3.org/2000/svg}"
TOLD = re.compile(r"layer (\d+), expert (\d+): (\d+) tokens, (\d+\.\d\d) of the mean")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Model:
    return pyllama.load("demo", "cpu")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result


def numbers(lines: list[str]) -> list[list[str]]:
    """The words of the lines that begin with a layer's number."""
    return [line.split() for line in lines if re.match(r" *\d+  ", line)]


def added(completions: list[Completion]) -> list[list[int]]:
    loads = [completion.expert_load for completion in completions]
    return [[sum(places) for places in zip(*layers, strict=True)] for layers in zip(*loads, strict=True)]


@pytest.mark.parametrize(("flags", "n"), [("", 1), ("-n 3 --temperature 1 --seed 4", 3)])
def test_the_table_is_printed_beside_the_speed(flags: str, n: int, model: Model) -> None:
    plain = run("generate", "demo", "If the file", "--max-new-tokens", 20, *flags.split())
    found = run("generate", "demo", "If the file", "--max-new-tokens", 20, *flags.split(), "--show-routing")
    assert found.stdout == plain.stdout
    made = pyllama.generate(model, "If the file", 20, n=n, temperature=float(n > 1), seed=4, routing=True)
    completions = made if n > 1 else [made]
    load = added(completions)
    tokens = sum(completion.prompt_tokens + len(completion.token_ids) - 1 for completion in completions)
    mean, most = tokens * 2 / 8, max(map(max, load))
    lines = found.stderr.splitlines()[3:]  # after those of speed and memory
    of = f" of {n} completions" if n > 1 else ""
    assert lines[0] == f"expert load: {tokens} tokens{of} to 2 of 8 experts each; mean {mean:.1f}, most {most}"
    assert lines[1].split() == ["layer", *"01234567", "max/mean", "unused"]
    assert numbers(lines) == [
        [str(layer), *map(str, counts), f"{max(counts) / mean:.2f}", str(counts.count(0))]
        for layer, counts in enumerate(load)
    ]
    assert len(lines) == 2 + len(load)


@pytest.mark.parametrize("n", [1, 2])
def test_json_has_it_instead(n: int, model: Model) -> None:
    flags = [
        "generate",
        "demo",
        "If the file",
        "--max-new-tokens",
        9,
        "-n",
        n,
        "--temperature",
        1,
        "--seed",
        4,
        "--json",
    ]
    made = pyllama.generate(model, "If the file", 9, n=n, temperature=1.0, seed=4, routing=True)
    found = run(*flags, "--show-routing")
    assert "expert load" not in found.stderr
    loads = [one["expert_load"] for one in json.loads(found.stdout)["completions"]]
    assert loads == [[list(layer) for layer in out.expert_load] for out in (made if n > 1 else [made])]
    assert [one["expert_load"] for one in json.loads(run(*flags).stdout)["completions"]] == [None] * n


def test_a_picture_of_a_model_with_an_awkward_name(model: Model, tmp_path: Path) -> None:
    """It can be read as XML, needs no other file, and says in every cell what its colour stands for."""
    folder, file = tmp_path / 'a <b> & "c" \x07]]>', tmp_path / "load.svg"
    shutil.copytree(DEMO, folder)
    result = run("generate", folder, "If the file", "--max-new-tokens", 20, "--routing-picture", file)
    assert "expert load" not in result.stderr
    text = file.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root[0].text == f"Expert load of {str(folder)!a}"
    assert not re.search(r"href|url\(|@import|<script", text)
    assert text.count("http") == 1  # the namespace's name
    assert "prefers-color-scheme: dark" in text
    expected = pyllama.generate(model, "If the file", 20, routing=True).expert_load
    assert cells(root) == {
        (layer, expert): (tokens, f"{tokens / max(map(max, expected)):.2f}", str(tokens))
        for layer, counts in enumerate(expected)
        for expert, tokens in enumerate(counts)
    }


def test_where_no_picture_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is said before anything is loaded, and nothing is left."""
    (tmp_path / "folder.svg").mkdir()

    def error(source: str, file: Path) -> str:
        flags = ["--max-new-tokens", "3", "--routing-picture", str(file)]
        result = CliRunner().invoke(app, ["generate", source, "If the file", *flags])
        assert (result.exit_code, result.stdout) == (1, "")
        return " ".join(result.stderr.split())

    assert "is not a file that could be written over" in error("demo", tmp_path / "folder.svg")
    assert "there is no folder" in error("demo", tmp_path / "nowhere" / "load.svg")
    assert "there is no folder" in error(str(tmp_path / "no model"), tmp_path / "load.svg")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "nothing can be written to the folder" in error("demo", tmp_path / "load.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.svg"]


def cells(root: ElementTree.Element) -> dict[tuple[int, int], tuple[int, str, str | None]]:
    """By layer and expert: tokens, opacity, and the number in the cell."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        told = TOLD.fullmatch(group.findtext(f"{SVG}title", ""))
        assert told
        layer, expert, tokens = map(int, told.groups()[:3])
        found[layer, expert] = tokens, group.find(f"{SVG}rect").get("opacity"), group.findtext(f"{SVG}text")
    return found


def random_load(experts: int, tokens: int, layers: tuple[int, ...]) -> ExpertLoad:
    """Of completions of as many tokens; some experts are seldom chosen."""
    pick = random.Random(experts * tokens)
    attention = GQAConfig(1, 1, 8, None)
    ffns = [MoEConfig(experts, 2, 8) if i in layers else MLPConfig(8) for i in range(max(layers) + 1)]
    config = ModelConfig(10, 8, 10**6, 1e-5, True, tuple(LayerConfig(attention, ffn) for ffn in ffns))
    counts = []
    for _ in layers:
        weights = [pick.random() ** 4 for _ in range(experts)]
        choices = pick.choices(range(experts), weights, k=2 * tokens)
        counts.append(tuple(choices.count(expert) for expert in range(experts)))
    return ExpertLoad.of(config, [Completion("", [1], "length", tokens, 1.0, 1.0, expert_load=tuple(counts))])


@pytest.mark.parametrize("width", [1, 70, 80, 200])
@pytest.mark.parametrize("experts", [1, 2, 8, 16, 60, 128, 256])
@pytest.mark.parametrize("tokens", [1, 40, 3000])
def test_tables_fit_the_terminal(tokens: int, experts: int, width: int) -> None:
    load = random_load(experts, tokens, (1, 2, 5))
    title, head, *lines = (line.plain for line in table(load, width))
    assert max(map(len, (head, *lines))) <= max(width, 60)
    assert len({len(line) for line in (head, *lines)}) == 1
    assert [line.split()[0] for line in lines] == ["1", "2", "5"]
    assert title.startswith(f"expert load: {tokens} tokens to 2 of {experts} experts each")
    start, end = head.index("layer") + 7, head.index("  max/mean")
    if "experts 0 to" not in head:
        assert [[int(word) for word in line[start:end].split()] for line in lines] == [list(row) for row in load.counts]
        return
    each = int(re.search(r", (\d+) a bar|$", head)[1] or 1)
    heights = {}
    for line, counts in zip(lines, load.counts, strict=True):
        for column, bar in enumerate(line[start:end].rstrip()):
            group = counts[column * each : (column + 1) * each]
            heights[sum(group) / len(group)] = heights.get(sum(group) / len(group), " ▁▂▃▄▅▆▇█".index(bar))
            assert "▁▂▃▄▅▆▇█".find(bar) + 1 == heights[sum(group) / len(group)]
    assert sorted(heights.values()) == [heights[mean] for mean in sorted(heights)]  # higher for more
    assert heights[max(heights)] == 8
    assert all(height > 0 for mean, height in heights.items() if mean)


@pytest.mark.parametrize(("experts", "tokens"), [(1, 1), (8, 10**5), (60, 500), (128, 30), (256, 300)])
def test_pictures_of_all_sizes(experts: int, tokens: int) -> None:
    """Every cell lies inside, and its number is written where there is room."""
    load = random_load(experts, tokens, (0, 3, 4))
    root = ElementTree.fromstring(picture(load, "x"))
    found = cells(root)
    assert {place: cell[0] for place, cell in found.items()} == {
        (layer, expert): count
        for layer, counts in zip((0, 3, 4), load.counts, strict=True)
        for expert, count in enumerate(counts)
    }
    assert {cell[2] is None for cell in found.values()} == {experts >= 60}
    width, height = (float(root.get(name)) for name in ("width", "height"))
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    corners = set()
    for rect in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.get(name, 0)) for name in ("x", "y", "width", "height"))
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        if rect.get("class") == "heat":
            corners.add((x, y))
            assert 0 <= float(rect.get("opacity")) <= 1
    assert len(corners) == 3 * experts + 20  # with the legend's
    assert all(0 <= float(text.get("x")) <= width for text in root.iter(f"{SVG}text"))
