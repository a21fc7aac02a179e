"""What `pyllama inspect` says of layers and of tensors' kinds, against configurations and the families' own tables."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from shards import CONFIGS, write_headers_of

from pyllama.architectures import read_config
from pyllama.config import GQAConfig, MLAConfig, MLPConfig, MoEConfig
from pyllama.inspection import inspect
from pyllama.inspection.blocks import MAX_RUNS, Block, Dots, diagram_of
from pyllama.inspection.structure import MAX_PERIOD, _runs
from pyllama.inspection.view import kind_of
from pyllama.model import Model
from pyllama.save import unstack

# One checkpoint of each family, and those in their publishers' own formats.
NAMES = [
    "DeepSeek-16B-original",
    "DeepSeek-V2-Lite-Chat",
    "GLM-4.5-Air",
    "Llama-3.1-8B",
    "Llama-3.2-1B-original",
    "MiniMind2-Small",
    "Mistral-7B-v0.1",
    "Mixtral-8x7B-v0.1",
    "Moonlight-16B-A3B-Instruct",
    "OLMoE-1B-7B-0125-Instruct",
    "Phi-4-mini-instruct",
    "Qwen2-57B-A14B",
    "Qwen3-30B-A3B",
    "Qwen3-4B",
]


@pytest.mark.parametrize(
    ("kinds", "runs"),
    [
        ([], []),
        ([7], [(0, 1, 1)]),
        ([1, 1, 1, 2, 2], [(0, 3, 1), (3, 2, 1)]),  # the first layers dense
        ([1, 2, 2, 2], [(0, 1, 1), (1, 3, 1)]),
        ([1, 1, 1, 2] * 6, [(0, 6, 4)]),  # every fourth another
        ([1, 2] * 5, [(0, 5, 2)]),
        ([1, 1, 2] * 3 + [1], [(0, 3, 3), (9, 1, 1)]),
        ([1, 2, 3], [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
    ],
)
def test_runs_by_hand(kinds: list[int], runs: list[tuple[int, int, int]]) -> None:
    assert list(_runs(kinds)) == runs


def test_runs_are_all_layers_in_order() -> None:
    chance = random.Random(0)
    for _ in range(300):
        pattern = [chance.randrange(3) for _ in range(chance.randrange(1, MAX_PERIOD))]
        kinds = (pattern * chance.randrange(1, 5) + [chance.randrange(2) for _ in range(chance.randrange(9))])[:60]
        found = []
        for first, repeats, period in _runs(kinds):
            assert first == len(found)
            assert repeats > 1 or period == 1
            found += kinds[first : first + period] * repeats
        assert found == kinds


def test_dense_layers_before_experts(tmp_path: Path) -> None:
    config = write_headers_of(tmp_path, "Moonlight-16B-A3B-Instruct")
    model = inspect(tmp_path).model
    assert model is not None
    assert [(run.first, run.repeats, len(run.layers)) for run in model.structure] == [(0, 1, 1), (1, 26, 1)]
    (dense,), (sparse,) = (run.layers for run in model.structure)
    assert (dense.attention.kind, dense.ffn.kind, sparse.attention.kind, sparse.ffn.kind) == (
        "MLA",
        "MLP",
        "MLA",
        "MoE",
    )
    assert (dense.attention.config, dense.ffn.config) == (config.layers[0].attention, MLPConfig(11264))
    D, E, F, heads, C = 2048, 64, 1408, 16, 512
    assert sparse.attention.weights == {
        "down.weight": (C + 64, D),
        "q_up.weight": (heads * 192, D),
        "kv_norm.weight": (C,),
        "kv_up.weight": (heads * 256, C),
        "out.weight": (D, heads * 128),
    }
    assert sparse.ffn.parameters == E * D + E + 3 * D * F * (E + 2)
    stack = diagram_of(model).stacks[1]
    assert (stack.title, stack.repeats) == ("layers 1-26", 26)
    (_, attention), (_, experts) = stack.layers[0].branches
    assert attention.dots == (Dots((True,) * 16, shared=True),)
    assert {"16 heads of 128 + 64 rotated", "keys and values from a latent of 512", "cached: 512 + 64"} <= set(
        attention.facts
    )
    assert {"64 experts: SwiGLU of 1,408", "6 for each token", "a shared expert of 2,816"} <= set(experts.facts)
    routed, shared = experts.dots
    assert (len(routed.chosen), sum(routed.chosen), shared) == (64, 6, Dots((True,), shared=True))


def test_experts_are_chosen_from_the_groups_that_are(tmp_path: Path) -> None:
    """DeepSeek-V2.5: of 8 groups of 20 experts 3 are chosen, and of theirs 6. Here with fewer layers."""
    write_headers_of(tmp_path, "DeepSeek-V2.5", num_hidden_layers=2)
    model = inspect(tmp_path).model
    assert model is not None
    *groups, _shared = diagram_of(model).stacks[1].layers[0].branches[1][1].dots
    assert [len(group.chosen) for group in groups] == [20] * 8
    assert sum(any(group.chosen) for group in groups) == 3
    assert sum(sum(group.chosen) for group in groups) == 6


def test_windows_that_alternate(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    write_headers_of(
        tmp_path,
        "Qwen2.5-0.5B",
        num_hidden_layers=8,
        use_sliding_window=True,
        sliding_window=4096,
        layer_types=kinds * 2,
    )
    model = inspect(tmp_path).model
    assert model is not None
    (run,) = model.structure
    assert (run.first, run.repeats, len(run.layers)) == (0, 2, 4)
    (stack,) = diagram_of(model).stacks
    assert [(layers.title, layers.number) for layers in stack.layers] == [("1-3 of 4", 3), ("4 of 4", 1)]
    windows = ["window of 4,096 tokens" in layers.branches[0][1].facts for layers in stack.layers]
    assert windows == [True, False]


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-4B", "Qwen2-57B-A14B", "Phi-4-mini-instruct"])
def test_blocks_sum_to_the_model(name: str, tmp_path: Path) -> None:
    config = write_headers_of(tmp_path, name)
    model = inspect(tmp_path).model
    assert model is not None
    diagram = diagram_of(model)
    blocks: list[Block] = [diagram.embedding, diagram.norm, diagram.head]
    for stack in diagram.stacks:
        inner = [block for layers in stack.layers for branch in layers.branches for block in branch]
        assert sum(block.parameters for block in inner) == stack.parameters
        blocks += inner
    assert sum(block.parameters for block in blocks) == model.parameters
    assert sum(run.repeats * len(run.layers) for run in model.structure) == len(config.layers)
    assert (diagram.head.parameters == 0) == config.tie_embeddings


def test_what_is_drawn_of_very_many_runs(tmp_path: Path) -> None:
    write_headers_of(tmp_path, "Llama-3.1-8B", num_hidden_layers=3)
    model = inspect(tmp_path).model
    assert model is not None
    (run,) = model.structure
    runs = tuple(replace(run, first=i, repeats=1) for i in range(100))
    stacks = diagram_of(replace(model, layers=100, structure=runs)).stacks
    assert len(stacks) == MAX_RUNS
    assert stacks[-1].title == f"layers {MAX_RUNS - 1}-99, in {101 - MAX_RUNS} more runs of unlike ones"
    each = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336 + 2 * 4096
    assert [stack.parameters for stack in stacks] == [each] * (MAX_RUNS - 1) + [(101 - MAX_RUNS) * each]


def test_the_structure_in_json(tmp_path: Path) -> None:
    """Plain data: a configuration can be read back from it."""
    config = write_headers_of(tmp_path, "Llama-3.1-8B", num_hidden_layers=3)
    model = json.loads(json.dumps(asdict(inspect(tmp_path))))["model"]
    (run,) = model["structure"]
    (layer,) = run["layers"]
    assert (run["first"], run["repeats"], layer["attention"]["kind"], layer["ffn"]["kind"]) == (0, 3, "GQA", "MLP")
    attention = config.layers[0].attention
    assert isinstance(attention, GQAConfig)
    assert layer["attention"]["config"] == asdict(attention)
    assert layer["ffn"]["weights"] == {"gate_up.weight": [28672, 4096], "down.weight": [4096, 14336]}
    assert (model["vocab_size"], model["hidden_size"]) == (128256, 4096)


@pytest.mark.parametrize("name", NAMES)
def test_kinds_by_name_are_what_the_tensors_are_for(name: str) -> None:
    """Against where a family's table puts the tensor."""
    files = (CONFIGS / name / kind for kind in ("config.json", "params.json"))
    values = json.loads(next(file for file in files if file.is_file()).read_text())
    config, table = read_config(values)
    with torch.device("meta"):
        model = Model(config)
    shown = {"embedding": "embedding", "head": "head", "norm": "norms"}
    for parameter, value in model.named_parameters():
        place = parameter.split(".")
        if place[0] != "layers":
            kind = shown[place[0]]
        elif "norm" in place[-2]:
            kind = "norms"
        elif place[2] == "attention":
            kind = "attention"
        else:
            kind = "experts" if isinstance(config.layers[int(place[1])].ffn, MoEConfig) else "feed-forward"
        wrong = {tensor for tensor in unstack(table, config, parameter, value) if kind_of(tensor) != kind}
        assert not wrong, kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer.h.0.ln_1.weight", "norms"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.mlp.c_fc.weight", "feed-forward"),
        ("transformer.wte.weight", "embedding"),
        ("decoder.layers.0.multihead_attn.in_proj_weight", "attention"),
        ("decoder.layers.0.linear1.weight", "feed-forward"),
        ("encoder.layer.0.attention.output.dense.weight", "attention"),
        ("encoder.layer.3.attention.output.LayerNorm.bias", "norms"),
        ("generator.weight", "head"),
        ("conv1.weight", "other"),
        ("", "other"),
    ],
)
def test_kinds_of_other_models(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_latent_attention_is_told_from_the_other(tmp_path: Path) -> None:
    config = write_headers_of(tmp_path, "DeepSeek-V2-Lite-Chat", num_hidden_layers=2)
    model = inspect(tmp_path).model
    assert model is not None
    assert isinstance(model.structure[0].layers[0].attention.config, MLAConfig)
    assert [run.layers[0].attention.config for run in model.structure] == [config.layers[0].attention] * 2
