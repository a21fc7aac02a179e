"""Which files of a checkpoint's folder may be opened, since a folder may come from anybody; and how a file is written.

A name in a folder can be a pipe that never ends, a device, or a link to any file of this machine. Whatever reads
files asks here first.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection
from pathlib import Path

# Where the Hub's cache keeps what its snapshots, and older downloads into a folder, link to.
_BLOB = re.compile(r".*/(?:models|datasets|spaces)--[^/]+/blobs/[0-9a-f]{40,64}")

_PREFIXES = " KMGT"
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate(_PREFIXES) if power}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate(_PREFIXES) if power}


class CheckpointError(ValueError):
    """A checkpoint's files are missing, damaged, unsafe, or not the model that its configuration describes."""


def expanded(path: str | Path) -> Path:
    """The path that a person gave, ~ and ~user being homes. Raises FileNotFoundError for a user that there is not."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{path}: there is no home of this user") from error


def target_file(path: str | Path) -> Path:
    """The file that `write_text` may write: a new one, or one that it takes the place of.

    Raises OSError where it cannot be one.
    """
    target = expanded(path).resolve()  # of a link the file that it leads to
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} to")
    if target.exists() and not target.is_file():  # a folder, or a device, whose place it must not take
        raise FileExistsError(f"{target} is not a file that could be written over")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing can be written to the folder {target.parent}")
    return target


def write_text(path: str | Path, text: str) -> None:
    """Writes the whole text, or nothing: until then a file that was there stays as it is."""
    target = target_file(path)
    new = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with new.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        new.replace(target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def check_file(file: Path, most: int | None = None) -> int:
    """The size in bytes of a file that may be opened, `most` at most.

    Raises CheckpointError for what is not a regular file, for a link that leads out of the folder (but into the
    Hub's cache, whose snapshots are links), and for a file that is too large to be what its name says.
    """
    target = Path(os.path.realpath(file))
    if not os.path.lexists(target):
        raise CheckpointError(f"{file} is {'a link to nothing' if file.is_symlink() else 'not there'}")
    if not target.is_file():
        raise CheckpointError(f"{file} is not a regular file")
    folder = os.path.realpath(file.parent)
    if file.is_symlink() and not target.is_relative_to(folder) and not _BLOB.fullmatch(target.as_posix()):
        raise CheckpointError(
            f"{file} is a link out of its folder, to {target}: only the Hub's cache is read through links. "
            "If the link is yours, put the file itself, or a hard link to it, in the folder"
        )
    size = target.stat().st_size
    if most is not None and size > most:
        raise CheckpointError(f"{file} has {size:,} bytes, and no such file needs more than {most:,}")
    return size


def damaged(file: Path, kind: str, error: Exception) -> CheckpointError:
    """The exception for a file that is not what its name says: of this kind, and whole."""
    return CheckpointError(
        f"{file} ({file.stat().st_size:,} bytes) is not a complete {kind}: {printable(str(error))}. "
        "It may be truncated or damaged; download it again"
    )


def few(names: Collection[str]) -> str:
    """The first names, fit to be printed, and how many more there are."""
    return ", ".join(map(printable, sorted(names)[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def printable(name: str) -> str:
    """A name from a file, which could steer a terminal or fill it."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= 200 else f"{text[:197]}..."


def parse_size(name: str, size: int | str, least: int = 1) -> int:
    """The bytes that the option `name` says, a number or as in "5GB" (10^9 bytes each) or "5GiB" (2^30).

    Raises ValueError for anything else, and for less than `least` bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Z]*)", str(size).upper())
    number = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else -1.0
    count = int(number) if math.isfinite(number) else -1
    if count < least:
        raise ValueError(f"{name} must be a number of bytes, or one as in '5GB' or '500MiB', got {size!r}")
    return count
