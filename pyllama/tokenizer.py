"""Text to token ids and back, and chats to text through the checkpoint's own template.

A thin layer over the `tokenizers` library. What it adds is what a checkpoint says outside tokenizer.json:
which token begins a text, which ends one, and the chat template.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from pyllama.architectures.reader import read_json
from pyllama.files import check_file

MAX_BYTES = 10**8  # of tokenizer.json; Gemma's, of 262144 tokens, has a third
NO_TEMPLATE = "this checkpoint has no chat template (neither chat_template.jinja nor one in tokenizer_config.json)"


class Tokenizer:
    """A checkpoint's tokenizer.

    backend: the tokenizer of the `tokenizers` library; special_tokens: "bos_token", "eos_token", ... as the
    checkpoint names them (a chat template may read each of them); chat_template: Jinja source; add_bos:
    whether a text begins with the BOS token (None: as the backend's post-processor does).
    Raises ValueError when the BOS token to be added is not in the vocabulary, or the template does not
    compile.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        add_bos: bool | None = None,
    ) -> None:
        self.backend = backend
        # Training leftovers in tokenizer.json would cut prompts or pad them.
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = dict(special_tokens or {})
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        if add_bos and self.bos_token_id is None:
            bos = self.special_tokens.get("bos_token")
            raise ValueError(f"add_bos_token is set, but bos_token {bos!r} is not in the vocabulary")
        self._add_bos = add_bos
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.chat_template = chat_template
        self._template = None if chat_template is None else _compile(chat_template)
        self._no_template = NO_TEMPLATE

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """Reads tokenizer.json and what stands beside it; None when the folder has no tokenizer.json.

        The other files are optional: tokenizer_config.json, special_tokens_map.json, chat_template.jinja
        (which goes before the configuration's template). Raises ValueError naming the file that is broken;
        for a chat template, which plain text does without, `apply_chat_template` does.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not os.path.lexists(file):
            return None
        check_file(file, MAX_BYTES)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file} is not a tokenizer that can be read: {error}") from error
        config_file = folder / "tokenizer_config.json"
        config = read_json(config_file) or {}
        names = {**(read_json(folder / "special_tokens_map.json") or {}), **config}
        special_tokens = {
            name: token
            for name, value in names.items()
            if name.endswith("_token") and isinstance(token := _content(value), str)
        }
        try:
            tokenizer = cls(backend, special_tokens, add_bos=config.get("add_bos_token"))
        except ValueError as error:
            raise ValueError(f"{config_file}: {error}") from error
        template_file = folder / "chat_template.jinja"
        source = template_file if os.path.lexists(template_file) else config_file
        try:
            if source == template_file:
                check_file(template_file, MAX_BYTES)
            own = template_file.read_text(encoding="utf-8") if source == template_file else None
            template = own or _default_template(config.get("chat_template"))
            if template is not None:
                tokenizer._template, tokenizer.chat_template = _compile(template), template
        except (ValueError, OSError) as error:  # UnicodeDecodeError is a ValueError
            tokenizer._no_template = f"the chat template of {source} cannot be used: {error}"
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the BOS token where the checkpoint begins a text with it.

        The BOS token is never doubled: a text that already begins with it, as templates write it, keeps one.
        add_special_tokens=False adds nothing.
        """
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        bos = self.bos_token_id
        if bos is None or not add_special_tokens:
            return ids
        start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        if self._add_bos is None:
            wanted = start > 0
        else:
            wanted = self._add_bos or (start > 0 and text.startswith(self.special_tokens["bos_token"]))
        return [bos] * wanted + ids[start:]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def special_id(self, token: str) -> int | None:
        """Id of a special token; None when `token` is not one."""
        token_id = self.backend.token_to_id(token)
        return token_id if token_id in self.special_ids else None

    def piece(self, token_id: int) -> str:
        """The token as the vocabulary spells it; "" for those that are no text: special and unknown ones."""
        return "" if token_id in self.special_ids else self.backend.id_to_token(token_id) or ""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The chat as one text, ready for `encode(text, add_special_tokens=False)`.

        messages: [{"role": "user", "content": "..."}, ...], as the template wants them;
        add_generation_prompt: end with the header of the assistant's answer. Equal to transformers' function
        of this name.
        Raises ValueError without a template, for malformed messages, and when the template refuses them.
        """
        if self._template is None:
            raise ValueError(f"{self._no_template}; give the prompt as a string in the model's own format instead")
        plain = _plain_messages(messages)
        try:
            return self._template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # a template is the checkpoint's own program and may fail in any way
            raise ValueError(f"the chat template does not take these messages: {error}") from error

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a chat that the assistant is to answer."""
        return self.encode(self.apply_chat_template(messages), add_special_tokens=False)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of `messages` in plain JSON types: a template must not reach the caller's objects."""
    if not messages:
        raise ValueError("a chat needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {i} of the chat must be a dict, got {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} of the chat needs a 'role' that is a string, got {message!r}")
        if "content" not in message and "tool_calls" not in message:
            raise ValueError(f"message {i} of the chat needs 'content', got the keys {sorted(message)}")
    try:
        copies: list[dict[str, Any]] = json.loads(json.dumps([dict(message) for message in messages]))
    except TypeError as error:
        raise ValueError(f"messages must consist of strings, numbers, lists and dicts: {error}") from error
    # Clients send `"content": null` where templates expect the key to be absent.
    return [{key: value for key, value in message.items() if value is not None} for message in copies]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the text to train on; here it is text like any other."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own spelling)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> jinja2.Template:
    """The template in a sandbox, with the functions that checkpoints' templates call."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except Exception as error:  # jinja2's, and Python's where what jinja2 makes of it is too deep
        raise ValueError(f"it does not compile: {error}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which a model must not see."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _content(value: Any) -> Any:
    """A special token is a string, or an object that holds it as "content"."""
    return value.get("content") if isinstance(value, dict) else value


def _default_template(value: Any) -> str | None:
    """tokenizer_config.json's chat_template: a string, or the one named "default" of a list."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        templates = {entry.get("name"): entry.get("template") for entry in value}
        default = templates.get("default")
        if isinstance(default, str):
            return default
        raise ValueError(f"chat_template has no template named 'default', only {list(templates)}")
    raise ValueError(f"chat_template must be a string or a list of named ones, got {type(value).__name__}")
