"""Strict reading of configurations: every key is understood, known to be irrelevant, or refused by name."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from pyllama.files import check_file

REQUIRED: Final[Any] = object()
MAX_SIZE = 2**31 - 1  # ops count in int32
MAX_BYTES = 10**7  # of a file of JSON; a configuration with a chat template has a hundredth
MAX_LAYERS = 2**16 - 1  # a `ModelConfig` lists its layers
MAX_EXTRA_LAYERS = 64  # each is a pattern that a checkpoint's names are held against; DeepSeek-V3 and GLM-4.5 have 1

# Keys that change nothing in what a model computes at inference, whatever their value.
# fmt: off
IRRELEVANT = frozenset({
    # what the checkpoint is and who wrote it (the data type is read from the tensors)
    "architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash",
    "transformers.js_config", "is_llama_config", "_attn_implementation_autoset", "unsloth_version",
    "unsloth_fixed",
    # token ids: the loader and the tokenizer read those that matter
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "tokenizer_class", "prefix",
    # training, and how products are split, which changes their rounding alone
    "initializer_range", "hidden_dropout", "embd_pdrop", "resid_pdrop",
    "router_jitter_noise", "neftune_noise_alpha", "gradient_checkpointing", "use_cache", "pretraining_tp",
    "chunk_size_feed_forward",
    # what transformers' functions return
    "return_dict", "use_return_dict", "output_hidden_states", "output_attentions", "output_scores",
    "output_router_logits", "return_dict_in_generate", "torchscript",
    # other frameworks and tasks
    "use_bfloat16", "tf_legacy_loss", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params",
    # defaults of transformers' generate(), from before generation_config.json
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
})
# fmt: on

# Keys that are harmless at these values only, in every family.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),  # every model here is one
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, None),
}


class ConfigError(ValueError):
    """A configuration says something that is not understood or not supported."""


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in the file; None where there is no file.

    Raises ConfigError where there is something else, CheckpointError for a file that is not safe to read.
    """
    if not os.path.lexists(file):
        return None
    check_file(file, MAX_BYTES)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values


