"""What families with mixtures of experts share: which layers have one, how groups are read, the usual tensor names."""

from __future__ import annotations

from pyllama.architectures.reader import Reader
from pyllama.config import FFNConfig, MLPConfig, MoEConfig
from pyllama.weights import Rule


def read_sparse_layers(reader: Reader, moe: MoEConfig, dense: MLPConfig, layers: int) -> list[FFNConfig]:
    """Every `decoder_sparse_step`-th layer is a mixture, but for `mlp_only_layers` (Qwen's rule)."""
    step = reader.integer("decoder_sparse_step", default=1)
    without = reader.integers("mlp_only_layers", least=0, default=[])
    return [dense if i in without or (i + 1) % step else moe for i in range(layers)]


def read_dense_first(reader: Reader, moe: MoEConfig, dense: MLPConfig, layers: int, default: int) -> list[FFNConfig]:
    """The first `first_k_dense_replace` layers are dense (DeepSeek's rule); `default` is transformers'."""
    first = reader.integer("first_k_dense_replace", default=default, zero=True)
    return [dense if i < first else moe for i in range(layers)]


def read_groups(
    reader: Reader, experts: int, top_k: int, *, least: int = 1, defaults: tuple[int, int] = (1, 1)
) -> tuple[int, int]:
    """(groups of experts, groups that a token may choose from); a group has `least` experts at least."""
    groups, chosen = (
        reader.integer(key, default=default, null=1)
        for key, default in zip(("n_group", "topk_group"), defaults, strict=True)
    )
    if experts % groups or experts // groups < least:
        raise reader.refusal("n_group", f"{experts} experts cannot form so many groups of {least} or more")
    if chosen > groups:
        raise reader.refusal("topk_group", f"there are only {groups} groups")
    if top_k > chosen * (experts // groups):
        raise reader.refusal(
            "num_experts_per_tok", f"{chosen} groups of {experts // groups} experts have not that many"
        )
    return groups, chosen


EXPERTS = (
    Rule("layers.{i}.ffn.router.weight", ("model.layers.{i}.mlp.gate.weight",), None),
    Rule("layers.{i}.ffn.correction_bias", ("model.layers.{i}.mlp.gate.e_score_correction_bias",), None),
    Rule(
        "layers.{i}.ffn.gate_up",
        ("model.layers.{i}.mlp.experts.{e}.gate_proj.weight", "model.layers.{i}.mlp.experts.{e}.up_proj.weight"),
        1,
    ),
    Rule("layers.{i}.ffn.down", ("model.layers.{i}.mlp.experts.{e}.down_proj.weight",), 2),
)


def shared_expert(name: str) -> tuple[Rule, ...]:
    """The expert that every token passes through; some families write its name in the plural."""
    prefix = f"model.layers.{{i}}.mlp.{name}"
    return (
        Rule("layers.{i}.ffn.shared.gate_up.weight", (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"), 0),
        Rule("layers.{i}.ffn.shared.gate_up.bias", (f"{prefix}.gate_proj.bias", f"{prefix}.up_proj.bias"), 0),
        Rule("layers.{i}.ffn.shared.down.weight", (f"{prefix}.down_proj.weight",), 1),
        Rule("layers.{i}.ffn.shared.down.bias", (f"{prefix}.down_proj.bias",), None),
        Rule("layers.{i}.ffn.shared_gate.weight", (f"{prefix}_gate.weight",), None),
    )
