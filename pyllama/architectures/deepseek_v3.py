"""DeepSeek-V3 and R1 (arXiv:2412.19437), and what has their layers: Moonlight, Kimi-K2.

DeepSeek-V2's layers with another router: sigmoids, and a bias that corrects which experts are chosen, not how they are
weighted. `aux_loss_alpha` is not used, since nobody's code has an auxiliary loss with that router.
"""

from __future__ import annotations

from pyllama.architectures.common import Family, read_decoder, read_positions
from pyllama.architectures.deepseek_v2 import read_ffns, read_latent_attention, weights
from pyllama.architectures.experts import read_corrected_experts
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "deepseek_v3", "kimi_k2")
    reader.only("scoring_func", "sigmoid")
    reader.only("topk_method", "noaux_tc")
    for key in ("aux_loss_alpha", "seq_aux"):
        reader.anything(key)
    moe = read_corrected_experts(reader, experts=256, groups=8, chosen=4, scale=2.5)
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
        extra_layers=reader.extra_layers(default=0),
    )


FAMILY = Family(("DeepseekV3ForCausalLM",), read, weights)
