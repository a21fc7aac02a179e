"""DeepSeek-V3 and R1 (arXiv:2412.19437), and what has their layers: Moonlight, Kimi-K2.

DeepSeek-V2's layers with another router: sigmoids, and a bias that corrects which experts are chosen, not how they are
weighted. `aux_loss_alpha` is not used, since nobody's code has an auxiliary loss with that router.
"""

from __future__ import annotations

from pyllama.architectures.common import Family, read_decoder, read_experts, read_positions
from pyllama.architectures.deepseek_v2 import read_ffns, read_groups, read_latent_attention, read_shared, weights
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig, MoEConfig


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "deepseek_v3", "kimi_k2")
    reader.only("scoring_func", "sigmoid")
    reader.only("topk_method", "noaux_tc")
    for key in ("aux_loss_alpha", "seq_aux"):
        reader.anything(key)
    experts, top_k = read_experts(reader, "n_routed_experts", experts=256, top_k=8)
    groups, chosen = read_groups(reader, experts, top_k, groups=8, chosen=4)
    moe = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        size=reader.integer("moe_intermediate_size"),
        scoring="sigmoid",
        renormalize=reader.boolean("norm_topk_prob", default=True),
        scale=reader.number("routed_scaling_factor", default=2.5),
        correction_bias=True,
        num_groups=groups,
        top_groups=chosen,
        group_top_k=min(2, experts // groups),
        float32_router=True,
        shared=read_shared(reader, default=1),
    )
    positions = read_positions(reader, 4096)
    interleaved = reader.boolean("rope_interleave", default=True)
    attention = read_latent_attention(reader, positions=positions, interleaved=interleaved)
    ffns = read_ffns(reader, MLPConfig(reader.integer("intermediate_size")), moe, dense=3)
    return read_decoder(
        reader,
        [attention] * len(ffns),
        ffns,
        positions=positions,
        norm_eps=1e-6,
        extra_layers=reader.integer("num_nextn_predict_layers", default=0, zero=True),
    )


FAMILY = Family(("DeepseekV3ForCausalLM",), read, weights)
