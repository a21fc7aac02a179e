"""What conformance.cu prints, as one line for each of its sections: short enough for conformance.golden, the GPU's."""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise


def sections(output: str) -> dict[str, list[str]]:
    """The lines of hexadecimal words below each title."""
    lines = output.splitlines()
    titles = [i for i, line in enumerate(lines) if not re.fullmatch(r"[0-9a-f]{8}( [0-9a-f]{8})*", line)]
    return {lines[i].strip(): lines[i + 1 : end] for i, end in pairwise([*titles, len(lines)])}


def digest(output: str) -> str:
    """For each section its title, and a hash of its lines."""
    return "".join(
        f"{title}: {len(lines)} lines, sha256 {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}\n"
        for title, lines in sections(output).items()
    )


def differences(found: str, golden: str) -> list[str]:
    """Titles of the sections in which two digests differ."""
    ours, theirs = (dict(line.rsplit(": ", 1) for line in text.splitlines()) for text in (found, golden))
    return [title for title in dict.fromkeys([*ours, *theirs]) if ours.get(title) != theirs.get(title)]
