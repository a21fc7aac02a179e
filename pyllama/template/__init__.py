"""Chat templates, which are programs of the checkpoint's author, in a process of their own.

jinja2's sandbox keeps a template from Python's objects, if it has no hole, and bounds neither time nor memory:
`{{ 'a' * 10**10 }}` takes gigabytes even while it is compiled. So a worker (worker.py) compiles and renders: without
the caller's environment variables, files and objects, within limits of memory, and killed at a deadline.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from threading import Lock, Timer
from typing import Any, NamedTuple

_START = "import sys; sys.path += sys.argv[1:]; import worker; worker.main()"
_START_SECONDS = 60  # of a busy machine; nothing of the checkpoint runs yet
_MODULES = ("jinja2", "markupsafe")
_BYTES_PER_CHARACTER = 12  # "\\ud83d\\ude42"
_BYTES_OF_AN_ERROR = 2**16


class Limits(NamedTuple):
    seconds: int = 10  # for compiling, and for each text
    memory: int = 2**30  # bytes
    characters: int = 2**24  # of a text


LIMITS = Limits()


class Template:
    """A chat template in Jinja, with the functions that transformers gives to templates.

    Threads may share one, and so may processes that were forked: each has a worker of its own.
    Raises ValueError when the source does not compile within the limits.
    """

    def __init__(self, source: str, limits: Limits = LIMITS) -> None:
        self.source = source
        self.limits = limits
        self._slots: dict[int, _Slot] = {}  # by process id: a forked process must not use its parent's pipes
        with self._slot() as slot:
            slot.worker = _Worker(source, limits)

    def render(self, values: Mapping[str, Any]) -> str:
        """The template's text with `values`, which must be of JSON's types.

        Raises TypeError for values of other types, and ValueError with the reason when the template fails or does
        not stay within the limits.
        """
        request = {"values": values, "now": datetime.now().isoformat()}
        line = json.dumps(request).encode()
        with self._slot() as slot:
            if slot.worker is None or not slot.worker.alive:
                slot.worker = _Worker(self.source, self.limits)
            return slot.worker.ask(line)

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "limits": self.limits, "_slots": {}}

    def _slot(self) -> _Slot:
        own = os.getpid()
        for process in self._slots.keys() - {own}:
            self._slots.pop(process, None)
        return self._slots.setdefault(own, _Slot())  # in one step, whatever other threads do


class _Slot:
    """One process's worker, used by one thread at a time."""

    def __init__(self) -> None:
        self.worker: _Worker | None = None
        self._lock = Lock()

    def __enter__(self) -> _Slot:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _Worker:
    def __init__(self, source: str, limits: Limits) -> None:
        self._limits = limits
        paths = [Path(__file__).parent, *(_folder_of(module) for module in _MODULES)]
        self._process = subprocess.Popen(
            # Isolated, without site-packages' start-up files, and UTF-8 whatever the locale.
            [sys.executable, "-ISB", "-Xutf8", "-c", _START, *map(str, paths)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            start_new_session=True,  # Ctrl-C is for the caller
        )
        self._stop = weakref.finalize(self, _stop, self._process, os.getpid())
        self._exchange(json.dumps(limits._asdict()).encode(), _START_SECONDS)
        try:
            self.ask(json.dumps({"source": source}).encode())
        except ValueError as error:
            self._stop()
            raise ValueError(f"it does not compile: {error}") from error

    @property
    def alive(self) -> bool:
        return self._stop.alive and self._process.poll() is None

    def ask(self, request: bytes) -> str:
        """The answer's text. Raises ValueError with the reason where there is none."""
        answer = self._exchange(request, self._limits.seconds)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def _exchange(self, request: bytes, seconds: float) -> dict[str, str]:
        start = time.monotonic()
        deadline = Timer(seconds, self._process.kill)
        deadline.daemon = True
        deadline.start()
        try:
            self._write(request + b"\n")
            answer = _parse(self._read())
        except OSError:  # its end of a pipe is closed: it is gone
            answer = None
        except BaseException:
            self._stop()  # in the middle of an answer
            raise
        finally:
            deadline.cancel()
        if time.monotonic() - start >= seconds:
            self._stop()
            raise ValueError(f"it takes more than {seconds} s")
        if answer is None:
            self._stop()
            raise ValueError("its process ended without an answer")
        return answer

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._process.stdin.fileno(), rest) :]

    def _read(self) -> bytes:
        """One line; b"" where the worker ends before its end, or writes more than an answer may have."""
        assert self._process.stdout is not None
        most = _BYTES_PER_CHARACTER * self._limits.characters + _BYTES_OF_AN_ERROR
        data = bytearray()
        while not data.endswith(b"\n"):
            part = os.read(self._process.stdout.fileno(), 2**20)
            if not part or len(data) > most:
                return b""
            data += part
        return bytes(data)


def _parse(line: bytes) -> dict[str, str] | None:
    """The worker's answer; None for anything else, which a template that left its sandbox may write."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(answer, dict) and answer.keys() in ({"text"}, {"error"})
    return answer if known and all(isinstance(value, str) for value in answer.values()) else None


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    """Ends the worker, if this process started it; closes the pipes."""
    assert process.stdin is not None
    assert process.stdout is not None
    if os.getpid() == owner:
        process.kill()
        process.wait()
    else:
        process.returncode = 0  # it is no child of this process, which a fork of its parent is
    process.stdin.close()
    process.stdout.close()


def _folder_of(module: str) -> Path:
    """Where the module is found; the worker looks there, and not where else this process does."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"chat templates need {module}")
    return Path(spec.origin).parents[1]
