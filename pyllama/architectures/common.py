"""What families share: the parts of a decoder's configuration, and the rules of the usual tensor names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyllama.architectures.reader import Reader, whole
from pyllama.config import (
    AttentionConfig,
    FFNConfig,
    GQAConfig,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from pyllama.weights import BlockScales, Rule, WeightTable


@dataclass(frozen=True)
class Family:
    """One family of checkpoints: a module of this folder defines it as `FAMILY`."""

    architectures: tuple[str, ...]  # config.json's "architectures"
    read: Callable[[Reader], ModelConfig]
    weights: Callable[[ModelConfig], WeightTable]


@dataclass(frozen=True)
class Dialect:
    """A publisher's own format of a family: other keys of the configuration, other names of the tensors.

    A module of this folder defines it as `DIALECT`. Of several that a configuration fits, the one with the most
    keys is its own.
    """

    keys: frozenset[str]  # a configuration without "architectures" that has all of these is of this dialect
    translate: Callable[[Reader], dict[str, Any]]  # the same as a config.json of the family
    weights: Callable[[ModelConfig], WeightTable]
    architecture: str | None = None  # what "architectures" says where there is one


def read_positions(reader: Reader, default: int) -> int:
    """The context, as far as position embeddings are trained or scaled for; transformers' default."""
    return int(reader.integer("max_position_embeddings", default=default))


def read_decoder(
    reader: Reader,
    attentions: Sequence[AttentionConfig],
    ffns: Sequence[FFNConfig],
    *,
    positions: int,
    norm_eps: float,
    extra_layers: int = 0,
) -> ModelConfig:
    """The whole model, an attention and a feed-forward for each layer; `norm_eps` is transformers' default."""
    # Vicuna's 16k models give the context that position interpolation reaches under this name.
    context = max(positions, reader.integer("max_sequence_length", default=positions))
    for attention in attentions:
        if attention.rope is not None and isinstance(attention.rope.scaling, YarnScaling):
            # Qwen2.5's and Qwen3's cards switch YaRN on and leave the context as it was.
            context = max(context, whole(attention.rope.scaling.factor * attention.rope.scaling.original_max_positions))
    return ModelConfig(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        max_positions=context,
        norm_eps=reader.number("rms_norm_eps", default=norm_eps),
        tie_embeddings=reader.boolean("tie_word_embeddings", default=False),
        layers=tuple(LayerConfig(attention, ffn) for attention, ffn in zip(attentions, ffns, strict=True)),
        extra_layers=extra_layers,
    )


def read_attention(
    reader: Reader,
    *,
    positions: int,
    rope_theta: float,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    rotated: float | None = None,
    original: int | None = None,
    **options: Any,
) -> GQAConfig:
    """Grouped-query attention; transformers' defaults: `rope_theta`, `kv_heads` (None: one per head), `head_dim`
    (None: hidden_size / heads), `rotated` (the share of a head that is rotated; None: all, whatever is said),
    `original` (see `read_rope`)."""
    heads = reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", default=kv_heads or heads, null=heads)
    if heads % kv_heads:
        raise reader.refusal("num_key_value_heads", f"num_attention_heads = {heads} is not a multiple of it")
    size = reader.integer("head_dim", default=head_dim, null=head_dim)
    if size is None:
        hidden = reader.integer("hidden_size")
        if hidden % heads:
            raise reader.refusal("num_attention_heads", f"hidden_size = {hidden} is not a multiple of it")
        size = hidden // heads
    if size % 2:
        raise reader.refusal("head_dim", f"RoPE rotates pairs, and the head size {size} is odd")
    dim = size if rotated is None else read_rotated(reader, size, rotated)
    rope = read_rope(reader, dim, rope_theta, positions=positions, original=original)
    return GQAConfig(heads, kv_heads, size, rope, dropout=read_dropout(reader, "attention_dropout"), **options)


def read_dropout(reader: Reader, key: str) -> float:
    """A probability of dropout, 0 where there is none."""
    dropout = float(reader.number(key, default=0.0, null=0.0, zero=True))
    if dropout >= 1:
        raise reader.refusal(key, "it is a probability, below 1")
    return dropout


def read_windows(
    reader: Reader, attention: GQAConfig, layers: int, window: int | None, slides: Callable[[int], bool]
) -> list[GQAConfig]:
    """Each layer's attention: with the window where `layer_types` or, without them, `slides` says so of the layer."""
    kinds = reader.strings("layer_types", ("sliding_attention", "full_attention"), layers)
    sliding = [slides(i) for i in range(layers)] if kinds is None else [kind == "sliding_attention" for kind in kinds]
    return [replace(attention, window=window if slide else None) for slide in sliding]


