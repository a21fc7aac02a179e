"""A step of decoding between the QKV product and the output product.

B sequences, H query heads, G key/value heads, K head size, P cache pages, S page size, R rotated dimensions.
"""

from torch import Tensor

from pyllama.ops.attention import check_window
from pyllama.ops.checks import cached_lengths
from pyllama.ops.norm_rope_store import turn_and_store
from pyllama.ops.paged_attention import attend_pages
from pyllama.ops.registry import nothing, op


@op(
    "(Tensor(a!) qkv, Tensor(b!) kv_cache, Tensor block_table, Tensor seq_lens, Tensor positions, "
    "Tensor? cos_sin=None, Tensor? q_weight=None, Tensor? k_weight=None, float eps=1e-6, bool interleaved=False, "
    "int? window=None, Tensor? counters=None) -> ()",
    fake=nothing,
    qkv="B features",
    kv_cache="P 2 G S K",
    block_table="int32: B max_pages",
    seq_lens="int32: B",
    positions="int32: B",
    cos_sin="float32: max_positions R",
    q_weight="K",
    k_weight="K",
    counters="int32: C",
)
def decode_attention_(
    qkv: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor,
    cos_sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    window: int | None = None,
    counters: Tensor | None = None,
) -> None:
    """`norm_rope_store_` and `paged_attention` of each sequence's one new token; the result takes the queries' place.

    qkv: [B, (H + 2G) K], queries, keys, values; afterwards its first H K columns are attention's result, the others
    are undefined. kv_cache: [P, 2, G, S, K]; block_table: int32 [B, max_pages]; seq_lens: int32 [B], the new token
    included, whose key and value go to the sequence's last place; 0: nothing is stored, and the result is 0. positions:
    int32 [B], the new token's row of cos_sin; the other arguments are those of the two ops. The kernel takes head sizes
    up to 128 and up to 16 queries of a key (float32: any). counters: int32, B G at least, zeros that are zeros again at
    the end; None makes them, at the cost of another launch. For inference: raises RuntimeError where a gradient would
    be due, ValueError for shapes or lengths that do not fit.
    """
    S, K = kv_cache.shape[3:]
    lengths = cached_lengths("decode_attention_", seq_lens, block_table.shape[1], S)
    check_window("decode_attention_", window)
    pages = block_table.tolist()
    slots = [row[(n - 1) // S] * S + (n - 1) % S if n else -1 for row, n in zip(pages, lengths, strict=True)]
    H = turn_and_store(
        "decode_attention_", qkv, kv_cache, positions, slots, cos_sin, q_weight, k_weight, eps, interleaved
    )
    q_BHK = qkv[:, : H * K].unflatten(1, (H, K))
    q_BHK.copy_(attend_pages(q_BHK, kv_cache, block_table, [1] * len(lengths), lengths, K**-0.5, window))
