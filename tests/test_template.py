"""Chat templates in their worker: the same text as transformers, whatever a hostile one tries."""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_level_tokenizer
from transformers import PreTrainedTokenizerFast

import pyllama.template
from pyllama.template import Limits, Template
from pyllama.template.worker import sandbox
from pyllama.tokenizer import Tokenizer

CONFIGS = Path(__file__).parent / "configs"
TIGHT = Limits(seconds=60, memory=2**28, characters=10**6)
SHORT = Limits(seconds=1)
MESSAGES = {"messages": [{"role": "user", "content": "Where is <b>Týros</b>? 🙂"}]}
LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
# Slow where its values say so.
SOMETIMES = f"{{% if slow %}}{LOOPS}{{% endif %}}{{{{ text }}}}"


def worker_id(template: Template) -> int:
    worker = template._slots[os.getpid()].worker
    assert worker is not None
    return worker._process.pid


def runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{process}/status").read_text()


def ends(process: int) -> bool:
    """Waits for it; a process that does not end fails the test after a minute."""
    for _ in range(600):
        if not runs(process):
            return True
        time.sleep(0.1)
    return False


def text(render: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """What it makes, or why it does not."""
    try:
        return str(render(*args, **kwargs))
    except Exception as error:
        return f"error: {error}"


@pytest.mark.parametrize(
    "source",
    [
        LOOPS,
        "{{ 10 ** (10 ** 8) }}",  # while it is compiled
        "{{ (messages|length + 9) ** (10 ** 8) }}",
    ],
)
def test_time_is_bounded(source: str) -> None:
    with pytest.raises(ValueError, match="takes more than 1 s"):
        Template(source, SHORT).render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 'a' * 10 ** 10 }}", "needs more than 256 MiB"),  # while it is compiled
        ("{% set n = messages|length %}{{ 'a' * n * 10 ** 10 }}", "needs more than 256 MiB"),
        ("{{ messages * 10 ** 9 }}", "needs more than 256 MiB"),
        ("{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "256 MiB"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "needs more than 256 MiB"),
        ("{{ '%1000000000d' % messages|length }}", "needs more than 256 MiB"),
        ("{{ '{:1000000000}'.format(messages|length) }}", "needs more than 256 MiB"),
        ("{{ messages|string|center(10 ** 9) }}", "needs more than 256 MiB"),
        ("{{ 'a\nb'|indent(messages|length * 10 ** 9) }}", "needs more than 256 MiB"),
        ("{{ messages|tojson(indent=10 ** 9) }}", "needs more than 256 MiB"),
        ("{{ 'a' * messages|length * 1000001 }}", "text has more than 1000000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('a' * 10 ** 6) }}", "^(does not compile: )?a{2000}$"),
        ("{{ range(10 ** 6) }}", "Range too big"),
    ],
)
def test_memory_and_text_are_bounded(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Template(source, TIGHT).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ('{0.__class__.__mro__}'|attr('format'))('') }}",
        "{% set f = '{0.__class__}'.format %}{{ f('') }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
        "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
        "{{ strftime_now.__self__.__class__ }}",
        "{{ raise_exception.__globals__['sys'].modules['os'].system('touch MARKER') }}",
        "{{ self._TemplateReference__context.__class__ }}",
        "{% include 'MARKER' %}",
        "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
        "{{ messages.append(1) }}",
    ],
)
def test_sandboxed(source: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    template = Template(source.replace("MARKER", str(marker)), TIGHT)
    assert re.fullmatch(
        "|error: .*(unsafe|not safe|no loader|no attribute|undefined).*", text(template.render, MESSAGES)
    )
    assert not marker.exists()


TRIES = """
import errno, os, socket, sys
sys.path += sys.argv[2:]
import worker
worker.confine(2**28)
def refused(attempt, *errors):
    try:
        attempt()
    except (OSError, MemoryError) as error:
        assert isinstance(error, MemoryError) or error.errno in errors, error
    else:
        raise AssertionError(attempt)
os.close(2)  # leaves its number free
refused(lambda: open(sys.argv[1]), errno.EMFILE)
refused(lambda: open(sys.argv[1] + ".new", "w"), errno.EMFILE)
refused(socket.socket, errno.EMFILE)
refused(os.pipe, errno.EMFILE)
refused(lambda: bytearray(2**29))
if os.getuid():  # root may
    refused(os.fork, errno.EAGAIN)
assert not os.environ.keys() - {"LC_CTYPE"}, os.environ  # which Python itself sets
print("all refused")
"""


def test_what_leaves_the_sandbox_is_confined(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("secret")
    folder = Path(pyllama.template.__file__).parent
    paths = [folder, *map(pyllama.template._folder_of, ("jinja2", "markupsafe"))]
    command = [sys.executable, "-ISB", "-c", TRIES, file, *paths]
    out = subprocess.run(command, env={}, capture_output=True, text=True, timeout=60)
    assert out.stdout == "all refused\n", out.stderr
    assert not (tmp_path / "file.new").exists()


def test_the_worker_sees_nothing_of_the_caller() -> None:
    template = Template("{{ messages }}")
    process = Path(f"/proc/{worker_id(template)}")
    assert (process / "environ").read_bytes() == b""
    assert (process / "cwd").readlink() == Path("/")
    assert len(list((process / "fd").iterdir())) == 3
    assert os.getpgid(worker_id(template)) != os.getpgrp(), "Ctrl-C would end it"


CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Where is <b>Týros</b>? 🙂\n'\"\\"}],
    [
        {"role": "system", "content": "Be brief. 简短"},
        {"role": "user", "content": "  1 + 1? "},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"},
        {"role": "user", "content": "{{ bos_token }}</s>"},
    ],
    [{"role": "assistant", "content": "first"}, {"role": "assistant", "content": "again"}],
]


def chat_templates() -> dict[str, str]:
    found = {}
    for folder in CONFIGS.iterdir():
        config = folder / "tokenizer_config.json"
        values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else values.get("chat_template")
        if isinstance(source, str):
            found[folder.name] = source
    return found


@pytest.mark.parametrize("name", sorted(chat_templates()))
def test_published_templates_as_transformers(name: str) -> None:
    source = chat_templates()[name]
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(byte_level_tokenizer(), special, source)
    reference = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), chat_template=source, **special)
    for chat in CHATS:
        for prompt in (True, False):
            expected = text(reference.apply_chat_template, chat, tokenize=False, add_generation_prompt=prompt)
            own = text(tokenizer.apply_chat_template, chat, add_generation_prompt=prompt)
            assert own.replace("the chat template does not take these messages: ", "") == expected