def read_rope(
    reader: Reader,
    dim: int,
    default_theta: float,
    *,
    positions: int,
    original: int | None = None,
    interleaved: bool = False,
) -> RopeConfig:
    """RoPE of `dim` dimensions in both spellings: `rope_parameters`, or `rope_theta` and `rope_scaling`.

    positions: max_position_embeddings, which some scalings refer to. original: the context before the scaling, where
    it is not given; None: `positions`.
    """
    theta = reader.number("rope_theta", default=default_theta)
    found = _rope_object(reader)
    if found is None:
        return RopeConfig(theta, dim, interleaved)
    theta = found.number("rope_theta", default=theta)
    key = "type" if "type" in found and "rope_type" not in found else "rope_type"
    kind = found.only(key, "default", *_SCALINGS, *_LONGROPE, default="default")
    if kind == "su" or (kind == "yarn" and "short_factor" in found):
        kind = "longrope"
    found.only("type", kind, *(_LONGROPE if kind == "longrope" else ()))  # some files give both
    if kind == "default":
        return RopeConfig(theta, dim, interleaved)
    # Phi-3 has its original context beside rope_scaling, not in it, and there it counts more.
    original = found.integer("original_max_position_embeddings", default=original or positions)
    original = reader.integer("original_max_position_embeddings", default=original)
    if kind == "yarn" and theta == 1:
        raise reader.refusal("rope_theta", "all dimensions would turn alike, and YaRN tells them apart")
    if kind == "longrope" and original == 1:
        raise reader.refusal("original_max_position_embeddings", "no context, which LongRoPE makes longer")
    scaling, magnitude = _SCALINGS[kind](found, original, positions, dim)
    return RopeConfig(theta, dim, interleaved, scaling, magnitude)


def read_rotated(reader: Reader, head_dim: int, default: float) -> int:
    """How many dimensions of each head are rotated: `partial_rotary_factor`, beside the rope object or in it."""
    factor = reader.number("partial_rotary_factor", default=default)
    found = _rope_object(reader)
    if found is not None:
        factor = found.number("partial_rotary_factor", default=factor)
    dim = whole(head_dim * factor)
    if dim % 2 or not 0 < dim <= head_dim:
        raise reader.refusal("partial_rotary_factor", f"RoPE rotates pairs, and {dim} of {head_dim} is not possible")
    return dim


def _rope_object(reader: Reader) -> Reader | None:
    parameters, scaling = reader.object("rope_parameters"), reader.object("rope_scaling")
    if parameters is not None and scaling is not None:
        raise reader.refusal("rope_scaling", "rope_parameters is given too")
    return parameters or scaling


def _linear(reader: Reader, original: int, positions: int, dim: int) -> tuple[RopeScaling, float]:
    return LinearScaling(reader.number("factor")), 1.0


def _llama3(reader: Reader, original: int, positions: int, dim: int) -> tuple[RopeScaling, float]:
    low, high = reader.number("low_freq_factor"), reader.number("high_freq_factor")
    if low >= high:
        raise reader.refusal("low_freq_factor", f"high_freq_factor = {high} is not larger")
    return Llama3Scaling(reader.number("factor"), low, high, original), 1.0


def _yarn(reader: Reader, original: int, positions: int, dim: int) -> tuple[RopeScaling, float]:
    factor = reader.number("factor", default=None, null=None) or positions / original
    one, all_dims = (reader.number(key, default=0, null=0, zero=True) for key in ("mscale", "mscale_all_dim"))
    magnitude = yarn_magnitude(factor, one) / yarn_magnitude(factor, all_dims) if one and all_dims else None
    magnitude = reader.number("attention_factor", default=None, null=None) or magnitude or yarn_magnitude(factor, 1.0)
    scaling = YarnScaling(
        factor,
        original,
        reader.number("beta_fast", default=32.0, null=32.0),
        reader.number("beta_slow", default=1.0, null=1.0),
        reader.boolean("truncate", default=True),
    )
    return scaling, magnitude


