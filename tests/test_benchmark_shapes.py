"""The models' dimensions that benchmarks measure are those of the models' files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: what is installed as pyllama comes first

from benchmarks.shapes import MODELS, Model  # noqa: E402

KEYS = {  # a Model's field: what it may be called in a config.json
    "D": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "V": ("vocab_size",),
    "H": ("num_attention_heads",),
    "G": ("num_key_value_heads",),
    "E": ("num_local_experts", "num_experts", "n_routed_experts"),
    "N": ("num_experts_per_tok",),
    "rank": ("kv_lora_rank",),
    "q_rank": ("q_lora_rank",),
    "V_head": ("v_head_dim",),
    "groups": ("n_group",),
    "top_groups": ("topk_group",),
}
CONFIGS = [
    (name, path)
    for name in MODELS
    for path in sorted((ROOT / "tests" / "configs").glob(f"{name}*/config.json"))
    if "architectures" in (text := path.read_text())  # in Hugging Face's keys
    and ("quantization_config" not in text or name == "DeepSeek-V3")
]


def check_sizes(name: str, config: dict[str, Any]) -> None:
    model = MODELS[name]
    for field, keys in KEYS.items():
        found = [config[key] for key in keys if config.get(key) is not None]
        assert getattr(model, field) == (found[0] if found else getattr(Model(*[0] * 7), field)), field
    assert model.F_expert == config.get("moe_intermediate_size", config["intermediate_size"] if model.E else 0)
    assert model.F_shared == (config.get("n_shared_experts") or 0) * model.F_expert
    assert model.sum_1 == config.get("norm_topk_prob", True)
    assert model.F in (config["intermediate_size"], 0 if model.E else None)


@pytest.mark.parametrize(("name", "path"), CONFIGS, ids=[path.parent.name for _, path in CONFIGS])
def test_models_have_the_dimensions_of_their_files(name: str, path: Path) -> None:
    model, config = MODELS[name], json.loads(path.read_text())
    check_sizes(name, config)
    if model.rank:
        assert config["qk_nope_head_dim"] + config["qk_rope_head_dim"] == model.K
        assert config["qk_rope_head_dim"] == model.R
    else:
        assert (config.get("head_dim") or model.D // model.H) == model.K
        assert model.K * config.get("partial_rotary_factor", 1) == model.R


def test_models_have_the_dimensions_that_transformers_gives_their_families() -> None:
    from transformers import DeepseekV3Config, Glm4MoeConfig

    check_sizes("DeepSeek-V3", DeepseekV3Config().to_dict())
    check_sizes("GLM-4.5-Air", Glm4MoeConfig().to_dict())


def test_most_models_have_their_files() -> None:
    assert {"Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B", "Mixtral-8x7B"} <= {name for name, _ in CONFIGS}