def test_every_filter_and_test_works_within_the_limits() -> None:
    """What a filter imports when it is first called, it could not import any more."""
    environment = sandbox()
    given = "(" + "n, 'a é', ['b', 'a', 'B'], {'k': 1}, none, messages, '<i>x</i> http://a.org'|safe" + ")"
    names = [f"|{name}" for name in sorted(environment.filters) if name != "random"]
    names += [f" is {name}" for name in sorted(environment.tests) if name.isidentifier()]
    expressions = [f"v{name}{arguments}" for name in names for arguments in ("", "(2)", "('k')", "('a', 'b')")]
    expressions += [f"{given}[i]|{name}" for name in ("pprint", "urlize", "striptags", "wordwrap", "tojson|length")]
    expressions += ["lipsum(1, false, 3, 9)|length > 0", "'\\N{BULLET}\\x41\\u00e9'", "'é'.encode('latin-1')", "1 / n"]
    branches = "".join(f"{{% elif w == {i} %}}{{{{ {text} }}}}" for i, text in enumerate(expressions))
    source = f"{{% if w < 0 %}}{branches}{{% endif %}}"
    template = Template(source)
    plain = environment.from_string(source)
    values = [0, "a é\n\nb", ["b", "a", "B"], {"k": 1}, None]

    for w in range(len(expressions)):
        for i, v in enumerate(values):
            request = {"w": w, "v": v, "n": 0, "i": i, **MESSAGES}
            expected = text(plain.render, request)
            if " at 0x" not in expected:
                assert text(template.render, request) == expected, expressions[w]


