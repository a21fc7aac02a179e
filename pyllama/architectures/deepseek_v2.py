"""DeepSeek-V2 and V2-Lite (arXiv:2405.04434): latent attention, and experts chosen by softmax, in groups or not.

What DeepSeek-V3 has in common with it is here: the attention, which layers are dense, the names of the tensors.
"""

from __future__ import annotations

from pyllama.architectures.common import (
    Family,
    read_decoder,
    read_dropout,
    read_positions,
    read_rope,
    weight_table,
    yarn_magnitude,
)
from pyllama.architectures.experts import (
    EXPERTS,
    read_dense_first,
    read_experts,
    read_groups,
    read_shared,
    shared_expert,
)
from pyllama.architectures.reader import Reader
from pyllama.config import FFNConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig, YarnScaling
from pyllama.weights import Rule, WeightTable


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "deepseek_v2")
    reader.only("scoring_func", "softmax")
    if reader.boolean("norm_topk_prob", default=False, null=False):
        reason = "transformers takes the weights as they are, DeepSeek's code normalises them instead of scaling them"
        raise reader.refusal("norm_topk_prob", reason)
    bias = reader.boolean("mlp_bias", default=False)
    experts, top_k = read_experts(reader, "n_routed_experts", experts=64)
    groups = 1, 1
    if reader.only("topk_method", "greedy", "group_limited_greedy", default="greedy") == "group_limited_greedy":
        groups = read_groups(reader, experts, top_k)
    for key in ("n_group", "topk_group"):  # without group_limited_greedy
        reader.anything(key)
    moe = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        size=reader.integer("moe_intermediate_size"),
        renormalize=False,
        scale=reader.number("routed_scaling_factor", default=1.0),
        num_groups=groups[0],
        top_groups=groups[1],
        float32_router=True,
        shared=read_shared(reader, default=2, bias=bias),
        aux_loss="sequence" if reader.boolean("seq_aux", default=True, null=True) else "batch",
        aux_loss_coef=reader.number("aux_loss_alpha", default=0.0, zero=True),
    )
    positions = read_positions(reader, 2048)
    attention = read_latent_attention(reader, positions=positions)
    ffns = read_ffns(reader, MLPConfig(reader.integer("intermediate_size"), bias), moe, dense=0)
    return read_decoder(reader, [attention] * len(ffns), ffns, positions=positions, norm_eps=1e-6)


def read_latent_attention(reader: Reader, *, positions: int, interleaved: bool = True) -> MLAConfig:
    """Latent attention in the keys of DeepSeek's configurations."""
    heads = reader.integer("num_attention_heads")
    if reader.integer("num_key_value_heads", default=heads, null=heads) != heads:
        raise reader.refusal("num_key_value_heads", f"latent attention has num_attention_heads = {heads} of them")
    nope, dim = reader.integer("qk_nope_head_dim"), reader.integer("qk_rope_head_dim")
    if dim % 2:
        raise reader.refusal("qk_rope_head_dim", "RoPE rotates pairs")
    for key, derived in (("head_dim", dim), ("qk_head_dim", nope + dim)):  # transformers writes them
        reader.only(key, derived, None)
    rope = read_rope(reader, dim, 10_000.0, positions=positions, interleaved=interleaved)
    scale = (nope + dim) ** -0.5
    if isinstance(rope.scaling, YarnScaling):
        magnitude = yarn_magnitude(rope.scaling.factor, _read_mscale(reader))
        scale *= magnitude * magnitude  # which may be infinite, where a power would raise
    return MLAConfig(
        num_heads=heads,
        q_rank=reader.integer("q_lora_rank", null=None),
        kv_rank=reader.integer("kv_lora_rank"),
        nope_dim=nope,
        v_dim=reader.integer("v_head_dim"),
        rope=rope,
        scale=scale,
        bias=reader.boolean("attention_bias", default=False),
        dropout=read_dropout(reader, "attention_dropout"),
    )


def _read_mscale(reader: Reader) -> float:
    """YaRN's `mscale_all_dim`, of the scores; `mscale`, of the rotated part beside it, is in `RopeConfig.magnitude`."""
    rope = reader.object("rope_parameters") or reader.object("rope_scaling")
    assert rope is not None  # it has YaRN
    everywhere = float(rope.number("mscale_all_dim", default=0.0, null=0.0, zero=True))
    rotated = rope.number("mscale", default=None, null=None, zero=True)
    if not (rotated if everywhere else rotated in (None, 1)) and rope.anything("attention_factor") is None:
        raise rope.refusal(
            "mscale", f"with mscale_all_dim = {everywhere} transformers and DeepSeek's code compute different things"
        )
    return everywhere


def read_ffns(reader: Reader, mlp: MLPConfig, moe: MoEConfig, *, dense: int) -> list[FFNConfig]:
    """The feed-forward of each layer: the first are dense; `dense` is transformers' default."""
    reader.only("moe_layer_freq", 1)
    reader.anything("ep_size")  # how DeepSeek's code spreads experts over devices
    return read_dense_first(reader, reader.layers(), mlp, moe, dense=dense)


def weights(config: ModelConfig) -> WeightTable:
    attention = config.layers[0].attention
    with_rank = isinstance(attention, MLAConfig) and attention.q_rank is not None
    down = ("q_a_proj", "kv_a_proj_with_mqa") if with_rank else ("kv_a_proj_with_mqa",)
    rules = [
        *(
            Rule(f"layers.{{i}}.attention.down.{kind}", tuple(f"{_ATTENTION}.{name}.{kind}" for name in down), None)
            for kind in ("weight", "bias")
        ),
        Rule("layers.{i}.attention.q_up.weight", (f"{_ATTENTION}.{'q_b_proj' if with_rank else 'q_proj'}.weight",), 0),
        *_RULES,
    ]
    return weight_table(*rules)(config)


_ATTENTION = "model.layers.{i}.self_attn"
_RULES = (
    Rule("layers.{i}.attention.q_norm.weight", (f"{_ATTENTION}.q_a_layernorm.weight",), None),
    Rule("layers.{i}.attention.kv_norm.weight", (f"{_ATTENTION}.kv_a_layernorm.weight",), None),
    Rule("layers.{i}.attention.kv_up.weight", (f"{_ATTENTION}.kv_b_proj.weight",), 0),
    *EXPERTS,
    *shared_expert("shared_experts"),
)
FAMILY = Family(("DeepseekV2ForCausalLM",), read, weights)