class Reader:
    """A JSON object whose keys are read one by one, by name and type; `finish` refuses the others.

    `default` is the value of an absent key, `null` that of a key given as null; without them the key must be
    there, and must not be null.
    """

    def __init__(self, values: dict[str, Any], file: str = "config.json", prefix: str = "") -> None:
        self._values = values
        self._file = file  # that errors name
        self._prefix = prefix  # of an object within the configuration: "rope_scaling."
        self._seen: set[str] = set()
        self._readers: dict[str, Reader] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(
        self, key: str, default: Any = REQUIRED, null: Any = REQUIRED, most: int = MAX_SIZE, zero: bool = False
    ) -> Any:
        """A positive integer, `most` at most, or zero where that has a meaning."""
        value, given = self._value(key, default, null)
        if given and not (type(value) is int and value >= (not zero)):
            raise self._malformed(key, f"must be a positive integer{' or 0' if zero else ''}")
        if given and value > most:
            raise self._malformed(key, f"must be {most} at most")
        return value

    def layers(self) -> int:
        """How many layers the model has."""
        return int(self.integer("num_hidden_layers", most=MAX_LAYERS))

    def extra_layers(self, default: int) -> int:
        """How many layers of multi-token prediction follow in the files; `default` is transformers'."""
        return int(self.integer("num_nextn_predict_layers", default=default, zero=True, most=MAX_EXTRA_LAYERS))

    def number(self, key: str, default: Any = REQUIRED, null: Any = REQUIRED, zero: bool = False) -> Any:
        """A positive number, or zero where that has a meaning."""
        value, given = self._value(key, default, null)
        if given and not (_is_positive(value) or (zero and type(value) in (int, float) and value == 0)):
            raise self._malformed(key, f"must be a positive number{' or 0' if zero else ''}")
        return value

    def numbers(self, key: str, length: int) -> list[float]:
        """A list of `length` positive numbers."""
        value, _ = self._value(key, REQUIRED, REQUIRED)
        if not (isinstance(value, list) and len(value) == length and all(map(_is_positive, value))):
            raise self._malformed(key, f"must be a list of {length} positive numbers")
        return value

    def integers(self, key: str, length: int | None = None, least: int = 1, default: Any = REQUIRED) -> Any:
        """A list of integers, `least` at least; `length`: how many. `default` where absent or null."""
        value, given = self._value(key, default, default)
        if given and not (
            isinstance(value, list)
            and length in (None, len(value))
            and all(type(v) is int and least <= v <= MAX_SIZE for v in value)
        ):
            count = "" if length is None else f"{length} "
            raise self._malformed(key, f"must be a list of {count}integers, {least} at least")
        return value

    def anything(self, key: str) -> Any:
        """The key's value, whatever it is; None where absent."""
        self._seen.add(key)
        return self._values.get(key)

    def boolean(self, key: str, default: Any = REQUIRED, null: Any = REQUIRED) -> Any:
        value, given = self._value(key, default, null)
        if given and type(value) is not bool:
            raise self._malformed(key, "must be true or false")
        return value

    def strings(self, key: str, known: tuple[str, ...], length: int) -> Any:
        """A list of `length` strings, each one of `known`; None where the key is absent or null."""
        value, given = self._value(key, None, None)
        if given and not (isinstance(value, list) and len(value) == length and all(v in known for v in value)):
            raise self._malformed(key, f"must be a list of {length}, each one of {', '.join(known)}")
        return value

    def object(self, key: str) -> Reader | None:
        """A reader of the object at `key`, checked by this reader's `finish`; None where absent or null."""
        value, given = self._value(key, None, None)
        if not given:
            return None
        if not isinstance(value, dict):
            raise self._malformed(key, "must be an object")
        if key not in self._readers:
            self._readers[key] = Reader(value, self._file, f"{self._prefix}{key}.")
        return self._readers[key]

    def only(self, key: str, *harmless: Any, default: Any = None) -> Any:
        """The key's value, which must be one of `harmless`; `default` where absent."""
        if key not in self._values:
            return default
        value = self._values[key]
        self._seen.add(key)
        if value not in harmless:
            raise self.refusal(key, f"only {', '.join(map(repr, harmless))} is supported")
        return value

    def finish(self) -> None:
        """Raises ConfigError for keys that nobody read."""
        for reader in self._readers.values():
            reader.finish()
        for key, harmless in HARMLESS.items():
            if key not in self._seen:
                self.only(key, *harmless)
        irrelevant = frozenset[str]() if self._prefix else IRRELEVANT
        if unknown := sorted(self._values.keys() - self._seen - irrelevant):
            pairs = ", ".join(f"{self._prefix}{key} = {_short(self._values[key])}" for key in unknown)
            raise ConfigError(
                f"{self._file} has keys that are not known and may change what the model computes: {pairs}. "
                f"If they do not, load with ignore_config_keys={[self._prefix + key for key in unknown]}"
            )

    def refusal(self, key: str, reason: str) -> ConfigError:
        """The exception for a key whose value is understood but not supported."""
        name = self._prefix + key
        return ConfigError(
            f"{self._file}: {name} = {_short(self._values.get(key))}: {reason}. "
            f"If the model computes the same without it, load with ignore_config_keys={[name]}"
        )

    def _malformed(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self._file}: {self._prefix}{key} {problem}, got {_short(self._values[key])}")

    def _value(self, key: str, default: Any, null: Any) -> tuple[Any, bool]:
        """(value, whether config.json gives one)."""
        self._seen.add(key)
        if key not in self._values:
            if default is REQUIRED:
                raise ConfigError(f"{self._file} lacks {self._prefix}{key}")
            return default, False
        value = self._values[key]
        if value is None:
            if null is REQUIRED:
                raise self._malformed(key, "must not be null")
            return null, False
        return value, True


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def whole(number: float) -> int:
    """The whole part of a product of sizes and factors, which may be infinite; then it is too large all the same."""
    return int(min(number, MAX_SIZE))


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__}, nested too deeply"
    return text if len(text) <= 80 else f"{text[:77]}..."
