"""Meta's own format and Mistral's against the same weights in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import pyllama
from pyllama.architectures import read_config
from pyllama.architectures.reader import ConfigError
from pyllama.config import GQAConfig, Llama3Scaling, MLPConfig
from pyllama.files import CheckpointError

VOCAB = 212
# What Meta calls a tensor of a layer, what Hugging Face calls it, and the dimension that Meta's shards split.
LAYER = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "norm_eps": 1e-5, "multiple_of": 32}
TWIN = {  # of PARAMS
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 192,  # 170 rounded up
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "eos_token_id": None,
}
LLAMA31 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA31 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Params.json, the twin's config.json, the context, the dimension along which shards split the embedding.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "llama2": ({"vocab_size": -1}, {}, 4096, 1),
    "codellama": (  # no vocab_size at all
        {"rope_theta": 1_000_000, "ffn_dim_multiplier": 1.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        16384,
        1,
    ),
    "llama2-70b": (  # 1.3 * 170 = 221
        {"vocab_size": -1, "n_kv_heads": 4, "ffn_dim_multiplier": 1.3},
        {"num_key_value_heads": 4, "intermediate_size": 224},
        4096,
        1,
    ),
    "llama3": (
        {"vocab_size": VOCAB, "n_kv_heads": 4, "rope_theta": 500_000.0, "ffn_dim_multiplier": 1.3},
        {
            "vocab_size": VOCAB,
            "num_key_value_heads": 4,
            "intermediate_size": 224,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
        8192,
        0,
    ),
    "llama3.1": (
        {"vocab_size": VOCAB, "rope_theta": 500_000.0, "use_scaled_rope": True, "n_kv_heads": None}
        | {"rope_scaling_factor": 8.0, "tie_word_embeddings": False},  # at this size it would be taken for Llama 3.2
        {"vocab_size": VOCAB, "rope_parameters": LLAMA31},
        131072,
        0,
    ),
    "llama3.2": (
        {"vocab_size": VOCAB, "rope_theta": 500_000.0, "use_scaled_rope": True, "max_batch_size": 32},
        {"vocab_size": VOCAB, "tie_word_embeddings": True, "rope_parameters": LLAMA31 | {"factor": 32.0}},
        131072,
        0,
    ),
    "max_seq_len": ({"vocab_size": -1, "max_seq_len": 1024}, {}, 1024, 1),
    "another base": (
        {"vocab_size": -1, "rope_theta": 20_000},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
        2048,
        1,
    ),
}


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys as Meta has them: what RoPE turns together lies together."""
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return torch.stack((halves[:, 0], halves[:, 1]), dim=2).reshape(weight.shape)


