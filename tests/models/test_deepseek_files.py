"""DeepSeek's checkpoints as they are published: weights of 8 bits, further layers, DeepSeek's own names and pieces."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepseek_names import own_config, write_own
from families import write
from safetensors.torch import load_file, save_file
from test_deepseek import YARN, draw
from test_families import TOKENS, logits, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

import pyllama
from pyllama.architectures import hugging_face_config, read_config
from pyllama.architectures.reader import ConfigError
from pyllama.weights import CheckpointError

# What DeepSeek's code fixes, and sizes that two ranks can share.
OWN = {
    "vocab_size": 212,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}
GROUPS = {"n_group": 4, "topk_group": 2}
V2 = OWN | {"mlp_bias": False, "topk_method": "group_limited_greedy", "q_lora_rank": 12} | GROUPS
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
LONG = YARN | {"rope_theta": 1e4, "factor": 40.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "V2-Lite": (
        "deepseek_v2",
        V2 | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "rope_parameters": PLAIN},
    ),
    "V2": ("deepseek_v2", V2 | {"rope_parameters": LONG | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
    "V3": (
        "deepseek_v3",
        OWN
        | GROUPS
        | {"q_lora_rank": 12, "norm_topk_prob": True, "rope_interleave": True}
        | {"rope_parameters": LONG | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_deepseeks_own_names(case: str, ranks: int, tmp_path: Path) -> None:
    family, changes = CASES[case]
    write(tmp_path, draw(family, 0) | changes)
    write_own(tmp_path, tmp_path / "own", ranks)
    token_ids = tokens(TOKENS)
    expected, found = (logits(pyllama.load(folder, device="cpu"), token_ids) for folder in (tmp_path, tmp_path / "own"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_the_translated_configuration_is_transformers_too(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    reference = write(tmp_path, draw(family, 0) | changes)
    expected = logits(reference, tokens(TOKENS))
    translated, dialect = hugging_face_config(own_config(json.loads((tmp_path / "config.json").read_text())))
    assert dialect is not None
    (tmp_path / "config.json").write_text(json.dumps(translated))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), tokens(TOKENS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.std().item())


PUBLISHED_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
PUBLISHED_V2 = PUBLISHED_V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "aux_loss_alpha": 0,
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "vocab_size": 102400,
}
del PUBLISHED_V2["num_nextn_predict_layers"]
OWN_V2 = {
    "vocab_size": 102400,
    "dim": 5120,
    "inter_dim": 12288,
    "moe_inter_dim": 1536,
    "n_layers": 60,
    "n_dense_layers": 1,
    "n_heads": 128,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "n_expert_groups": 8,
    "n_limited_groups": 3,
    "route_scale": 16.0,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
OWN_V3 = OWN_V2 | {
    "vocab_size": 129280,
    "dim": 7168,
    "inter_dim": 18432,
    "moe_inter_dim": 2048,
    "n_layers": 61,
    "n_dense_layers": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 8,
    "n_limited_groups": 4,
    "route_scale": 2.5,
    "score_func": "sigmoid",
    "dtype": "fp8",
    "scale_fmt": "ue8m0",
}


@pytest.mark.parametrize(("own", "published"), [(OWN_V2, PUBLISHED_V2), (OWN_V3, PUBLISHED_V3)])
def test_both_published_configurations_are_one_model(own: dict[str, Any], published: dict[str, Any]) -> None:
    """DeepSeek's inference/configs leave out what its code's defaults are: YaRN by 40 from a context of 4,096."""
    expected, _ = read_config(published)
    assert expected.extra_layers == published.get("num_nextn_predict_layers", 0)
    assert read_config(own)[0] == replace(expected, extra_layers=0)


def test_without_a_longer_context_there_is_no_scaling() -> None:
    config, _ = read_config(OWN_V3 | {"max_seq_len": 4096})
    published = {key: value for key, value in PUBLISHED_V3.items() if key != "rope_scaling"}
    published |= {"max_position_embeddings": 4096, "num_nextn_predict_layers": 0}
    assert config == read_config(published)[0]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (OWN_V3, {"score_func": "sqrtsoftplus"}, "score_func = 'sqrtsoftplus': only 'softmax', 'sigmoid'"),
        (OWN_V3, {"index_topk": 2048}, "not known.*index_topk = 2048"),  # V3.2's sparse attention
        (OWN_V3, {"rope_factor": 0.5}, "rope_factor = 0.5: YaRN makes contexts longer"),
        (OWN_V3, {"n_limited_groups": 9}, "topk_group = 9: there are only"),
        (OWN_V2, {"n_dense_layers": -1}, "n_dense_layers must be a positive integer or 0"),
        (PUBLISHED_V3, {"topk_method": "greedy"}, "topk_method = 'greedy': only 'noaux_tc'"),
        (PUBLISHED_V3, {"scoring_func": "softmax"}, "scoring_func = 'softmax': only 'sigmoid'"),
        (PUBLISHED_V3, {"moe_layer_freq": 2}, "moe_layer_freq = 2: only 1"),
        (PUBLISHED_V3, {"num_key_value_heads": 8}, "num_key_value_heads = 8: latent attention has .* = 128"),
        (PUBLISHED_V3, {"qk_rope_head_dim": 63}, "qk_rope_head_dim = 63: RoPE rotates pairs"),
        (PUBLISHED_V3, {"head_dim": 128}, "head_dim = 128: only 64"),
        (PUBLISHED_V3, {"n_group": 7}, "n_group = 7: "),
        (PUBLISHED_V3, {"topk_group": 9}, "topk_group = 9: there are only"),
        (PUBLISHED_V3, {"n_group": 128, "num_experts_per_tok": 9}, "num_experts_per_tok = 9: 4 groups"),
        (PUBLISHED_V3, {"mlp_bias": True}, "not known.*mlp_bias = True"),
        (PUBLISHED_V2, {"norm_topk_prob": True}, "norm_topk_prob = True: transformers takes .* instead of scaling"),
        (PUBLISHED_V2, {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid': only 'softmax'"),
        (PUBLISHED_V2, {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc': only 'greedy', 'group_limited_greedy'"),
        (PUBLISHED_V2, {"rope_interleave": False}, "not known.*rope_interleave = False"),
        *(
            (
                PUBLISHED_V2,
                {"rope_scaling": {k: v for k, v in PUBLISHED_V2["rope_scaling"].items() if k != left_out} | given},
                rf"rope_scaling.mscale.*with mscale_all_dim = {everywhere} transformers and DeepSeek's code",
            )
            for left_out, given, everywhere in (
                ("mscale", {}, 1.0),
                ("mscale", {"mscale": 0}, 1.0),
                ("mscale_all_dim", {"mscale": 0.7}, 0.0),
                ("mscale_all_dim", {"mscale": 0}, 0.0),
            )
        ),
    ],
)
def test_what_is_refused(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(config | changes)


def test_further_layers_are_skipped(tmp_path: Path) -> None:
    """V3's file has the layers of multi-token prediction behind the model's own."""
    write(tmp_path, draw("deepseek_v3", 0) | {"num_hidden_layers": 2})
    token_ids = tokens(TOKENS)
    expected = logits(pyllama.load(tmp_path, device="cpu"), token_ids)
    weights = load_file(tmp_path / "model.safetensors")
    more = {"eh_proj.weight", "shared_head.head.weight", "mlp.experts.0.up_proj.weight", "mlp.gate.weight_scale_inv"}
    weights |= {f"model.layers.2.{name}": torch.ones(3, 3) for name in more}
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1  # transformers' default
    assert torch.equal(logits(pyllama.load(tmp_path, device="cpu"), token_ids), expected)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=r"4 not part of the model: model\.layers\.2\.eh_proj"):
        pyllama.load(tmp_path, device="cpu")


def quantized(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(float8, scales of blocks of 128 x 128, what the two stand for)."""
    rows, columns = weight.shape
    blocks = F.pad(weight, (0, -columns % 128, 0, -rows % 128)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    stored = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = (stored.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return stored.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scales, meant.contiguous()


@pytest.mark.parametrize("own", [False, True], ids=["hugging-face", "own"])
def test_weights_of_8_bits(own: bool, tmp_path: Path) -> None:
    """As DeepSeek-V3 is published: all products but the router's and the head's."""
    family, changes = CASES["V3"]
    sizes = {"hidden_size": 200, "intermediate_size": 300, "moe_intermediate_size": 136, "v_head_dim": 100}
    write(tmp_path, draw(family, 0) | changes | sizes)
    exact, stored = load_file(tmp_path / "model.safetensors"), {}
    for name, weight in exact.items():
        if weight.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "mlp.gate.")):
            stored[name], stored[f"{name}_scale_inv"], exact[name] = quantized(weight)
        else:
            stored[name] = exact[name] = weight.bfloat16() if weight.ndim == 2 else weight
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config["quantization_config"] = quantization | {"weight_block_size": [128, 128]}
    folder = tmp_path / "float8"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if own:
        write_own(folder, tmp_path / "own")
        folder = tmp_path / "own"
    save_file(exact, tmp_path / "model.safetensors")
    token_ids = tokens(TOKENS)
    expected = logits(pyllama.load(tmp_path, device="cpu", dtype="float32"), token_ids)
    assert torch.equal(logits(pyllama.load(folder, device="cpu", dtype="float32"), token_ids), expected)
