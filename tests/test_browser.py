"""The page of `pyllama inspect --html` in a real browser: nothing runs, nothing loads, everything has its place."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape, unescape
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from shards import write_headers_of
from test_page import hostile

from pyllama.inspection import inspect
from pyllama.inspection.page import MAPS, render

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
QUIET = ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync", "--no-first-run", "--no-sandbox", "--virtual-time-budget=5000"]
WIDTHS = {"wide": 1400, "middle": 800, "narrow": 400}

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")

MEASURE = """
onload = () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height] };
  const measured = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, shown = e => e.getClientRects().length > 0;
    return {
      title: page.title,
      width: [page.documentElement.clientWidth, page.documentElement.scrollWidth],
      maps: [...page.querySelectorAll('.map')].filter(shown).map(map => ({
        box: box(map),
        areas: [...map.querySelectorAll('.area')].map(area => ({
          box: box(area.querySelector('rect')),
          label: [...area.querySelectorAll('text')].map(box),
        })),
      })),
      blocks: [...page.querySelectorAll('.flow .block, .modules .tensor')].map(box),
      rows: [...page.querySelectorAll('.row')].filter(shown).length,
      scripts: page.scripts.length,
    };
  });
  document.body.textContent = JSON.stringify(measured);
}
"""


def browse(folder: Path, page: str, *options: str) -> tuple[str, str]:
    """What the document is in the end, and what the browser has to say."""
    file = folder / "harness.html"
    file.write_text(page, encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, "--headless", *QUIET, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"]
    command += [*options, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def measure(folder: Path, page: str) -> list[dict[str, Any]]:
    """The page as it is, in a frame of each width. Nothing may be logged."""
    frame = f'height="900" srcdoc="{escape(page)}"></iframe>'
    frames = "".join(f'<iframe width="{width}" {frame}' for width in WIDTHS.values())
    dom, log = browse(folder, f"<!DOCTYPE html><meta charset=utf-8><script>{MEASURE}</script><body>{frames}")
    assert "CONSOLE" not in log, log
    body = re.search(r"<body>(.*)</body>", dom, re.DOTALL)
    assert body is not None, dom[:1000]
    found: list[dict[str, Any]] = json.loads(unescape(body[1]))
    return found


@contextmanager
def listening() -> Iterator[tuple[int, list[str]]]:
    """A server of this machine, and the paths that it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("name", ["demo", "Qwen3-30B-A3B", "Moonlight-16B-A3B-Instruct"])
def test_everything_has_its_place(name: str, tmp_path: Path) -> None:
    if name == "demo":
        found = inspect(name)
    else:
        write_headers_of(tmp_path, name, num_hidden_layers=4)
        found = inspect(tmp_path)
    for frame, (size, width) in zip(measure(tmp_path, render(found)), WIDTHS.items(), strict=True):
        client, scrolled = frame["width"]
        assert width - 30 < client <= width
        assert scrolled <= client, "it is wider than the window"
        (map_,) = frame["maps"]
        left, top, across, along = map_["box"]
        assert across > 0.9 * min(width, 1200) - 40
        shape = MAPS[size]
        assert along == pytest.approx(across * shape.height / shape.width, rel=0.01)
        covered = 0.0
        for area in map_["areas"]:
            x, y, w, h = area["box"]
            covered += w * h
            assert left - 1 <= x
            assert top - 1 <= y
            assert x + w <= left + across + 1
            assert y + h <= top + along + 1
            for label_x, label_y, label_w, label_h in area["label"]:
                assert label_x >= x - 1
                assert label_x + label_w <= x + w + 1, "a label is cut"
                assert label_y >= y - 1
                assert label_y + label_h <= y + h + 2
        assert covered == pytest.approx(across * along, rel=0.01)
        assert sum(bool(area["label"]) for area in map_["areas"]) >= 4
        for x, _, w, h in frame["blocks"]:
            assert x >= 0
            assert x + w <= client
            assert h > 20
        assert len(frame["blocks"]) >= 7
        assert frame["rows"] > 10
        assert frame["scripts"] == 0


def test_names_that_would_do_harm_do_none(tmp_path: Path) -> None:
    with listening() as (port, asked):
        page = render(hostile(tmp_path, port))
        for frame in measure(tmp_path, page):
            assert frame["scripts"] == 0
            assert frame["title"] != "owned"
            assert frame["title"].startswith("<script>") or frame["title"].startswith("'<script>")
            assert frame["width"][1] <= frame["width"][0]
        assert asked == []
        # What would be seen if a name were not escaped, in a page without the policy that forbids it again.
        name = f"<img src=http://127.0.0.1:{port}/plain><script>document.title='owned'</script>"
        dom, _ = browse(tmp_path, f"<title>x</title>{name}")
        assert "<title>owned</title>" in dom
        assert asked == ["/plain"]


def test_the_policy_forbids_scripts_and_loading(tmp_path: Path) -> None:
    """Even if a name were not escaped."""
    with listening() as (port, asked):
        name = f"<img src=http://127.0.0.1:{port}/plain><script>document.title='owned'</script>"
        page = render(inspect("demo")).replace("</main>", f"{name}</main>")
        dom, log = browse(tmp_path, page)
        assert "<title>demo</title>" in dom
        assert asked == []
        assert "Content Security Policy" in log
