"""attention: one causal sequence in prefill, beside every back end of torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.shapes import Scope
from pyllama.ops.attention import attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
LAST = 16  # queries whose results are compared


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        V = model.V_head or model.K
        sizes = f"{model.K}" if model.K == V else f"{model.K} and {V}"
        for T in scope.prompts:
            what = f"prefill {T}, {model.H}/{model.G} heads of {sizes}"
            yield Case(name, what, {"T": T, "H": model.H, "G": model.G, "K": model.K, "V": V})


def inputs(dtype: torch.dtype, T: int, H: int, G: int, K: int, V: int) -> tuple[Any, ...]:
    q, k, v = (torch.randn(T, heads, size, dtype=dtype) for heads, size in ((H, K), (G, K), (G, V)))
    return q, k, v, torch.tensor([0, T], dtype=torch.int32)


def work(dtype: torch.dtype, T: int, H: int, G: int, K: int, V: int) -> Work:
    return Work(moved=T * (H + G) * (K + V) * dtype.itemsize, flops=causal_flops(T, T, H, K, V), limit="product")


def causal_flops(n: int, m: int, H: int, K: int, V: int) -> int:
    """Of each query with the keys that it sees, n queries at the end of m keys: products of size K and V."""
    pairs = n * (m - n) + n * (n + 1) // 2
    return 2 * H * (K + V) * pairs


def explicit(q_BnHK: Tensor, k_BGmK: Tensor, v_BGmV: Tensor) -> Tensor:
    """Causal attention as its formula, aligned at the end of the keys; softmax in float32 or wider. [B, n, H, V]."""
    B, n, H, K = q_BnHK.shape
    G, m = k_BGmK.shape[1:3]
    q_BGrnK = q_BnHK.view(B, n, G, H // G, K).permute(0, 2, 3, 1, 4)
    scores_BGxm = (q_BGrnK.reshape(B, G, -1, K) @ k_BGmK.mT) * K**-0.5
    if n > 1:
        positions = torch.arange(m, device=q_BnHK.device)
        unseen_nm = positions[m - n :, None] < positions
        scores_BGxm = scores_BGxm.unflatten(2, (-1, n)).masked_fill(unseen_nm, float("-inf")).flatten(2, 3)
    wide = torch.promote_types(q_BnHK.dtype, torch.float32)
    out_BGxV = scores_BGxm.to(wide).softmax(-1).to(q_BnHK.dtype) @ v_BGmV
    return out_BGxV.view(B, G, H // G, n, -1).permute(0, 3, 1, 2, 4).reshape(B, n, H, -1)


def formula(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    return explicit(q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None])[0]


def reference(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    return formula(q[-LAST:].double(), k.double(), v.double(), bounds)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def backend(chosen: SDPBackend, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with one back end of scaled_dot_product_attention; raises where that does not serve."""

    def run(*args: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return function(*args)

    return run


BENCH = Bench(
    op="attention",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=lambda q, k, v, bounds: attention(q, k, v, bounds, bounds, len(q), len(k)),
    formula=formula,
    torch=sdpa,
    peers={name: backend(chosen, sdpa) for name, chosen in BACKENDS.items()}
    | {
        "flashinfer": Peer(
            "flashinfer:single_prefill_with_kv_cache", lambda prefill, q, k, v, bounds: prefill(q, k, v, causal=True)
        )
    },
    reference=reference,
    gradients=(0, 1, 2),
)
