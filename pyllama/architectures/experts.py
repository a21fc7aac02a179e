"""What families with mixtures of experts share: how many there are, which layers have them, the usual names."""

from __future__ import annotations

from pyllama.architectures.reader import REQUIRED, Reader
from pyllama.config import FFNConfig, MLPConfig, MoEConfig
from pyllama.weights import Rule


def read_experts(reader: Reader, key: str, *, experts: int = REQUIRED, top_k: int = REQUIRED) -> tuple[int, int]:
    """(experts, experts per token); `key` has the number of experts, the others are transformers' defaults."""
    experts = reader.integer(key, default=experts)
    top_k = reader.integer("num_experts_per_tok", default=top_k)
    if top_k > experts:
        raise reader.refusal("num_experts_per_tok", f"there are only {experts} experts")
    return experts, top_k


def read_softmax_experts(
    reader: Reader,
    key: str,
    *,
    experts: int = REQUIRED,
    top_k: int = REQUIRED,
    size: str = "moe_intermediate_size",
    renormalize: bool = False,
    aux_loss_coef: float = 0.001,
) -> MoEConfig:
    """Experts chosen by softmax; `key` has their number, `size` their size, the others are transformers' defaults."""
    experts, top_k = read_experts(reader, key, experts=experts, top_k=top_k)
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        size=reader.integer(size),
        renormalize=reader.boolean("norm_topk_prob", default=renormalize),
        aux_loss_coef=reader.number("router_aux_loss_coef", default=aux_loss_coef, zero=True),
    )


def read_sparse_layers(reader: Reader, layers: int, mlp: MLPConfig, moe: MoEConfig) -> list[FFNConfig]:
    """Every `decoder_sparse_step`-th layer has experts, but for `mlp_only_layers` (Qwen's rule)."""
    step = reader.integer("decoder_sparse_step", default=1)
    without = set(reader.integers("mlp_only_layers", least=0, default=[]))
    return [mlp if i in without or (i + 1) % step else moe for i in range(layers)]


def read_dense_first(reader: Reader, layers: int, mlp: MLPConfig, moe: MoEConfig, *, dense: int) -> list[FFNConfig]:
    """The first layers have no experts (DeepSeek's rule); `dense` is transformers' default."""
    dense = reader.integer("first_k_dense_replace", default=dense, zero=True)
    return [mlp if i < dense else moe for i in range(layers)]


def read_groups(
    reader: Reader, experts: int, top_k: int, *, groups: int = REQUIRED, chosen: int = REQUIRED
) -> tuple[int, int]:
    """(groups of experts, how many of them a token may use); `groups` and `chosen` are transformers' defaults."""
    groups, chosen = reader.integer("n_group", default=groups), reader.integer("topk_group", default=chosen)
    if experts % groups:
        raise reader.refusal("n_group", f"n_routed_experts = {experts} is not a multiple of it")
    if chosen > groups:
        raise reader.refusal("topk_group", f"there are only n_group = {groups}")
    if top_k > experts // groups * chosen:
        raise reader.refusal("num_experts_per_tok", f"{chosen} groups have only {experts // groups * chosen} experts")
    return groups, chosen


def read_shared(reader: Reader, *, default: int, bias: bool = False) -> MLPConfig | None:
    """The shared experts, which are one of their joint size; null: none. `default` is transformers'."""
    shared = reader.integer("n_shared_experts", default=default, null=None)
    return None if shared is None else MLPConfig(shared * reader.integer("moe_intermediate_size"), bias)


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


def read_corrected_experts(reader: Reader, *, experts: int, groups: int, chosen: int, scale: float) -> MoEConfig:
    """DeepSeek-V3's experts (arXiv:2412.19437): sigmoids, a bias that corrects the choice, groups by their two best.

    Keyword arguments: transformers' defaults.
    """
    experts, top_k = read_experts(reader, "n_routed_experts", experts=experts, top_k=8)
    groups, chosen = read_groups(reader, experts, top_k, groups=groups, chosen=chosen)
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        size=reader.integer("moe_intermediate_size"),
        scoring="sigmoid",
        renormalize=reader.boolean("norm_topk_prob", default=True),
        scale=reader.number("routed_scaling_factor", default=scale),
        correction_bias=True,
        num_groups=groups,
        top_groups=chosen,
        group_top_k=min(2, experts // groups),
        float32_router=True,
        shared=read_shared(reader, default=1),
        aux_loss="sequence",  # DeepSeek-V3's, whose weight is 0 here, as in everybody's code
    )
