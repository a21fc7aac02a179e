"""pyllama's attention and experts in transformers' own models.

    from pyllama.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(
        "...", attn_implementation="pyllama", experts_implementation="pyllama"
    )

Training (Trainer, PEFT, DeepSpeed) and `generate` stay transformers'; its layers call pyllama's ops, which have
gradients. What these do not compute, such as dropout, sinks or other masks, raises ValueError with the way out;
AttributeError where a model asks its mask for what only tensors have.

B rows of a batch, n queries and m keys in each, H query heads, G key/value heads, K head size, V value head size;
T tokens, N experts per token, E experts, D hidden size, F feed-forward size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pyllama.ops.attention import attention
from pyllama.ops.grouped_linear import grouped_linear
from pyllama.ops.grouped_swiglu import grouped_swiglu
from pyllama.ops.moe_combine import moe_combine
from pyllama.ops.moe_dispatch import moe_dispatch
from pyllama.ops.registry import cast, compute_dtype

try:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils, modeling_utils
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import ExpertsInterface

    if not hasattr(modeling_utils, "ALL_EXPERTS_FUNCTIONS"):
        raise ImportError("the one installed takes no experts but its own")
except ImportError as error:
    raise ImportError(
        f"pyllama.integrations.transformers needs transformers 5.7 or newer ({error}): pip install -U transformers"
    ) from error

NAME = "pyllama"

# What attention functions may be given that changes the result: name -> what it is.
REFUSED = {
    "softcap": "a cap on scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias by position",
    "head_mask": "a mask of heads",
    "indices": "a choice of keys for each query",
    "block_indices": "a choice of keys for each query",
    "cache": "the paged cache of continuous batching",
    "output_attentions": "the attention weights as a result",
}

# The functions that transformers builds masks of and that `Sequences` can say: causal, a window, packed sequences.
UNDERSTOOD = {
    "causal_mask_function",
    "and_masks",
    "sliding_window_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
}

READ = "a model that reads its attention mask", 'attn_implementation="eager"'

# What an experts module must be.
LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
    "_is_expert_parallel": False,
}


def register() -> None:
    """Offers attention and experts to transformers under the name "pyllama"; a second call changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sequences_of)
    ExpertsInterface.register(NAME, experts_forward)


@dataclass(eq=False)
class Sequences:
    """Which of a batch's rows, laid end to end, are a sequence: what layers get as their mask, made once a forward.

    Padding, and the part of a static cache that is not filled, are sequences of their own. So nothing else sees them,
    their results are finite, and all shapes follow from the batch's. What models do to masks of numbers is refused.
    """

    shape: tuple[int, int, int]  # B, n, m
    window: int | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    order_q: Tensor | None = None  # [B * n], the queries' rows with each batch row's padding moved to its end
    order_k: Tensor | None = None  # [B * m], the keys' likewise

    ndim = 4  # transformers looks here for masks of padding (2), and passes others on

    def contiguous(self) -> Sequences:
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Sequences:
        """On another device, for layers there."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()}
        return replace(self, **moved)

    def __getitem__(self, index: object) -> NoReturn:
        raise _refusal(*READ)

    def __add__(self, other: object) -> NoReturn:
        raise _refusal(*READ)

    __radd__ = __add__

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(str(_refusal(*READ)))  # so that hasattr says no


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sequences | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers calls it.

    query: [B, H, n, K]; key: [B, G, m, K]; value: [B, G, m, V]; attention_mask: what `sequences_of` made, or None where
    each row is one sequence; sliding_window counts in that case only; cu_seq_lens_q and cu_seq_lens_k: the sequences of
    a packed batch, laid end to end. Result: [B, n, H, V], and no weights. Raises ValueError for what is not computed.
    """
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise _refusal(f"{name} ({what})", 'attn_implementation="eager"')
    if dropout:
        raise _refusal(f"dropout ({dropout})", "attention_dropout=0 in the model's config")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _refusal("attention that is not causal", 'attn_implementation="sdpa" for this module')

    B, H, n, _ = query.shape
    m = key.shape[2]
    if attention_mask is None:
        sequences = _whole(B, n, m, sliding_window, query.device)
    elif isinstance(attention_mask, Sequences):
        sequences = attention_mask
    else:
        wrong = f"an attention_mask of shape {list(attention_mask.shape)}"
        raise _refusal(wrong, 'a mask of padding, [batch, tokens], or attn_implementation="sdpa"')
    if sequences.window is not None and sequences.window < 1:  # Qwen2-MoE makes such a mask, but for no layer
        raise _refusal(f"a sliding_window of {sequences.window}", "sliding_window=None in the model's config")
    if sequences.shape != (B, n, m):
        raise ValueError(
            f"pyllama's attention: the mask is for {sequences.shape[0]} rows of {sequences.shape[1]} queries and "
            f"{sequences.shape[2]} keys, but query and key have {B} rows of {n} and {m}"
        )
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        sequences = _packed(sequences, cu_seq_lens_q, cu_seq_lens_k)

    q, k, v = _as_autocast(query, key, value)
    out = attention(
        _rows(q, sequences.order_q),
        _rows(k, sequences.order_k),
        _rows(v, sequences.order_k),
        sequences.cu_seqlens_q,
        sequences.cu_seqlens_k,
        *sequences.shape[1:],  # at least the longest sequence's queries and keys
        scaling,
        sequences.window,
    )
    if sequences.order_q is not None:
        out = out.index_select(0, _inverse(sequences.order_q))
    return out.view(B, n, H, -1), None


