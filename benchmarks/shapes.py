"""The sizes that are measured: the dimensions of real models, and how many tokens, sequences and cached tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Model:
    """A model's dimensions, as its config.json has them. Names are CONTRIBUTING.md's."""

    D: int  # hidden size
    layers: int
    V: int  # vocabulary
    H: int  # query heads
    G: int  # key/value heads
    K: int  # head size of queries and keys
    R: int  # dimensions of a head that are rotated
    F: int = 0  # feed-forward size of a dense layer; 0: all layers are MoE
    F_expert: int = 0  # feed-forward size of an expert
    E: int = 0  # experts
    N: int = 0  # experts per token
    F_shared: int = 0  # feed-forward size of the expert that every token passes through
    sigmoid: bool = False  # scores of the router, with a correction bias; else softmax
    sum_1: bool = True  # a token's weights are made to sum to 1
    groups: int = 1  # of experts,
    top_groups: int = 1  # of which a token sees so many
    qk_norm: bool = False  # RMSNorm over each query and key head
    rank: int = 0  # latent attention (MLA): size of the compressed keys and values; 0: grouped queries
    q_rank: int = 0  # MLA: size of the compressed queries
    V_head: int = 0  # MLA: head size of values


MODELS = {
    "Llama-3.2-1B": Model(D=2048, layers=16, V=128256, H=32, G=8, K=64, R=64, F=8192),
    "Llama-3.1-8B": Model(D=4096, layers=32, V=128256, H=32, G=8, K=128, R=128, F=14336),
    "Llama-3.1-70B": Model(D=8192, layers=80, V=128256, H=64, G=8, K=128, R=128, F=28672),
    "Qwen3-30B-A3B": Model(
        D=2048, layers=48, V=151936, H=32, G=4, K=128, R=128, F_expert=768, E=128, N=8, qk_norm=True
    ),
    "Mixtral-8x7B": Model(D=4096, layers=32, V=32000, H=32, G=8, K=128, R=128, F_expert=14336, E=8, N=2),
    "MiniMind-MoE": Model(D=512, layers=8, V=6400, H=16, G=8, K=32, R=32, F_expert=1408, E=4, N=2, F_shared=1408),
    "DeepSeek-V2-Lite": Model(
        D=2048, layers=27, V=102400, H=16, G=16, K=192, R=64, F=10944, F_expert=1408, E=64, N=6,
        F_shared=2816, sum_1=False, rank=512, V_head=128,
    ),
    "GLM-4.5-Air": Model(
        D=4096, layers=46, V=151552, H=96, G=8, K=128, R=64, F=10944, F_expert=1408, E=128, N=8,
        F_shared=1408, sigmoid=True,
    ),
    "DeepSeek-V3": Model(
        D=7168, layers=61, V=129280, H=128, G=128, K=192, R=64, F=18432, F_expert=2048, E=256, N=8,
        F_shared=2048, sigmoid=True, groups=8, top_groups=4, rank=512, q_rank=1536, V_head=128,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Scope:
    """What a run covers; benchmarks take the combinations that their op knows."""

    models: Mapping[str, Model]
    tokens: tuple[int, ...]  # of one step: a few in decode, thousands in prefill
    few: tuple[int, ...]  # of one step, for what takes few
    prompts: tuple[int, ...]  # lengths of one sequence, for attention in prefill
    batches: tuple[int, ...]  # sequences in decode
    contexts: tuple[int, ...]  # cached tokens of each of them
    dtype: torch.dtype


def _models(*names: str) -> dict[str, Model]:
    return {name: MODELS[name] for name in names}


# By kind of device and whether quick.
SCOPES = {
    ("cuda", False): Scope(
        models=MODELS,
        tokens=(1, 16, 64, 1024, 8192, 32768),
        few=(1, 4, 8, 16),
        prompts=(1024, 2048, 4096, 8192, 16384),
        batches=(1, 4, 16, 64),
        contexts=(1024, 4096, 8192, 32768),
        dtype=torch.bfloat16,
    ),
    ("cuda", True): Scope(
        models=_models("Llama-3.1-8B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite"),
        tokens=(1, 64, 8192),
        few=(1, 16),
        prompts=(2048, 8192),
        batches=(1, 16),
        contexts=(1024, 8192),
        dtype=torch.bfloat16,
    ),
    ("cpu", False): Scope(
        models=_models("Llama-3.2-1B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite"),
        tokens=(1, 16, 256),
        few=(1, 4, 8, 16),
        prompts=(128, 512),
        batches=(1, 4),
        contexts=(256, 1024),
        dtype=torch.float32,
    ),
    ("cpu", True): Scope(
        models=_models("Llama-3.2-1B", "MiniMind-MoE", "DeepSeek-V2-Lite"),
        tokens=(1, 64),
        few=(1, 4),
        prompts=(128,),
        batches=(2,),
        contexts=(256,),
        dtype=torch.float32,
    ),
}
