"""Tiny random checkpoints and tokenizers, made by transformers and tokenizers, for tests of generation."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "The with statement is used to wrap the execution of a block.",
    "Größe, naïve café, žluťoučký kůň, 你好世界, привет мир, 🙂🙃🤖",
    "def main(): return [x for x in range(10)]",
] * 4
VOCAB_SIZE = 400
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]

# A whole config.json.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """As GPT-2's and Llama 3's: every byte is a token. No post-processor: it adds nothing to a text."""
    return tokenizers.Tokenizer.from_str(_byte_level())


def sentencepiece_tokenizer() -> tokenizers.Tokenizer:
    """As Llama 2's: pieces hold spaces, unknown characters fall back to bytes, a BOS token is added."""
    return tokenizers.Tokenizer.from_str(_sentencepiece())


@cache
def _byte_level() -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return str(tokenizer.to_str())


@cache
def _sentencepiece() -> str:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL[:3] + byte_tokens + SPECIAL[3:],
        limit_alphabet=40,
        show_progress=False,
    )
    trained.train_from_iterator(TEXT, trainer)
    content = json.loads(trained.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    content["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(tokenizer.to_str())


def write_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer, **config: Any) -> None:
    """tokenizer.json and a tokenizer_config.json with `config` in it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    } | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_checkpoint(
    folder: Path, tokenizer: tokenizers.Tokenizer | None = None, seed: int = 0, **config: Any
) -> LlamaForCausalLM:
    """A random Llama with weights large enough to make its choices varied; returns transformers' model."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(values | config))).eval()
    model.save_pretrained(folder)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, chat_template=CHAT_TEMPLATE)
    return model
