"""Loading by Hub id: through huggingface_hub's own client, against a server on this machine, and without one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_level_tokenizer, write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The part of the Hub's protocol that a download needs: one public repository, and one gated."""

    def __init__(self, folder: Path) -> None:
        hub = self
        self.folder = folder
        self.downloads: list[str] = []
        self.parts: list[str] = []  # of what a range of bytes was asked for

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        files = sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())
        if "owner/gated" in path:
            self.send(request, 403, b"", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/owner/model/revision/"):
            siblings = [{"rfilename": name} for name in files]
            self.send(request, 200, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("/api/models/owner/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": COMMIT}
                for name in files
            ]
            self.send(request, 200, json.dumps(tree).encode())
        elif path.startswith("/owner/model/resolve/") and (name := path.split("/", 5)[5]) in files:
            content = (self.folder / name).read_bytes()
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["Range"] or "")
            if request.command == "GET":
                (self.parts if part else self.downloads).append(name)
            status, sent = (206, content[int(part[1]) : int(part[2]) + 1]) if part else (200, content)
            etag = hashlib.sha1(content).hexdigest()
            self.send(request, status, sent, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})

    def send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    write_checkpoint(folder, byte_level_tokenizer())
    (folder / "pytorch_model.bin").write_bytes(b"not asked for")
    (folder / "consolidated.safetensors").write_bytes(b"not asked for")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_bytes(b"not asked for")
    (folder / "README.md").write_text("not asked for")
    hub = Hub(folder)
    Thread(target=hub.server.serve_forever, daemon=True).start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def load(source: str, cache: Path, address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = (
        f"import pyllama; model = pyllama.load({source!r}); print(model.config.vocab_size, model.tokenizer is None)"
    )
    return run(script, cache, address, **environment)


def run(script: str, cache: Path, address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    settings = {"HF_HOME": str(cache), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    inherited = {name: value for name, value in os.environ.items() if name.lower() not in proxies}
    return subprocess.run(
        [sys.executable, "-c", script], env=inherited | settings | environment, capture_output=True, text=True
    )


def test_a_hub_id_is_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    result = load("owner/model", tmp_path / "cache", hub.address)
    assert result.stdout == "400 False\n", result.stderr
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(hub.downloads) == wanted
    assert hub.downloads[-1] == "model.safetensors"

    assert load("owner/model", tmp_path / "cache", hub.address).stdout == "400 False\n"
    offline = load("owner/model", tmp_path / "cache", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline.stdout == "400 False\n", offline.stderr
    assert len(hub.downloads) == len(wanted)


def test_a_repository_in_metas_layout(hub: Hub, tmp_path: Path) -> None:
    """Its vocabulary has the size that its weights say, so they come before its configuration is read."""
    for file in ("config.json", "model.safetensors", "pytorch_model.bin", "consolidated.safetensors"):
        (hub.folder / file).unlink()
    params = {"dim": 64, "n_layers": 1, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
    (hub.folder / "params.json").write_text(json.dumps(params))
    names = [f"layers.0.attention.{part}.weight" for part in ("wq", "wk", "wv", "wo")]
    tensors = {name: torch.zeros(64, 64) for name in names}
    tensors |= {f"layers.0.feed_forward.{part}.weight": torch.zeros(192, 64) for part in ("w1", "w3")}
    tensors["layers.0.feed_forward.w2.weight"] = torch.zeros(64, 192)
    tensors |= {f"{name}.weight": torch.ones(64) for name in ("norm", "layers.0.attention_norm", "layers.0.ffn_norm")}
    tensors |= {name: torch.zeros(400, 64) for name in ("tok_embeddings.weight", "output.weight")}
    torch.save(tensors, hub.folder / "consolidated.00.pth")
    result = load("owner/model", tmp_path / "cache", hub.address)
    assert result.stdout == "400 False\n", result.stderr
    assert hub.downloads[-1] == "consolidated.00.pth"


def test_files_of_torch_save_are_downloaded_where_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "consolidated.safetensors").unlink()
    torch.save(load_file(hub.folder / "model.safetensors"), hub.folder / "pytorch_model.bin")
    (hub.folder / "model.safetensors").unlink()
    (hub.folder / "training_args.bin").write_bytes(b"not asked for")
    result = load("owner/model", tmp_path / "cache", hub.address)
    assert result.stdout == "400 False\n", result.stderr
    assert hub.downloads[-1] == "pytorch_model.bin"
    assert "training_args.bin" not in hub.downloads


def test_weights_of_a_model_that_is_not_known_are_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    config = json.loads((hub.folder / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (hub.folder / "config.json").write_text(json.dumps(config))
    result = load("owner/model", tmp_path / "cache", hub.address)
    assert "['GPT2LMHeadModel'] is not known; known: " in result.stderr
    assert "model.safetensors" not in hub.downloads


INSPECT = """
from pyllama.inspection import inspect
found = inspect("owner/model")
print(found.root.parameters, found.model and found.model.parameters)
"""


def test_of_what_is_inspected_headers_alone_are_fetched(hub: Hub, tmp_path: Path) -> None:
    result = run(INSPECT, tmp_path / "cache", hub.address)
    count = sum(tensor.numel() for tensor in load_file(hub.folder / "model.safetensors").values())
    expected = f"{count} {count}\n"
    assert result.stdout == expected, result.stderr
    assert hub.downloads == ["config.json"]
    assert set(hub.parts) == {"model.safetensors"}

    load("owner/model", tmp_path / "cache", hub.address)  # after which all is here
    for address, environment in (("http://127.0.0.1:9", {"HF_HUB_OFFLINE": "1"}), (hub.address, {})):
        assert run(INSPECT, tmp_path / "cache", address, **environment).stdout == expected
    assert hub.parts == ["model.safetensors"]


def test_headers_that_cannot_be_fetched(hub: Hub, tmp_path: Path) -> None:
    assert run(INSPECT, tmp_path / "cache", hub.address).returncode == 0
    offline = run(INSPECT, tmp_path / "cache", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert "FileNotFoundError: the headers of owner/model cannot be fetched: " in last_line(offline)
    (hub.folder / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b'{"a":{"dtype":1}')
    result = run(INSPECT, tmp_path / "cache", hub.address)
    assert "CheckpointError: the headers of owner/model are damaged: " in last_line(result)
    header = b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,-16]}}'
    (hub.folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    result = run(INSPECT, tmp_path / "cache", hub.address)
    assert "are damaged: a has no place, shape and type of a tensor" in last_line(result)
    (hub.folder / "model.safetensors").unlink()
    result = run(INSPECT, tmp_path / "cache", hub.address)
    assert "owner/model has no model.safetensors and no index of such files, whose headers" in last_line(result)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("source", ["owner/nothing", "nothing"])
def test_an_unknown_id_is_named(source: str, hub: Hub, tmp_path: Path) -> None:
    line = last_line(load(source, tmp_path / "cache", hub.address))
    assert line.startswith(f"FileNotFoundError: there is neither a folder {source} nor a repository of this name")


def test_a_gated_repository_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    line = last_line(load("owner/gated", tmp_path / "cache", hub.address))
    assert line.startswith("FileNotFoundError: owner/gated is a gated repository: ask for access")


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_offline_says_so(environment: dict[str, str], tmp_path: Path) -> None:
    line = last_line(load("owner/model", tmp_path, "http://127.0.0.1:9", **environment))
    assert line.startswith(
        "FileNotFoundError: there is no folder owner/model, and the Hugging Face Hub cannot be reached"
    )
    assert "offline, give a folder that holds the checkpoint" in line
