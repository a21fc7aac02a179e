"""The tokenizer against transformers' reading of the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEXT, byte_level_tokenizer, sentencepiece_tokenizer, write_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from pyllama.tokenizer import Tokenizer

# The shapes that checkpoints' templates have, and the functions that they call.
TEMPLATES = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "llama3": """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
Today: {{ date_string }}
""",
    "mistral": """
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% continue %}
    {% endif %}
    {% if message['role'] == 'user' %}
[INST] {{ message['content'] }} [/INST]{% set ns.index = ns.index + 1 %}
    {% else %}
 {{ message | tojson }}{{ eos_token }}
    {% endif %}
    {% if ns.index > 2 %}{% break %}{% endif %}
{% endfor %}""",
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% generation %}"
        "{{ message['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
CHATS = [
    [{"role": "user", "content": "Hello <b>& 'you'</b>"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  Größe? 🙂 "},
        {"role": "assistant", "content": "1.80\nm", "name": None},
        {"role": "user", "content": "</s> and <s>?"},
    ],
]
FAMILIES = {"byte level": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer}


@pytest.fixture(scope="module", params=FAMILIES)
def backend(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return FAMILIES[request.param]()


def read(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def test_text_to_ids_and_back_as_transformers(backend: tokenizers.Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, backend)
    tokenizer, reference = read(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.vocab_size == len(reference)

    @settings(max_examples=60, deadline=None)
    @given(st.one_of(st.text(max_size=30), st.sampled_from(TEXT)))
    def check(text: str) -> None:
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert plain == reference.encode(text, add_special_tokens=False)
        if not text.startswith("<s>"):
            assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.decode(plain) == reference.decode(plain, skip_special_tokens=True)

    check()


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("processor", [True, False], ids=["processor adds BOS", "processor adds nothing"])
def test_one_bos_at_most(
    backend: tokenizers.Tokenizer, tmp_path: Path, processor: bool, add_bos_token: bool | None
) -> None:
    template = "<s> $A" if processor else "$A"
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1)])
    config = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    write_tokenizer(tmp_path, backend, **config)
    tokenizer = read(tmp_path)
    content = tokenizer.encode("fox", add_special_tokens=False)
    assert 1 not in content
    added = processor if add_bos_token is None else add_bos_token
    assert tokenizer.encode("fox") == [1] * added + content
    assert tokenizer.encode("") == [1] * added
    for text in ("<s>fox", "<s><s>fox"):
        ids = tokenizer.encode(text)
        assert ids[0] == 1
        assert 1 not in ids[1:]
    assert tokenizer.encode("fox<s>")[-1] == 1, "a BOS token inside a text is the text's own"


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_as_transformers(backend: tokenizers.Tokenizer, tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path, backend, chat_template=TEMPLATES[name], pad_token="<unk>")
    tokenizer, reference = read(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for chat in CHATS:
        for prompt in (True, False):
            expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert tokenizer.apply_chat_template(chat, add_generation_prompt=prompt) == expected
        ids = reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_chat(chat) == ids


def test_where_templates_are_found(tmp_path: Path) -> None:
    chat = CHATS[0]
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]
    write_tokenizer(tmp_path, byte_level_tokenizer(), chat_template=named)
    assert read(tmp_path).apply_chat_template(chat) == "the default"
    (tmp_path / "chat_template.jinja").write_text("from {{ eos_token }} the file", encoding="utf-8")
    assert read(tmp_path).apply_chat_template(chat) == "from </s> the file"


def test_special_tokens_from_any_file(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer(), bos_token={"content": "<s>", "lstrip": False})
    assert read(tmp_path).bos_token_id == 1
    (tmp_path / "tokenizer_config.json").unlink()
    assert read(tmp_path).bos_token_id is None
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    assert (read(tmp_path).bos_token_id, read(tmp_path).eos_token_id) == (1, 2)
    assert read(tmp_path).special_id("</s>") == 2
    assert read(tmp_path).special_id("fox") is None


def test_truncation_and_padding_of_training_are_off(tmp_path: Path) -> None:
    backend = byte_level_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    write_tokenizer(tmp_path, backend)
    tokenizer = read(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXT[0])) == TEXT[0]
    assert len(tokenizer.encode("a")) == 1


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', '{"model": {"type": "BPE"'])
def test_broken_tokenizer_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that can be read: .+"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{not json", r"tokenizer_config\.json is not JSON"),
        ("[]", r"tokenizer_config\.json must hold a JSON object, got list"),
        (
            '{"add_bos_token": true, "bos_token": "[B]"}',
            r"add_bos_token is set, but bos_token '\[B\]' is not",
        ),
    ],
)
def test_broken_configuration(tmp_path: Path, config: str, message: str) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be a string or a list"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag", "template": ""}]}',
            r"no template named 'default', only \['rag'\]",
        ),
        ("tokenizer_config.json", '{"chat_template": "{% for"}', "it does not compile"),
        ("chat_template.jinja", "{{ 1", "it does not compile"),
        ("chat_template.jinja", "{% if a %}" * 150 + "{% endif %}" * 150, "it does not compile"),
        ("chat_template.jinja", "\xff", "'utf-8' codec can't decode"),
    ],
)
def test_a_broken_template_stops_chats_alone(tmp_path: Path, file: str, content: str, message: str) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer())
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    tokenizer = read(tmp_path)
    assert tokenizer.decode(tokenizer.encode("fox")) == "fox"
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match=rf"chat template of .*{file} cannot be used: .*{message}"):
        tokenizer.apply_chat_template(CHATS[0])


def test_a_template_given_by_hand_must_compile() -> None:
    with pytest.raises(ValueError, match="it does not compile"):
        Tokenizer(byte_level_tokenizer(), chat_template="{% for")


def test_chat_without_a_template(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer())
    with pytest.raises(ValueError, match="no chat template"):
        read(tmp_path).apply_chat_template(CHATS[0])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        (["hello"], "message 0 of the chat must be a dict, got str"),
        ([{"content": "hello"}], "message 0 of the chat needs a 'role'"),
        (
            [CHATS[0][0], {"role": 1, "content": "hello"}],
            "message 1 of the chat needs a 'role' that is a string",
        ),
        ([{"role": "user", "text": "hello"}], r"message 0 of the chat needs 'content', got .*'role', 'text'"),
        ([{"role": "user", "content": {1, 2}}], "must consist of strings, numbers, lists and dicts"),
        (
            [{"role": "assistant", "content": "hello"}],
            "does not take these messages: Conversation roles must",
        ),
        ([{"role": "user", "content": None}], "does not take these messages"),
    ],
)
def test_malformed_messages(tmp_path: Path, messages: list, message: str) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer(), chat_template=TEMPLATES["llama2"])
    with pytest.raises(ValueError, match=message):
        read(tmp_path).apply_chat_template(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_templates_run_in_a_sandbox(tmp_path: Path, template: str) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer(), chat_template=template)
    with pytest.raises(ValueError, match="the chat template does not take these messages"):
        read(tmp_path).apply_chat_template(CHATS[0])


def test_pieces_of_what_is_no_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer())
    tokenizer = read(tmp_path)
    assert [tokenizer.piece(token) for token in (1, 2, 10_000)] == ["", "", ""]
    assert "".join(map(tokenizer.piece, tokenizer.encode(" fox"))) == "Ġfox"
