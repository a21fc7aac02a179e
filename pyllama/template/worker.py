"""The process in which a chat template is compiled and rendered; `pyllama.template` starts it and says why.

It reads requests and writes answers, one JSON object a line: first the template's source and the limits, then the
values to render with. It imports nothing but jinja2 and the standard library, and everything before its limits hold.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# jinja2, markupsafe and str import these when they first need them, which the limits forbid.
LATE = [
    "_strptime",
    "encodings.ascii",
    "encodings.latin_1",
    "encodings.unicode_escape",
    "html",
    "pprint",
    "textwrap",
    "unicodedata",
]

MOST_OF_AN_ERROR = 2000  # characters; the text is the template's own


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the text to train on; here it is text like any other."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own spelling)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def sandbox() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """With the functions that checkpoints' templates call."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which a model must not see."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def confine(memory: int) -> None:
    """From here on: `memory` bytes of addresses, no new files, sockets or processes, nothing written to a file."""
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


class Renderer:
    def __init__(self, limits: dict[str, int]) -> None:
        self.limits = limits
        self.environment = sandbox()
        self.template: jinja2.Template | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, str]:
        """{"text": ...}, or {"error": ...} with the reason."""
        try:
            if self.template is None:
                self.template = self.environment.from_string(request["source"])
                return {"text": ""}
            self.environment.globals["strftime_now"] = datetime.fromisoformat(request["now"]).strftime
            text = self.template.render(request["values"])
        except MemoryError:
            return {"error": f"it needs more than {self.limits['memory'] >> 20} MiB of memory"}
        except Exception as error:  # a template is a program, and may fail in any way
            return {"error": str(error)[:MOST_OF_AN_ERROR] or type(error).__name__}
        if len(text) > self.limits["characters"]:
            return {"error": f"its text has more than {self.limits['characters']} characters"}
        return {"text": text}


def main() -> None:
    for module in LATE:
        __import__(module)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    limits = json.loads(requests.readline())
    renderer = Renderer(limits)
    confine(limits["memory"])
    answers.write(b'{"text": ""}\n')
    answers.flush()
    for line in requests:
        signal.alarm(limits["seconds"] + 1)  # whoever asked may be gone, and this must end
        answers.write(json.dumps(renderer.answer(json.loads(line))).encode() + b"\n")
        answers.flush()
        signal.alarm(0)
