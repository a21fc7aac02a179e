"""What stands between latent attention's products and the attention itself (DeepSeek-V2, arXiv:2405.04434).

T tokens, H query heads, K query head size, P cache pages, S page size, R rotated dimensions, L latent entry
(rank + R).
"""

import torch
from torch import Tensor

from pyllama.ops.norm_rope_store import runs
from pyllama.ops.registry import cast, compute_dtype, nothing, op
from pyllama.ops.rms_norm import normalised
from pyllama.ops.rope import rotated


@op(
    "(Tensor(a!) q, Tensor latent, Tensor(b!) kv_cache, Tensor weight, Tensor positions, Tensor slots, "
    "Tensor cos_sin, float eps=1e-6, bool interleaved=False) -> ()",
    fake=nothing,
    q="T H K",
    latent="T L",
    kv_cache="P S L",
    weight="rank",
    positions="int32: T",
    slots="int32: T",
    cos_sin="float32: max_positions R",
)
def mla_rope_store_(
    q: Tensor,
    latent: Tensor,
    kv_cache: Tensor,
    weight: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> None:
    """Rotate the queries, and write the normalised latent and the rotated key into the paged cache.

    q: [T, H, K], afterwards the last R dimensions of each head are rotated (see `rope`). latent: [T, rank + R], the
    latent and the key that all heads share; unchanged. kv_cache: [P, S, rank + R] receives the latent after RMSNorm
    with weight [rank], and the rotated key. slots: int32 [T], page * S + place in the page; -1: the token is not
    stored. positions: int32 [T]. Computed in float32 or wider, rounded once. For inference: raises RuntimeError where
    a gradient would be due, ValueError for shapes that do not fit.
    """
    S, L = kv_cache.shape[1:]
    R, rank = cos_sin.shape[1], weight.shape[0]
    if rank + R != L or q.shape[2] < R:
        raise ValueError(
            f"mla_rope_store_: weight has rank = {rank} and cos_sin R = {R}, but they must add up to L = {L}, the size "
            f"of an entry of kv_cache, and R must be at most q's K = {q.shape[2]}"
        )
    q[..., -R:] = rotated(q[..., -R:], cos_sin, positions, interleaved)
    wide_TL = cast(latent, compute_dtype(latent))
    key_T1R = rotated(wide_TL[:, None, rank:], cos_sin, positions, interleaved)
    entry_TL = torch.cat((normalised(wide_TL[:, :rank], weight, eps), key_T1R[:, 0]), dim=1)
    for first, count, page, place in runs(slots.tolist(), S):
        kv_cache[page, place : place + count] = entry_TL[first : first + count]