def test_texts_of_every_kind() -> None:
    template = Template("{{ text }}|{{ text|length }}")
    for text in ["", "\x00\n\r\u2028", "🙂", "\ud83d", "\udc80 lone", "a" * 5_000_000, "🙂" * 1_000_000]:
        assert template.render({"text": text}) == f"{text}|{len(text)}"


def test_values_that_are_not_json() -> None:
    template = Template("{{ text }}")
    with pytest.raises(TypeError, match="not JSON serializable"):
        template.render({"text": {1, 2}})
    assert template.render({"text": 1}) == "1"


def test_threads_share_a_template() -> None:
    template = Template("{{ text }}" * 3)
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda i: template.render({"text": i}), range(200)))
    assert texts == [str(i) * 3 for i in range(200)]


def test_a_worker_that_ends_is_replaced() -> None:
    template = Template(SOMETIMES, SHORT)
    first = worker_id(template)
    with pytest.raises(ValueError, match="takes more than 1 s"):
        template.render({"slow": True})
    assert not runs(first)
    assert template.render({"text": "a"}) == "a"
    second = worker_id(template)
    assert second != first
    os.kill(second, signal.SIGKILL)
    assert ends(second)
    assert template.render({"text": "b"}) == "b"
    template = Template(SOMETIMES)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(template.render, {"slow": True})
        while not template._slots[os.getpid()]._lock.locked():
            time.sleep(0.01)
        os.kill(worker_id(template), signal.SIGKILL)
        with pytest.raises(ValueError, match="ended without an answer"):
            slow.result()
    assert template.render({"text": "c"}) == "c"


def test_what_is_interrupted_leaves_no_answer_behind() -> None:
    template = Template(SOMETIMES)
    assert template.render({"text": "a"}) == "a"
    usual = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            template.render({"slow": True, "text": "late"})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    assert template.render({"text": "b"}) == "b"


def test_nothing_is_left() -> None:
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    template = Template("{{ text }}")
    process = worker_id(template)
    assert runs(process)
    del template
    gc.collect()
    assert not runs(process)
    with pytest.raises(ValueError, match="it does not compile"):
        Template("{% if")
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before


ALONE = """
import os, sys, time
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("template", sys.argv[1])
module = module_from_spec(spec)
spec.loader.exec_module(module)
Template = module.Template
"""


def python(code: str) -> subprocess.Popen[str]:
    """Runs code that uses Template, in a process without torch, which would take seconds to import."""
    return subprocess.Popen(
        [sys.executable, "-Walways", "-c", ALONE + code, str(pyllama.template.__file__)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("signum", [None, signal.SIGKILL])
def test_the_worker_ends_with_its_process(signum: signal.Signals | None) -> None:
    wait = "time.sleep(600)" if signum else ""
    process = python(f"t = Template('x'); print(t._slots[os.getpid()].worker._process.pid, flush=True); {wait}")
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    if signum:
        assert runs(worker)
        process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert errors == ""
    assert ends(worker)


def test_forked_processes_have_their_own_workers() -> None:
    code = """
template = Template("{{ text }}")
mine = template._slots[os.getpid()].worker._process
children = []
for i in range(3):
    child = os.fork()
    if not child:
        assert template.render({"text": i}) == str(i)
        assert template._slots[os.getpid()].worker._process.pid != mine.pid
        del template
        sys.exit()
    children.append(child)
    assert template.render({"text": "parent"}) == "parent"
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
assert mine.poll() is None and template.render({"text": "parent"}) == "parent"
print("done")
"""
    out, errors = python(code).communicate(timeout=60)
    assert (out, errors) == ("done\n", "")


def test_without_standard_streams() -> None:
    code = """
for number in (0, 2):
    os.close(number)
sys.stdin = sys.stderr = None
print(Template("{{ text }}").render({"text": "fine"}))
"""
    out, _ = python(code).communicate(timeout=60)
    assert out == "fine\n"


def test_a_pickled_tokenizer_has_its_template() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer(), {"bos_token": "<s>"}, "{{ bos_token }}{{ messages[0].content }}")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.apply_chat_template([{"role": "user", "content": "a"}]) == "<s>a"