def meta_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A transformers Llama's tensors in Meta's names and order."""
    given, config = model.state_dict(), model.config
    tensors = {
        "tok_embeddings.weight": given["model.embed_tokens.weight"],
        "norm.weight": given["model.norm.weight"],
        "output.weight": given["lm_head.weight"],
        "rope.freqs": torch.ones(4),
    }
    for i in range(config.num_hidden_layers):
        for name, (theirs, _) in LAYER.items():
            tensors[f"layers.{i}.{name}.weight"] = given[f"model.layers.{i}.{theirs}.weight"]
        for name, heads in (("wq", config.num_attention_heads), ("wk", config.num_key_value_heads)):
            name = f"layers.{i}.attention.{name}.weight"
            tensors[name] = in_pairs(tensors[name], heads)
        tensors[f"layers.{i}.attention.inner_attention.rope.freqs"] = torch.ones(4)
    return tensors


def write_meta(folder: Path, params: dict[str, Any], tensors: dict[str, Tensor], shards: int, embedding: int) -> None:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    splits = {"tok_embeddings": embedding, "output": 0} | {name: split for name, (_, split) in LAYER.items()}

    def piece(name: str, tensor: Tensor, rank: int) -> Tensor:
        split = splits.get(name.removesuffix(".weight").split(".", 2)[-1] if "layers" in name else name.split(".")[0])
        return tensor if split is None else tensor.tensor_split(shards, dim=split)[rank].clone()

    for rank in range(shards):
        content = {name: piece(name, tensor, rank) for name, tensor in tensors.items()}
        torch.save(content, folder / f"consolidated.{rank:02}.pth")


def tokens(count: int) -> Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def check_twins(meta: Path, twin: Path, reference: PreTrainedModel) -> None:
    """The same parameters bit by bit, transformers' logits up to rounding, its greedy tokens."""
    found, same = (pyllama.load(folder, device="cpu") for folder in (meta, twin))
    assert found.state_dict().keys() == same.state_dict().keys()
    for name, parameter in found.state_dict().items():
        assert torch.equal(parameter, same.state_dict()[name]), name
    assert found.config.layers == same.config.layers
    token_ids = tokens(75)
    expected = reference(token_ids[None]).logits[0]
    torch.testing.assert_close(found(token_ids[None])[0], expected, rtol=0, atol=2e-5 * expected.std().item())
    prompt = token_ids[:9]
    out = reference.generate(
        prompt[None], attention_mask=torch.ones(1, 9), do_sample=False, max_new_tokens=20, pad_token_id=0
    )
    assert pyllama.generate(found, prompt.tolist(), 20).token_ids == out[0, 9:].tolist()


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("case", ["llama2-70b", "llama3"])
def test_shards(case: str, shards: int, tmp_path: Path) -> None:
    params, config, _, embedding = CASES[case]
    reference = write(tmp_path / "twin", TWIN | config)
    write_meta(tmp_path / "meta", PARAMS | params, meta_tensors(reference), shards, embedding)
    check_twins(tmp_path / "meta", tmp_path / "twin", reference)


@pytest.mark.parametrize("case", CASES)
def test_params_json(case: str, tmp_path: Path) -> None:
    params, config, context, embedding = CASES[case]
    reference = write(tmp_path / "twin", TWIN | config)
    write_meta(tmp_path / "meta", PARAMS | params, meta_tensors(reference), 1, embedding)
    check_twins(tmp_path / "meta", tmp_path / "twin", reference)
    model = pyllama.load(tmp_path / "meta", device="cpu")
    assert model.config.max_positions == context
    assert model.config.norm_eps == 1e-5
    with pytest.raises(ValueError, match=r"is text.*put the tokenizer.json of the same model in Hugging Face's layout"):
        pyllama.generate(model, "text")