def sequences_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | Sequences | None = None,
    device: torch.device | str = "cpu",
    **kwargs: object,
) -> Sequences:
    """The mask, as transformers asks for it: `mask_function` over the places of queries and keys, less padding.

    q_offset, kv_offset: the first query's and the first key's place; attention_mask: [B, places], False for padding, or
    what this function returned. A row is packed where transformers says so, as to sdpa: at steps other than 1 in
    position_ids, if there is neither a cache nor a mask of padding. Raises ValueError for what is neither causal,
    within a window, nor packed, and for padding between tokens under a window, which would count it.
    """
    if isinstance(attention_mask, Sequences):  # made ahead, by `generate`
        return attention_mask
    return _sequences(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, torch.device(device)
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it takes functions apart, and reads values
def _sequences(
    B: int,
    n: int,
    m: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    device: torch.device,
) -> Sequences:
    parts = _parts(mask_function)
    if "causal_mask_function" not in parts or not parts.keys() <= UNDERSTOOD:
        raise _refusal(f"a mask made of {', '.join(parts)}", 'attn_implementation="sdpa"')
    window = parts.get("sliding_window_overlay", {}).get("sliding_window")
    whole = _whole(B, n, m, window, device)
    if "packed_sequence_mask_function" in parts:  # and then there is no padding
        return _split(whole, parts["packed_sequence_mask_function"]["packed_sequence_mask"].diff() != 0)

    filled = q_offset + n - kv_offset  # keys; those behind are places of a static cache, whose length is a tensor
    partial = isinstance(filled, Tensor) or filled < m
    if attention_mask is None:
        if not partial:
            return whole
        tokens_B = torch.as_tensor(filled, device=device).expand(B)
        bounds_q, bounds_k = _bounds(torch.full_like(tokens_B, n), n), _bounds(tokens_B, m)
        return replace(whole, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k)
    token_Bm = nn.functional.pad(attention_mask, (0, max(kv_offset + m - attention_mask.shape[1], 0)))
    token_Bm = token_Bm[:, kv_offset : kv_offset + m]
    if partial:
        token_Bm = token_Bm & (torch.arange(m, device=device) < filled)
    elif token_Bm.all():
        return whole
    rises_B = token_Bm[:, 0] + (token_Bm.int().diff(dim=1) > 0).sum(1)
    if window is not None and 0 < window < m and rises_B.max() > 1:
        raise _refusal("a window over padding between tokens", 'attn_implementation="sdpa"')
    token_Bn = token_Bm.index_select(1, torch.arange(n, device=device) + (filled - n))
    return replace(
        whole,
        cu_seqlens_q=_bounds(token_Bn.sum(1), n),
        cu_seqlens_k=_bounds(token_Bm.sum(1), m),
        order_q=_tokens_first(token_Bn),
        order_k=_tokens_first(token_Bm),
    )


def _parts(function: Callable[..., Any]) -> dict[str, Mapping[str, Any]]:
    """The functions that a mask function is made of, by the names of those that made them, with what they hold."""
    name = getattr(function, "__qualname__", repr(function)).split(".")[0]
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return {f"the function {name}": {}}
    held = inspect.getclosurevars(function).nonlocals
    parts: dict[str, Mapping[str, Any]] = {name: held}
    for value in held.values():
        for inner in value if isinstance(value, tuple) else (value,):
            if callable(inner):
                parts |= _parts(inner)
    return parts


def _whole(B: int, n: int, m: int, window: int | None, device: torch.device) -> Sequences:
    starts = torch.arange(B + 1, dtype=torch.int32, device=device)
    return Sequences((B, n, m), window, starts * n, starts * m)


def _bounds(tokens_B: Tensor, length: int) -> Tensor:
    """The bounds of two sequences in each row of `length`: its tokens, and the rest."""
    lengths = torch.stack([tokens_B, length - tokens_B], dim=1).flatten()
    return nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _tokens_first(token_Bn: Tensor) -> Tensor:
    """Places of all rows laid end to end, where each row's tokens come before its padding."""
    B, n = token_Bn.shape
    order_Bn = (~token_Bn).int().argsort(dim=1, stable=True)
    return (order_Bn + n * torch.arange(B, device=order_Bn.device)[:, None]).flatten()


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _packed(sequences: Sequences, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> Sequences:
    """The sequences that a collator counted, over all rows."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError("pyllama's attention in transformers: cu_seq_lens_q and cu_seq_lens_k must come together")
    if sequences.order_q is not None:
        raise _refusal("a batch both packed and padded", "either cu_seq_lens or an attention_mask")
    B, n, m = sequences.shape
    bounds_q, bounds_k = cast(cu_seqlens_q, torch.int32), cast(cu_seqlens_k, torch.int32)
    return replace(sequences, shape=(1, B * n, B * m), cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k)


def _split(sequences: Sequences, starts_Bn: Tensor) -> Sequences:
    """The sequences with more starts, of which each row's place 0 is not one."""
    B, n, _ = sequences.shape
    starts = nn.functional.pad(starts_Bn, (1, 0), value=True).expand(B, -1).flatten().nonzero().flatten()
    cu_seqlens = nn.functional.pad(starts, (0, 1), value=B * n).int()
    return replace(sequences, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)


def _rows(x_BHnK: Tensor, order: Tensor | None) -> Tensor:
    """Tokens laid end to end, [B * n, H, K]."""
    x_THK = x_BHnK.transpose(1, 2).flatten(0, 1)
    return x_THK if order is None else x_THK.index_select(0, order)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """One layer's experts, as transformers calls them.

    module: its gate_up_proj is [E, 2F, D], each expert's gate, then its up part, and its down_proj [E, D, F];
    hidden_states: [T, D]; top_k_index, top_k_weights: [T, N]; result: [T, D]. Raises ValueError for experts of another
    kind.
    """
    kind, way_out = type(module).__name__, 'experts_implementation="grouped_mm"'
    for name, wanted in LAYOUT.items():
        if (found := getattr(module, name, wanted)) != wanted:
            raise _refusal(f"{kind} with {name} = {found}", way_out, "experts")
    gate = type(module)._apply_gate
    if gate.__module__ != ExpertsInterface.__module__:
        raise _refusal(f"{kind} with a gate of its own, {gate.__qualname__},", way_out, "experts")
    act = getattr(module, "act_fn", None)
    if not isinstance(act, (nn.SiLU, SiLUActivation)):
        raise _refusal(f"{kind} with the activation {type(act).__name__}", way_out, "experts")

    x_TD, gate_up_EFD, down_EDF = _as_autocast(hidden_states, module.gate_up_proj, module.down_proj)
    rows, offsets, positions_TN = moe_dispatch(cast(top_k_index, torch.int32), module.num_experts)
    hidden = grouped_swiglu(x_TD, gate_up_EFD, offsets, rows)
    weights_TN = cast(top_k_weights, compute_dtype(top_k_weights))  # what the kernel reads
    return cast(moe_combine(grouped_linear(hidden, down_EDF, offsets), positions_TN, weights_TN), hidden_states.dtype)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type that autocast, where it is on, has products computed in."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor if tensor.dtype is torch.float64 else cast(tensor, dtype) for tensor in tensors)


def _refusal(what: str, way_out: str, who: str = "attention") -> ValueError:
    return ValueError(f"pyllama's {who} in transformers: {what} is not supported; use {way_out}")