def yarn_magnitude(factor: float, mscale: float) -> float:
    """YaRN's correction of the scores' size for contexts `factor` times as long (DeepSeek-V2's `yarn_get_mscale`)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(reader: Reader, original: int, positions: int, dim: int) -> tuple[RopeScaling, float]:
    short, long = (reader.numbers(key, dim // 2) for key in ("short_factor", "long_factor"))
    factor = reader.number("factor", default=None, null=None) or positions / original
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    magnitude = reader.number("attention_factor", default=None, null=None) or magnitude
    return LongRopeScaling(tuple(short), tuple(long), original), magnitude


_SCALINGS: dict[str, Callable[[Reader, int, int, int], tuple[RopeScaling, float]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
_LONGROPE = ("longrope", "su", "yarn")  # its names in files of Phi-3, the older ones last


def read_quantization(reader: Reader) -> BlockScales | None:
    """How the weights are stored: None as they are, else as 8-bit floats with a scale for each block."""
    found = reader.object("quantization_config")
    if found is None:
        return None
    if found.anything("quant_method") != "fp8" or "weight_block_size" not in found:
        raise reader.refusal("quantization_config", "of quantized checkpoints only fp8 with weight_block_size is read")
    found.only("fmt", "e4m3", "float8_e4m3fn")
    # How the publisher's kernels round activations, and which modules are stored as they are, which the files say.
    for key in ("activation_scheme", "modules_to_not_convert", "ignored_layers", "scale_fmt", "dequantize"):
        found.anything(key)
    rows, columns = found.integers("weight_block_size", 2)
    return BlockScales(rows, columns)


def refuse_own_code(reader: Reader) -> None:
    """Raises ConfigError for a model that only its publisher's code can run.

    Checkpoints of families that are known here often bring a copy of the family's code, under the family's own name
    (Phi-3, DeepSeek-V3). It is not needed, and like any other it is never run.
    """
    classes = reader.anything("auto_map")
    brought = classes.get("AutoModelForCausalLM") if isinstance(classes, dict) else classes
    if brought is not None and str(brought).split(".")[-1] not in reader.anything("architectures"):
        raise reader.refusal("auto_map", "the checkpoint brings its own code, which is not run")


ATTENTION = (
    Rule("layers.{i}.attention_norm.weight", ("model.layers.{i}.input_layernorm.weight",), None),
    Rule(
        "layers.{i}.attention.qkv.weight",
        (
            "model.layers.{i}.self_attn.q_proj.weight",
            "model.layers.{i}.self_attn.k_proj.weight",
            "model.layers.{i}.self_attn.v_proj.weight",
        ),
        0,
    ),
    Rule(
        "layers.{i}.attention.qkv.bias",
        (
            "model.layers.{i}.self_attn.q_proj.bias",
            "model.layers.{i}.self_attn.k_proj.bias",
            "model.layers.{i}.self_attn.v_proj.bias",
        ),
        0,
    ),
    Rule("layers.{i}.attention.q_norm.weight", ("model.layers.{i}.self_attn.q_norm.weight",), None),
    Rule("layers.{i}.attention.k_norm.weight", ("model.layers.{i}.self_attn.k_norm.weight",), None),
    Rule("layers.{i}.attention.out.weight", ("model.layers.{i}.self_attn.o_proj.weight",), 1),
    Rule("layers.{i}.attention.out.bias", ("model.layers.{i}.self_attn.o_proj.bias",), None),
    Rule("layers.{i}.ffn_norm.weight", ("model.layers.{i}.post_attention_layernorm.weight",), None),
)

MLP = (
    Rule(
        "layers.{i}.ffn.gate_up.weight",
        ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
        0,
    ),
    Rule(
        "layers.{i}.ffn.gate_up.bias",
        ("model.layers.{i}.mlp.gate_proj.bias", "model.layers.{i}.mlp.up_proj.bias"),
        0,
    ),
    Rule("layers.{i}.ffn.down.weight", ("model.layers.{i}.mlp.down_proj.weight",), 1),
    Rule("layers.{i}.ffn.down.bias", ("model.layers.{i}.mlp.down_proj.bias",), None),
)

ENDS = (
    Rule("embedding.weight", ("model.embed_tokens.weight",), 0),
    Rule("norm.weight", ("model.norm.weight",), None),
    Rule("head.weight", ("lm_head.weight",), 0),
)

SKIP = (
    "model.layers.{i}.self_attn.rotary_emb.inv_freq",  # old checkpoints; computed from the configuration
    "model.rotary_emb.inv_freq",
)
TIED = (("lm_head.weight", "model.embed_tokens.weight"),)  # where the head has no parameter for the rule above


def weight_table(*rules: Rule, skip: tuple[str, ...] = ()) -> Callable[[ModelConfig], WeightTable]:
    """The rules most families here have, and `rules` for what is special; of two for a parameter the first counts."""

    def table(config: ModelConfig) -> WeightTable:
        layers = len(config.layers)
        extra = tuple(f"model.layers.{i}.*" for i in range(layers, layers + config.extra_layers))
        return WeightTable((*rules, *ENDS, *ATTENTION, *MLP), (*SKIP, *skip, *extra), TIED)

    return table
