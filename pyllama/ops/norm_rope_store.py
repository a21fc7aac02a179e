"""What stands between the QKV product and paged attention, in one op.

T tokens, H query heads, G key/value heads, K head size, P cache pages, S page size, R rotated dimensions.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pyllama.ops.registry import cast, compute_dtype, nothing, op
from pyllama.ops.rms_norm import normalised
from pyllama.ops.rope import rotated


@op(
    "(Tensor(a!) qkv, Tensor(b!) kv_cache, Tensor positions, Tensor slots, Tensor? cos_sin=None, "
    "Tensor? q_weight=None, Tensor? k_weight=None, float eps=1e-6, bool interleaved=False) -> ()",
    fake=nothing,
    qkv="T features",
    kv_cache="P 2 G S K",
    positions="int32: T",
    slots="int32: T",
    cos_sin="float32: max_positions R",
    q_weight="K",
    k_weight="K",
)
def norm_rope_store_(
    qkv: Tensor,
    kv_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> None:
    """Normalise and rotate queries and keys, and write keys and values into the paged cache.

    qkv: [T, (H + 2G) K], queries, keys, values; afterwards its query part is normalised (RMSNorm over each head, if
    q_weight) and rotated (if cos_sin, see `rope`), its key and value parts are undefined. kv_cache: [P, 2, G, S, K]
    receives the keys, treated alike with k_weight, and the values. slots: int32 [T], page * S + place in the page;
    -1: the token is not stored (padding). positions: int32 [T]. Computed in float32 or wider, rounded once.
    For inference: raises RuntimeError where a gradient would be due, ValueError for shapes that do not fit.
    """
    turn_and_store(
        "norm_rope_store_", qkv, kv_cache, positions, slots.tolist(), cos_sin, q_weight, k_weight, eps, interleaved
    )


def turn_and_store(
    op: str,
    qkv: Tensor,
    kv_cache: Tensor,
    positions: Tensor,
    slots: list[int],
    cos_sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
) -> int:
    """`norm_rope_store_` as a plain function, for other ops' bodies: named `op` in errors; returns H."""
    _, _, G, S, K = kv_cache.shape
    T, features = qkv.shape
    H = features // K - 2 * G
    if features % K or H <= 0 or H % G:
        raise ValueError(
            f"{op}: qkv has {features} features, but must have (H + 2G) K with G = {G}, K = {K} as in "
            "kv_cache and H a multiple of G"
        )
    compute = compute_dtype(qkv)
    heads_THK = qkv.view(T, H + 2 * G, K)
    qk_THK = heads_THK[:, : H + G]
    out = cast(qk_THK, compute)
    if q_weight is not None or k_weight is not None:
        q, k = out[:, :H], out[:, H:]
        if q_weight is not None:
            q = normalised(q, q_weight, eps)
        if k_weight is not None:
            k = normalised(k, k_weight, eps)
        out = torch.cat((q, k), dim=1)
    if cos_sin is not None:
        out = rotated(out, cos_sin, positions, interleaved)
    if out is not qk_THK:
        qk_THK.copy_(out)
    kv_2GTK = heads_THK[:, H:].view(T, 2, G, K).permute(1, 2, 0, 3)
    for first, count, page, place in runs(slots, S):
        kv_cache[page, :, :, place : place + count] = kv_2GTK[:, :, first : first + count]
    return H


def runs(slots: list[int], S: int) -> Iterator[tuple[int, int, int, int]]:
    """Stretches of tokens that go to consecutive places of one page: first token, count, page, first place."""
    first = 0
    for t in range(1, len(slots) + 1):
        if t == len(slots) or slots[t] != slots[t - 1] + 1 or slots[t] % S == 0:
            if slots[first] >= 0:
                yield first, t - first, slots[first] // S, slots[first] % S
            first = t
