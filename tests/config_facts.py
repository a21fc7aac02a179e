"""What publishers say of the models in configs/."""

from __future__ import annotations

from math import log
from typing import NamedTuple


class MoE(NamedTuple):
    experts: int
    top_k: int
    size: int
    active: float  # billions of parameters for each token, as the model card rounds them
    dense: int = 0  # layers without experts, the first ones
    shared: int | None = None
    renormalize: bool = True
    scale: float = 1
    scoring: str = "softmax"  # "sigmoid": with a correction bias for each expert
    groups: tuple[int, int, int] = (1, 1, 1)  # how many, how many are chosen, by how many experts' scores
    shared_gate: bool = False


class MLA(NamedTuple):
    """The rest is the same in all of DeepSeek's: a latent of 512, heads of 128 + 64 dimensions, values of 128."""

    q_rank: int | None
    scale: float


class Facts(NamedTuple):
    """Of model cards, papers and the published files.

    ffn: of the dense layers, or of an expert where there are none. parameters: of the tensors that the model
    computes with, correction biases included; where the Hub's page counts those alone, it says the same number. Else
    they were counted from the published shapes: of Kimi K2 a listing of all tensors, less the scales of blocks.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int
    parameters: int
    moe: MoE | None = None
    mla: MLA | None = None
    extra_layers: int = 0  # of multi-token prediction


UNSCALED = MLA(None, 192**-0.5)
SCALE_40 = 192**-0.5 * (0.1 * log(40) + 1) ** 2  # YaRN's correction for a context 40 times as long
V2_LITE = MoE(64, 6, 1408, 2.4, dense=1, shared=2816, renormalize=False)
V3 = MoE(256, 8, 2048, 37, dense=3, shared=2048, scale=2.5, scoring="sigmoid", groups=(8, 4, 2))

FACTS = {
    "ALLaM-7B-Instruct-preview": Facts(32, 4096, 32, 32, 11008, 64000, 4096, 7_000_559_616),
    "Atom-7B": Facts(32, 4096, 32, 32, 11008, 65000, 4096, 7_008_751_616),
    "CodeLlama-7b-Instruct-hf": Facts(32, 4096, 32, 32, 11008, 32016, 16384, 6_738_546_688),
    "DeepSeek-16B-original": Facts(27, 2048, 16, 16, 10944, 102400, 4096, 15_706_484_224, V2_LITE, UNSCALED),
    "DeepSeek-R1": Facts(61, 7168, 128, 128, 18432, 129280, 163840, 671_026_419_200, V3, MLA(1536, SCALE_40), 1),
    "DeepSeek-R1-Distill-Llama-8B": Facts(32, 4096, 32, 8, 14336, 128256, 131072, 8_030_261_248),
    "DeepSeek-V2-Lite-Chat": Facts(
        27,
        2048,
        16,
        16,
        10944,
        102400,
        163840,
        15_706_484_224,
        V2_LITE,
        MLA(None, 192**-0.5 * (0.0707 * log(40) + 1) ** 2),
    ),
    "DeepSeek-V2.5": Facts(
        60,
        5120,
        128,
        128,
        12288,
        102400,
        163840,
        235_741_434_880,
        MoE(160, 6, 1536, 21, dense=1, shared=3072, renormalize=False, scale=16, groups=(8, 3, 1)),
        MLA(1536, SCALE_40),
    ),
    "DeepSeek-V3-671B-original": Facts(
        61, 7168, 128, 128, 18432, 129280, 163840, 671_026_419_200, V3, MLA(1536, SCALE_40)
    ),
    "DeepSeek-V3.1-original": Facts(
        61, 7168, 128, 128, 18432, 129280, 163840, 671_026_419_200, V3, MLA(1536, SCALE_40)
    ),
    "ELYZA-japanese-Llama-2-13b-instruct": Facts(40, 5120, 40, 40, 13824, 32000, 4096, 13_015_864_320),
    "GLM-4.5-Air": Facts(
        46,
        4096,
        96,
        8,
        10944,
        151552,
        131072,
        106_852_251_264,
        MoE(128, 8, 1408, 12, dense=1, shared=1408, scoring="sigmoid"),
        extra_layers=1,
    ),
    "Kimi-K2-Instruct": Facts(
        61,
        7168,
        64,
        64,
        18432,
        163840,
        131072,
        1_026_408_232_448,
        MoE(384, 8, 2048, 32, dense=1, shared=2048, scale=2.827, scoring="sigmoid"),
        MLA(1536, 192**-0.5 * (0.1 * log(32) + 1) ** 2),
    ),
    "Llama-2-13b-hf": Facts(40, 5120, 40, 40, 13824, 32000, 4096, 13_015_864_320),
    "Llama-2-70b-chat-hf": Facts(80, 8192, 64, 8, 28672, 32000, 4096, 68_976_648_192),
    "Llama-2-70b-original": Facts(80, 8192, 64, 8, 28672, 32000, 4096, 68_976_648_192),
    "Llama-2-7b-hf": Facts(32, 4096, 32, 32, 11008, 32000, 4096, 6_738_415_616),
    "Llama-2-7b-original": Facts(32, 4096, 32, 32, 11008, 32000, 4096, 6_738_415_616),
    "Llama-3.1-405B": Facts(126, 16384, 128, 8, 53248, 128256, 131072, 405_853_388_800),
    "Llama-3.1-70B": Facts(80, 8192, 64, 8, 28672, 128256, 131072, 70_553_706_496),
    "Llama-3.1-70B-original": Facts(80, 8192, 64, 8, 28672, 128256, 131072, 70_553_706_496),
    "Llama-3.1-8B": Facts(32, 4096, 32, 8, 14336, 128256, 131072, 8_030_261_248),
    "Llama-3.1-8B-original": Facts(32, 4096, 32, 8, 14336, 128256, 131072, 8_030_261_248),
    "Llama-3.2-1B-Instruct": Facts(16, 2048, 32, 8, 8192, 128256, 131072, 1_235_814_400),
    "Llama-3.2-1B-original": Facts(16, 2048, 32, 8, 8192, 128256, 131072, 1_235_814_400),
    "Llama-3.2-3B-Instruct": Facts(28, 3072, 24, 8, 8192, 128256, 131072, 3_212_749_824),
    "Llama-3.3-70B-Instruct": Facts(80, 8192, 64, 8, 28672, 128256, 131072, 70_553_706_496),
    "Meta-Llama-3-8B-Instruct": Facts(32, 4096, 32, 8, 14336, 128256, 8192, 8_030_261_248),
    "MiniMind-LMConfig": Facts(8, 512, 16, 8, 1408, 6400, 512, 26_878_464),
    "MiniMind2": Facts(16, 768, 8, 2, 2048, 6400, 32768, 104_030_976),
    "MiniMind2-Small": Facts(8, 512, 8, 2, 1408, 6400, 8192, 29_106_688),
    "Mistral-7B-Instruct-v0.2-GPTQ": Facts(32, 4096, 32, 8, 14336, 32000, 32768, 7_241_732_096),
    "Mistral-7B-Instruct-v0.3": Facts(32, 4096, 32, 8, 14336, 32768, 32768, 7_248_023_552),
    "Mistral-7B-v0.1": Facts(32, 4096, 32, 8, 14336, 32000, 32768, 7_241_732_096),
    "Mistral-Nemo-Base-2407": Facts(40, 5120, 32, 8, 14336, 131072, 128000, 12_247_782_400),
    "Mixtral-8x22B-v0.1": Facts(56, 6144, 48, 8, 16384, 32000, 65536, 140_620_634_112, MoE(8, 2, 16384, 39)),
    "Mixtral-8x7B-v0.1": Facts(32, 4096, 32, 8, 14336, 32000, 32768, 46_702_792_704, MoE(8, 2, 14336, 12.9)),
    "Moonlight-16B-A3B-Instruct": Facts(
        27,
        2048,
        16,
        16,
        11264,
        163840,
        8192,
        15_960_110_208,
        MoE(64, 6, 1408, 2.24, dense=1, shared=2816, scale=2.446, scoring="sigmoid"),
        UNSCALED,
    ),
    "OLMoE-1B-7B-0125-Instruct": Facts(
        16, 2048, 16, 16, 1024, 50304, 4096, 6_919_161_856, MoE(64, 8, 1024, 1.3, renormalize=False)
    ),
    "OpenMath-CodeLlama-13b-Python-hf": Facts(40, 5120, 40, 40, 13824, 32000, 16384, 13_015_864_320),
    "Phi-3.5-mini-instruct": Facts(32, 3072, 32, 32, 8192, 32064, 131072, 3_821_079_552),
    "Phi-4-mini-instruct": Facts(32, 3072, 24, 8, 8192, 200064, 131072, 3_836_021_760),
    "Pygmalion-7b-Merged-Safetensors": Facts(32, 4096, 32, 32, 11008, 32000, 2048, 6_738_415_616),
    "Qwen2-57B-A14B": Facts(
        28,
        3584,
        28,
        4,
        2560,
        151936,
        131072,
        57_408_658_944,
        MoE(64, 8, 2560, 14, shared=20480, shared_gate=True, renormalize=False),
    ),
    "Qwen2.5-0.5B": Facts(24, 896, 14, 2, 4864, 151936, 32768, 494_032_768),
    "Qwen2.5-32B-Instruct": Facts(64, 5120, 40, 8, 27648, 152064, 131072, 32_763_876_352),
    "Qwen2.5-7B": Facts(28, 3584, 28, 4, 18944, 152064, 131072, 7_615_616_512),
    "Qwen3-235B-A22B-Instruct-2507": Facts(
        94, 4096, 64, 4, 1536, 151936, 262144, 235_093_634_560, MoE(128, 8, 1536, 22)
    ),
    "Qwen3-30B-A3B": Facts(48, 2048, 32, 4, 768, 151936, 40960, 30_532_122_624, MoE(128, 8, 768, 3.3)),
    "Qwen3-32B": Facts(64, 5120, 64, 8, 25600, 151936, 40960, 32_762_123_264),
    "Qwen3-4B": Facts(36, 2560, 32, 8, 9728, 151936, 40960, 4_022_468_096),
    "Qwen3-8B": Facts(36, 4096, 32, 8, 12288, 151936, 40960, 8_190_735_360),
    "SmolLM2-135M": Facts(30, 576, 9, 3, 1536, 49152, 8192, 134_515_008),
    "TinyLlama-1.1B-Chat-v1.0": Facts(22, 2048, 32, 4, 5632, 32000, 2048, 1_100_048_384),
    "Yi-6B-Chat": Facts(32, 4096, 32, 4, 11008, 64000, 4096, 6_061_035_520),
    "deepseek-coder-1.3b-instruct": Facts(24, 2048, 16, 16, 5504, 32256, 16384, 1_346_471_936),
    "dolphin-2.5-mixtral-8x7b": Facts(32, 4096, 32, 8, 14336, 32002, 32768, 46_702_809_088, MoE(8, 2, 14336, 12.9)),
    "llama-3-Korean-Bllossom-8B": Facts(32, 4096, 32, 8, 14336, 128256, 8192, 8_030_261_248),
    "llama-7b": Facts(32, 4096, 32, 32, 11008, 32000, 2048, 6_738_415_616),
    "openllama-chinese-english-3b": Facts(26, 3200, 32, 32, 8640, 32001, 2048, 3_426_480_000),
    "phi-4": Facts(40, 5120, 40, 10, 17920, 100352, 16384, 14_659_507_200),
    "stable-vicuna-13B-HF": Facts(40, 5120, 40, 40, 13824, 32001, 2048, 13_015_874_560),
    "vicuna-13b-v1.3": Facts(40, 5120, 40, 40, 13824, 32000, 2048, 13_015_864_320),
    "vicuna-7b-v1.3": Facts(32, 4096, 32, 32, 11008, 32000, 2048, 6_738_415_616),
    "zephyr-7b-beta": Facts(32, 4096, 32, 8, 14336, 32000, 32768, 7_241_732_096),
}