@pytest.mark.parametrize(
    ("published", "size"),
    [
        ({"dim": 4096, "multiple_of": 256}, 11008),  # Llama 2 7B
        ({"dim": 5120, "multiple_of": 256}, 13824),
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
        ({"dim": 8192, "multiple_of": 256}, 22016),  # CodeLlama 34B's head size, Llama 1 65B's feed-forward
        ({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),  # Llama 3 8B
        ({"dim": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5}, 8192),  # Llama 3.2 1B
        ({"dim": 3072, "multiple_of": 256, "ffn_dim_multiplier": 1.0}, 8192),
        ({"dim": 16384, "multiple_of": 4096, "ffn_dim_multiplier": 1.2}, 53248),  # Llama 3.1 405B
    ],
)
def test_the_feed_forward_of_published_models(published: dict[str, Any], size: int) -> None:
    params = {"n_layers": 2, "n_heads": 32, "norm_eps": 1e-5, "vocab_size": 32000} | published
    assert read_config(params)[0].layers[0].ffn == MLPConfig(size)


@pytest.mark.parametrize(("dim", "factor"), [(2048, 32.0), (3072, 32.0), (4096, 8.0), (8192, 8.0)])
def test_the_scaling_of_llama_31_and_32(dim: int, factor: float) -> None:
    params = {"dim": dim, "n_layers": 2, "n_heads": 32, "vocab_size": 128256}
    config, _ = read_config(params | {"rope_theta": 500_000.0, "use_scaled_rope": True})
    attention = config.layers[0].attention
    assert isinstance(attention, GQAConfig)
    assert attention.rope is not None
    assert attention.rope.scaling == Llama3Scaling(factor, 1.0, 4.0, 8192)
    assert config.tie_embeddings == (factor == 32.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_chunk_size": 448}, r"params.json has keys that are not known .*: vision_chunk_size = 448"),
        ({"quantization_args": {"group_size": 32}}, "quantization_args"),
        ({"rope_scaling_factor": 8.0}, "rope_scaling_factor"),  # without use_scaled_rope
        ({"n_heads": 8, "n_kv_heads": 3}, "params.json: n_kv_heads = 3: n_heads = 8 is not a multiple of it"),
        ({"n_heads": 7}, "params.json: n_heads = 7: dim = 64 gives no even head size"),
        ({"n_layers": "2"}, "params.json: n_layers must be a positive integer, got '2'"),
        ({"norm_eps": 0}, "params.json: norm_eps must be a positive number"),
        ({"vocab_size": -2}, "params.json: vocab_size must be a positive integer, got -2"),
        ({"use_scaled_rope": 1}, "use_scaled_rope must be true or false"),
    ],
)
def test_what_params_json_may_not_say(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": VOCAB} | changes))
    with pytest.raises(ConfigError, match=f"{tmp_path}: .*{message}"):
        pyllama.load(tmp_path)


def test_other_weights_than_params_json_says(tmp_path: Path) -> None:
    reference = write(tmp_path / "twin", TWIN)
    tensors = meta_tensors(reference)
    write_meta(tmp_path / "meta", PARAMS | {"vocab_size": -1, "n_layers": 3}, tensors, 1, 1)
    with pytest.raises(CheckpointError, match=r"9 missing: layers.2.attention.wk.weight"):
        pyllama.load(tmp_path / "meta")
    del tensors["tok_embeddings.weight"]
    write_meta(tmp_path / "headless", PARAMS | {"vocab_size": -1}, tensors, 1, 1)
    with pytest.raises(ConfigError, match=r"vocab_size must be a positive integer, got -1"):
        pyllama.load(tmp_path / "headless")


def test_config_json_goes_first(tmp_path: Path) -> None:
    """Repositories of both layouts have params.json beside config.json, or deeper."""
    write(tmp_path, TWIN)
    (tmp_path / "params.json").write_text("{}")
    assert pyllama.load(tmp_path, device="cpu").config.vocab_size == VOCAB
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"params.json: architectures = None is not known"):
        pyllama.load(tmp_path)


@pytest.mark.parametrize(
    ("params", "config"),
    [
        ({"sliding_window": 9}, {"sliding_window": 9}),
        ({"rope_theta": 1e6}, {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        (
            {"moe": {"num_experts": 3, "num_experts_per_tok": 2}},
            {
                "model_type": "mixtral",
                "num_local_experts": 3,
                "num_experts_per_tok": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            },
        ),
    ],
    ids=["window", "theta", "mixtral"],
)
def test_mistrals_own_files(params: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    config = (
        TWIN | {"model_type": "mistral", "head_dim": 12, "intermediate_size": 40, "num_key_value_heads": 2} | config
    )
    reference = write(tmp_path / "twin", config)
    names = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.": ""}
    names |= {theirs: ours for ours, (theirs, _) in LAYER.items()}
    names |= {"mlp.gate.": "feed_forward.gate.", "block_sparse_moe": "feed_forward"}
    tensors = {}
    for name, tensor in load_file(tmp_path / "twin" / "model.safetensors").items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        heads = {"wq": 8, "wk": 2}.get(name.split(".")[-2])
        tensors[name] = in_pairs(tensor, heads) if heads else tensor
    own = tmp_path / "own"
    own.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, own / "consolidated.safetensors")
    values = {"dim": 64, "n_layers": 2, "head_dim": 12, "hidden_dim": 40, "n_heads": 8, "n_kv_heads": 2}
    (own / "params.json").write_text(json.dumps(values | {"norm_eps": 1e-5, "vocab_size": VOCAB} | params))
    check_twins(own, tmp_path / "twin", reference)
