"""What stands between the QKV product and paged attention, in one op.

T tokens, H query heads, G key/value heads, K head size, P cache pages, S page size, R rotated dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllama.ops.registry import op
from pyllama.ops.rope import rotated


def _nothing(*args: object) -> None:
    """The fake: the op returns nothing."""


@op(
    "(Tensor(a!) qkv, Tensor(b!) kv_cache, Tensor positions, Tensor slots, Tensor? cos_sin=None, "
    "Tensor? q_weight=None, Tensor? k_weight=None, float eps=1e-6, bool interleaved=False) -> ()",
    fake=_nothing,
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
    _, _, G, S, K = kv_cache.shape
    T, features = qkv.shape
    H = features // K - 2 * G
    if features % K or H <= 0 or H % G:
        raise ValueError(
            f"norm_rope_store_: qkv has {features} features, but must have (H + 2G) K with G = {G}, K = {K} as in "
            "kv_cache and H a multiple of G"
        )
    compute = torch.promote_types(qkv.dtype, torch.float32)
    heads_THK = qkv.view(T, H + 2 * G, K)
    qk_THK = heads_THK[:, : H + G]
    out = qk_THK.to(compute)
    if q_weight is not None or k_weight is not None:
        q, k = out[:, :H], out[:, H:]
        if q_weight is not None:
            q = F.rms_norm(q, (K,), q_weight.to(compute), eps)
        if k_weight is not None:
            k = F.rms_norm(k, (K,), k_weight.to(compute), eps)
        out = torch.cat((q, k), dim=1)
    if cos_sin is not None:
        out = rotated(out, cos_sin, positions, interleaved)
    if out is not qk_THK:
        qk_THK.copy_(out)
    kv_T2GK = heads_THK[:, H:].unflatten(1, (2, G))
    places = slots.tolist()
    if -1 in places:
        kept = torch.tensor([t for t, slot in enumerate(places) if slot >= 0], dtype=torch.int64, device=qkv.device)
        kv_T2GK, slots = kv_T2GK[kept], slots[kept]
    kv_cache.permute(0, 3, 1, 2, 4)[slots // S, slots % S] = kv_T2GK
