"""Text as it comes against the decoding of the whole."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEXT, VOCAB_SIZE, byte_level_tokenizer, sentencepiece_tokenizer
from tokenizers import decoders, models

from pyllama.text import Completion, TextStream
from pyllama.tokenizer import Tokenizer


def gemma_like() -> tokenizers.Tokenizer:
    """Byte fallback that keeps the leading space."""
    backend = sentencepiece_tokenizer()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def metaspace() -> tokenizers.Tokenizer:
    backend = sentencepiece_tokenizer()
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return backend


def nested_byte_level() -> tokenizers.Tokenizer:
    backend = byte_level_tokenizer()
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    backend.add_tokens(["<added>", "中文"])
    return backend


def whole_words() -> tokenizers.Tokenizer:
    """No decoder at all: the library joins words by spaces."""
    return tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))


TOKENIZERS = {
    "byte level": byte_level_tokenizer,
    "nested byte level": nested_byte_level,
    "sentencepiece": sentencepiece_tokenizer,
    "gemma": gemma_like,
    "metaspace": metaspace,
    "words": whole_words,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(TOKENIZERS[request.param]())


def pieces(tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """What is given out at each token, up to a stop, and at the end."""
    stream = TextStream(tokenizer, stop)
    out = []
    for token in token_ids:
        out.append(stream.push(token))
        if stream.stopped:
            break
    return [*out, stream.finish()]


def reference(text: str, stop: tuple[str, ...]) -> str:
    """The text character by character: it ends where a stop string is complete, before the longest such."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def test_any_tokens_give_the_decoding(tokenizer: Tokenizer) -> None:
    ids = st.integers(0, VOCAB_SIZE + 5)  # some that the tokenizer does not know: a model may have padding

    @settings(max_examples=300, deadline=None)
    @given(st.lists(ids, max_size=25))
    def check(token_ids: list[int]) -> None:
        assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)

    check()


def test_broken_and_whole_characters_mixed(tokenizer: Tokenizer) -> None:
    """Random bytes are mostly invalid UTF-8; cut-up emoji are valid again."""
    random.seed(0)
    emoji = tokenizer.encode("🙂 Größe", add_special_tokens=False)
    single = [token for token in range(VOCAB_SIZE) if "�" in tokenizer.decode([token])] or emoji
    for _ in range(100):
        token_ids = [token for _ in range(8) for token in random.choice([emoji, random.choices(single, k=2)])]
        assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("name", ["byte level", "sentencepiece", "gemma", "metaspace"])
def test_text_comes_early_and_in_whole_characters(name: str) -> None:
    tokenizer = Tokenizer(TOKENIZERS[name]())
    for text in TEXT[:4]:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        given_out = pieces(tokenizer, token_ids)
        assert "�" not in "".join(given_out)
        assert given_out[-1] == "" or name != "byte level", "complete characters do not wait for the end"
        for place in range(len(token_ids)):
            decoded = tokenizer.decode(token_ids[: place + 1])
            assert tokenizer.decode(token_ids).startswith("".join(given_out[: place + 1]))
            if tokenizer.piece(token_ids[place])[:3] != "<0x" and "�" not in decoded:
                assert "".join(given_out[: place + 1]) == decoded


def test_a_long_run_of_broken_bytes_stays_cheap() -> None:
    """Each token is looked at a bounded number of times, however long nothing whole comes."""
    decoded = 0

    class Counting(Tokenizer):
        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            nonlocal decoded
            decoded += len(token_ids)
            return super().decode(token_ids, skip_special_tokens)

    tokenizer = Counting(sentencepiece_tokenizer())
    byte = tokenizer.backend.token_to_id("<0xF0>")
    assert "".join(pieces(tokenizer, [byte] * 5000)) == "�" * 5000
    assert decoded <= 3 * 5000


@given(
    text=st.text(alphabet="abé🙂 ", max_size=20),
    stop=st.lists(st.text(alphabet="abé🙂 ", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=500, deadline=None)
@pytest.mark.parametrize("name", ["byte level", "gemma"])
def test_stop_strings(name: str, text: str, stop: list[str]) -> None:
    tokenizer = STOPPING[name]
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    decoded, stops = tokenizer.decode(token_ids), tuple(stop)
    expected = reference(decoded, stops)
    given_out = pieces(tokenizer, token_ids, stops)
    assert "".join(given_out) == expected
    stream = TextStream(tokenizer, stops)
    for token in token_ids:
        stream.push(token)
    stream.finish()
    assert stream.stopped == (expected != decoded)


STOPPING = {"byte level": Tokenizer(byte_level_tokenizer()), "gemma": Tokenizer(gemma_like())}


def test_only_what_a_stop_could_begin_with_is_held_back() -> None:
    tokenizer = STOPPING["byte level"]
    stream = TextStream(tokenizer, ("xyz", "xylophone"))
    given_out = [stream.push(token) for character in "axyxyxylx" for token in tokenizer.encode(character)]
    assert given_out == ["a", "", "", "xy", "", "xy", "", "", "xyl"]
    assert stream.finish() == "x"
    assert not stream.stopped


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None)
    assert stream.push(5) + stream.finish() == ""


def test_what_a_completion_says() -> None:
    completion = Completion("text", [5, 6, 7], "length", 10, prompt_seconds=0.5, generation_seconds=0.25)
    assert str(completion) == "text"
    assert completion.prompt_tokens_per_second == 20
    assert completion.generation_tokens_per_second == 8
    assert Completion("", [5], "stop", 1, 0.5, 0.0).generation_tokens_per_second is None
