"""English text that every CPython carries: its documentation topics and the docstrings of its standard library.

Nothing is downloaded and nothing is imported: docstrings are read with `ast` from the source files, so that the
corpus depends on the Python version alone. A document is one topic or one docstring. Whole sources (a file with all
its docstrings, or a topic) are held out by a hash of their name: look-alikes inside one file stay on one side, and a
source held out for one Python version is held out for all. Topics and docstrings repeat each other by the paragraph,
so a paragraph is kept only where it comes first, and no held-out paragraph occurs in training.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

HELD_OUT_SHARE = 0.05  # of the sources
MIN_PARAGRAPH = 40  # characters; shorter ones ("See also:") may repeat
# Tests are not shipped by every distribution; packages installed by the user are not CPython's.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "lib-dynload", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Documents without repetitions, in an order that depends on the Python version alone."""

    training: list[str]
    held_out: list[str]

    @property
    def sha256(self) -> str:
        """Hash of all documents, each ended by a NUL byte, the training ones first."""
        digest = hashlib.sha256()
        for document in self.training + self.held_out:
            digest.update(document.encode() + b"\0")
        return digest.hexdigest()


def num_bytes(documents: list[str]) -> int:
    """Bytes of the documents in UTF-8, ends of documents not counted."""
    return sum(len(document.encode()) for document in documents)


def is_held_out(source: str) -> bool:
    """Whether the source of this name (a topic, or a file's path in the library) is kept from training."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") < HELD_OUT_SHARE * 2**64


def clean(text: str) -> str:
    """The text without indentation common to all lines, trailing spaces and lone surrogates."""
    lines = [line.rstrip() for line in inspect.cleandoc(text).splitlines()]
    return "\n".join(lines).strip().encode("utf-8", "ignore").decode()


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a source file's module, classes and functions, from the top."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def sources(library: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and documents of every topic, then of every source file under `library`, each sorted by name."""
    for name, text in sorted(topics.topics.items()):
        yield f"topics/{name}", [text]
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if EXCLUDED_FOLDERS.isdisjoint(parts):
            yield "/".join(parts), list(docstrings(path))


def without_repetitions(texts: Iterable[str], seen: set[str]) -> Iterator[str]:
    """The texts less the paragraphs in `seen`, which grows; texts of which nothing is left are skipped."""
    for text in texts:
        kept = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key not in seen:
                kept.append(paragraph)
            if len(key) >= MIN_PARAGRAPH:
                seen.add(key)
        document = "\n\n".join(kept).strip("\n")
        if document and (key := f"document: {document}") not in seen:
            seen.add(key)
            yield document


def read_corpus(library: Path | None = None) -> Corpus:
    """Collects the corpus of the running Python.

    Args:
        library: folder of the standard library's sources; None: the running Python's.

    Raises: FileNotFoundError when the folder holds no Python source (some distributions ship compiled files only).
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    named = list(sources(library))
    if not any(name.endswith(".py") for name, _ in named):
        raise FileNotFoundError(f"no Python sources in {library}: a Python that ships its library's sources is needed")
    seen: set[str] = set()
    parts = []
    for held_out in (False, True):  # training first, so that nothing of it is held out
        texts = (clean(text) for name, texts in named if is_held_out(name) is held_out for text in texts)
        parts.append(list(without_repetitions(texts, seen)))
    return Corpus(*parts)
