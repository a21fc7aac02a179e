"""Meta's own format of Llama: params.json beside consolidated.00.pth, ... (github.com/meta-llama/llama-models).

Mistral's own files and small research models have the same names (mistral.py, minimind.py).
"""

from __future__ import annotations

from typing import Any

from pyllama.architectures.common import Dialect
from pyllama.architectures.reader import MAX_LAYERS, Reader, whole
from pyllama.config import GQAConfig, ModelConfig
from pyllama.weights import Rule, WeightTable

# The contexts of training by RoPE's base: Llama 2, Llama 3, CodeLlama. params.json does not say them, nor anything
# that tells Llama 1 (2048) from Llama 2. For another base the default of Meta's code.
CONTEXTS = {10_000.0: 4096, 500_000.0: 8192, 1_000_000.0: 16384}
DEFAULT_CONTEXT = 2048
SCALED_CONTEXT = 131072  # of Llama 3.1 and later


def translate(reader: Reader) -> dict[str, Any]:
    reader.anything("max_batch_size")
    theta = float(reader.number("rope_theta", default=10_000.0))
    scaled = reader.boolean("use_scaled_rope", default=False)
    # Llama 3.2's 1B and 3B, made for phones. Their tied head and factor of 32 are in their config.json only (the
    # factor of 8 in Meta's code is Llama 3.1's: github.com/meta-llama/llama-models/issues/241).
    small = scaled and reader.integer("dim") < 4096
    context = SCALED_CONTEXT if scaled else CONTEXTS.get(theta, DEFAULT_CONTEXT)
    multiplier = reader.number("ffn_dim_multiplier", default=None, null=None)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **read_common(reader),
        "intermediate_size": feed_forward_size(reader, multiple_of=256, multiplier=multiplier),
        "max_position_embeddings": reader.integer("max_seq_len", default=context),
        "rope_theta": theta,
        "rope_scaling": _scaling(reader, default=32.0 if small else 8.0) if scaled else None,
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", default=small),
    }


def _scaling(reader: Reader, default: float) -> dict[str, Any]:
    """Llama 3.1's, whose values are in Meta's code."""
    return {
        "rope_type": "llama3",
        "factor": reader.number("rope_scaling_factor", default=default),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def read_common(reader: Reader) -> dict[str, Any]:
    """What all configurations in these keys say in the same way, in Hugging Face's keys."""
    dim, heads = reader.integer("dim"), reader.integer("n_heads")
    kv_heads = reader.integer("n_kv_heads", default=heads, null=heads)
    if heads % kv_heads:
        raise reader.refusal("n_kv_heads", f"n_heads = {heads} is not a multiple of it")
    if dim % (2 * heads) and "head_dim" not in reader:
        raise reader.refusal("n_heads", f"dim = {dim} gives no even head size")
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": dim,
        "num_hidden_layers": reader.integer("n_layers", most=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": reader.number("norm_eps", default=1e-5),
        "hidden_act": "silu",
    }


def feed_forward_size(reader: Reader, *, multiple_of: int, multiplier: float | None = None) -> int:
    """Two thirds of 4 * dim, so that SwiGLU's three matrices have the parameters of two; `multiple_of`: a default."""
    size = int(2 * (4 * reader.integer("dim")) / 3)
    if multiplier is not None:
        size = whole(multiplier * size)
    multiple: int = reader.integer("multiple_of", default=multiple_of)
    return -(-size // multiple) * multiple


def weights(config: ModelConfig) -> WeightTable:
    """The rules for these names. RoPE turns pairs (2i, 2i + 1) there, and what it turns is put in the half order."""
    attention = config.layers[0].attention
    assert isinstance(attention, GQAConfig)
    size = attention.head_dim
    ffn, expert, shared = (f"layers.{{i}}.feed_forward.{part}" for part in ("", "experts.{e}.", "shared_experts."))
    rules = (
        Rule("embedding.weight", ("tok_embeddings.weight",), 0),
        Rule("layers.{i}.attention_norm.weight", ("layers.{i}.attention_norm.weight",), None),
        Rule(
            "layers.{i}.attention.qkv.weight",
            tuple(f"layers.{{i}}.attention.{part}.weight" for part in ("wq", "wk", "wv")),
            0,
            interleaved=(size, size, 0),
        ),
        Rule("layers.{i}.attention.out.weight", ("layers.{i}.attention.wo.weight",), 1),
        Rule("layers.{i}.ffn_norm.weight", ("layers.{i}.ffn_norm.weight",), None),
        Rule("layers.{i}.ffn.gate_up.weight", (f"{ffn}w1.weight", f"{ffn}w3.weight"), 0),
        Rule("layers.{i}.ffn.down.weight", (f"{ffn}w2.weight",), 1),
        Rule("layers.{i}.ffn.router.weight", (f"{ffn}gate.weight",), None),
        Rule("layers.{i}.ffn.gate_up", (f"{expert}w1.weight", f"{expert}w3.weight"), 1),
        Rule("layers.{i}.ffn.down", (f"{expert}w2.weight",), 2),
        Rule("layers.{i}.ffn.shared.gate_up.weight", (f"{shared}w1.weight", f"{shared}w3.weight"), 0),
        Rule("layers.{i}.ffn.shared.down.weight", (f"{shared}w2.weight",), 1),
        Rule("norm.weight", ("norm.weight",), None),
        Rule("head.weight", ("output.weight",), 0),
    )
    # Frequencies and masks, which are computed.
    skip = "rope.freqs", "layers.{i}.attention.inner_attention.rope.freqs", "layers.{i}.attention.mask", "pos_cis"
    return WeightTable(rules, skip, tied=(("output.weight", "tok_embeddings.weight"),))


DIALECT = Dialect(frozenset({"dim", "n_layers", "n_heads"}), translate, weights)
